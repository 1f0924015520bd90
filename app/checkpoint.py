"""The only definition of what a weights file holds. Reading never runs code from the file; writing is atomic.

    format        `FORMAT`, below
    architecture  {"name": "cifar_net", "arguments": {...}}, what `model.build` needs
    state_dict    float32 tensors on the CPU, including mean and std, so that preprocessing is defined only here
    classes       the class names, in the order of the outputs
    calibration   the fields of `calibration.Calibration`
    self_test     (N, K), the probabilities of `self_test.drawings` in float32, or None
    evaluation    the fields of `report.Evaluation`, or None
    trained       where the weights come from, for people; training also reads from it which images were held out

The tutorial's own file, a bare state_dict of `Net`, is read too, even inside a dict of other things. Whatever may be
None is None then.

Shape letters: N images, K classes.
"""

import dataclasses
import hashlib
import io
import json
import math
import pickle
import warnings
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from app import model, self_test
from app.calibration import UNCALIBRATED, Calibration
from app.errors import CheckpointError
from app.files import read_regular, save_tensors
from app.model import Normalized
from app.report import Evaluation, evaluate_probabilities

FORMAT = 4
CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EXPECTED = (
    "It must be a file written by `python -m training train`, or by `torch.save(net.state_dict(), PATH)` for the "
    "tutorial's Net."
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained network and all that is needed to use it."""

    architecture: str
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]
    classes: tuple[str, ...]
    calibration: Calibration = UNCALIBRATED
    self_test_NK: Tensor | None = None
    evaluation: Evaluation | None = None
    trained: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    """Digest of the file it was read from; empty if there is none."""

    def network(self) -> Normalized:
        """The network in evaluation mode, float32, on the CPU; pixels (N, 3, 32, 32) in 0..255 in, logits (N, K) out.

        Raises:
            CheckpointError: the weights do not fit the architecture.
        """
        try:
            with torch.device("meta"):  # shapes are compared before any memory is taken
                network = model.build(self.architecture, **self.arguments)
        except (TypeError, ValueError, RuntimeError):
            raise CheckpointError(
                f"The weights file gives the network {self.architecture} arguments it does not take."
            ) from None
        expected = network.state_dict()
        for name, tensor in expected.items():
            given = self.state_dict.get(name)
            if given is None:
                raise CheckpointError(f"The weights file lacks the tensor {name} of the network {self.architecture}.")
            if given.shape != tensor.shape:
                raise CheckpointError(
                    f"In the weights file the tensor {name} has the shape {tuple(given.shape)}; "
                    f"the network {self.architecture} needs {tuple(tensor.shape)}."
                )
            if given.is_floating_point() != tensor.is_floating_point():
                raise CheckpointError(
                    f"In the weights file the tensor {name} holds {str(given.dtype).removeprefix('torch.')}; "
                    f"the network {self.architecture} needs {str(tensor.dtype).removeprefix('torch.')}."
                )
        if extra := self.state_dict.keys() - expected.keys():
            raise CheckpointError(
                f"The weights file has a tensor {min(extra)} that the network {self.architecture} does not have."
            )
        # Copies, so that training or moving the network leaves the checkpoint alone. float16 becomes float32.
        copies = {name: given.detach().to(expected[name].dtype, copy=True) for name, given in self.state_dict.items()}
        network.load_state_dict(copies, assign=True)
        return network.eval().requires_grad_(False)

    def evaluate(self, logits_NK: Tensor, labels_N: Tensor, *, dataset: str, digest: str) -> Evaluation:
        """How good this network's logits (N, K) for some images are, with its calibration and without."""
        return evaluate_probabilities(
            self.calibration.probabilities(logits_NK),
            labels_N,
            dataset=dataset,
            digest=digest,
            evaluated_at=datetime.now(UTC).isoformat(timespec="seconds"),
            uncalibrated_NK=logits_NK.softmax(dim=1),
            set_threshold=self.calibration.set_threshold,
        )


def save(checkpoint: Checkpoint, path: Path) -> str:
    """Write `checkpoint` beside `path` and rename it into place, so that nobody sees half a file.

    Returns:
        The sha256 of the file.
    """
    content = {
        "format": FORMAT,
        "architecture": {"name": checkpoint.architecture, "arguments": checkpoint.arguments},
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in checkpoint.state_dict.items()},
        "classes": list(checkpoint.classes),
        "calibration": vars(checkpoint.calibration),
        "self_test": checkpoint.self_test_NK,
        "evaluation": None if checkpoint.evaluation is None else vars(checkpoint.evaluation),
        "trained": checkpoint.trained,
    }
    return save_tensors(path, content)


def load(path: Path | str) -> Checkpoint:
    """Read a weights file.

    Raises:
        CheckpointError: it cannot be used; the sentence says what is wrong and what the file must be.
    """
    path = Path(path)
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no weights file {path}. Train one with `python -m training train`, or name an existing one; "
            "the service takes it from CIFAR_WEIGHTS."
        ) from None
    except OSError as error:
        raise CheckpointError(f"The weights file {path} cannot be read: {error.strerror}.") from None
    try:
        wrong = zipfile.ZipFile(io.BytesIO(raw)).testzip() if zipfile.is_zipfile(io.BytesIO(raw)) else None
        with warnings.catch_warnings(action="ignore"):  # torch warns of files that it then refuses
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"The weights file {path} was refused: it is not a PyTorch file, or it holds Python objects besides "
            f"tensors and plain values, which could run code when loaded. {EXPECTED}"
        ) from None
    except Exception:  # torch raises nearly anything for damaged bytes
        raise CheckpointError(
            f"The weights file {path} is not a PyTorch file of tensors (TorchScript is not accepted), or it is damaged "
            f"or cut short ({len(raw):,} bytes). {EXPECTED}"
        ) from None
    if wrong is not None:  # torch does not look
        raise CheckpointError(
            f"The weights file {path} is damaged: the checksum of its part {wrong} is wrong. Get it again; if it was "
            "saved without checksums (torch.serialization.set_crc32_options), save it with them."
        )
    try:
        checkpoint = _parse(content)
        _check(checkpoint)
        checkpoint.network()
    except CheckpointError as error:
        raise CheckpointError(f"{error} (File {path}.) {EXPECTED}") from None
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"The weights file {path} has a field of the wrong type. {EXPECTED}") from None
    return dataclasses.replace(checkpoint, sha256=hashlib.sha256(raw).hexdigest())


def _parse(content: object) -> Checkpoint:
    if not isinstance(content, dict):
        raise CheckpointError(f"The weights file holds a {type(content).__name__} where a dict belongs.")
    if "format" not in content:
        return _parse_tutorial(content)
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"The weights file has the format {content['format']!r}; this version reads format {FORMAT}."
        )
    try:
        evaluation = content["evaluation"]
        return Checkpoint(
            architecture=content["architecture"]["name"],
            arguments=content["architecture"]["arguments"],
            state_dict=content["state_dict"],
            classes=tuple(content["classes"]),
            calibration=Calibration(**content["calibration"]),
            self_test_NK=content["self_test"],
            evaluation=None if evaluation is None else Evaluation(**evaluation),
            trained=content["trained"],
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError("The weights file lacks a field of its format, or has one too many.") from None


def _parse_tutorial(content: dict[Any, Any]) -> Checkpoint:
    """The tutorial saves the bare state_dict and normalises with mean 0.5 and standard deviation 0.5 outside it.

    Others save it beside the optimizer's and the epoch. DataParallel, which the tutorial uses on several GPUs, and
    torch.compile prefix every name.
    """
    held = [each for each in content.values() if isinstance(each, dict) and any(map(torch.is_tensor, each.values()))]
    state_dict = held[0] if len(held) == 1 else content
    for prefix in ("module.", "_orig_mod.", "module."):
        consume_prefix_in_state_dict_if_present(state_dict, prefix)
    half = torch.full((3,), 0.5)
    return Checkpoint(
        architecture="net",
        arguments={"num_classes": len(CIFAR10_CLASSES)},
        state_dict={"mean": half, "std": half, **state_dict},
        classes=CIFAR10_CLASSES,
        trained={"recipe": "the tutorial's own state_dict"},
    )


def is_text(value: object) -> bool:
    """Whether it is text that an answer can hold: a folder's name that is not UTF-8 could not be sent."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _check(checkpoint: Checkpoint) -> None:
    if checkpoint.architecture not in model.NETWORKS:
        raise CheckpointError(
            f"The weights file is for a network {checkpoint.architecture!r}; there are {', '.join(model.NETWORKS)}."
        )
    if checkpoint.arguments.get("num_classes") != len(checkpoint.classes):
        raise CheckpointError("In the weights file the number of class names differs from the number of outputs.")
    if not checkpoint.classes:
        raise CheckpointError("The weights file names no class.")
    trained = checkpoint.trained
    if not isinstance(trained, dict) or not all(map(is_text, trained)) or not _is_json(trained):
        raise CheckpointError("In the weights file the field trained is not a dict of plain values.")
    if len(set(checkpoint.classes)) != len(checkpoint.classes) or not all(map(is_text, checkpoint.classes)):
        raise CheckpointError("In the weights file the class names are not distinct strings.")
    for name, tensor in checkpoint.state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"The weights file holds something other than a tensor under the name {name!r}.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"In the weights file the tensor {name} is not an ordinary dense one.")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"In the weights file the tensor {name} has values that are not finite.")
    if not (checkpoint.state_dict.get("std", torch.ones(3)) > 0).all():
        raise CheckpointError("In the weights file a standard deviation of the normalisation is not positive.")
    _check_calibration(checkpoint.calibration)
    if (given := checkpoint.self_test_NK) is not None:
        if given.dtype != torch.float32 or not given.isfinite().all():
            raise CheckpointError("In the weights file the field self_test has values that are not finite float32.")
        expected = (len(self_test.drawings()), len(checkpoint.classes))
        if given.shape != expected:
            raise CheckpointError(
                f"In the weights file the field self_test has the shape {tuple(given.shape)}; it must be {expected}."
            )
    if checkpoint.evaluation is not None:
        _check_evaluation(checkpoint.evaluation, len(checkpoint.classes))


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _check_calibration(calibration: Calibration) -> None:
    _check_kinds(calibration, "calibration")
    if not 0 < calibration.temperature < math.inf:
        raise CheckpointError(
            f"The weights file has the temperature {calibration.temperature}; it must be positive and finite."
        )
    if not 0 <= calibration.cubic < math.inf:
        raise CheckpointError(
            f"The weights file has the cubic term {calibration.cubic}; it must be finite and not negative."
        )
    if calibration.set_threshold is not None and not 0 <= calibration.set_threshold <= 1:
        raise CheckpointError(
            f"In the weights file the threshold of the prediction sets is {calibration.set_threshold}; it must be from "
            "0 to 1."
        )
    quantiles = calibration.energy_quantiles
    if quantiles is not None and not (
        len(quantiles) > 1
        and all(isinstance(value, float) and math.isfinite(value) for value in quantiles)
        and all(low <= high for low, high in pairwise(quantiles))
    ):
        raise CheckpointError("In the weights file the energy quantiles are not numbers in rising order.")


def _check_evaluation(evaluation: Evaluation, size: int) -> None:
    _check_kinds(evaluation, "evaluation")
    if evaluation.confusion_KK.shape != (size, size) or evaluation.confusion_KK.dtype != torch.int64:
        raise CheckpointError(f"In the weights file the confusion matrix is not {size} x {size} whole numbers.")
    if (evaluation.confusion_KK < 0).any():
        raise CheckpointError("In the weights file the confusion matrix has negative counts.")
    if evaluation.bins_B3.shape[1:] != (3,) or evaluation.bins_B3.dtype != torch.float64:
        raise CheckpointError("In the weights file the calibration bins are not rows of three numbers.")
    floats = [value for value in vars(evaluation).values() if isinstance(value, float)]
    if not (all(map(math.isfinite, floats)) and evaluation.bins_B3.isfinite().all()):
        raise CheckpointError("In the weights file a figure of the evaluation is not finite.")


def _check_kinds(holder: Calibration | Evaluation, name: str) -> None:
    for entry in dataclasses.fields(holder):
        kinds = tuple(get_origin(kind) or kind for kind in get_args(entry.type) or (entry.type,))
        value = getattr(holder, entry.name)
        if not isinstance(value, kinds):
            raise CheckpointError(f"In the weights file {entry.name} of the {name} is a {type(value).__name__}.")
        if isinstance(value, str) and not is_text(value):
            raise CheckpointError(f"In the weights file {entry.name} of the {name} is not UTF-8.")

"""What is saved comes back; what cannot be used is refused by a sentence; what is half written never appears."""

import contextlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Hostile
from torch import Tensor, nn

from app import checkpoint, model
from app.calibration import Calibration
from app.checkpoint import CIFAR10_CLASSES, Checkpoint, load, save
from app.errors import CheckpointError
from app.report import Evaluation

EVALUATION = Evaluation(
    dataset="CIFAR-10 test",
    digest="0" * 64,
    evaluated_at="2026-01-01T00:00:00+00:00",
    confusion_KK=torch.arange(100).reshape(10, 10),
    nll=0.25,
    brier=0.125,
    ece=0.0625,
    bins_B3=torch.tensor([[2, 0.5, 0.75], [1, 0.875, 1]], dtype=torch.float64),
    uncalibrated_nll=0.5,
    uncalibrated_brier=0.25,
    uncalibrated_ece=0.125,
    coverage=0.9375,
    set_size=1.5,
)
CALIBRATION = Calibration(
    temperature=1.25,
    cubic=0.5,
    set_threshold=0.375,
    energy_quantiles=(0.0, 0.125, 0.5),
    images="validation (12 held-out training images)",
    count=12,
    digest="1" * 64,
)


def example(name: str = "net") -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(
        architecture=name,
        arguments={"num_classes": 10},
        state_dict=model.build(name).state_dict(),
        classes=CIFAR10_CLASSES,
        calibration=CALIBRATION,
        self_test_NK=torch.full((8, 10), 0.1),
        evaluation=EVALUATION,
        trained={"recipe": "debug", "seed": 3, "versions": {"torch": "2"}},
    )


def content(**changes: object) -> dict[str, Any]:
    """What a file holds, field by field."""
    given = example()
    return {
        "format": checkpoint.FORMAT,
        "architecture": {"name": given.architecture, "arguments": given.arguments},
        "state_dict": given.state_dict,
        "classes": list(given.classes),
        "calibration": vars(CALIBRATION),
        "self_test": given.self_test_NK,
        "evaluation": vars(EVALUATION),
        "trained": given.trained,
    } | changes


def tensors(**changes: object) -> dict[str, Any]:
    return content(state_dict={**example().state_dict, **changes})


def calibrated(**changes: object) -> dict[str, Any]:
    return content(calibration={**vars(CALIBRATION), **changes})


def evaluated(**changes: object) -> dict[str, Any]:
    return content(evaluation={**vars(EVALUATION), **changes})


@pytest.mark.parametrize("name", model.NETWORKS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    saved = example(name)
    sha256 = save(saved, tmp_path / "new" / "weights.pth")
    loaded = load(tmp_path / "new" / "weights.pth")
    assert loaded.sha256 == sha256
    for field in ("architecture", "arguments", "classes", "calibration", "trained"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.self_test_NK is not None
    assert saved.self_test_NK is not None
    assert torch.equal(loaded.self_test_NK, saved.self_test_NK)
    assert loaded.evaluation is not None
    for field, value in vars(EVALUATION).items():
        found = getattr(loaded.evaluation, field)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
    assert loaded.state_dict.keys() == saved.state_dict.keys()
    assert all(torch.equal(loaded.state_dict[key], tensor) for key, tensor in saved.state_dict.items())
    network = loaded.network()
    assert not network.training
    pixels_NCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    fresh = model.build(name)
    fresh.load_state_dict(saved.state_dict)
    assert torch.equal(network(pixels_NCHW), fresh.eval()(pixels_NCHW))


def test_changing_the_network_does_not_change_the_checkpoint() -> None:
    given = example()
    before = given.state_dict["conv1.weight"].clone()
    parameter = next(given.network().parameters())
    parameter.zero_()
    assert torch.equal(given.state_dict["conv1.weight"], before)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in example().state_dict.items()}, tmp_path / "half.pth")
    network = load(tmp_path / "half.pth").network()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


class TutorialNet(nn.Module):
    """As in the tutorial; it has no buffers for the normalisation, which is done outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


def training_state(net: nn.Module) -> dict[str, Any]:
    """What PyTorch's tutorial on checkpoints saves."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {
        "epoch": 5,
        "model_state_dict": net.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": torch.tensor(0.4),
    }


def prefixed(prefix: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda net: {prefix + name: tensor for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(
    "saved",
    [
        lambda net: net.state_dict(),
        lambda net: nn.DataParallel(net).state_dict(),
        prefixed("_orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("module._orig_mod."),
        training_state,
        lambda net: {"state_dict": nn.DataParallel(net).state_dict()},
    ],
    ids=["alone", "DataParallel", "compiled", "both", "both, reversed", "training checkpoint", "wrapped DataParallel"],
)
def test_the_tutorials_state_dict_is_read(tmp_path: Path, saved: Callable[[nn.Module], dict[str, Any]]) -> None:
    net = TutorialNet()
    torch.save(saved(net), tmp_path / "cifar_net.pth")
    loaded = load(tmp_path / "cifar_net.pth")
    assert loaded.classes == CIFAR10_CLASSES
    assert (loaded.evaluation, loaded.self_test_NK) == (None, None)
    assert loaded.calibration == Calibration()
    pixels_NCHW = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    normalized = (pixels_NCHW / 255 - 0.5) / 0.5  # ToTensor and Normalize of the tutorial
    torch.testing.assert_close(loaded.network()(pixels_NCHW), net(normalized).detach(), atol=1e-5, rtol=1e-4)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "weights.pth"
    torch.save({"conv1.weight": Hostile(trap)}, file)
    with pytest.raises(CheckpointError, match="Python objects besides tensors and plain values, which could run code"):
        load(file)
    file.write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(CheckpointError, match=r"not a PyTorch file"):
        load(file)
    assert not trap.exists()


def test_a_whole_network_is_refused_and_the_sentence_says_what_to_save(tmp_path: Path) -> None:
    torch.save(TutorialNet(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"torch\.save\(net\.state_dict\(\), PATH\)"):
        load(tmp_path / "net.pth")


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights file .*w\.pth\. Train one with `python -m training train`"):
        load(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="cannot be read: not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 1_000, 100_000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "weights.pth"
    save(example(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"cut short \({file.stat().st_size:,} bytes\)|not a PyTorch file"):
        load(file)


def test_a_file_with_a_single_wrong_bit_is_refused(tmp_path: Path) -> None:
    """Such weights often compute so nearly the same that no drawing shows it."""
    file = tmp_path / "weights.pth"
    save(example(), file)
    content = bytearray(file.read_bytes())
    content[content.index(next(iter(example().state_dict.values())).numpy().tobytes()) + 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: the checksum of its part \S+ is wrong"):
        load(file)


@pytest.mark.parametrize("keep", range(0, 60, 3))
def test_a_truncated_file_of_an_old_torch_is_refused(tmp_path: Path, keep: int) -> None:
    """It is a sequence of pickles, which can be cut anywhere."""
    file = tmp_path / "weights.pth"
    torch.save(example().state_dict, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"not a PyTorch file"):
        load(file)


def test_a_damaged_old_format_file_is_loaded_or_refused_cleanly(tmp_path: Path) -> None:
    """Its pickles name storages and number types; for other names torch raises all kinds of errors."""
    file = tmp_path / "weights.pth"
    torch.save(example().state_dict, file, _use_new_zipfile_serialization=False)
    good = file.read_bytes()
    refused = 0
    for place in range(100, 900, 4):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with contextlib.suppress(CheckpointError):
            load(file)
            refused -= 1
        refused += 1
    assert refused > 100


def test_weights_with_trainable_normalisation_can_be_served(tmp_path: Path) -> None:
    torch.save(content(state_dict={**example().state_dict, "mean": nn.Parameter(torch.zeros(3))}), tmp_path / "w.pth")
    assert not load(tmp_path / "w.pth").network().mean.requires_grad


REFUSED: dict[str, tuple[object, str]] = {
    "a tensor": (torch.zeros(3), "holds a Tensor where a dict belongs"),
    "a list": ([1, 2], "holds a list where a dict belongs"),
    "empty": ({}, "lacks the tensor conv1.weight of the network net"),
    "another model": ({"features.0.weight": torch.zeros(3)}, "lacks the tensor conv1.weight of the network net"),
    "extra tensor": (tensors(extra=torch.zeros(1)), "has a tensor extra that the network net does not have"),
    "another shape": (
        tensors(**{"fc3.weight": torch.zeros(100, 84)}),
        r"the tensor fc3.weight has the shape \(100, 84\); the network net needs \(10, 84\)",
    ),
    "not a number": (tensors(**{"fc1.bias": torch.full((120,), torch.nan)}), "fc1.bias has values that are not finite"),
    "infinite": (tensors(**{"fc1.bias": torch.full((120,), torch.inf)}), "fc1.bias has values that are not finite"),
    "integers": (
        tensors(**{"fc1.bias": torch.zeros(120).int()}),
        "fc1.bias holds int32; the network net needs float32",
    ),
    "sparse": (tensors(**{"fc1.bias": torch.ones(120).to_sparse()}), "fc1.bias is not an ordinary dense one"),
    "meta tensor": (tensors(**{"fc1.bias": torch.ones(120, device="meta")}), "fc1.bias is not an ordinary"),
    "not a tensor": (tensors(**{"fc1.bias": [0.0]}), "something other than a tensor under the name 'fc1.bias'"),
    "zero deviation": (tensors(std=torch.zeros(3)), "standard deviation of the normalisation is not positive"),
    "newer format": (content(format=5), "has the format 5; this version reads format 4"),
    "missing field": ({"format": 4}, "lacks a field of its format"),
    "unknown network": (
        content(architecture={"name": "vgg", "arguments": {"num_classes": 10}}),
        "is for a network 'vgg'; there are net, cifar_net",
    ),
    "unknown argument": (
        content(architecture={"name": "net", "arguments": {"num_classes": 10, "depth": 3}}),
        "gives the network net arguments it does not take",
    ),
    "fewer names": (content(classes=["cat", "dog"]), "number of class names differs from the number of outputs"),
    "same names": (content(classes=["cat"] * 10), "class names are not distinct strings"),
    "undecodable names": (content(classes=[*"abcdefghi", "\udce9"]), "class names are not distinct strings"),
    "names not text": (content(classes=[*range(10)]), "class names are not distinct strings"),
    "negative temperature": (calibrated(temperature=-1.0), r"temperature -1.0; it must be positive"),
    "negative cubic": (calibrated(cubic=-1.0), r"cubic term -1.0; it must be finite and not negative"),
    "NaN cubic": (calibrated(cubic=float("nan")), r"cubic term nan; it must be finite"),
    "NaN temperature": (calibrated(temperature=float("nan")), r"temperature nan; it must be positive"),
    "text as temperature": (calibrated(temperature="hot"), "temperature of the calibration is a str"),
    "a threshold above 1": (
        calibrated(set_threshold=1.5),
        "threshold of the prediction sets is 1.5; it must be from 0",
    ),
    "falling quantiles": (calibrated(energy_quantiles=(0.5, 0.25)), "quantiles are not numbers in rising order"),
    "one quantile": (calibrated(energy_quantiles=(0.5,)), "energy quantiles are not numbers in rising order"),
    "quantiles of text": (calibrated(energy_quantiles=("a", "b")), "energy quantiles are not numbers in rising order"),
    "unknown calibration": (calibrated(shift=1.0), "lacks a field of its format, or has one too many"),
    "self-test not a tensor": (content(self_test=[1.0]), "has a field of the wrong type"),
    "boolean self-test": (content(self_test=torch.ones(8, 10).bool()), "values that are not finite float32"),
    "an infinite self-test": (content(self_test=torch.full((8, 10), torch.inf)), "values that are not finite float32"),
    "a short self-test": (
        content(self_test=torch.zeros(3, 10)),
        r"self_test has the shape \(3, 10\); it must be \(8, 10",
    ),
    "small matrix": (evaluated(confusion_KK=torch.zeros(2, 2).long()), "confusion matrix is not 10 x 10"),
    "fractional matrix": (
        evaluated(confusion_KK=torch.zeros(10, 10)),
        "confusion matrix is not 10 x 10 whole numbers",
    ),
    "negative matrix": (evaluated(confusion_KK=-EVALUATION.confusion_KK), "has negative counts"),
    "int matrix": (evaluated(confusion_KK=3), "confusion_KK of the evaluation is a int"),
    "boolean bins": (evaluated(bins_B3=torch.zeros(3, 3).bool()), "bins are not rows of three numbers"),
    "one bin": (evaluated(bins_B3=torch.zeros(3).double()), "bins are not rows of three numbers"),
    "bins of two numbers": (evaluated(bins_B3=torch.zeros(3, 2).double()), "bins are not rows of three numbers"),
    "text as figure": (evaluated(nll="low"), "nll of the evaluation is a str"),
    "NaN figure": (evaluated(nll=float("nan")), "a figure of the evaluation is not finite"),
    "undecodable text": (evaluated(dataset="caf\udce9"), "dataset of the evaluation is not UTF-8"),
    "undecodable provenance": (content(trained={"command": "\udce9"}), "not a dict of plain values"),
    "no classes": (
        content(classes=[], architecture={"name": "net", "arguments": {"num_classes": 0}}),
        "names no class",
    ),
    "no provenance": (content(trained=None), "the field trained is not a dict of plain values"),
    "tensor in provenance": (content(trained={"seed": torch.zeros(1)}), "trained is not a dict of plain values"),
    "number as key": (content(trained={1: "epoch"}), "trained is not a dict of plain values"),
    "list as state_dict": (content(state_dict=[1]), "has a field of the wrong type"),
}


@pytest.mark.parametrize(("given", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(tmp_path: Path, given: object, sentence: str) -> None:
    file = tmp_path / "weights.pth"
    torch.save(given, file)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(file)
    assert "weights.pth" in str(caught.value)
    assert str(caught.value).endswith(checkpoint.EXPECTED)


def test_the_unmodified_content_is_accepted(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth").calibration == CALIBRATION


def test_the_file_holds_only_what_weights_only_reads(tmp_path: Path) -> None:
    save(example(), tmp_path / "weights.pth")
    raw = io.BytesIO((tmp_path / "weights.pth").read_bytes())
    read = torch.load(raw, weights_only=True)
    names = ["format", "architecture", "state_dict", "classes", "calibration", "self_test", "evaluation"]
    assert list(read) == [*names, "trained"]

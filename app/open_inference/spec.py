"""What the model takes and gives, and how the protocol describes it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from app.model import IMAGE_SIZE
from app.statistics import Histogram, Statistics

MODEL_NAME = "cifar"
"""The model's fixed name: clients need not change when the weights do. Answers name the weights."""
MODEL_VERSION = "1"
PLATFORM = "pytorch_state_dict"
EXTENSIONS = ("binary_tensor_data", "classification", "statistics", "model_repository", "model_configuration")
"""The supported extensions; of the model repository, only the index."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of the model; -1 stands for any number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name!r} ({self.datatype}, shape {list(self.shape)})"


PIXEL_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
"""Shape of a picture, (H, W, C), red first."""

PIXELS = TensorSpec("pixels", "UINT8", (-1, *PIXEL_SHAPE))
IMAGE = TensorSpec("image", "BYTES", (-1,))
INPUTS = {spec.name: spec for spec in (PIXELS, IMAGE)}
OutputName = Literal["probabilities", "label", "class_id", "familiarity"]
OUTPUT_NAMES: tuple[OutputName, ...] = get_args(OutputName)

MAX_ID_LETTERS = 1024
"""The limit for a request's id, which is returned."""
UNKNOWN = -1.0
"""The familiarity if the weights cannot tell it; a tensor cannot hold null."""


def output_specs(num_classes: int) -> tuple[TensorSpec, ...]:
    """The outputs, in the order of `OUTPUT_NAMES`."""
    return (
        TensorSpec("probabilities", "FP32", (-1, num_classes)),
        TensorSpec("label", "BYTES", (-1,)),
        TensorSpec("class_id", "INT64", (-1,)),
        TensorSpec("familiarity", "FP32", (-1,)),
    )


def metadata(num_classes: int) -> dict[str, Any]:
    """The answer of GET v2/models/M: the tensors, with the batch dimension."""
    return {
        "name": MODEL_NAME,
        "versions": [MODEL_VERSION],
        "platform": PLATFORM,
        "inputs": [_describe(spec) for spec in INPUTS.values()],
        "outputs": [_describe(spec) for spec in output_specs(num_classes)],
    }


def _describe(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def configuration(num_classes: int) -> dict[str, Any]:
    """The answer of GET v2/models/M/config, as far as it means something here.

    `max_batch_size` is 0, which says that the batch dimension is part of `dims`, as it is in the metadata.
    """
    return {
        "name": MODEL_NAME,
        "platform": PLATFORM,
        "max_batch_size": 0,
        "input": [{**_configure(spec), "optional": True} for spec in INPUTS.values()],
        "output": [_configure(spec) for spec in output_specs(num_classes)],
    }


def _configure(spec: TensorSpec) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype  # the enumeration has another name for it
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape)}


def statistics(known: Statistics) -> dict[str, Any]:
    """The answer of GET v2/models/stats, for everything answered over any route.

    A request is what was admitted as one item: a picture, or up to a usual batch of raw pixels.
    """
    none = Histogram()
    totals = {
        "success": known.success,
        "fail": known.fail,
        "queue": known.queue,
        "compute_input": known.prepare,
        "compute_infer": known.run,
        "compute_output": none,  # each request encodes its own answer, after its batch
        "cache_hit": none,
        "cache_miss": none,
    }
    model = {
        "name": MODEL_NAME,
        "version": MODEL_VERSION,
        "last_inference": round(known.last_at * 1e3),
        "inference_count": known.pictures,
        "execution_count": known.batches.count,
        "inference_stats": {
            name: {"count": histogram.count, "ns": round(histogram.sum * 1e9)} for name, histogram in totals.items()
        },
        "batch_stats": [],
    }
    return {"model_stats": [model]}

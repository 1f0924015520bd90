"""Probabilities and familiarity -> the body of an inference response."""

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

from pydantic_core import to_json

from app.open_inference.request import Inference, Wanted
from app.open_inference.spec import MODEL_NAME, MODEL_VERSION, UNKNOWN


def encode(
    inference: Inference,
    probabilities_NK: Sequence[Sequence[float]],
    familiarity_N: Sequence[float | None],
    classes: Sequence[str],
    weights: str,
) -> tuple[bytes, int | None]:
    """The response body, and the length of its JSON if raw tensors follow.

    Args:
        weights: Which weights answered; goes into the parameters of the response.
    """
    outputs, blobs = [], []
    for wanted in inference.outputs:
        datatype, shape, elements = _tensor(wanted, probabilities_NK, familiarity_N, classes)
        output: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": shape}
        if wanted.binary:
            blobs.append(_binary(datatype, elements))
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = elements
        outputs.append(output)
    header: dict[str, Any] = {"model_name": MODEL_NAME, "model_version": MODEL_VERSION}
    if inference.id:
        header["id"] = inference.id
    text = to_json({**header, "parameters": {"weights_sha256": weights}, "outputs": outputs})
    return b"".join((text, *blobs)), len(text) if blobs else None


Datatype = Literal["FP32", "INT64", "BYTES"]


def _tensor(
    wanted: Wanted,
    probabilities_NK: Sequence[Sequence[float]],
    familiarity_N: Sequence[float | None],
    classes: Sequence[str],
) -> tuple[Datatype, list[int], list[Any]]:
    """Datatype, shape and the elements in row-major order."""
    count, num_classes = len(probabilities_NK), len(classes)
    if wanted.top_k:
        top_k = min(wanted.top_k, num_classes)
        return "BYTES", [count, top_k], [text for row in probabilities_NK for text in _ranked(row, classes)[:top_k]]
    if wanted.name == "probabilities":
        return "FP32", [count, num_classes], list(chain.from_iterable(probabilities_NK))
    if wanted.name == "familiarity":
        return "FP32", [count], [UNKNOWN if value is None else value for value in familiarity_N]
    class_ids = [row.index(max(row)) for row in probabilities_NK]
    if wanted.name == "class_id":
        return "INT64", [count], class_ids
    return "BYTES", [count], [classes[class_id] for class_id in class_ids]


def _ranked(row: Sequence[float], classes: Sequence[str]) -> list[str]:
    """ "<value>:<index>:<label>" for each class, the most probable first (extension "classification")."""
    ranking = sorted(range(len(row)), key=lambda class_id: -row[class_id])
    return [f"{row[class_id]:f}:{class_id}:{classes[class_id]}" for class_id in ranking]


def _binary(datatype: Datatype, elements: list[Any]) -> bytes:
    if datatype == "BYTES":
        encoded = [element.encode() for element in elements]
        return b"".join(struct.pack("<I", len(element)) + element for element in encoded)
    return struct.pack(f"<{len(elements)}{'f' if datatype == 'FP32' else 'q'}", *elements)

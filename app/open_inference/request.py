"""The body of an inference request -> what it asks for, fully checked."""

import codecs
from dataclasses import dataclass, field
from reprlib import repr as show  # an error message should not repeat a megabyte of input
from typing import Any

from pydantic_core import from_json

from app.errors import BadRequest, BodyTooLarge, NotOffered
from app.images import PICTURE_FILE
from app.model import IMAGE_SIZE
from app.open_inference import tensors
from app.open_inference.spec import IMAGE, INPUTS, MAX_ID_LETTERS, OUTPUT_NAMES, PIXELS, TensorSpec

MAX_BRACKETS_OF_A_PICTURE = 1 + IMAGE_SIZE + IMAGE_SIZE**2
"""The most brackets one picture can have: its pixels nested as deep as possible."""
MAX_OTHER_BRACKETS = 1000


@dataclass(frozen=True)
class Wanted:
    """A requested output."""

    name: str
    binary: bool
    top_k: int = 0
    """For `probabilities` only: how many classes to give as text instead (the classification extension); 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A request. Its input is `pixels` (N x 32 x 32 x 3 bytes) or, if that is None, `pictures` (N, encoded)."""

    pixels: bytearray | None = None
    pictures: list[bytes] = field(default_factory=list)
    outputs: list[Wanted]
    id: str = ""
    timeout_seconds: float | None = None


def decode(body: bytes, header: str | None, *, binary: bool, max_pictures: int) -> Inference:
    """Read an inference request.

    Args:
        header: Inference-Header-Content-Length as it was sent, or None. With 0 there is no JSON:
            the body is one encoded picture.
        binary: Whether the outputs are binary if there is no JSON to say so.

    Raises:
        BadRequest: Anything that does not follow the protocol or the model's metadata.
        BodyTooLarge: More than `max_pictures`.
        NotOffered: Tensors in shared memory.
    """
    length = json_length(body, header)
    if header is not None and length == 0:
        if not body:
            raise BadRequest("The body is empty; with Inference-Header-Content-Length 0 it is one encoded picture.")
        return Inference(pictures=[body], outputs=[Wanted(name, binary) for name in OUTPUT_NAMES])
    request = _json(body[:length], max_pictures)
    parameters = _parameters(request, "The request")
    spec, tensor, count = _only_input(request)
    if count > max_pictures:
        raise BodyTooLarge(
            f"Input {spec.name!r} has {count:,} pictures; the limit for one request is {max_pictures:,}. Send several "
            "requests.",
            detail={"max_pictures": max_pictures},
        )
    pixels, pictures = _content(spec, tensor, count, memoryview(body)[length:])
    request_id = _given(request, "id", "")
    if not isinstance(request_id, str) or len(request_id) > MAX_ID_LETTERS:
        raise BadRequest(
            f"The `id` of the request is {show(request_id)}; it must be text of at most {MAX_ID_LETTERS:,} letters."
        )
    return Inference(
        pixels=pixels,
        pictures=pictures,
        outputs=_outputs(request, binary=_flag(parameters, "binary_data_output", "The request")),
        id=request_id,
        timeout_seconds=_timeout(parameters),
    )


def json_length(body: bytes, header: str | None) -> int:
    """How many bytes of an uncompressed body are JSON: as many as Inference-Header-Content-Length says, or all.

    Raises:
        BadRequest: The header is no length, or exceeds the body.
    """
    if header is None:
        return len(body)
    length = int(header) if header.isascii() and header.isdigit() and len(header) < 20 else -1
    if not 0 <= length <= len(body):
        raise BadRequest(
            f"The header Inference-Header-Content-Length is {show(header)}; it must be the length of the JSON, from 0 "
            f"to {len(body):,}, the length of the uncompressed body."
        )
    return length


def _json(text: bytes, max_pictures: int) -> dict[str, Any]:
    # Parsing millions of lists holds the GIL for a second, and the event loop with it.
    most = max_pictures * MAX_BRACKETS_OF_A_PICTURE + MAX_OTHER_BRACKETS
    if (brackets := text.count(b"[") + text.count(b"{")) > most:
        raise BodyTooLarge(
            f"The JSON of the request has {brackets:,} lists and objects; the limit is {most:,}, as many as "
            f"{max_pictures:,} pictures can have. Send fewer, or flat or raw pixels."
        )
    try:
        request = from_json(text.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        place = str(error).rpartition(" at ")[2]  # the line and the column
        raise BadRequest(_explain(text, place)) from None
    if not isinstance(request, dict):
        raise BadRequest('The request is not a JSON object; it must be {"inputs": [...]}.')
    return request


def _explain(text: bytes, place: str) -> str:
    """Why what should be the JSON of a request is none."""
    if PICTURE_FILE.match(text):
        return "The body begins like a picture; with the header Inference-Header-Content-Length: 0 it may be one."
    if text.startswith(b"--"):
        return "The body begins like a form; it must be JSON. Send forms to /predict or /predict/batch."
    return (
        f"The JSON of the request (bytes: {len(text):,}) is not valid, at {place}. If raw tensors follow it, the "
        "header Inference-Header-Content-Length must say how long it is."
    )


def _parameters(holder: dict[str, Any], owner: str) -> dict[str, Any]:
    parameters = _given(holder, "parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest(f"{owner} has the parameters {show(parameters)}; they must be a JSON object.")
    if "shared_memory_region" in parameters:
        raise NotOffered(f"{owner} is in shared memory, which this service does not offer. Send it in the body.")
    return parameters


def _given(holder: dict[str, Any], name: str, default: Any) -> Any:
    """The value, or `default` if there is none; some clients send null instead."""
    value = holder.get(name)
    return default if value is None else value


def _flag(parameters: dict[str, Any], name: str, owner: str, default: bool = False) -> bool:
    value = _given(parameters, name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{owner} has the parameter `{name}` {show(value)}; it must be true or false.")
    return value


def _number(parameters: dict[str, Any], name: str, owner: str) -> int:
    value = _given(parameters, name, 0)
    if type(value) is not int or value < 0:
        raise BadRequest(f"{owner} has the parameter `{name}` {show(value)}; it must be a whole number, 0 or more.")
    return value


def _timeout(parameters: dict[str, Any]) -> float | None:
    """The timeout in seconds; the parameter is in microseconds, and 0 means none."""
    return min(_number(parameters, "timeout", "The request"), 2**63) / 1e6 or None


def _objects(request: dict[str, Any], field: str) -> list[dict[str, Any]]:
    objects = _given(request, field, [])
    if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
        raise BadRequest(f"The request has the {field} {show(objects)}; they must be a list of JSON objects.")
    return objects


def _only_input(request: dict[str, Any]) -> tuple[TensorSpec, dict[str, Any], int]:
    """The only input's specification, the input itself with name, datatype and shape checked, and its picture count."""
    given = _objects(request, "inputs")
    names = [tensor.get("name") for tensor in given]
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in INPUTS:
        raise BadRequest(
            f"The request has the inputs {show(names)}; it must have exactly one: {PIXELS}, or {IMAGE} of encoded "
            "pictures."
        )
    spec, tensor = INPUTS[names[0]], given[0]
    if tensor.get("datatype") != spec.datatype:
        raise BadRequest(
            f"Input {spec.name!r} has the datatype {show(tensor.get('datatype'))}; it must be {spec.datatype!r}."
        )
    shape = tensor.get("shape")
    numbers = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not numbers or not shape or tuple(shape[1:]) != spec.shape[1:] or not 1 <= shape[0] < 2**63:
        expected = ", ".join(map(str, ("N", *spec.shape[1:])))
        raise BadRequest(
            f"Input {spec.name!r} has the shape {show(shape)}; it must be [{expected}] for N pictures, at least one."
        )
    return spec, tensor, shape[0]


def _content(
    spec: TensorSpec, tensor: dict[str, Any], count: int, tail: memoryview
) -> tuple[bytearray | None, list[bytes]]:
    """The raw pixels, or the encoded pictures, from the JSON or from the bytes after it."""
    owner = f"Input {spec.name!r}"
    size = _parameters(tensor, owner).get("binary_data_size")
    if size is None:
        data = tensor.get("data")
        if tail:
            raise BadRequest(f"{owner} has no `binary_data_size`, but {len(tail):,} bytes follow the JSON.")
        if not isinstance(data, list):
            raise BadRequest(f"{owner} has neither a list `data` nor the parameter `binary_data_size`.")
        return (tensors.json_pixels(data, count), []) if spec is PIXELS else (None, tensors.json_strings(data, count))
    if tensor.get("data") not in (None, []):  # some clients send an empty list, too
        raise BadRequest(f"{owner} has both `data` and `binary_data_size`; it must have only one of them.")
    if type(size) is not int or size != len(tail):
        raise BadRequest(f"{owner} has the binary_data_size {show(size)}, but {len(tail):,} bytes follow the JSON.")
    return (tensors.raw_pixels(tail, count), []) if spec is PIXELS else (None, tensors.raw_strings(tail, count))


def _outputs(request: dict[str, Any], *, binary: bool) -> list[Wanted]:
    """The requested outputs, or all if none is named. An output's own parameters override the request's."""
    wanted: dict[str, Wanted] = {}
    for output in _objects(request, "outputs"):
        name = output.get("name")
        if not isinstance(name, str) or name not in OUTPUT_NAMES:
            raise BadRequest(f"There is no output {show(name)}; there are {', '.join(map(repr, OUTPUT_NAMES))}.")
        if name in wanted:
            raise BadRequest(f"Output {name!r} is requested twice; request it once.")
        owner = f"Output {name!r}"
        parameters = _parameters(output, owner)
        top_k = _number(parameters, "classification", owner)
        if top_k and name != "probabilities":
            raise BadRequest(f"{owner} cannot have the parameter `classification`; only 'probabilities' can.")
        wanted[name] = Wanted(name, _flag(parameters, "binary_data", owner, default=binary), top_k)
    return list(wanted.values()) or [Wanted(name, binary) for name in OUTPUT_NAMES]

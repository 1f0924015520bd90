"""The content of an input tensor, in JSON or binary, checked against the number of images that its shape announced."""

import base64
import math
import struct
from collections.abc import Sequence
from itertools import chain
from reprlib import repr as show
from typing import Any

from app.errors import BadRequest
from app.model import IMAGE_BYTES
from app.open_inference.spec import IMAGE, PIXEL_SHAPE, PIXELS


def raw_pixels(tail: memoryview, count: int) -> bytearray:
    """The pixels, N x 32 x 32 x 3 bytes.

    Raises:
        BadRequest: There are more or fewer bytes.
    """
    if len(tail) != count * IMAGE_BYTES:
        raise BadRequest(
            f"Input {PIXELS.name!r} has {len(tail):,} bytes; the shape {[count, *PIXEL_SHAPE]} needs "
            f"{count * IMAGE_BYTES:,}."
        )
    return bytearray(tail)


def json_pixels(data: list[Any], count: int) -> bytearray:
    """The pixels from JSON numbers, flat or nested as the shape says.

    Raises:
        BadRequest: They are nested otherwise, too many or too few, or not whole numbers from 0 to 255.
    """
    flat = _flatten(data, [count, *PIXEL_SHAPE], PIXELS.name)
    try:
        return bytearray(flat)
    except (TypeError, ValueError):
        wrong = next(index for index, value in enumerate(flat) if not isinstance(value, int) or not 0 <= value <= 255)
        raise BadRequest(
            f"Input {PIXELS.name!r}, element {wrong} is {show(flat[wrong])}; it must be a whole number from 0 to 255."
        ) from None


def raw_strings(tail: memoryview, count: int) -> list[bytes]:
    """The N elements of a BYTES tensor, each preceded by its length.

    Raises:
        BadRequest: The tensor ends within an element, or holds too many or too few.
    """
    elements: list[bytes] = []
    start = 0
    while start < len(tail) and len(elements) <= count:
        if len(tail) - start < 4:
            raise BadRequest(f"Input {IMAGE.name!r}, element {len(elements)}: the tensor ends within its length.")
        (size,) = struct.unpack_from("<I", tail, start)
        start += 4
        if size > len(tail) - start:
            raise BadRequest(
                f"Input {IMAGE.name!r}, element {len(elements)} has the length {size:,} bytes, but only "
                f"{len(tail) - start:,} follow. Each element begins with its length, in four bytes, the lowest first."
            )
        elements.append(bytes(tail[start : start + size]))
        start += size
    if len(elements) != count:
        more = "more" if len(elements) > count else f"{len(elements):,}"
        raise BadRequest(f"Input {IMAGE.name!r} holds {more} elements; the shape [{count}] needs {count:,}.")
    return elements


def json_strings(data: list[Any], count: int) -> list[bytes]:
    """The elements from text in base64, because JSON cannot hold a picture's bytes as they are.

    Raises:
        BadRequest: There are too many or too few elements, or one is not base64.
    """
    pictures = []
    for index, text in enumerate(_flatten(data, [count], IMAGE.name)):
        try:
            pictures.append(base64.b64decode(text, validate=True))
        except (TypeError, ValueError):
            raise BadRequest(
                f"Input {IMAGE.name!r}, element {index} is {show(text)}; in JSON it must be the bytes of the picture "
                "in base64, in the usual alphabet, without line breaks or a leading `data:`."
            ) from None
    return pictures


def _flatten(data: list[Any], shape: Sequence[int], name: str) -> list[Any]:
    """The elements in row-major order, from a list that is flat or nested exactly as `shape` says."""
    if data and isinstance(data[0], list):
        fits = len(data) == shape[0]
        for size in shape[1:]:
            # Merely counting elements would mistake channels first for channels last.
            if not fits or not all(isinstance(row, list) and len(row) == size for row in data):
                raise BadRequest(f"Input {name!r} has its `data` nested differently from its shape {list(shape)}.")
            data = list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise BadRequest(
            f"Input {name!r} has {len(data):,} elements in `data`; the shape {list(shape)} needs {math.prod(shape):,}, "
            "flat or nested."
        )
    return data

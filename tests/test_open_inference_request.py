"""The codec of the Open Inference Protocol: bytes of a request -> what is asked, or a sentence about what is wrong."""

import base64
import json
import struct
from typing import Any

import pytest
from conftest import drawing, encode

from app.errors import BadRequest, BodyTooLarge, NotOffered
from app.open_inference.request import Inference, Wanted, decode

IMAGE = bytes(range(256)) * 12
"""32 x 32 x 3 bytes that are not all the same."""
ALL = [Wanted(name, binary=False) for name in ("probabilities", "label", "class_id", "familiarity")]


def pixels(data: Any = None, **changes: Any) -> dict[str, Any]:
    data = list(IMAGE) if data is None else data
    tensor = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": data}
    return tensor | changes


def binary(name: str, datatype: str, shape: list[int], size: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


def read(request: Any, tail: bytes = b"", header: str | None = "") -> Inference:
    """Decode a request of JSON and tail; the header is right unless it is given."""
    text = json.dumps(request).encode()
    length = (str(len(text)) if tail else None) if header == "" else header
    return decode(text + tail, length, binary=True, max_pictures=8)


def strings(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def nested(flat: bytes, *shape: int) -> list[Any]:
    if len(shape) == 1:
        return list(flat)
    step = len(flat) // shape[0]
    return [nested(flat[start : start + step], *shape[1:]) for start in range(0, len(flat), step)]


# Valid requests


@pytest.mark.parametrize("data", [list(IMAGE), nested(IMAGE, 1, 32, 32, 3)], ids=["flat", "nested"])
def test_pixels_in_json(data: list[Any]) -> None:
    inference = read({"inputs": [pixels(data)]})
    assert inference == Inference(pixels=bytearray(IMAGE), outputs=ALL)


def test_pixels_in_binary() -> None:
    inference = read({"inputs": [binary("pixels", "UINT8", [2, 32, 32, 3], 6144)]}, IMAGE + IMAGE[::-1])
    assert inference.pixels == bytearray(IMAGE + IMAGE[::-1])


@pytest.mark.parametrize("data", [None, []])
def test_empty_data_beside_binary_data_size_is_ignored(data: Any) -> None:
    """As sent by a client that has both fields."""
    tensor = binary("pixels", "UINT8", [1, 32, 32, 3], 3072) | {"data": data}
    assert read({"inputs": [tensor]}, IMAGE).pixels == bytearray(IMAGE)


def test_pictures_in_binary() -> None:
    tail = strings(b"first", b"", b"third")
    inference = read({"inputs": [binary("image", "BYTES", [3], len(tail))]}, tail)
    assert (inference.pixels, inference.pictures) == (None, [b"first", b"", b"third"])


def test_pictures_in_json_are_base64() -> None:
    data = [base64.b64encode(picture).decode() for picture in (b"\x89PNG", b"\xff\xd8")]
    inference = read({"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": data}]})
    assert inference.pictures == [b"\x89PNG", b"\xff\xd8"]


@pytest.mark.parametrize("binary", [True, False])
def test_without_json_the_body_is_one_picture(binary: bool) -> None:
    inference = decode(b"\x89PNG", "0", binary=binary, max_pictures=8)
    assert inference.pictures == [b"\x89PNG"]
    assert inference.outputs == [Wanted(wanted.name, binary) for wanted in ALL]


def test_outputs_default_to_the_binary_setting_of_the_request() -> None:
    request = {
        "inputs": [pixels()],
        "parameters": {"binary_data_output": True},
        "outputs": [
            {"name": "class_id", "parameters": {"binary_data": False}},
            {"name": "probabilities", "parameters": {"classification": 3}},
        ],
    }
    assert read(request).outputs == [Wanted("class_id", False), Wanted("probabilities", True, 3)]
    assert read(request | {"outputs": []}).outputs == [Wanted(wanted.name, True) for wanted in ALL]


def test_id_and_timeout() -> None:
    inference = read({"inputs": [pixels()], "id": "42", "parameters": {"timeout": 1500, "priority": 1}})
    assert (inference.id, inference.timeout_seconds) == ("42", 0.0015)
    assert read({"inputs": [pixels()], "parameters": {"timeout": 0}}).timeout_seconds is None
    assert read({"inputs": [pixels()], "parameters": {"timeout": 10**320}}).timeout_seconds == 2**63 / 1e6


def test_null_fields_count_as_absent() -> None:
    nothing = {"id": None, "outputs": None, "parameters": {"timeout": None, "binary_data_output": None}}
    assert read({"inputs": [pixels(parameters=None)], **nothing}) == read({"inputs": [pixels()]})


def test_unknown_fields_are_ignored() -> None:
    assert read({"inputs": [pixels(surplus=1)], "surplus": {}, "parameters": {"sequence_id": 7}}).pixels == bytearray(
        IMAGE
    )


# What is refused: each case names the tensor, what was given and what is expected

CHANNELS_FIRST = nested(IMAGE, 1, 3, 32, 32)
REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], r"not a JSON object; it must be {\"inputs\""),
    "no inputs": ({}, r"inputs \[\]; it must have exactly one: 'pixels' \(UINT8, shape \[-1, 32, 32, 3\]\)"),
    "inputs as dict": ({"inputs": {"name": "pixels"}}, "they must be a list of JSON objects"),
    "input as text": ({"inputs": ["pixels"]}, "they must be a list of JSON objects"),
    "unknown name": ({"inputs": [pixels(name="INPUT0")]}, r"inputs \['INPUT0'\]; it must have exactly one"),
    "odd name": ({"inputs": [pixels(name=["pixels"])]}, r"it must have exactly one"),
    "extra input": ({"inputs": [pixels(), pixels(name="image")]}, r"inputs \['pixels', 'image'\]; it must have"),
    "dtype": ({"inputs": [pixels(datatype="FP32")]}, "'pixels' has the datatype 'FP32'; it must be 'UINT8'"),
    "no dtype": ({"inputs": [pixels(datatype=None)]}, "'pixels' has the datatype None; it must be 'UINT8'"),
    "layout": ({"inputs": [pixels(shape=[1, 3, 32, 32])]}, r"\[1, 3, 32, 32\]; it must be \[N, 32, 32, 3\]"),
    "rank": ({"inputs": [pixels(shape=[32, 32, 3])]}, r"'pixels' has the shape \[32, 32, 3\]; it must be \[N, 32"),
    "shape as int": ({"inputs": [pixels(shape=3072)]}, r"'pixels' has the shape 3072; it must be \[N, 32, 32, 3\]"),
    "empty shape": ({"inputs": [pixels(shape=[])]}, r"'pixels' has the shape \[\]; it must be \[N, 32, 32, 3\]"),
    "no shape": (
        {"inputs": [binary("image", "BYTES", [], 0)]},
        r"the shape \[\]; it must be \[N\] for",
    ),
    "shape of text": ({"inputs": [pixels(shape=["1", 32, 32, 3])]}, r"has the shape \['1', 32, 32, 3\]"),
    "huge": ({"inputs": [pixels(shape=[2**63, 32, 32, 3])]}, r"it must be \[N, 32, 32, 3\]"),
    "zero": ({"inputs": [pixels(shape=[0, 32, 32, 3])]}, r"has the shape \[0, 32, 32, 3\]; .* at least one"),
    "too few": ({"inputs": [pixels(list(IMAGE[1:]))]}, "'pixels' has 3,071 elements in `data`; .* needs 3,072"),
    "empty data": ({"inputs": [pixels([])]}, "'pixels' has 0 elements in `data`; .* needs 3,072"),
    "too many": ({"inputs": [pixels([*IMAGE, 0])]}, "'pixels' has 3,073 elements in `data`; .* needs 3,072"),
    "nested otherwise": ({"inputs": [pixels(CHANNELS_FIRST)]}, "'pixels' has its `data` nested differently"),
    "half nested": ({"inputs": [pixels([[1], 2])]}, "'pixels' has its `data` nested differently"),
    "256": ({"inputs": [pixels([*IMAGE[:-1], 256])]}, "'pixels', element 3071 is 256; it must be a whole"),
    "text": ({"inputs": [pixels([*IMAGE[:-1], "0"])]}, "'pixels', element 3071 is '0'; it must be a whole"),
    "fraction": ({"inputs": [pixels([0.5, *IMAGE[1:]])]}, "'pixels', element 0 is 0.5; it must be a whole"),
    "deeper": ({"inputs": [pixels([7, [], *IMAGE[2:]])]}, r"'pixels', element 1 is \[\]; it must be a whole"),
    "no data": ({"inputs": [pixels() | {"data": None}]}, "'pixels' has neither a list `data` nor the"),
    "base64": (
        {"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": ["", "é"]}]},
        "'image', element 1 is 'é'; in JSON it must be the bytes of the picture in base64",
    ),
    "number": (
        {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [5]}]},
        "'image', element 0 is 5; in JSON it must be the bytes",
    ),
    "text count": (
        {"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": [""]}]},
        r"'image' has 1 elements in `data`; the shape \[2\] needs 2",
    ),
    "unknown output": ({"inputs": [pixels()], "outputs": [{"name": "nope"}]}, "no output 'nope'; there are 'proba"),
    "output twice": ({"inputs": [pixels()], "outputs": [{"name": "label"}] * 2}, "'label' is requested twice"),
    "classified label": (
        {"inputs": [pixels()], "outputs": [{"name": "label", "parameters": {"classification": 2}}]},
        "'label' cannot have the parameter `classification`; only 'probabilities' can",
    ),
    "negative class count": (
        {"inputs": [pixels()], "outputs": [{"name": "probabilities", "parameters": {"classification": -1}}]},
        "'probabilities' has the parameter `classification` -1; it must be a whole number, 0 or more",
    ),
    "text flag": (
        {"inputs": [pixels()], "outputs": [{"name": "label", "parameters": {"binary_data": "no"}}]},
        "'label' has the parameter `binary_data` 'no'; it must be true or false",
    ),
    "parameters": ({"inputs": [pixels()], "parameters": [1]}, r"the parameters \[1\]; they must be a JSON object"),
    "empty list": ({"inputs": [pixels()], "parameters": []}, r"the parameters \[\]; they must be a JSON"),
    "outputs as dict": (
        {"inputs": [pixels()], "outputs": {}},
        r"the outputs \{\}; they must be a list of JSON objects",
    ),
    "id": ({"inputs": [pixels()], "id": 42}, "`id` of the request is 42; it must be text"),
    "timeout": ({"inputs": [pixels()], "parameters": {"timeout": "1s"}}, "`timeout` '1s'; it must be a whole number"),
}


@pytest.mark.parametrize(("request_", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_an_invalid_request_is_refused_naming_the_problem(request_: Any, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        read(request_)


@pytest.mark.parametrize(
    ("tensor", "tail", "sentence"),
    [
        pytest.param(
            binary("pixels", "UINT8", [1, 32, 32, 3], 3072), IMAGE + b"x", "3072, but 3,073 bytes follow", id="trailing"
        ),
        pytest.param(
            binary("pixels", "UINT8", [1, 32, 32, 3], 3072), IMAGE[1:], "3072, but 3,071 bytes follow", id="short tail"
        ),
        pytest.param(
            binary("pixels", "UINT8", [2, 32, 32, 3], 3072), IMAGE, "has 3,072 bytes; .* needs 6,144", id="shape"
        ),
        pytest.param(
            binary("pixels", "UINT8", [1, 32, 32, 3], "3072"), IMAGE, "binary_data_size '3072', but", id="size is text"
        ),
        pytest.param(pixels(), b"x", "no `binary_data_size`, but 1 bytes follow", id="data and tail"),
        pytest.param(
            pixels(parameters={"binary_data_size": 3072}), IMAGE, "both `data` and `binary_data_size`", id="both"
        ),
        pytest.param(
            binary("image", "BYTES", [1], 3), b"\x01\0\0", "element 0: the tensor ends within its length", id="length"
        ),
        pytest.param(
            binary("image", "BYTES", [2], 9),
            strings(b"a") + b"\x05\0\0\0",
            "element 1 has the length 5 bytes, but only 0 follow",
            id="short element",
        ),
        pytest.param(
            binary("image", "BYTES", [2], 5), strings(b"a"), "holds 1 elements; .* needs 2", id="too few elements"
        ),
        pytest.param(
            binary("image", "BYTES", [1], 12),
            strings(b"", b"", b""),
            "holds more elements; .* needs 1",
            id="too many elements",
        ),
    ],
)
def test_an_invalid_binary_tensor_is_refused_naming_the_problem(
    tensor: dict[str, Any], tail: bytes, sentence: str
) -> None:
    with pytest.raises(BadRequest, match=f"Input '{tensor['name']}'.*{sentence}"):
        read({"inputs": [tensor]}, tail)


@pytest.mark.parametrize("header", ["", "x", "-1", "1.5", "+4", "1_0", "٣", "999999", "9" * 5000])
def test_an_invalid_json_length_header_is_refused(header: str) -> None:
    with pytest.raises(BadRequest, match=r"Inference-Header-Content-Length is .*; it must be the length of the JSON"):
        decode(b'{"inputs": []}', header, binary=True, max_pictures=8)


def test_a_length_that_cuts_the_json_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"The JSON of the request \(bytes: 9\) is not valid, at line 1 column 9\. If"):
        decode(b'{"inputs": []}', "9", binary=True, max_pictures=8)


def test_json_with_too_many_brackets_is_refused() -> None:
    with pytest.raises(BodyTooLarge, match="has 9,000 lists and objects; the limit is 2,0"):
        decode(b"[" * 9_000, None, binary=True, max_pictures=1)


def test_an_overlong_id_is_refused() -> None:
    assert read({"inputs": [pixels()], "id": "4" * 1024}).id == "4" * 1024
    with pytest.raises(BadRequest, match="it must be text of at most 1,024 letters"):
        read({"inputs": [pixels()], "id": "4" * 1025})


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 9_000, b'{"inputs": '], ids=["empty", "bytes", "deep", "cut"])
def test_invalid_json_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"The JSON of the request .* is not valid"):
        decode(body, None, binary=True, max_pictures=8)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (encode(drawing()), "begins like a picture; with the header Inference-Header-Content-Length: 0 it may be one"),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n', "begins like a form; it must be JSON. Send"),
    ],
    ids=["picture", "form"],
)
def test_what_is_often_sent_instead_of_json_is_named(body: bytes, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        decode(body, None, binary=True, max_pictures=8)


def test_a_byte_order_mark_before_the_json_is_ignored() -> None:
    body = json.dumps({"inputs": [pixels()]}).encode("utf-8-sig")
    assert bytes(decode(body, None, binary=True, max_pictures=8).pixels or b"") == IMAGE


def test_an_empty_picture_without_json_is_refused() -> None:
    with pytest.raises(BadRequest, match="The body is empty"):
        decode(b"", "0", binary=True, max_pictures=8)


def test_too_many_pictures_are_refused_before_they_are_read() -> None:
    with pytest.raises(BodyTooLarge, match="Input 'pixels' has 9 pictures; the limit for one request is 8"):
        read({"inputs": [pixels(shape=[9, 32, 32, 3])]})


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_not_offered(where: str) -> None:
    shared = {"shared_memory_region": "r", "shared_memory_byte_size": 3072}
    request = {"inputs": [pixels()], "outputs": [{"name": "label"}]}
    request[where][0]["parameters"] = shared
    with pytest.raises(NotOffered, match="in shared memory, which this service does not offer"):
        read(request)


def test_an_error_does_not_repeat_overlong_values() -> None:
    with pytest.raises(BadRequest) as refusal:
        read({"inputs": [pixels(datatype="x" * 1_000_000)]})
    assert len(str(refusal.value)) < 200

"""The fast form parser gives what the full one gives, or leaves the form to it."""

import pytest

from app import multipart
from app.errors import BadRequest
from app.multipart import read_field, read_fields

CONTENT = bytes(range(256)) * 3 + b"\r\n--b\r\n--boundaries\r\n\r\n"
TYPE = "multipart/form-data; boundary=boundary"


def form(head: bytes, content: bytes = CONTENT, end: bytes = b"\r\n--boundary--\r\n") -> bytes:
    return b"--boundary\r\n" + head + b"\r\n\r\n" + content + end


NAMED = b'Content-Disposition: form-data; name="file"'
OTHER = NAMED.replace(b"file", b"more")
CURL = NAMED + b'; filename="a.png"\r\nContent-Type: image/png'


@pytest.mark.parametrize(
    ("body", "short"),
    [
        (form(CURL), True),
        (form(NAMED), True),
        (form(CURL.lower()), True),
        (form(CURL, b""), True),
        (form(CURL, end=b"\r\n--boundary--"), True),
        (form(NAMED + b'; filename="a\\"b.png"'), False),
        (form(b"Content-Type: image/png\r\n" + NAMED), False),
        (form(NAMED + b"; filename*=UTF-8''a.png"), False),
        (
            form(CURL, end=b"\r\n--boundary\r\n" + NAMED.replace(b"file", b"more") + b"\r\n\r\n1\r\n--boundary--\r\n"),
            False,
        ),
    ],
)
def test_fast_and_full_parser_agree(body: bytes, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (multipart._only_field(body, TYPE, "file") is not None) is short
    given = read_field(body, TYPE, "file")
    monkeypatch.setattr(multipart, "_only_field", lambda *_: None)
    assert given == read_field(body, TYPE, "file")
    assert given in (CONTENT, b"")


@pytest.mark.parametrize("boundary", ['"boundary"', "boundary; charset=utf-8"])
def test_unusual_boundary_spellings_use_the_full_parser(boundary: str) -> None:
    content_type = f"multipart/form-data; boundary={boundary}"
    assert multipart._only_field(form(CURL), content_type, "file") is None
    assert read_field(form(CURL), content_type, "file") == CONTENT


@pytest.mark.parametrize(
    "body",
    [
        form(CURL)[:-10],
        form(CURL).replace(b"--boundary--", b"--boundary"),
        form(CURL.replace(b"file", b"picture", 1)),
        form(CURL, end=b"\r\n--boundary\r\n" + CURL + b"\r\n\r\n1\r\n--boundary--\r\n"),
        b"",
    ],
)
def test_an_invalid_form_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read_field(body, TYPE, "file")


@pytest.mark.parametrize(
    "disposition",
    [NAMED + b"; a=" + b"a" * 1000, NAMED + b'; a="' + b";" * 20 + b'"'],
    ids=["long", "with many semicolons"],
)
def test_an_excessive_content_disposition_is_refused(disposition: bytes) -> None:
    with pytest.raises(
        BadRequest, match=r"The Content-Disposition of a part of the form has [\d,]+ bytes, with \d+ semi"
    ):
        read_field(form(disposition), TYPE, "file")


def test_an_overlong_content_type_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"The Content-Type has 2,0.. bytes, with 2,000 semicolons; the limit is"):
        read_field(form(NAMED), TYPE + ";" * 1999, "file")


def test_a_part_has_one_name() -> None:
    with pytest.raises(BadRequest, match="more than one Content-Disposition"):
        read_field(form(NAMED + b"\r\n" + NAMED), TYPE, "file")
    assert read_fields(form(NAMED, end=b"\r\n" + form(OTHER)), TYPE, 2, BadRequest("")) == [
        ("file", CONTENT),
        ("more", CONTENT),
    ]

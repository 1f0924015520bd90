"""multipart/form-data, in memory. The framework's form parser writes files above 1 MiB to disk, which a read-only
container cannot do, and takes twice the time; the body is already bounded."""

import re

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import BadRequest, RequestError

MAX_PARTS = 32
"""The limit for one picture: the web page and curl send one part, and each costs time in the event loop."""
MAX_HEADER_BYTES, MAX_SEMICOLONS = 1024, 16
"""Limits of a header with parameters, such as the field's and the file's name. Parsing it takes 50 us, and time grows
with the square of the number of semicolons."""

BOUNDARY = re.compile(r"multipart/form-data; ?boundary=([\w'()+,./:=?-]{1,70})")
PART = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([\w.-]{1,64})"(?:; filename="[^"\r\n]{0,256}")?'
    rb"(?:\r\nContent-Type: [^\r\n]{0,256})?\r\n\r\n",
    re.IGNORECASE,
)
"""How curl, browsers and the usual libraries begin a part."""


class _Collector:
    """Gathers the content of each part by the name of its field."""

    def __init__(self, max_parts: int, too_many: RequestError) -> None:
        self._max_parts = max_parts
        self._too_many = too_many
        self.fields: list[tuple[str, bytearray]] = []
        self.complete = False
        self._disposed = False
        """Whether the part has already had its Content-Disposition."""
        self._header_name = b""
        self._header_value = b""

    def on_part_begin(self) -> None:
        if len(self.fields) == self._max_parts:
            raise self._too_many
        self.fields.append(("", bytearray()))
        self._disposed = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            if self._disposed:
                raise BadRequest("A part of the form has more than one Content-Disposition; it must have one.")
            self._disposed = True
            options = _parameters(self._header_value, "Content-Disposition of a part of the form")
            self.fields[-1] = (options.get(b"name", b"").decode("utf-8", "replace"), self.fields[-1][1])
        self._header_name = self._header_value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.fields[-1][1].extend(memoryview(data)[start:end])

    def on_end(self) -> None:
        self.complete = True


def _parameters(header: bytes, name: str) -> dict[bytes, bytes]:
    if len(header) > MAX_HEADER_BYTES or header.count(b";") > MAX_SEMICOLONS:
        raise BadRequest(
            f"The {name} has {len(header):,} bytes, with {header.count(b';'):,} semicolons; the limit is "
            f"{MAX_HEADER_BYTES:,} bytes and {MAX_SEMICOLONS} semicolons. Shorten it, or the file name in it."
        )
    return parse_options_header(header)[1]


def read_field(body: bytes, content_type: str, name: str) -> bytes:
    """The content of the one field `name` of a form.

    Raises:
        BadRequest: The form is malformed or cut short, or does not have exactly one such field.
    """
    if (content := _only_field(body, content_type, name)) is not None:
        return content
    too_many = BadRequest(f"The form has more than {MAX_PARTS} fields; send one field {name!r} with the picture.")
    fields = read_fields(body, content_type, MAX_PARTS, too_many)
    found = [content for field, content in fields if field == name]
    if len(found) != 1:
        names = ", ".join(repr(field) for field, _ in fields) or "none"
        raise BadRequest(f"The form must have exactly one field {name!r} with the picture; its fields are: {names}.")
    return found[0]


def _only_field(body: bytes, content_type: str, name: str) -> bytes | None:
    """The result of `read_field` in a twentieth of the time, for a form like nearly all forms; None for any other."""
    boundary = BOUNDARY.fullmatch(content_type)
    if boundary is None:
        return None
    delimiter = b"--" + boundary[1].encode()
    part = PART.match(body, len(delimiter)) if body.startswith(delimiter) else None
    if part is None or part[1] != name.encode():
        return None
    end = body.find(b"\r\n" + delimiter, part.end())
    if end < 0 or body[end + 2 + len(delimiter) :] not in (b"--\r\n", b"--"):
        return None
    return body[part.end() : end]


def read_fields(body: bytes, content_type: str, max_parts: int, too_many: RequestError) -> list[tuple[str, bytes]]:
    """The fields of a form in order, each with its name and content.

    Raises:
        BadRequest: The form is malformed or cut short.
        RequestError: `too_many`, as soon as there are more than `max_parts`.
    """
    options = _parameters(content_type.encode("latin-1"), "Content-Type")
    collector = _Collector(max_parts, too_many)
    try:
        parser = MultipartParser(
            options.get(b"boundary", b""),
            {
                "on_part_begin": collector.on_part_begin,
                "on_header_field": collector.on_header_field,
                "on_header_value": collector.on_header_value,
                "on_header_end": collector.on_header_end,
                "on_part_data": collector.on_part_data,
                "on_end": collector.on_end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        collector.complete = False
    if not options.get(b"boundary") or not collector.complete:
        raise BadRequest(
            "The multipart body is malformed or cut short. Send it as `curl -F file=@picture.png` does, with the "
            "boundary named in the Content-Type header, or send the picture itself as the body."
        )
    return [(name, bytes(content)) for name, content in collector.fields]

"""One request and its answer below the framework: headers as they came, the body within its limit, bytes to send.

The fast lane lives on these alone; a route of the framework hands its request's over and gets the same answer.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from app.errors import BodyTooLarge, RequestError
from app.statistics import Timing

Headers = Mapping[bytes, bytes]
"""By name in small letters, as ASGI has them."""

RawReply = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body, ready to be written."""

JSON = b"application/json"


class Reply(NamedTuple):
    """An answer, whole."""

    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    timing: Timing | None = None
    status: int = 200

    def head(self, request_id: str) -> list[tuple[bytes, bytes]]:
        """All headers."""
        return [
            (b"content-length", b"%d" % len(self.body)),
            (b"content-type", self.content_type),
            (b"x-request-id", request_id.encode()),
            *self.headers,
        ]

    def response(self, request: Request) -> Response:
        """The same as the framework has it."""
        if self.timing is not None:
            request.scope["state"]["timing"] = self.timing
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers}
        return Response(self.body, self.status, headers, self.content_type.decode())


def headers_of(request: Request) -> Headers:
    """The headers of a request of the framework."""
    return dict(request.headers.raw)


def text(headers: Headers, name: bytes, default: str = "") -> str:
    """A header in letters."""
    return headers[name].decode("latin-1") if name in headers else default


def refusal(error: RequestError, request_id: str) -> Reply:
    """The answer that an error is: its sentence, its status and its headers."""
    headers = {**error.headers}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    body = to_json({"error": str(error), "detail": error.detail, "request_id": request_id})
    raw = tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items())
    return Reply(body, headers=raw, status=error.status)


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """The body; one that announces too much is not read at all.

    Raises:
        BodyTooLarge: It has more than `max_bytes`.
        ClientDisconnect: The client has left before its end.
    """
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join((*parts, part)) if parts else part
        parts.append(part)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is too large; accepted are at most {max_bytes:,} bytes.",
        detail={"max_body_bytes": max_bytes},
    )

"""One request and its answer below the framework: raw headers, the body within its limit, bytes to send.

The fast lane uses nothing else; a route of the framework hands over its request's headers and body, and gets the same
answer.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Send

from app.errors import BodyTooLarge, Overloaded, RequestError, TooSlow, UnsupportedMedia
from app.statistics import Timing

Headers = Mapping[bytes, bytes]
"""Headers by lower-case name, as in ASGI."""

RawReply = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body, ready to be written."""

JSON = b"application/json"
LISTS = {b"accept", b"accept-encoding", b"content-encoding"}
"""The headers that are lists, of those that matter here."""
LIGHT_BYTES = 16 * 1024
"""How much the event loop may decode itself: five times a picture's raw pixels. The usual 2 KB take 0.1 ms."""
MAX_DIGITS = 20
"""A length of this many digits exceeds any memory; Python parses 4,300 digits at most."""


class Reply(NamedTuple):
    """A complete answer."""

    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    timing: Timing | None = None
    status: int = 200

    def head(self) -> list[tuple[bytes, bytes]]:
        """All headers but the request's id."""
        return [(b"content-length", b"%d" % len(self.body)), (b"content-type", self.content_type), *self.headers]

    async def send(self, send: Send) -> None:
        """Send it as an ASGI application does."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.head()})
        await send({"type": "http.response.body", "body": self.body})

    def response(self, request: Request) -> Response:
        """The answer as a response of the framework."""
        if self.timing is not None:
            request.scope["state"]["timing"] = self.timing
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers}
        return Response(self.body, self.status, headers, self.content_type.decode())


def headers_of(request: Request) -> Headers:
    """The headers of a request of the framework."""
    return combine(request.headers.raw)


def combine(lines: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Headers by name. Of repeated lines, those of a list are joined (RFC 9110, section 5.3); else the last counts."""
    headers = dict(lines)
    if len(headers) < len(lines):
        for name in LISTS & headers.keys():
            headers[name] = b", ".join(value for other, value in lines if other == name)
    return headers


def header_text(headers: Headers, name: bytes) -> str:
    """A header, decoded; empty if there is none."""
    return headers.get(name, b"").decode("latin-1")


def encoding_of(headers: Headers) -> str | None:
    """What the body is compressed with, in lower case; None for nothing."""
    encoding = header_text(headers, b"content-encoding").strip().lower()
    if encoding in ("", "identity"):
        return None
    return "gzip" if encoding == "x-gzip" else encoding  # its old name (RFC 9110, section 8.4.1.3)


def content_kind(headers: Headers) -> tuple[str, str]:
    """The content type, without its parameters and in full.

    Raises:
        UnsupportedMedia: The body is compressed.
    """
    if (encoding := encoding_of(headers)) is not None:
        raise UnsupportedMedia(
            f"The body has the content encoding {encoding!r}; send it without any.",
            headers={"Accept-Encoding": "identity"},
        )
    content_type = header_text(headers, b"content-type") or "application/octet-stream"
    return content_type.partition(";")[0].strip().lower(), content_type


def announced_bytes(headers: Headers) -> int | None:
    """The body's Content-Length, if there is a usable one."""
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() and len(length) < MAX_DIGITS else None


def error_reply(error: RequestError, request_id: str) -> Reply:
    """The answer for an error: its sentence, its status and its headers."""
    headers = {**error.headers}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    sentence = str(error).encode(errors="backslashreplace").decode()  # it may name a file, whose name need not be UTF-8
    body = to_json({"error": sentence, "detail": error.detail, "request_id": request_id})
    raw = tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items())
    return Reply(body, headers=raw, status=error.status)


class Intake:
    """Reads request bodies, for any event loop.

    Args:
        max_bytes: The limit for one body.
        max_waiting_bytes: The limit for all bodies together that are incomplete or waiting to be parsed.
        seconds: How long one body may take.
    """

    def __init__(self, *, max_bytes: int, max_waiting_bytes: int, seconds: float) -> None:
        self.max_bytes = max_bytes
        self._max_waiting_bytes = max_waiting_bytes
        self._seconds = seconds
        self._waiting_bytes = 0
        self._lock = threading.Lock()

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """Read the body, unless it announces that it is too large.

        Raises:
            BodyTooLarge: It has more than `max_bytes`.
            Overloaded: Other incomplete bodies hold too many bytes.
            TooSlow: It was not complete in time.
            ClientDisconnect: The client left before its end.
        """
        self._check(announced_bytes(headers) or 0)
        try:
            async with asyncio.timeout(self._seconds):
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body", False):
                    whole: bytes = message.get("body", b"")  # as nearly all bodies come
                    self._check(len(whole))
                    return whole
                return await self._join(message, receive)
        except TimeoutError:
            # The connection stays open and the rest is read and dropped, because after a reset the client might never
            # see the answer.
            raise TooSlow(
                f"The body was not complete within {self._seconds:g} seconds. Send it faster, or send less."
            ) from None

    async def _join(self, message: Message, receive: Receive) -> bytes:
        body = bytearray()
        try:
            while True:
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part: bytes = message.get("body", b"")
                self._count(len(part))
                body += part
                self._check(len(body))
                self._check_room(len(body))
                if not message.get("more_body", False):
                    return bytes(body)
                message = await receive()
        finally:
            self._count(-len(body))

    @contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        """Count a body as waiting.

        Raises:
            Overloaded: Other waiting bodies hold too many bytes.
        """
        self._count(size_bytes)
        try:
            self._check_room(size_bytes)
            yield
        finally:
            self._count(-size_bytes)

    def _count(self, size_bytes: int) -> None:
        with self._lock:
            self._waiting_bytes += size_bytes

    def _check_room(self, own_bytes: int) -> None:
        if self._waiting_bytes > max(self._max_waiting_bytes, own_bytes):  # a body alone is always accepted
            raise Overloaded(
                "The service is receiving as many bytes as it accepts at once. Try again in 1 second.",
                retry_after_seconds=1,
            )

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise BodyTooLarge(
                f"The request body is too large; the limit is {self.max_bytes:,} bytes. Send smaller or fewer "
                "pictures.",
                detail={"max_body_bytes": self.max_bytes},
            )

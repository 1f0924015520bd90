"""uvicorn's HTTP protocol, cheaper where it counts.

What one turn of the event loop writes to a connection leaves in one piece: uvicorn writes the head of an answer and its
body apart, and each is a system call that wakes the client. And under too much load, when refusals are most of the
work, they are given before uvicorn makes a task of each.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.exchange import RawReply


class Joining:
    """A transport that writes in the next turn of the event loop, or before it closes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()


class Protocol(HttpToolsProtocol):
    """Of an application with a method `refuse`."""

    _refusal: RawReply | None = None
    _refuse: Callable[[str, Iterable[tuple[bytes, bytes]]], RawReply | None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Joining(transport)))
        self._refuse = cast(Any, self.config.app).refuse

    def on_headers_complete(self) -> None:
        in_turn = self.cycle is None or self.cycle.response_complete  # not behind another of the same connection
        if in_turn and not self.expect_100_continue and self.parser.get_method() == b"POST":
            self._refusal = self._refuse(self.url.decode("latin-1"), self.headers)
        if self._refusal is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refusal is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refusal is None:
            super().on_message_complete()
            return
        (status, headers, body), self._refusal = self._refusal, None
        headers = [*self.server_state.default_headers, *headers]
        keep_alive = self.parser.should_keep_alive() and (b"connection", b"close") not in headers
        if not keep_alive:
            headers.append((b"connection", b"close"))
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, body))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

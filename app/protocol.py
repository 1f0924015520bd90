"""uvicorn's HTTP protocol, cheaper where it counts.

All that one iteration of the event loop writes to a connection leaves in one piece: uvicorn writes the head and the
body of an answer separately, and each write is a system call that wakes the client. And under overload, when refusals
are most of the work, a request is refused before uvicorn creates a task for it.

It ignores offers to switch protocols, and does not wait for ever for the head of a request, or for a body that nobody
reads.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.errors import BadRequest, HeadTooLarge, RequestError, TooSlow
from app.exchange import LIGHT_BYTES, RawReply

MAX_HEAD_BYTES = 64 * 1024
"""A longer head is refused, as are more bytes than this after a chunked body: nothing else would stop them."""
MAX_PIPELINED = 64
"""How many requests may wait behind a running one. Any more are dropped, and the connection ends after these: a client
that does not wait for answers can send fourteen thousand at once."""
OFFER = frozenset({b"connection", b"upgrade", b"http2-settings"})
"""The headers in which a client offers to switch to another protocol."""


class Turnstile:
    """Lets in at most `PER_ITERATION` requests per iteration of the event loop; the others follow in order.

    Otherwise one would take in all that has arrived: a third of a second for a wave of a thousand requests. A health
    check, which takes a few iterations from its connection to its answer, would wait that long for each.
    """

    PER_ITERATION = 16

    def __init__(self) -> None:
        self._room = self.PER_ITERATION
        self._scheduled = False
        self._waiting: deque[Callable[[], None]] = deque()

    def enter(self, come_in: Callable[[], None]) -> bool:
        """Whether a request may come in at once; if not, `come_in` is called when it may."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next_iteration)
        if self._waiting or not self._room:
            self._waiting.append(come_in)
            return False
        self._room -= 1
        return True

    def _next_iteration(self) -> None:
        self._room = self.PER_ITERATION
        self._scheduled = bool(self._waiting)
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._next_iteration)
        while self._waiting and self._room:
            self._room -= 1
            self._waiting.popleft()()


class CoalescingTransport:
    """A transport that writes in the next iteration of the event loop, or before it closes."""

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
        if self._parts and not self._transport.is_closing():  # else the client has left
            self._transport.write(b"".join(self._parts))
        self._parts.clear()


class NoUpgradeParser:
    """A parser that stays with HTTP/1.1 when a client offers another protocol, as RFC 9110, section 7.8 allows.

    httptools alone assumes that the other protocol follows the head: it loses the body, or reads it as the next
    request. Java's own client and `curl --http2` offer HTTP/2 with their first request.
    """

    def __init__(self, protocol: "HttpProtocol") -> None:
        self._protocol = protocol
        self._parser = HttpRequestParser(protocol)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except HttpParserUpgrade as offer:
                if (head := self._protocol.take_head_without_offer()) is None:
                    return  # CONNECT, which the application refuses; the rest would be for the tunnel
                rest = rest[offer.args[0] :]
                self._parser = HttpRequestParser(self._protocol)  # after `close` the old one takes nothing more
                self._parser.feed_data(head)


Refuse = Callable[[str, Sequence[tuple[bytes, bytes]]], Callable[[], RawReply] | None]
"""Takes a POST request's path and headers; returns a function that refuses it at its end, or None to let it in."""
Reject = Callable[[RequestError], RawReply]
"""Returns the answer to bytes that are not a valid request."""


class HttpProtocol(HttpToolsProtocol):
    """Serves connections that share a turnstile. The application decides what to refuse, and how."""

    _held = b""
    _early_reply: Callable[[], RawReply] | None = None
    """How to refuse the request being read, called at its end; None to let it in."""
    _head_without_offer: bytes | None = None
    _running: RequestResponseCycle | None = None
    """The request that the application is answering; uvicorn's `cycle` is the latest, which may be queued behind it."""
    _undigested_bytes = 0
    """How much has arrived since a head was last complete or part of a body arrived."""

    def __init__(self, *args: Any, turnstile: Turnstile, refuse: Refuse, reject: Reject, **options: Any) -> None:
        super().__init__(*args, **options)
        self._turnstile = turnstile
        self._refuse = refuse
        self._reject_with = reject

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, CoalescingTransport(transport)))
        self.parser = cast(Any, NoUpgradeParser(self))
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        # What begins like this is usually a whole request; a longer one is not decoded by the event loop.
        if not data.startswith(b"POST") or len(data) > LIGHT_BYTES or self._turnstile.enter(self._come_in):
            self._take(data)
        else:
            self.transport.pause_reading()
            self._held = data

    def _come_in(self) -> None:
        data, self._held = self._held, b""
        if data and not self.transport.is_closing():
            self.transport.resume_reading()
            self._take(data)

    def _take(self, data: bytes) -> None:
        if self._undigested_bytes > MAX_HEAD_BYTES:
            self._reject(HeadTooLarge("The head of the request is too long; send fewer or shorter headers."))
            return
        self._undigested_bytes += len(data)
        # uvicorn stops the clock at the first byte of a head. Here it runs on until the head is complete.
        clock, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)
        if clock is not None and self._undigested_bytes:
            self.timeout_keep_alive_task = clock
            return
        if clock is not None:
            clock.cancel()
        if self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._start_clock()  # for the rest of a body that nobody reads: its request has been refused or answered

    def _start_clock(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Called when the clock has run down."""
        if self._held:  # a request arrived in time and waits its turn
            self._start_clock()
        elif self._undigested_bytes and not self.transport.is_closing():
            seconds = f"{self.timeout_keep_alive:g} seconds"
            self._reject(TooSlow(f"The head of the request was not complete within {seconds}; send it faster."))
        elif self.transport.get_write_buffer_size():  # nobody reads the answer, and closing would wait for that
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._unset_keepalive_if_required()  # uvicorn does so only after a close, not a reset

    def shutdown(self) -> None:
        self._come_in()
        super().shutdown()

    def take_head_without_offer(self) -> bytes | None:
        """The head of a request that offered another protocol, without the offer; None the second time."""
        head, self._head_without_offer = self._head_without_offer, None
        return head

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value.rstrip(b" \t"))  # RFC 9110, section 5.5; llhttp strips only the front

    def on_headers_complete(self) -> None:
        self._undigested_bytes = 0
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):  # RFC 9112, section 3.2
            raise BufferError  # which the parser reports as bytes it cannot read
        method: bytes = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
            lines += [b"%b: %b" % header for header in self.headers if header[0] not in OFFER]
            options = [option for name, value in self.headers if name == b"connection" for option in value.split(b",")]
            lines += [b"connection: " + option for option in options if option.strip().lower() not in OFFER]
            self._head_without_offer = b"\r\n".join([*lines, b"\r\n"])
            return
        in_turn = self.cycle is None or self.cycle.response_complete  # not behind another on the same connection
        if in_turn and not self.expect_100_continue and method == b"POST":
            self._early_reply = self._refuse(self.url.decode("latin-1"), self.headers)
        if len(self.pipeline) >= MAX_PIPELINED:
            raise BufferError
        if self._early_reply is None:
            super().on_headers_complete()
            if not self.pipeline:
                self._running = self.cycle
        self.headers = []  # so that trailers do not join the head's (RFC 9110, section 6.5.1)

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        self._undigested_bytes = 0
        if self._early_reply is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._undigested_bytes = 0
        if self._head_without_offer is not None:
            return
        if self._early_reply is None:
            super().on_message_complete()
            return
        reply, self._early_reply = self._early_reply(), None
        modern = self.parser.get_http_version() != "1.0"  # HTTP/1.0 clients wait for the connection to close
        self._write(reply, keep_alive=modern and self.parser.should_keep_alive())

    def send_400_response(self, _msg: str) -> None:
        """Called by uvicorn when the bytes are not HTTP. Its own answer would be plain text."""
        sentence = (
            "The bytes are not an HTTP request, or break its rules. Send HTTP/1.1 without TLS, with the path in ASCII, "
            "one Host, at most one Content-Length, and each chunk as long as it says."
        )
        self._reject(BadRequest(sentence))

    def _reject(self, error: RequestError) -> None:
        if self.pipeline and self.cycle.more_body:  # a request ahead of the broken one is still unanswered
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else cast(RequestResponseCycle, self._running)
        if self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete):
            self.cycle.keep_alive = False  # the request ahead is answered first, then nothing more
            self.flow.pause_reading()
            return
        self._write(self._reject_with(error), keep_alive=False)

    def _write(self, reply: RawReply, *, keep_alive: bool) -> None:
        status, headers, body = reply
        headers = [*self.server_state.default_headers, *headers]
        keep_alive = keep_alive and (b"connection", b"close") not in headers
        if not keep_alive:
            headers.append((b"connection", b"close"))
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, body))
        if not keep_alive:
            self.transport.close()

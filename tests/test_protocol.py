"""Below the application: refusals in turn, after the whole body, the connection kept or closed as the client wants;
a wave of requests admitted gradually."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.errors import RequestError
from app.exchange import LIGHT_BYTES, RawReply
from app.protocol import MAX_HEAD_BYTES, MAX_PIPELINED, CoalescingTransport, HttpProtocol, Turnstile

pytestmark = pytest.mark.anyio
POST = b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\nx-request-id: %b\r\n%b\r\nhello"
SECONDS = 10


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both loops that uvicorn may run on: their transports differ."""
    return "asyncio", {"use_uvloop": request.param}


class Application:
    """Answers with the length of the body, and refuses while it is full."""

    def __init__(self) -> None:
        self.full = False
        self.called = 0
        self.paths: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def refuse(self, _path: str, headers: Iterable[tuple[bytes, bytes]]) -> Callable[[], RawReply] | None:
        body = b"no, " + dict(headers).get(b"x-request-id", b"")
        answer = 429, [(b"content-length", b"%d" % len(body)), (b"retry-after", b"1")], body
        return (lambda: answer) if self.full else None

    def reject(self, error: RequestError) -> RawReply:
        body = str(error).encode()
        return error.status, [(b"content-length", b"%d" % len(body))], body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called += 1
        self.paths.append(scope["path"])
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await self.gate.wait()
        length = b"%d" % len(body)
        headers = [(b"content-length", b"%d" % len(length))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": length})


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def listening(
    application: Application, patience: float = SECONDS
) -> AsyncIterator[tuple[Callable[[], Awaitable[Connection]], ServerState]]:
    """How to connect a client, and the server's state."""
    config = uvicorn.Config(
        application, http=HttpProtocol, log_config=None, proxy_headers=False, lifespan="off", ws="none"
    )
    config.timeout_keep_alive = patience  # type: ignore[assignment]
    config.load()
    state, turnstile = ServerState(), Turnstile()
    loop = asyncio.get_running_loop()
    refuse, reject = application.refuse, application.reject
    protocol = partial(HttpProtocol, config, state, {}, turnstile=turnstile, refuse=refuse, reject=reject)
    async with await loop.create_server(protocol, "127.0.0.1", 0) as server:
        clients = []

        async def connect() -> Connection:
            clients.append(await asyncio.open_connection(*server.sockets[0].getsockname()))
            return clients[-1]

        try:
            yield connect, state
        finally:
            for _, writer in clients:
                writer.close()
            while state.connections:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def connected(application: Application, patience: float = SECONDS) -> AsyncIterator[Connection]:
    async with listening(application, patience) as (connect, _):
        yield await connect()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Status, head and body of the next answer."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head.split()[1]), head, await asyncio.wait_for(reader.readexactly(length), SECONDS)


async def test_a_refusal_leaves_the_connection_open_for_the_next_request() -> None:
    application = Application()
    async with connected(application) as (reader, writer):
        for full, expected in [(True, (429, b"no, 7")), (False, (200, b"5")), (True, (429, b"no, 7"))]:
            application.full = full
            writer.write(POST % (b"7", b""))
            status, head, body = await answer(reader)
            assert (status, body) == expected
            assert (b"retry-after: 1\r\n" in head) is full
            assert b"connection:" not in head
    assert application.called == 1


async def test_a_refusal_waits_for_the_whole_body() -> None:
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write((POST % (b"7", b""))[:-1])
        early = asyncio.create_task(reader.read(1))
        await asyncio.sleep(0.05)
        assert not early.done()
        application.full = False  # it was asked when the head came
        writer.write(b"o")
        assert await asyncio.wait_for(early, SECONDS) == b"H"
        assert (await answer(reader))[2] == b"no, 7"
    assert application.called == 0


async def test_connection_close_is_honoured_after_a_refusal() -> None:
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write(POST % (b"7", b"connection: close\r\n"))
        status, head, _ = await answer(reader)
        assert status == 429
        assert b"connection: close\r\n" in head
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


async def test_an_overlong_head_is_refused() -> None:
    application = Application()
    async with connected(application) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n")
        for number in range(MAX_HEAD_BYTES // 1024 + 1):
            await asyncio.sleep(0.001)  # so that each comes in a piece of its own
            writer.write(b"x-%d: %b\r\n" % (number, b"x" * 1024))
        status, head, body = await answer(reader)
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    assert status == 431
    assert b"connection: close" in head
    assert body == b"The head of the request is too long; send fewer or shorter headers."
    assert application.called == 0


@pytest.mark.parametrize("before", [b"", POST % (b"7", b"")], ids=["the first request", "a later one"])
async def test_a_head_sent_a_byte_at_a_time_times_out_with_408(before: bytes) -> None:
    application = Application()
    async with listening(application, patience=0.2) as (connect, state):
        reader, writer = await connect()
        while not state.connections:
            await asyncio.sleep(0)
        (connection,) = state.connections
        if before:
            writer.write(before)
            assert (await answer(reader))[0] == 200
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\nx: ")
        async with asyncio.timeout(SECONDS):
            while not connection.transport.is_closing():  # a byte after that, and all would be reset
                writer.write(b"y")
                await asyncio.sleep(0.01)
        told = await asyncio.wait_for(reader.read(), SECONDS)
        assert told.startswith(b"HTTP/1.1 408 ")
        assert told.endswith(b"The head of the request was not complete within 0.2 seconds; send it faster.")
    assert application.called == bool(before)


async def test_an_idle_connection_is_closed() -> None:
    async with connected(Application(), patience=0.05) as (reader, _):
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


async def test_the_head_timeout_does_not_cover_slow_bodies_or_answers() -> None:
    application = Application()
    async with connected(application, patience=0.05) as (reader, writer):
        writer.write((POST % (b"7", b""))[:-5])
        await asyncio.sleep(0.2)
        application.gate.clear()
        writer.write(b"hello" + POST[:20])  # and the next head has begun
        await asyncio.sleep(0.2)
        application.gate.set()
        assert (await answer(reader))[2] == b"5"
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


CHUNKS = b"POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n"


async def send_in_pieces(writer: asyncio.StreamWriter) -> None:
    for piece in CHUNKS:
        writer.write(piece)
        await asyncio.sleep(0.02)


async def test_a_refused_request_leaves_no_timeout_running() -> None:
    application = Application()
    application.full = True
    async with connected(application, patience=0.4) as (reader, writer):
        await send_in_pieces(writer)
        assert (await answer(reader))[0] == 429
        application.full = False
        application.gate.clear()
        await send_in_pieces(writer)
        await asyncio.sleep(0.6)
        application.gate.set()
        assert (await answer(reader))[2] == b"5"


@pytest.mark.parametrize("full", [True, False])
async def test_the_last_chunk_of_a_body_is_not_taken_for_a_head(full: bool) -> None:
    application = Application()
    application.full = full
    async with connected(application, patience=0.2) as (reader, writer):
        await send_in_pieces(writer)
        assert (await answer(reader))[0] == (429 if full else 200)
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""  # no error about a head


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nhost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHOST:\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", 400),
    ],
)
async def test_a_request_must_have_exactly_one_host(head: bytes, status: int) -> None:
    """RFC 9112, section 3.2; before HTTP/1.1 it may have none."""
    async with connected(Application()) as (reader, writer):
        writer.write(head)
        assert (await answer(reader))[0] == status


async def test_trailing_white_space_is_stripped_from_header_values() -> None:
    """RFC 9110, section 5.5; the parser strips only the white space in front."""
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write(POST % (b"abc \t ", b""))
        assert (await answer(reader))[2] == b"no, abc"
        application.full = False
        writer.write((POST % (b"abc", b"expect: 100-continue \r\n"))[: -len(b"hello")])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"hello")
        assert (await answer(reader))[0] == 200


async def test_invalid_bytes_close_the_connection_only_after_earlier_answers() -> None:
    application = Application()
    application.gate.clear()
    async with connected(application) as (reader, writer):
        writer.write(2 * (POST % (b"7", b"")) + b"no request\r\n\r\n")
        while not application.called:
            await asyncio.sleep(0)
        writer.write(b"nor this\r\n\r\n")
        application.gate.set()
        assert [(await answer(reader))[2] for _ in range(2)] == [b"5", b"5"]
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


async def test_reading_stops_after_invalid_bytes() -> None:
    application = Application()
    application.gate.clear()
    async with listening(application) as (connect, state):
        reader, writer = await connect()
        writer.write(POST % (b"7", b""))
        while not application.called:
            await asyncio.sleep(0)
        (connection,) = state.connections
        assert connection.transport.is_reading()
        writer.write(b"no request\r\n\r\n")
        async with asyncio.timeout(SECONDS):
            while connection.transport.is_reading():
                await asyncio.sleep(0.001)
        application.gate.set()
        assert (await answer(reader))[2] == b"5"


@pytest.mark.parametrize("before", [1, 2])
async def test_a_broken_body_does_not_affect_answers_to_earlier_requests(before: int) -> None:
    application = Application()
    application.gate.clear()
    async with connected(application) as (reader, writer):
        writer.write(before * (POST % (b"7", b"")) + CHUNKS[0] + b"no length\r\n")
        while not application.called:
            await asyncio.sleep(0)
        application.gate.set()
        assert [(await answer(reader))[2] for _ in range(before)] == before * [b"5"]
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    assert application.called == before


class Waiting(Application):
    """Answers some requests at once, and the next when the client has left."""

    left = False

    def __init__(self, answered: int) -> None:
        super().__init__()
        self.answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.called < self.answered:
            await super().__call__(scope, receive, send)
            return
        self.called += 1
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"hi"})


@pytest.mark.parametrize(("answered", "requests"), [(0, 1), (0, 3), (1, 3)])
async def test_a_disconnect_ends_the_running_request_and_drops_queued_ones(
    answered: int, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    application = Waiting(answered)
    async with connected(application) as (_, writer):
        writer.write(requests * (POST % (b"7", b"")))
        while application.called <= answered:
            await asyncio.sleep(0)
        writer.close()
        async with asyncio.timeout(SECONDS):
            while not application.left:
                await asyncio.sleep(0.001)
    assert application.called == answered + 1
    assert not caplog.records


class Generous(Application):
    """Answers with more than the system buffers if the client does not read."""

    BODY = bytes(2**26)

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"%d" % len(self.BODY))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.BODY})
        self.called += 1


async def test_a_connection_whose_client_does_not_read_is_closed() -> None:
    application = Generous()
    async with listening(application, patience=0.1) as (connect, state):
        await connect()
        _, writer = await connect()
        writer.write(POST % (b"7", b""))
        async with asyncio.timeout(SECONDS):
            while not application.called or state.connections:
                await asyncio.sleep(0.01)


async def test_nothing_is_written_to_a_closing_transport() -> None:
    class Transport(asyncio.Transport):
        closing = False
        written = b""

        def is_closing(self) -> bool:
            return self.closing

        def write(self, data: Any) -> None:
            self.written += data

    transport = Transport()
    joining = CoalescingTransport(transport)
    for closing in (False, True):
        joining.write(b"answer")
        transport.closing = closing
        await asyncio.sleep(0)
        assert transport.written == b"answer"


async def test_trailers_are_not_added_to_the_headers() -> None:
    """The application holds the very list that the parser fills."""
    seen = []

    class Looking(Application):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["headers"])
            await super().__call__(scope, receive, send)

    async with connected(Looking()) as (reader, writer):
        writer.write(CHUNKS[0] + CHUNKS[1] + b"0\r\ncontent-encoding: gzip\r\n\r\n")
        assert (await answer(reader))[2] == b"5"
    assert seen == [[(b"host", b"test"), (b"transfer-encoding", b"chunked")]]


class Hasty(Application):
    """Answers before it has read the body."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"hi"})


@pytest.mark.parametrize("full", [True, False], ids=["refused", "answered"])
async def test_an_incomplete_unread_body_is_not_waited_for(full: bool) -> None:
    application = Hasty()
    application.full = full
    async with connected(application, patience=0.1) as (reader, writer):
        writer.write((POST % (b"7", b""))[:-5])
        if not full:
            assert (await answer(reader))[2] == b"hi"
        writer.write(b"hel")
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


async def test_a_reset_connection_leaves_no_timer_running() -> None:
    async with listening(Application()) as (connect, state):
        _, writer = await connect()
        while not state.connections:
            await asyncio.sleep(0)
        (connection,) = state.connections
        clock = connection.timeout_keep_alive_task  # type: ignore[union-attr]
        assert clock is not None
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        while state.connections:
            await asyncio.sleep(0.001)
        assert clock.cancelled()


async def test_many_short_requests_do_not_count_as_one_long_head() -> None:
    async with connected(Application()) as (reader, writer):
        for number in range(40):
            writer.write(POST % (b"x" * 2048, b""))
            status, _, body = await answer(reader)
            assert (number, status, body) == (number, 200, b"5")


async def test_a_pipelined_request_is_answered_after_the_running_one() -> None:
    application = Application()
    application.gate.clear()
    async with connected(application) as (reader, writer):
        writer.write(POST % (b"1", b""))
        while not application.called:
            await asyncio.sleep(0.01)
        application.full = True
        writer.write(POST % (b"2", b""))
        await asyncio.sleep(0.05)
        application.gate.set()
        assert [(await answer(reader))[0] for _ in range(2)] == [200, 200]  # the second had to wait for its turn


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("offered", [b"h2c", b"websocket"])
async def test_a_protocol_upgrade_offer_is_ignored(offered: bytes, full: bool) -> None:
    """Java's own client and `curl --http2` offer HTTP/2 with their first request. It and the next stay intact."""
    application = Application()
    application.full = full
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAMAAABk\r\n" % offered
    async with connected(application) as (reader, writer):
        both = POST % (b"7", offer) + POST % (b"7", b"")
        for cut in (len(both), both.index(b"hello"), 30, both.index(b"lo")):  # in one piece or in two
            for part in (both[:cut], both[cut:]):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
            for _ in range(2):
                status, _, body = await answer(reader)
                assert (status, body) == ((429, b"no, 7") if full else (200, b"5"))
    assert application.called == (0 if full else 8)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("connection", [b"Upgrade, close", b"close\r\nconnection: upgrade"])
async def test_an_upgrade_offer_with_connection_close_is_answered_and_closed(connection: bytes, version: bytes) -> None:
    async with connected(Application()) as (reader, writer):
        offer = b"connection: %b\r\nupgrade: h2c\r\n" % connection
        writer.write((POST % (b"7", offer)).replace(b"1.1", version))
        status, head, body = await answer(reader)
        assert (status, body) == (200, b"5")
        assert b"connection: close" in head
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


async def test_many_pipelined_upgrade_offers_are_all_answered() -> None:
    count = MAX_PIPELINED
    async with connected(Application()) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n" * count)
        assert {(await answer(reader))[0] for _ in range(count)} == {200}


@pytest.mark.parametrize("offer", [b"", b"connection: upgrade\r\nupgrade: a\r\n"], ids=["plain", "upgrade"])
async def test_only_the_first_of_too_many_pipelined_requests_are_answered(offer: bytes) -> None:
    application = Application()
    application.gate.clear()
    async with connected(application) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n%b\r\n" % offer * 1500)
        while not application.called:
            await asyncio.sleep(0)
        application.gate.set()
        assert {(await answer(reader))[0] for _ in range(1 + MAX_PIPELINED)} == {200}
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    assert application.called == 1 + MAX_PIPELINED


async def test_connect_is_treated_as_an_ordinary_request(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(Application()) as (reader, writer):
        writer.write(b"CONNECT /other HTTP/1.1\r\nhost: test\r\n\r\n")
        assert (await answer(reader))[0] == 200  # from the application
    assert not caplog.records


async def test_an_http_1_0_connection_closes_after_a_refusal() -> None:
    """HTTP/1.0: the answer ends where the connection does."""
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write((POST % (b"7", b"connection: keep-alive\r\n")).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = (await asyncio.wait_for(reader.read(), SECONDS)).partition(b"\r\n\r\n")
    assert (head.split()[1], body) == (b"429", b"no, 7")
    assert b"connection: close" in head


async def test_expect_100_continue_bypasses_the_early_refusal() -> None:
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write((POST % (b"1", b"expect: 100-continue\r\n"))[:-5])
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)).startswith(b"HTTP/1.1 100")
        writer.write(b"hello")
        assert (await answer(reader))[0] == 200


WAVE = 2 * Turnstile.PER_ITERATION + 5


async def test_the_turnstile_admits_a_limited_number_per_turn_in_order() -> None:
    turnstile, room = Turnstile(), Turnstile.PER_ITERATION
    come_in: list[int] = []
    let_in = [turnstile.enter(partial(come_in.append, index)) for index in range(WAVE)]
    assert let_in == [True] * room + [False] * (WAVE - room)
    await asyncio.sleep(0)
    assert come_in == list(range(room, 2 * room))
    assert not turnstile.enter(partial(come_in.append, WAVE))  # no overtaking
    await asyncio.sleep(0)
    assert come_in == list(range(room, WAVE + 1))
    assert turnstile.enter(lambda: None)


async def test_an_idle_turnstile_schedules_no_turns() -> None:
    class Counting(Turnstile):
        iterations = 0

        def _next_iteration(self) -> None:
            self.iterations += 1
            super()._next_iteration()

    turnstile = Counting()
    assert turnstile.enter(lambda: None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert turnstile.iterations == 1


@pytest.mark.parametrize(
    "light",
    [
        b"GET /other HTTP/1.1\r\nhost: test\r\n\r\n",
        b"POST /other HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % LIGHT_BYTES + bytes(LIGHT_BYTES),
    ],
    ids=["GET", "light body"],
)
async def test_light_requests_overtake_a_burst_of_others(light: bytes) -> None:
    application = Application()
    async with listening(application) as (connect, _):
        clients = [await connect() for _ in range(WAVE)]
        reader, writer = await connect()
        for _, waving in clients:
            waving.write(POST % (b"7", b""))
        writer.write(light)
        assert (await answer(reader))[0] == 200
        assert {(await answer(reader))[2] for reader, _ in clients} == {b"5"}
    assert application.paths.count("/") == WAVE
    assert application.paths.index("/other") <= Turnstile.PER_ITERATION


async def wave(application: Application, connect: Callable[[], Awaitable[Connection]]) -> list[Connection]:
    """A burst of requests, some already admitted."""
    clients = [await connect() for _ in range(WAVE)]
    for _, writer in clients:
        writer.write(POST % (b"7", b""))
    while not application.called:
        await asyncio.sleep(0)
    return clients


async def test_the_keep_alive_timeout_does_not_end_requests_waiting_for_admission() -> None:
    application = Application()
    async with listening(application) as (connect, state):
        clients = await wave(application, connect)
        held = [connection for connection in state.connections if connection._held]  # type: ignore[union-attr]
        assert held
        for connection in held:
            connection.timeout_keep_alive_handler()  # type: ignore[union-attr]
        assert {(await answer(reader))[2] for reader, _ in clients} == {b"5"}


async def test_requests_waiting_for_admission_are_answered_before_shutdown() -> None:
    application = Application()
    async with listening(application) as (connect, state):
        clients = await wave(application, connect)
        assert application.called < WAVE
        for connection in list(state.connections):
            connection.shutdown()
        for reader, _ in clients:
            status, _, body = await answer(reader)
            assert (status, body) == (200, b"5")
            assert await asyncio.wait_for(reader.read(), SECONDS) == b""

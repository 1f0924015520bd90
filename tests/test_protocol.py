"""Refusals below the application: in turn, after the whole body, and the connection left as the client wants it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.exchange import RawReply
from app.protocol import Protocol

pytestmark = pytest.mark.anyio
POST = b"POST / HTTP/1.1\r\ncontent-length: 5\r\nx-request-id: %b\r\n%b\r\nhello"
SECONDS = 10


class Application:
    """Answers with the length of the body, and refuses while it is full."""

    def __init__(self) -> None:
        self.full = False
        self.called = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def refuse(self, _path: str, headers: Iterable[tuple[bytes, bytes]]) -> Callable[[], RawReply] | None:
        body = b"no, " + dict(headers)[b"x-request-id"]
        answer = 429, [(b"content-length", b"%d" % len(body)), (b"retry-after", b"1")], body
        return (lambda: answer) if self.full else None

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self.called += 1
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"%d" % len(body)})


@asynccontextmanager
async def connected(application: Application) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(application, http=Protocol, log_config=None, proxy_headers=False, lifespan="off", ws="none")
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: Protocol(config, state, {}), "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer
        writer.close()


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


async def test_a_client_that_wants_no_more_is_let_go() -> None:
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write(POST % (b"7", b"connection: close\r\n"))
        status, head, _ = await answer(reader)
        assert status == 429
        assert b"connection: close\r\n" in head
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""


async def test_what_comes_behind_a_request_that_runs_is_answered_behind_it() -> None:
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
async def test_an_offer_of_another_protocol_is_not_taken_up(offered: bytes, full: bool) -> None:
    """Java's own client and `curl --http2` offer HTTP/2 with their first request. It and what follows stay whole."""
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


async def test_who_asks_before_sending_is_told_by_the_application() -> None:
    application = Application()
    application.full = True
    async with connected(application) as (reader, writer):
        writer.write((POST % (b"1", b"expect: 100-continue\r\n"))[:-5])
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)).startswith(b"HTTP/1.1 100")
        writer.write(b"hello")
        assert (await answer(reader))[0] == 200

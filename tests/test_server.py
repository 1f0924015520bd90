"""How a server stops, and what it needs to start; in this process, where a test can intervene."""

import asyncio
import gc
import http.client
import signal
import socket
from collections.abc import Iterator
from functools import partial

import pytest
import uvicorn

from app.application import Application
from app.main import create_app
from app.protocol import HttpProtocol, Turnstile
from app.server import Server
from app.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def garbage() -> Iterator[None]:
    """Undo what a server sets for its process: garbage collector and SIGHUP."""
    threshold, handler = gc.get_threshold(), signal.getsignal(signal.SIGHUP)
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)
    signal.signal(signal.SIGHUP, handler)


def server_of(app: Application) -> Server:
    config = uvicorn.Config(
        app,
        http=partial(HttpProtocol, turnstile=Turnstile(), refuse=app.refuse, reject=app.reject),  # type: ignore[arg-type]
        log_config=None,
        timeout_graceful_shutdown=60,
    )
    config.load()
    running = Server(config, app.service, lambda: None)
    running.lifespan = config.lifespan_class(config)
    return running


async def test_connections_not_yet_accepted_when_the_socket_closes_are_answered(settings: Settings, png: bytes) -> None:
    running = server_of(create_app(settings))
    listener = socket.create_server(("127.0.0.1", 0))
    await running.startup([listener])
    host, port = listener.getsockname()
    clients = [http.client.HTTPConnection(host, port, timeout=60) for _ in range(5)]
    for client in clients:
        client.connect()  # the event loop does not run meanwhile, so that none of them is accepted

    def ask() -> list[int]:
        for client in clients:
            client.request("POST", "/predict", png, {"content-type": "image/png"})
        statuses = [client.getresponse().status for client in clients]
        for client in clients:
            client.close()
        return statuses

    statuses, _ = await asyncio.gather(asyncio.to_thread(ask), running.shutdown([listener]))
    assert statuses == [200] * 5
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))


async def test_a_signal_during_startup_stops_the_service(settings: Settings) -> None:
    """A thread that computes while the interpreter ends aborts the process."""
    app = create_app(settings)
    running = server_of(app)
    running.handle_exit(signal.SIGTERM, None)
    await running.startup([])
    assert not running.started
    assert not app.service.running


async def test_responses_carry_connection_close_while_draining(settings: Settings) -> None:
    running = server_of(create_app(settings))
    running.started = True
    running.handle_exit(signal.SIGTERM, None)
    for tick in (1, 10):  # every tenth makes the headers anew
        assert not await running.on_tick(tick)
        assert (b"connection", b"close") in running.server_state.default_headers

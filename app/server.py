"""One process that serves: an application behind uvicorn, until a signal says stop."""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from app.errors import RequestError, StartError
from app.link import COULD_NOT_START, Link, ReadyNotice
from app.main import create_app
from app.protocol import HttpProtocol, Turnstile
from app.service import Service
from app.settings import Settings

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 0.2
"""How long a connection that was accepted just as the socket closed has to send its request."""
BROKEN = 70
"""The exit code of a process whose engine has failed (EX_SOFTWARE of sysexits.h)."""


class Server(uvicorn.Server):
    """uvicorn alone closes its socket at the first signal, which fails what a load balancer still sends.

    Here SIGTERM first makes /readyz answer 503 while all else goes on, and closes the socket after `drain_seconds`.
    Ctrl-C or a second signal closes it at once. However many come, what was admitted is answered; the exit code is 0.

    SIGHUP has the weights file read anew. When no batch can be run any more, the server stops with another exit code.

    Args:
        on_started: Called when the socket is open.
    """

    def __init__(self, config: uvicorn.Config, service: Service, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_started = on_started
        self._close_at = math.inf
        self._draining_logged = False
        self._reloads: set[asyncio.Task[None]] = set()
        """Kept here, or they might be garbage-collected before their end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.start()
        except StartError as error:  # raised in the application's lifespan, it would be a traceback
            print(error, file=sys.stderr)
            self.should_exit = True
            return
        try:
            for listener in sockets or ():
                listener.listen(self.config.backlog)  # here, because uvloop does not report a failure
        except OSError as error:  # it is bound, but another program has begun to listen there
            print(f"The service cannot listen: {error.strerror}. Choose another port with --port.", file=sys.stderr)
            self.should_exit = True
        if self.should_exit:  # or a signal has come meanwhile
            await self._service.close()  # a thread that still computes when the interpreter ends would abort it
            return
        # What is loaded by now stays; otherwise a full garbage collection stops all requests for 60 ms now and then.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000)  # a request leaves no cycles; looking for some every 700 objects takes 3 % of the time
        await super().startup(sockets)
        if not self.started:
            return
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.start_reload)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the socket and answer everything that came before, even on connections that are not accepted yet.

        uvicorn alone resets those, and closes accepted ones whose request it has not read yet.
        """
        loop = asyncio.get_running_loop()
        for listener in sockets or ():
            with suppress(OSError):  # none is waiting, or none can be opened
                for _ in range(self.config.backlog):
                    connection, _ = listener.accept()
                    await loop.connect_accepted_socket(self._protocol, connection)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        await asyncio.sleep(REQUEST_SECONDS)
        await super().shutdown(sockets)
        if hasattr(signal, "SIGHUP"):
            loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # or one that comes now would kill the process

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        if self._service.draining or sig != signal.SIGTERM or not self.started:
            self.should_exit = True
        else:
            self._close_at = time.monotonic() + self._service.settings.drain_seconds
        if self._service.draining:
            return
        self._service.draining = True
        # Clients that reuse connections are told to take another one before this one is closed.
        for headers in (self.config.encoded_headers, self.server_state.default_headers):  # for later ticks, and now
            headers.append((b"connection", b"close"))

    def start_reload(self) -> None:
        """Read the weights file anew, in the background."""
        reload = asyncio.create_task(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._service.reload()
        except RequestError as error:
            logger.error("The weights were not exchanged. %s", error)
        except Exception:  # a defect here would vanish with the task that nobody awaits
            logger.exception("The weights were not exchanged.")

    async def on_tick(self, counter: int) -> bool:
        if self._service.broken and not self.should_exit:
            logger.critical("No batch can be run any more. This process ends, so that another one can take its place.")
            self.should_exit = self._service.draining = True
        if self._service.draining and not self._draining_logged:  # not by the signal's handler: it interrupts anything
            self._draining_logged = True
            logger.info("Stopping: /readyz says 503; what arrives before the socket closes is answered.")
        self.should_exit |= time.monotonic() >= self._close_at
        return await super().on_tick(counter)


def serve(
    settings: Settings,
    listener: socket.socket,
    link: Link | None = None,
    classes: tuple[str, ...] | None = None,
) -> int:
    """Serve on `listener` until a signal says stop, and return the exit code.

    Args:
        link: To the supervisor, if this is one of several processes.
        classes: Those of processes that serve already. Without them, what is served and where is printed once it is.
    """
    # The inference thread releases the GIL at every step of torch, and would get it back from a busy event loop only
    # after Python's usual 5 ms. Measured with tests/soak.py: 445 -> 636 answers/s with torch, 967 -> 1,049 with
    # OpenVINO, which has one step.
    sys.setswitchinterval(0.0005)
    # A SIGHUP after the weights were read must not be lost. (One of several gets it again from the supervisor.)
    early_reloads: list[int] = []
    if link is None and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda sent, _frame: early_reloads.append(sent))
    try:
        app = create_app(settings, classes)
    except StartError as error:
        print(error, file=sys.stderr)
        return COULD_NOT_START
    service = app.service
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(HttpProtocol, turnstile=Turnstile(), refuse=app.refuse, reject=app.reject)),
        log_config=None,
        proxy_headers=False,  # nothing here depends on who asks, and looking takes time for each request
        access_log=False,  # ours is cheaper, and knows the request's id and route
        ws="none",
        timeout_keep_alive=75,  # load balancers keep theirs for 60, and would now and then use a closed connection
        timeout_graceful_shutdown=2 * math.ceil(settings.deadline_seconds) + 1,  # for a body, and for its answer
    )

    def on_started() -> None:
        if link is not None:
            app.total, service.on_swap = link.total, link.reloaded
            ready = ReadyNotice(service.engine, service.checkpoint.sha256, service.checkpoint.classes)
            link.open(ready, app.count, lambda: server.handle_exit(signal.SIGTERM, None))
        if classes is None:
            processes = f" in {settings.processes} processes" if settings.processes > 1 else ""
            say(f"Serving {service.describe()}{processes} on {url(listener)}")
        if early_reloads:
            server.start_reload()

    server = Server(config, service, on_started)
    server.run(sockets=[listener])
    if service.broken:
        return BROKEN
    return 0 if server.started or service.draining else COULD_NOT_START


def say(text: str) -> None:
    """Print to stdout, if that works: serving must not depend on a disk with room, or on a reader."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing the rest at exit would fail


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

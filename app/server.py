"""One serving process: an application behind uvicorn, until a signal stops it."""

import asyncio
import gc
import logging
import math
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
from app.logs import say
from app.main import create_app
from app.protocol import HttpProtocol, Turnstile
from app.service import Service
from app.settings import Settings

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 0.2
"""How long a connection accepted just as the socket closed has to send its request."""
WATCH_TICKS = 50
"""How often to look after engine and decoder, in ticks of 0.1 seconds."""
BROKEN = 70
"""The exit code of a process whose engine or decoder has failed (EX_SOFTWARE of sysexits.h)."""


class Server(uvicorn.Server):
    """uvicorn alone closes its socket at the first signal, so that requests a load balancer still sends fail.

    Here SIGTERM first makes /readyz answer 503 while all else goes on, and closes the socket after `drain_seconds`.
    Ctrl-C or a second signal closes it at once. However many signals come, admitted requests are answered; the exit
    code is 0.

    SIGHUP reads the weights file again. When the engine fails, or it or the decoder hangs, the server stops with
    another exit code.

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
        """Running reloads, kept here or they might be garbage-collected."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.start()
        except StartError as error:  # from the application's lifespan it would be a traceback
            say(str(error), sys.stderr)
            self.should_exit = True
            return
        try:
            for listener in sockets or ():
                listener.listen(self.config.backlog)  # not by uvloop, which does not report failure
        except OSError as error:  # it is bound, but another program began to listen there
            say(f"The service cannot listen: {error.strerror}. Choose another port with --port.", sys.stderr)
            self.should_exit = True
        if self.should_exit:  # perhaps a signal came meanwhile
            await self._service.close()  # a thread still computing when the interpreter ends would abort it
            return
        # Everything loaded by now stays; otherwise full garbage collections stop all requests for 60 ms now and then.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000)  # requests leave no cycles; a search every 700 objects takes 3 % of the time
        await super().startup(sockets)
        if not self.started:
            return
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.start_reload)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the socket and answer everything that came before, even on connections not accepted yet.

        uvicorn alone resets those, and closes accepted connections whose request it has not read yet.
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
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # one that comes now would kill the process

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
        # Tell clients that reuse connections to take another one before theirs is closed.
        for headers in (self.config.encoded_headers, self.server_state.default_headers):  # for later ticks, and now
            headers.append((b"connection", b"close"))

    def start_reload(self) -> None:
        """Read the weights file again, in the background."""
        reload = asyncio.create_task(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._service.reload()
        except RequestError as error:
            logger.error("The weights were not replaced. %s", error)
        except Exception:  # a bug here would vanish with the task, which nobody awaits
            logger.exception("The weights were not replaced.")

    async def on_tick(self, counter: int) -> bool:
        if counter % WATCH_TICKS == 0:
            self._service.check_engine()
        if self._service.broken and not self.should_exit:
            logger.critical(
                "This process cannot do its work any more: its engine fails, or a thread hangs. It ends, so that "
                "another can take its place."
            )
            self.should_exit = self._service.draining = True
        if self._service.draining and not self._draining_logged:  # not in the signal handler, which interrupts anything
            self._draining_logged = True
            logger.info("Stopping: /readyz answers 503; requests that arrive before the socket closes are answered.")
        self.should_exit |= time.monotonic() >= self._close_at
        return await super().on_tick(counter)


def serve(
    settings: Settings,
    listener: socket.socket,
    link: Link | None = None,
    classes: tuple[str, ...] | None = None,
) -> int:
    """Serve on `listener` until a signal stops it, and return the exit code.

    Args:
        link: The link to the supervisor, if this is one of several processes.
        classes: The class names that running processes serve; None for the first process, which prints what it serves
            and where.
    """
    # The inference thread releases the GIL at every torch operation, and would get it back from a busy event loop only
    # after Python's usual 5 ms. Measured with tests/soak.py: 445 -> 636 answers/s with torch, 967 -> 1,049 with
    # OpenVINO, which runs as one operation.
    sys.setswitchinterval(0.0005)
    # A SIGHUP after the weights were read must not be lost. (The supervisor repeats it to one of several processes.)
    early_reloads: list[int] = []
    if link is None and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda sent, _frame: early_reloads.append(sent))
    try:
        app = create_app(settings, classes)
    except StartError as error:
        say(str(error), sys.stderr)
        return COULD_NOT_START
    service = app.service
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(HttpProtocol, turnstile=Turnstile(), refuse=app.refuse, reject=app.reject)),
        log_config=None,
        proxy_headers=False,  # nothing here depends on who asks, and looking costs time in each request
        access_log=False,  # ours is cheaper, and knows the request's id and route
        ws="none",
        timeout_keep_alive=75,  # load balancers keep theirs for 60, and must not find one closed
        timeout_graceful_shutdown=2 * math.ceil(settings.deadline_seconds) + 1,  # for a body and its answer
    )

    def on_started() -> None:
        if link is not None:
            app.total, service.on_swap = link.total, link.reloaded
            ready = ReadyNotice(service.engine, service.checkpoint.sha256, service.checkpoint.classes)
            link.open(ready, app.count, lambda: server.handle_exit(signal.SIGTERM, None))
        if classes is None:
            processes = f" in {settings.processes} processes" if settings.processes > 1 else ""
            say(f"Serving {service.describe()}{processes} on {url(listener)}", sys.stdout)
        if early_reloads:
            server.start_reload()

    server = Server(config, service, on_started)
    server.run(sockets=[listener])
    if service.broken:
        return BROKEN
    return 0 if server.started or service.draining else COULD_NOT_START


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

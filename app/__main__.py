"""python -m app: settings -> server. Exits with 1 and a sentence if it cannot start, with 0 after a clean stop."""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from app import logs
from app.errors import RequestError, SettingsError, StartError
from app.protocol import Protocol, Turnstile
from app.settings import Settings, parse_settings

if TYPE_CHECKING:
    from app.service import Service


logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn alone closes its socket at the first signal, which fails what a load balancer still sends.

    Here SIGTERM first makes /readyz answer 503 while everything else goes on, and closes after `drain_seconds`. Ctrl-C
    or a second signal closes at once. Either way what was admitted is answered, and the exit code is 0.

    SIGHUP has the weights file read anew.
    """

    def __init__(self, config: uvicorn.Config, service: "Service") -> None:
        super().__init__(config)
        self._service = service
        self._close_at = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.start()
        except StartError as error:  # from the application's lifespan it would come out as a traceback
            print(error, file=sys.stderr)
            self.should_exit = True
        if not self.should_exit:  # nor has a signal come meanwhile
            await super().startup(sockets)
        if not self.started:
            return
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        print(f"Serving {self._service.describe()} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self.started and not self._service.draining:
            self._close_at = time.monotonic() + self._service.settings.drain_seconds
        elif self.should_exit:
            self.force_exit = True
        else:
            self.should_exit = True
        self._service.draining = True
        # Clients that keep a connection for their next request learn to take another one before this is closed.
        for headers in (self.config.encoded_headers, self.server_state.default_headers):  # the next ones, and now
            headers.append((b"connection", b"close"))

    def _hang_up(self) -> None:
        self._reloading = asyncio.create_task(self._reload())  # kept, or it might be collected before its end

    async def _reload(self) -> None:
        try:
            await self._service.reload()
        except RequestError as error:
            logger.error("The weights were not exchanged. %s", error)
        except Exception:  # a defect here would vanish with the task that nobody awaits
            logger.exception("The weights were not exchanged.")

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= time.monotonic() >= self._close_at
        return await super().on_tick(counter)


def bind(settings: Settings) -> socket.socket:
    """The listening address, taken before the network is loaded, because a taken port is better known early.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        reason = getattr(error, "strerror", None) or "there is no such name"
        raise SettingsError(
            f"The service cannot listen on {settings.host}, port {settings.port}: {reason}. "
            "Choose another port with --port or CIFAR_PORT; --port 0 takes a free one."
        ) from None
    return listener


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # would end the process; what is being read is the newest anyway
    logs.configure(sys.stderr)
    # The inference thread gives the interpreter away at every step of torch, and would get it back from a busy event
    # loop only after Python's 5 ms. Measured with tests/soak.py: 445 -> 636 answers/s with torch, 967 -> 1,049 with
    # OpenVINO, which has one step.
    sys.setswitchinterval(0.0005)
    try:
        settings = parse_settings(arguments, environment)
        listener = bind(settings)
        from app.main import create_app  # torch takes seconds to import; --help and a bad value need not wait for it

        app = create_app(settings)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(Protocol, turnstile=Turnstile())),
        log_config=None,
        proxy_headers=False,  # nothing here depends on who asks, and looking takes time for each request
        access_log=False,  # ours is cheaper, and knows the request's id and route
        ws="none",
        timeout_keep_alive=75,  # load balancers keep theirs for 60 and would now and then ask on a closed connection
        timeout_graceful_shutdown=math.ceil(settings.deadline_seconds) + 1,
    )
    server = Server(config, app.state.service)
    server.run(sockets=[listener])
    return 0 if server.started or app.state.service.draining else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))

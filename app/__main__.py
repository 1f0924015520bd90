"""python -m app: settings -> server. Exits with 1 and a sentence if it cannot start, with 0 after a clean stop."""

import errno
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from app import logs
from app.errors import SettingsError, StartError
from app.processes import COULD_NOT_START, Supervisor
from app.settings import Settings, parse_settings

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C before anything was served."""


def bind(settings: Settings) -> socket.socket:
    """The listening address, taken before the network is loaded, because a taken port is better known early.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        reason = getattr(error, "strerror", None) or "there is no such name"
        advice = "Name an address of this machine with --host or CIFAR_HOST."
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            advice = "Choose another port with --port or CIFAR_PORT; --port 0 takes a free one."
        raise SettingsError(
            f"The service cannot listen on {settings.host}, port {settings.port}: {reason}. {advice}"
        ) from None
    return listener


def open_standard_streams() -> None:
    """Whoever starts this may have closed some of the three, and what is opened next would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    # Until the server takes the signals over. By default the first process of a container ignores SIGTERM, and Ctrl-C
    # is a traceback of whatever is being imported.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # would end the process; the weights are still to be read
    open_standard_streams()
    try:
        settings = parse_settings(arguments, environment)
        listener = bind(settings)
    except StartError as error:
        print(error, file=sys.stderr)
        return COULD_NOT_START
    logs.configure(sys.stderr)
    if settings.processes > 1:
        return Supervisor(settings, listener).run()
    from app.server import serve  # with torch, which takes a second; --help, a bad value and a supervisor do without it

    with listener:
        return serve(settings, listener)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))

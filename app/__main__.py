"""python -m app: settings -> server. Exits with 1 and a message if it cannot start, with 0 after a clean stop."""

import errno
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from app import logs
from app.errors import SettingsError, StartError
from app.link import COULD_NOT_START
from app.settings import Settings, parse_settings

MOST_FILES = 16_384
"""Limit on open files, if the system allows that many. An idle connection takes some 10 KB."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C before anything was served."""


def bind(settings: Settings) -> socket.socket:
    """Bind the listening socket, before the network is loaded, so that a port in use is reported early.

    Raises:
        SettingsError: the service cannot listen on the address.
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
    except (OSError, UnicodeError) as error:  # UnicodeError: not a possible host name
        reason = getattr(error, "strerror", None) or "there is no such name"
        advice = "Name an address of this machine with --host or CIFAR_HOST."
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            advice = "Choose another port with --port or CIFAR_PORT; --port 0 takes a free one."
        raise SettingsError(
            f"The service cannot listen on {settings.host}, port {settings.port}: {reason}. {advice}"
        ) from None
    return listener


def open_standard_streams() -> None:
    """Open /dev/null for each of the three that the parent has closed; the next file opened would take its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number: this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives


def allow_connections() -> None:
    """Raise the limit on open files, because each connection is one: it is usually 1,024, though more is allowed."""
    if sys.platform == "win32":
        return
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit not in (resource.RLIM_INFINITY, most) and limit < MOST_FILES:
        wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(MOST_FILES, most)
        with suppress(OSError, ValueError):  # the system has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    # In force until the server installs its own handlers. By default the first process of a container ignores
    # SIGTERM, and Ctrl-C prints a traceback of whatever is being imported.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it would end the process; there is nothing to reload yet
    open_standard_streams()
    allow_connections()
    logs.escape_unprintable(sys.stdout)
    try:
        settings = parse_settings(arguments, environment)
        listener = bind(settings)
    except StartError as error:
        logs.say(str(error), sys.stderr)
        return COULD_NOT_START
    logs.configure(sys.stderr)
    if settings.processes > 1:
        from app.processes import Supervisor  # not everywhere do processes fork

        return Supervisor(settings, listener).run()
    from app.server import serve  # imports torch (a second), which --help and errors do without

    with listener:
        return serve(settings, listener)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:], os.environ)
    os._exit(exit_code)  # Python would wait for threads, which may hang: reading a data set, say

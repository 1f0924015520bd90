"""The log on stderr: one JSON object per line for programs, short lines of text on a terminal.

For a request it holds the id, the method, the route's template and the outcome. Pictures, paths and queries come from
the client and stay out.
"""

import asyncio
import io
import json
import logging
import os
import select
import stat
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

TEXT = "%(asctime)s %(levelname)s %(message)s"
QUIET = frozenset(
    {
        *("/healthz", "/health", "/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"),
        *("/v2/models/cifar/ready", "/v2/models/cifar/versions/1/ready"),
    }
)
"""Routes that machines request every few seconds; they are not logged."""


def configure(stream: TextIO) -> None:
    """Send the records of all loggers to `stream`, including the server's and Python's warnings."""
    handler = logging.StreamHandler(NonBlockingStream(stream))
    handler.setFormatter(logging.Formatter(TEXT) if stream.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of clients' mistakes, which we answer
    logging.captureWarnings(True)


def escape_unprintable(stream: TextIO) -> None:
    """Have `stream` escape what its encoding cannot express, such as a file name, as stderr already does."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None) -> None:
    """Print a line, if that works: nothing may depend on room on a disk or in a pipe, or on somebody who reads.

    Args:
        stream: None if it was closed when Python started.
    """
    if stream is None or not _has_room(stream):
        return
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # flushing the rest at exit would fail


def _has_room(stream: TextIO) -> bool:
    """Whether a line can be written without waiting."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # it is in memory, or on Windows, where only sockets can be asked
        return True


class NonBlockingStream:
    """A stream that drops and counts lines instead of waiting: a pipe that nobody reads fills up, and writing to it
    would stop the event loop and with it the service."""

    PIECE_BYTES = select.PIPE_BUF if hasattr(select, "PIPE_BUF") else 512
    """A pipe that is ready for writing has room for this much (POSIX)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._poll: select.poll | None = None
        self._cut = False
        """Whether the last line was only partly written."""
        self.dropped = 0
        with suppress(OSError, ValueError, AttributeError):  # in memory, closed, or no poll on this system
            self._file = stream.fileno()
            self._poll = select.poll()
            self._poll.register(self._file, select.POLLOUT)
            if stat.S_ISFIFO(os.fstat(self._file).st_mode):
                # Another process may fill the pipe first. O_NONBLOCK on our own descriptor does not affect theirs.
                self._file = os.open(f"/proc/self/fd/{self._file}", os.O_WRONLY | os.O_NONBLOCK)
                weakref.finalize(self, os.close, self._file)

    def write(self, text: str) -> None:
        if self._poll is None:
            self._stream.write(text)
            return
        rest = b"\n" * self._cut + text.encode("utf-8", "backslashreplace")
        while rest and self._poll.poll(0):
            whole_lines = rest.rfind(b"\n", 0, self.PIECE_BYTES) + 1 or self.PIECE_BYTES
            try:
                written = os.write(self._file, rest[:whole_lines])
            except BlockingIOError:
                break
            self._cut = rest[written - 1] != ord("\n")
            rest = rest[written:]
        self.dropped += rest.lstrip(b"\n").count(b"\n")

    def flush(self) -> None:
        if self._poll is None:
            self._stream.flush()


class JsonFormatter(logging.Formatter):
    """Formats a record as one line. `extra={"request_id": ...}` becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "request_id"):
            line["request_id"] = record.request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class AccessLog:
    """Writes a line for each request, bypassing the logging module, which takes five times as long.

    The lines of one iteration of the event loop are written together in the next: the answers of a batch leave
    together, and a system call for each line, which hands the GIL to another thread, cost 13 % of the throughput; this
    costs some 4 %.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = NonBlockingStream(stream)
        self._lines: list[str] = []
        self._time = ""
        self._line = _as_text if stream.isatty() else _as_json

    @property
    def dropped(self) -> int:
        """How many lines nobody read in time."""
        return self._stream.dropped

    def note(self, request_id: str, method: str, route: str, status: int, seconds: float) -> None:
        if route in QUIET:
            return
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._write)
            # Once an iteration: it takes as long as all the rest of a line.
            self._time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(self._line(self._time, request_id, method, route, status, seconds * 1e3))

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        with suppress(OSError, ValueError):  # the log's reader is gone, or it was closed
            self._stream.write("".join(lines))


def _as_text(time: str, request_id: str, method: str, route: str, status: int, milliseconds: float) -> str:
    return f"{time} {method} {route} {status} {milliseconds:.1f} ms {request_id}\n"


def _as_json(time: str, request_id: str, method: str, route: str, status: int, milliseconds: float) -> str:
    """Formatted by hand. Nothing needs escaping: ids are checked when they come in, the rest is ours."""
    return (
        f'{{"time": "{time}", "level": "info", "logger": "app.access", '
        f'"message": "{method} {route} {status}", "request_id": "{request_id}", "method": "{method}", '
        f'"route": "{route}", "status": {status}, "milliseconds": {milliseconds:.2f}}}\n'
    )

"""A serving process's end of the pipe to its supervisor, and the messages that travel through it; see `processes`."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from app.statistics import Counts

COULD_NOT_START = 1
"""The exit code of a process that could not start and has said why."""
REPLY_SECONDS = 1.0
"""How long to wait for a process's counts before using its previous ones."""


class ReadyNotice(NamedTuple):
    """This process serves."""

    engine: str
    """The engine it found fastest while it had the machine to itself."""
    weights: str
    """The digest of the weights it serves."""
    classes: tuple[str, ...]
    """The class names in its answers."""


class ReloadNotice(NamedTuple):
    """This process has read its weights file again."""

    weights: str
    """The digest of the weights it serves now."""


class TotalRequest(NamedTuple):
    """This process wants the counts of all processes together."""


class CountsRequest(NamedTuple):
    """The supervisor wants the counts of this process."""


class CountsReply(NamedTuple):
    """The counts of this process."""

    counts: Counts


class TotalReply(NamedTuple):
    """The counts of all processes together."""

    counts: Counts


class Link:
    """The serving process's end of the pipe. Belongs to the event loop."""

    def __init__(self, end: Connection) -> None:
        self._end = end
        self._count: Callable[[], Counts] = Counts
        self._asked: asyncio.Future[Counts] | None = None

    def open(self, ready: ReadyNotice, count: Callable[[], Counts], stop: Callable[[], None]) -> None:
        """Say that this process serves.

        Args:
            count: Called when the supervisor asks for the counts.
            stop: Called when the supervisor is gone.
        """
        self._count = count
        asyncio.get_running_loop().add_reader(self._end.fileno(), self._receive, stop)
        os.set_blocking(self._end.fileno(), True)  # uvloop changed that, but a long message arrives in two pieces
        with suppress(OSError):  # the supervisor is gone, which the reader will notice
            self._end.send(ready)

    async def total(self) -> Counts:
        """The counts of all processes; of this one alone if the supervisor is gone or does not answer. Concurrent
        callers share one request."""
        if self._asked is None:
            try:
                self._end.send(TotalRequest())
            except OSError:
                return self._count()
            self._asked = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(asyncio.shield(self._asked), 2 * REPLY_SECONDS)
        except TimeoutError:
            return self._count()

    def reloaded(self, weights: str) -> None:
        """Have the processes that serve other weights read the file again."""
        with suppress(OSError):  # the supervisor is gone, so the others are stopping as well
            self._end.send(ReloadNotice(weights))

    def _receive(self, stop: Callable[[], None]) -> None:
        try:
            message = self._end.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._end.fileno())
            self._answer(self._count())
            stop()
            return
        match message:
            case CountsRequest():
                with suppress(OSError):  # as above; the reader will notice
                    self._end.send(CountsReply(self._count()))
            case TotalReply(counts):
                self._answer(counts)

    def _answer(self, counts: Counts) -> None:
        if self._asked is not None:
            self._asked.set_result(counts)
            self._asked = None

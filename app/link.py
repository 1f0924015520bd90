"""A serving process's end of the pipe to its supervisor, and the messages that travel there; see `processes`."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from app.statistics import Counts

COULD_NOT_START = 1
"""The exit code of a process that has said why."""
REPLY_SECONDS = 1.0
"""How long to wait for a process's counts; after that its last ones are used."""


class ReadyNotice(NamedTuple):
    """This process serves."""

    engine: str
    """The one that it found to be the fastest, while it had the machine to itself."""
    weights: str
    """The digest of what it serves."""
    classes: tuple[str, ...]
    """Those that it answers with."""


class ReloadNotice(NamedTuple):
    """This process has exchanged its weights."""

    weights: str
    """The digest of what it serves now."""


class TotalRequest(NamedTuple):
    """This process wants to know what all have counted."""


class CountsRequest(NamedTuple):
    """What has this process counted?"""


class CountsReply(NamedTuple):
    counts: Counts


class TotalReply(NamedTuple):
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
        os.set_blocking(self._end.fileno(), True)  # uvloop changed that, but a long message comes in two pieces
        with suppress(OSError):  # the supervisor is gone, which the reader will notice
            self._end.send(ready)

    async def total(self) -> Counts:
        """What all processes have counted; this one alone, if the supervisor is gone or does not answer. Concurrent
        callers share one question."""
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
        """Have the other processes exchange their weights, too."""
        with suppress(OSError):  # the supervisor is gone, and the others are stopping as well
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

"""Admitted items on the way to their answers. Knows neither HTTP nor torch."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Generic, TypeVar

from app.admission import Load, plain, usual_batch
from app.errors import DeadlineExceeded, RequestError
from app.statistics import Timing

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

Run = Callable[[list[Prepared]], Sequence[Result]]
"""Maps a batch to one result per item."""


class Answer(asyncio.Future[Result]):
    """A result to come and, once it is here, where its time went."""

    timing: Timing


@dataclass(slots=True, eq=False)
class Entry(Generic[Item, Prepared, Result]):
    """One admitted item."""

    item: Item
    load: Load
    future: Answer[Result]
    admitted_at: float
    """Time by the clock of `monotonic`."""
    deadline_seconds: float
    run: Run[Prepared, Result]
    prepared: Prepared = field(init=False)
    prepare_seconds: float = field(init=False, default=0.0)

    def prepare(self, prepare: Callable[[Item], Prepared]) -> Exception | None:
        """Set `prepared`, or return what `prepare` raised."""
        start = monotonic()
        try:
            self.prepared = prepare(self.item)
        except RequestError as error:  # the item's own fault
            error.__traceback__ = error.__context__ = None  # they would keep the picture until garbage collection
            return error
        except Exception as error:  # whatever it is, only this item fails
            return error
        finally:  # others waited even if it failed
            self.prepare_seconds = monotonic() - start
        return None

    def expiry_error(self) -> Exception | None:
        """Why no more work should go into it; None if it is still wanted."""
        if self.future.cancelled():
            return DeadlineExceeded("The client has left.")  # nobody will read it
        if monotonic() > self.admitted_at + self.deadline_seconds:
            return DeadlineExceeded(
                f"The request waited longer than {plain(self.deadline_seconds)} seconds for its turn. Try again later."
            )
        return None


class Control(Enum):
    """Queued among the entries: WAKE ends a thread's wait, STOP says that no more entries will come."""

    WAKE = auto()
    STOP = auto()


class FairQueue(Generic[Item, Prepared, Result]):
    """A thread's queue. Any thread may `put`; everything else is for that thread alone.

    While both kinds wait, requests of one picture alternate with requests of many, batch by batch: a thousand pictures
    in one request delay a single picture by only one of their batches, and get half of the time.

    When four batches of single pictures wait, and nothing else, the batch size doubles, and so on up to the largest:
    the busier the event loop, the longer it takes to get the GIL back between two batches (at three times the load that
    can be carried, 96 % of what can be carried was answered instead of 81 %). Many pictures in one request leave the
    event loop alone, so larger batches of those would only hold up a single picture for longer (37 ms instead of 12).
    """

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._arrived: SimpleQueue[Entry[Item, Prepared, Result] | Control] = SimpleQueue()
        self.stopped = False
        """Whether `Control.STOP` has been collected."""
        self._singles: deque[Entry[Item, Prepared, Result]] = deque()
        self._bulk: deque[Entry[Item, Prepared, Result]] = deque()
        self._current = self._singles

    def __bool__(self) -> bool:
        return bool(self._singles or self._bulk)

    def put(self, arrival: Entry[Item, Prepared, Result] | Control) -> None:
        self._arrived.put(arrival)

    def collect(self, timeout: float | None) -> bool:
        """Sort all arrivals, waiting up to `timeout` seconds for the first; return whether there were any."""
        try:
            arrival = self._arrived.get(timeout=timeout) if timeout != 0 else self._arrived.get_nowait()
        except Empty:
            return False
        with suppress(Empty):
            while True:
                if isinstance(arrival, Entry):
                    (self._bulk if arrival.load.bulk else self._singles).append(arrival)
                elif arrival is Control.STOP:
                    self.stopped = True
                arrival = self._arrived.get_nowait()
        return True

    def next_batch(self) -> list[Entry[Item, Prepared, Result]]:
        """As many entries as fit a batch, of one kind and for one `run`; an item larger than a batch comes alone."""
        other = self._bulk if self._current is self._singles else self._singles
        if other:
            self._current = other
        batch: list[Entry[Item, Prepared, Result]] = []
        room = usual_batch(self._max_batch)
        if not self._bulk:
            while 4 * room <= len(self._singles) and 2 * room <= self._max_batch:
                room *= 2
        while self._current and (
            not batch or (self._current[0].load.pictures <= room and self._current[0].run is batch[0].run)
        ):
            batch.append(self._current.popleft())
            room -= batch[-1].load.pictures
        return batch

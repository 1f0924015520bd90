"""Concurrent requests -> batches. Depends on neither HTTP nor torch.

    event loop                 decode thread     inference thread          event loop
    submit: light -> prepare ----------------->  take what has queued,
       `--- others ----------> prepare ------->  run, settle ----------->  futures resolved, one call per batch

A lone request runs at once and no batch waits for a timer: whatever arrives while one batch runs is the next.
The event loop prepares light items, which take a known fraction of a millisecond, while a batch runs: if the inference
thread did, its next batch would start later, and two threads that contend for the GIL lose more in handing it over than
the work takes (one picture a request, 64 connections: a third more answers a second this way). All other items have a
thread of their own, so that one big photo does not hold up a thousand small ones. In both threads, requests of one
picture alternate with requests of many (`entries.FairQueue`).

Usually there is one event loop; the threads of somebody's tests may have several. So each future is resolved in its own
loop, and a lock keeps the counts right, which the two threads hold only to count.
"""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic, time
from typing import Generic

from app.admission import Admission, Limits, Load
from app.entries import Answer, Control, Entry, FairQueue, Item, Prepared, Result, Run
from app.errors import NotReady
from app.statistics import Statistics, Timing

logger = logging.getLogger(__name__)

Building = Generator[None, None, Run[Prepared, Result]]
"""Builds a `Run` in steps, none of which takes much longer than a batch."""
Outcome = tuple[Entry[Item, Prepared, Result], Result | Exception]

QUIET_SECONDS = 0.005
"""Idle work begins after this long without a request, so that a client who sends one at a time does not notice it."""
BROKEN_BATCHES = 10
"""After this many batches in a row that failed entirely, none will succeed: a GPU that has failed stays failed."""
PATIENCE = 12
"""After this many checks in vain a thread is stuck for good, as a GPU may be. Counted, not timed: the container may
have been paused."""
STOPPING = "The service is stopping. Try again, it may be back shortly."


class Batcher(Generic[Item, Prepared, Result]):
    """Runs items through a function that is built and called in one thread.

    Args:
        prepare: Item -> Prepared. What it raises fails that item alone.
    """

    def __init__(self, prepare: Callable[[Item], Prepared], limits: Limits) -> None:
        self._prepare = prepare
        self._limits = limits
        self.statistics = Statistics()
        self._to_run: FairQueue[Item, Prepared, Result] = FairQueue(limits.max_batch)
        self._to_prepare: FairQueue[Item, Prepared, Result] = FairQueue(1)
        self._idle_work: deque[Iterator[object]] = deque()
        self._buildings: deque[tuple[Building[Prepared, Result], Future[None]]] = deque()
        self._admission = Admission(limits)
        self._lock = threading.RLock()
        """Of the admission, the statistics, `_run` and `_closing`. Light items are prepared under it: one that was
        queued after the end would be lost. Re-entrant: if that fails, they are settled at once."""
        self._started = False
        self._closing = False
        self._failed_batches = 0
        self._inference_thread = threading.Thread(target=self._infer, name="inference", daemon=True)
        self._decode_thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        self._responsive: set[threading.Thread] = set()
        """Those of the two that have come back to their queue since the last check."""
        self._vain_checks = 0

    # Event loops

    def start(self, building: Building[Prepared, Result]) -> None:
        """Return when the function is built; an event loop would be held up. Call once only.

        Raises:
            NotReady: it was closed meanwhile.
            Exception: whatever `building` raises. The batcher is closed then.
        """
        built = self._build(building)  # before the threads: one that a close ends at once then finds it
        try:
            with self._lock:
                self._decode_thread.start()
                self._inference_thread.start()
            built.result()
        except BaseException:  # whatever it is, and an interrupt, too: no thread may stay
            self.close()
            raise
        self._started = True
        self.check_open()

    def check_alive(self) -> None:
        """To be called every few seconds: see that neither thread is dead or stuck."""
        self._vain_checks = 0 if len(self._responsive) == 2 else self._vain_checks + 1
        self._responsive.clear()
        self._to_prepare.put(Control.WAKE)
        self._to_run.put(Control.WAKE)

    @property
    def running(self) -> bool:
        return self._started and not self._closing

    @property
    def closing(self) -> bool:
        """Whether it still has to answer something before it ends."""
        return self._closing and self._inference_thread.is_alive()

    @property
    def closed(self) -> bool:
        """Whether it has ended, so that another must take its place."""
        return self._closing and not self.closing

    @property
    def broken(self) -> bool:
        """Whether only a new process can help."""
        return self._failed_batches >= BROKEN_BATCHES or self._vain_checks >= PATIENCE

    @property
    def waiting(self) -> int:
        """Pictures admitted and not yet answered."""
        return self._admission.waiting

    def check_room(self) -> None:
        """Raise if not even the smallest item would be admitted now; `submit` may still refuse a given one.

        Raises:
            Overloaded, NotReady: as `submit`.
        """
        with self._lock:
            self._check(Load(0, 1, light=True, bulk=False), self._limits.deadline_seconds)

    def submit(self, item: Item, size_bytes: int, *, light: bool) -> Answer[Result]:
        """Admit an item of one picture. Cancel the future once nobody wants the answer.

        Args:
            light: Whether the event loop can afford to prepare it.

        Raises:
            Overloaded: too many pictures or bytes would be waiting, or the answer would come too late.
            NotReady: the service is stopping.
        """
        deadline_seconds = self._limits.deadline_seconds
        load = Load(size_bytes, 1, light=light, bulk=False)
        with self._lock:
            self._check(load, deadline_seconds)
            return self._admit(item, load, deadline_seconds)

    def submit_all(
        self, items: Sequence[tuple[Item, int, int]], deadline_seconds: float | None = None, *, light: bool
    ) -> list[Answer[Result]]:
        """Admit all items or none; each comes with its size in bytes and its picture count.

        Args:
            light: Whether the event loop can afford to prepare them all.
            deadline_seconds: The client's own deadline; only a shorter one than the limits set has an effect.

        Raises:
            Overloaded, NotReady: as `submit`.
        """
        deadline_seconds = min(deadline_seconds or math.inf, self._limits.deadline_seconds)
        pictures = sum(count for _, _, count in items)
        bulk = pictures > 1
        with self._lock:
            self._check(Load(sum(size for _, size, _ in items), pictures, light, bulk), deadline_seconds)
            return [self._admit(item, Load(size, count, light, bulk), deadline_seconds) for item, size, count in items]

    def _check(self, load: Load, deadline_seconds: float) -> None:
        self.check_open()
        self._admission.check(load, deadline_seconds)

    def check_open(self) -> None:
        """Raise unless it is running.

        Raises:
            NotReady: it is not.
        """
        if not self.running:
            raise NotReady(STOPPING)

    def _admit(self, item: Item, load: Load, deadline_seconds: float) -> Answer[Result]:
        # Not Answer[Result](...): the subscript would be evaluated for each request, which takes 2 us.
        future: Answer[Result] = Answer(loop=asyncio.get_running_loop())
        entry: Entry[Item, Prepared, Result] = Entry(item, load, future, monotonic(), deadline_seconds, self._run)
        self._admission.enter(load)
        if not load.light:
            self._to_prepare.put(entry)
        elif (failure := entry.prepare(self._prepare)) is None:
            self._to_run.put(entry)
        else:
            self._settle([(entry, failure)])
        return future

    def run_when_idle(self, work: Iterator[object]) -> None:
        """Exhaust `work` in the inference thread, a step at a time, when nothing is queued. A swap drops it."""
        self._idle_work.append(work)
        self._to_run.put(Control.WAKE)

    def swap(self, building: Building[Prepared, Result]) -> Future[None]:
        """Switch to the function that `building` returns; items admitted before still run with the old one.

        So one function runs all items of a `submit_all`. The inference thread takes one step of `building`
        between any two batches, so that no request waits for all of it.

        Returns:
            A future that ends with the exchange, or fails with whatever `building` raises, and nothing has changed
            then; with NotReady if the service stops first.

        Raises:
            NotReady: as `check_open`.
        """
        with self._lock:
            self.check_open()
            return self._build(building)

    def _build(self, building: Building[Prepared, Result]) -> Future[None]:
        built: Future[None] = Future()
        built.set_running_or_notify_cancel()  # who no longer waits cannot cancel it
        self._buildings.append((building, built))
        self._to_run.put(Control.WAKE)
        return built

    def close(self) -> None:
        """Refuse new items, answer the admitted ones, end the threads; an event loop would be held up. Idle work is
        dropped; a thread that does not end is left behind."""
        with self._lock:
            self._closing = True
            self._to_prepare.put(Control.STOP)  # the decode thread passes it on, after its last item
            threads_run = self._inference_thread.ident is not None
        if threads_run:
            self._inference_thread.join(2 * self._limits.deadline_seconds + 1)

    # Any thread

    def _settle(
        self,
        outcomes: Sequence[Outcome[Item, Prepared, Result]],
        ran: Sequence[Entry[Item, Prepared, Result]] = (),
    ) -> None:
        """Count that these items leave, and resolve each future in its event loop."""
        now = monotonic()
        with self._lock:
            if ran:
                timings, pictures = [entry.future.timing for entry in ran], sum(entry.load.pictures for entry in ran)
                self.statistics.record(timings, pictures, time())
                self._admission.learn(timings[0].run_seconds / pictures)
            for entry, outcome in outcomes:
                self._admission.leave(entry.load)
                if not entry.load.light and entry.prepare_seconds:
                    self._admission.learn_preparation(entry.prepare_seconds)
                if not entry.future.cancelled():
                    ended = self.statistics.fail if isinstance(outcome, Exception) else self.statistics.success
                    ended.add(now - entry.admitted_at)
        for loop in (loops := {entry.future.get_loop() for entry, _ in outcomes}):
            its = outcomes if len(loops) == 1 else [each for each in outcomes if each[0].future.get_loop() is loop]
            with suppress(RuntimeError):  # it is closed, so nobody waits any more
                loop.call_soon_threadsafe(_resolve, its)

    # Decode thread

    def _decode(self) -> None:
        while self._to_prepare or not self._to_prepare.stopped:
            self._responsive.add(self._decode_thread)
            self._to_prepare.collect(timeout=0 if self._to_prepare else None)
            for entry in self._to_prepare.next_batch():
                failure = entry.expiry_error() or entry.prepare(self._prepare)
                if failure is None:
                    self._to_run.put(entry)
                else:
                    self._settle([(entry, failure)])
        self._to_run.put(Control.STOP)

    # Inference thread

    def _infer(self) -> None:
        while batch := self._take():
            self._settle(*self._answer(batch))
        for building, built in self._buildings:
            built.set_exception(NotReady(STOPPING))
            building.close()  # the garbage collector might do it in the very thread that `steps.aside` then waits for

    def _take(self) -> list[Entry[Item, Prepared, Result]]:
        """The next batch, from all that is queued by now; waits while nothing is. Empty only at the end."""
        self._responsive.add(self._inference_thread)
        if self._buildings:
            self._build_step(*self._buildings[0])
        self._to_run.collect(timeout=0)
        while not (self._to_run or self._to_run.stopped):
            self._responsive.add(self._inference_thread)
            if self._buildings:
                self._build_step(*self._buildings[0])
                self._to_run.collect(timeout=0)
            elif not self._to_run.collect(QUIET_SECONDS if self._idle_work else None) and self._idle_work:
                self._step(self._idle_work[0])
        return self._to_run.next_batch()

    def _build_step(self, building: Building[Prepared, Result], built: Future[None]) -> None:
        try:
            next(building)
        except StopIteration as finished:
            self._buildings.popleft()
            self._idle_work.clear()
            with self._lock:
                self._run = finished.value
            built.set_result(None)
        except BaseException as error:  # whoever waits raises it; they would otherwise wait for ever
            self._buildings.popleft()
            built.set_exception(error)

    def _step(self, work: Iterator[object]) -> None:
        try:
            next(work)
        except StopIteration:
            self._idle_work.popleft()
        except Exception:  # nobody waits for it, and requests must not suffer
            logger.exception("Idle work failed and was given up.")
            self._idle_work.popleft()

    def _answer(
        self, batch: list[Entry[Item, Prepared, Result]]
    ) -> tuple[list[Outcome[Item, Prepared, Result]], list[Entry[Item, Prepared, Result]]]:
        outcomes: list[Outcome[Item, Prepared, Result]] = []
        wanted: list[Entry[Item, Prepared, Result]] = []
        for entry in batch:
            if error := entry.expiry_error():
                outcomes.append((entry, error))
            else:
                wanted.append(entry)
        if not wanted:
            return outcomes, wanted
        start = monotonic()
        prepared = [entry.prepared for entry in wanted]
        outcomes += zip(wanted, _run_or_retry_singly(wanted[0].run, prepared), strict=True)
        seconds = monotonic() - start
        for entry in wanted:
            queue_seconds = start - entry.admitted_at - entry.prepare_seconds
            entry.future.timing = Timing(queue_seconds, entry.prepare_seconds, seconds)
        failed = all(isinstance(outcome, Exception) for _, outcome in outcomes)
        self._failed_batches = self._failed_batches + 1 if failed else 0
        return outcomes, wanted


def _resolve(outcomes: Sequence[Outcome[Item, Prepared, Result]]) -> None:
    for entry, outcome in outcomes:
        if entry.future.done():  # cancelled meanwhile
            continue
        if isinstance(outcome, Exception):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)


def _run_or_retry_singly(run: Run[Prepared, Result], prepared: list[Prepared]) -> list[Result | Exception]:
    """The results of a batch. If it fails, each item runs alone, so that only the culprit fails."""
    try:
        results: list[Result | Exception] = list(run(prepared))
        if len(results) != len(prepared):
            raise AssertionError(f"{len(results)} results for a batch of {len(prepared)}")
        return results
    except Exception as error:  # whatever it is, only the culprit gets it as its answer
        if len(prepared) == 1:
            return [error]
        logger.warning("A batch of %d failed; its items are tried one by one.", len(prepared), exc_info=True)
        return [result for item in prepared for result in _run_or_retry_singly(run, [item])]

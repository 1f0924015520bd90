"""Several processes that serve one address, and the one that looks after them.

    supervisor, without torch            processes that serve, each with the network
    binds a socket for each -----------> listens on it; Linux deals new connections out at random (SO_REUSEPORT)
    starts the first, then the others <- ReadyNotice
    replaces each that dies
    CountsRequest now and then --------> CountsReply; one that does not answer is killed
    SIGTERM, SIGINT, SIGHUP -----------> each of them
    SIGHUP to the others <-------------- ReloadNotice: one serves other weights than they do
    CountsRequest to each of them <----- TotalRequest: one wants to report what all have counted
    sums up, with those that died -----> TotalReply

Messages travel over a pipe for each process. No question is repeated before it is answered, so that no pipe fills up
and neither side ever waits for the other to read. A process whose supervisor is gone stops as if by SIGTERM. (One
socket for all of them would be simpler, but the process that wakes first would take all connections of a client that
opens several at once.)
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from app import logs
from app.link import (
    COULD_NOT_START,
    REPLY_SECONDS,
    CountsReply,
    CountsRequest,
    Link,
    ReadyNotice,
    ReloadNotice,
    TotalReply,
    TotalRequest,
)
from app.settings import Settings
from app.statistics import Counts

logger = logging.getLogger(__name__)

RETRY_SECONDS, MOST_RETRY_SECONDS = 1.0, 30.0
"""The wait after a process that could not start; twice as long after each further one."""
CHECK_SECONDS = 5.0
"""The time between two checks that each process still answers."""
PATIENCE = 6
"""After this many unanswered checks a process is stuck. Not timed: the whole container may have been paused."""


@dataclass(eq=False)
class Worker:
    """A process that serves, as the supervisor knows it."""

    process: SpawnProcess
    end: Connection
    ready: bool = False
    weights: str = ""
    """The digest of what it serves."""
    outdated: bool = False
    """The weights may have changed since it read them, while it was not ready and ignored signals."""
    counts: Counts = field(default_factory=Counts)
    """What it told last."""
    asked: bool = False
    """Whether it has been asked and has not told yet."""
    unanswered: int = 0
    """Checks in a row that found it in that state."""

    def ask(self) -> None:
        if not self.asked:
            self.asked = True
            self.send(CountsRequest())

    def send(self, message: CountsRequest | TotalReply) -> None:
        with suppress(OSError):  # it has just died, which the loop will notice
            self.end.send(message)

    def signal(self, sent: int) -> None:
        with suppress(ProcessLookupError):
            assert self.process.pid is not None
            os.kill(self.process.pid, sent)


class Supervisor:
    """Keeps as many processes serving as the settings say.

    Args:
        listener: Bound to the address that the processes will share; taken over.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = replace(settings, threads=max(1, settings.threads // settings.processes))
        self._family, self._address = listener.family, listener.getsockname()
        self._reserved = self._bind()  # keeps others off the address while nobody listens; gets no connection itself
        listener.close()
        # With that option, other programs could bind to the address while nobody listens. The sockets that listen need
        # it, or the next start would have to wait for a minute.
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._workers: list[Worker] = []
        self._rounds: dict[Worker, tuple[set[Worker], float]] = {}
        """For each worker that asks: the workers that have not told yet, and until when to wait for them."""
        self._gone = Counts()
        self._classes: tuple[str, ...] | None = None
        """Those of the first process, which all others must have, too."""
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._start_at = 0.0
        """No process is started before that."""
        self._failures = 0
        """Processes in a row that ended before they served."""
        self._announced = False
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Return the exit code when the last process has ended."""
        signals, signalled = self._context.Pipe(duplex=False)
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, lambda sent, _frame: signalled.send(sent))
        self._start()
        try:
            self._look_after(signals)
        finally:
            for worker in self._workers:  # after a defect here: the workers notice, and stop
                worker.end.close()
        return self._exit_code

    def _look_after(self, signals: Connection) -> None:
        while self._workers or self._missing:
            self._fill()
            handlers: dict[Any, Callable[[], None]] = {signals: lambda: self._pass_on(signals.recv())}
            for worker in self._workers:
                handlers[worker.process.sentinel] = partial(self._bury, worker)
                if not worker.end.closed:
                    handlers[worker.end] = partial(self._receive, worker)
            until = min([self._check_at, *(until for _, until in self._rounds.values())])
            if self._missing:
                until = min(until, self._start_at)
            for each in wait(list(handlers), max(0.0, until - time.monotonic())):
                handlers[each]()
            now = time.monotonic()
            for asker, (_, until) in list(self._rounds.items()):
                if now >= until:  # a process is stuck
                    self._answer(asker)
            if now >= self._check_at:
                self._check_at = now + CHECK_SECONDS
                self._check()

    @property
    def _missing(self) -> int:
        """How many to start: none until the first has shown that the settings are good, so that only one complains."""
        return self._settings.processes - len(self._workers) if self._announced and not self._stopping else 0

    def _fill(self) -> None:
        while self._missing and time.monotonic() >= self._start_at:
            try:
                self._start()
            except OSError as error:  # no memory, or no more processes, for the moment
                logger.error("Another process could not be started, and is tried again: %s.", error)
                self._start_at = time.monotonic() + RETRY_SECONDS

    def _check(self) -> None:
        for worker in [each for each in self._workers if each.ready]:
            worker.unanswered += worker.asked
            worker.ask()
            if worker.unanswered == PATIENCE:
                logger.error("Process %s is stuck and is killed.", worker.process.pid)
                worker.signal(signal.SIGKILL)

    def _start(self) -> None:
        own, its = self._context.Pipe()
        with self._bind() as listener, its:
            arguments = (self._settings, listener, its, self._classes)
            process = self._context.Process(target=_work, args=arguments)
            process.start()
        self._workers.append(Worker(process, own))

    def _bind(self) -> socket.socket:
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind(self._address)
        return listener

    def _pass_on(self, sent: int) -> None:
        if sent not in (signal.SIGTERM, signal.SIGINT):
            self._reload_all()
            return
        self._stopping = True
        self._reserved.close()
        for worker in self._workers:
            worker.signal(sent if worker.ready else signal.SIGTERM)  # SIGINT would print a traceback while it starts

    def _reload_all(self) -> None:
        for worker in self._workers:
            if worker.ready:
                worker.signal(signal.SIGHUP)
            else:
                worker.outdated = True

    def _receive(self, worker: Worker) -> None:
        try:
            message = worker.end.recv()
        except (EOFError, OSError):
            worker.end.close()  # it is ending
            return
        match message:
            case ReadyNotice(engine, weights, classes):
                worker.ready = self._announced = True
                self._failures = 0
                self._classes = classes
                self._settings = replace(self._settings, engine=engine)
                if worker.outdated:
                    worker.signal(signal.SIGHUP)
                self._compare(worker, weights)
            case ReloadNotice(weights):
                self._compare(worker, weights)
            case TotalRequest():
                asked = {each for each in self._workers if each.ready}
                self._rounds[worker] = asked, time.monotonic() + REPLY_SECONDS
                for each in asked:
                    each.ask()
            case CountsReply(counts):
                worker.counts, worker.asked, worker.unanswered = counts, False, 0
                self._count_off(worker)

    def _compare(self, worker: Worker, weights: str) -> None:
        """Have those that serve other weights than `worker` read the file again."""
        worker.weights = weights
        for each in self._workers:
            if each.ready and each.weights != weights:
                each.signal(signal.SIGHUP)

    def _count_off(self, worker: Worker) -> None:
        for asker, (awaited, _) in list(self._rounds.items()):
            awaited.discard(worker)
            if not awaited:
                self._answer(asker)

    def _answer(self, asker: Worker) -> None:
        del self._rounds[asker]
        total = Counts()
        for counts in (self._gone, *(each.counts for each in self._workers)):
            total.merge(counts)
        asker.send(TotalReply(total))

    def _bury(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.process.join()
        worker.end.close()
        self._gone.merge(replace(worker.counts, pids=(), waiting=0, ready=True))
        self._count_off(worker)
        if self._stopping:
            return
        pid, exit_code = worker.process.pid, worker.process.exitcode
        if not self._announced:
            if exit_code != COULD_NOT_START:
                logger.error("Process %d ended (exit code %s) before it could serve.", pid, exit_code)
            self._exit_code = COULD_NOT_START
            return
        logger.error("Process %d ended (exit code %s). Another one takes its place.", pid, exit_code)
        if exit_code == -signal.SIGKILL and worker.unanswered < PATIENCE:  # else it was killed here
            logger.error("It was killed, for want of memory most likely: give it more, or set CIFAR_PROCESSES lower.")
        if not worker.ready:  # an immediate retry would fail, too, so wait longer each time
            self._failures += 1
            self._start_at = time.monotonic() + min(RETRY_SECONDS * 2 ** (self._failures - 1), MOST_RETRY_SECONDS)


def _work(settings: Settings, listener: socket.socket, end: Connection, classes: tuple[str, ...] | None) -> None:
    """Run in the new process; `classes` are those of the others, if it is not the first."""
    os.setpgrp()  # Ctrl-C goes to the supervisor alone, which passes it on
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.configure(sys.stderr)
    logs.escape_unprintable(sys.stdout)
    from app.server import serve  # imports torch, which the supervisor does without

    raise SystemExit(serve(settings, listener, Link(end), classes))

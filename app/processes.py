"""Several processes that serve one address, and the supervisor that looks after them.

    supervisor, computes nothing         processes that serve, each with the network
    imports torch, forks each ---------> shares the memory that this took
    binds a socket for each -----------> listens on it; Linux deals new connections out at random (SO_REUSEPORT)
    starts the first, then the others <- ReadyNotice
    replaces each that dies
    CountsRequest now and then --------> CountsReply; one that does not answer is killed
    SIGTERM, SIGINT, SIGHUP -----------> each of them
    SIGHUP to the others <-------------- ReloadNotice: one serves other weights than they do
    CountsRequest to each of them <----- TotalRequest: one wants to report what all have counted
    sums up, with those that died -----> TotalReply

Messages travel over a pipe for each process. No request is repeated before it is answered, so no pipe fills up and
neither side ever waits for the other to read. A process whose supervisor is gone stops as if by SIGTERM. (One socket
for all processes would be simpler, but the first process to wake would take all connections of a client that opens
several at once.)
"""

import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

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
from app.logs import say
from app.settings import Settings
from app.statistics import Counts

logger = logging.getLogger(__name__)

RETRY_SECONDS, MOST_RETRY_SECONDS = 1.0, 30.0
"""How long to wait before replacing a process that failed to start; doubles with each further failure."""
CHECK_SECONDS = 5.0
"""How long between two checks that each process still answers."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OOM_SCORE = 50
"""How much larger than it is a process should look if memory runs out, in thousandths of what there is. The supervisor
looks as large, as what they share counts for each, but if it were killed, all would end."""
PATIENCE = 6
"""After this many unanswered checks a process is stuck. Counted, not timed: the container may have been paused."""


@dataclass(eq=False)
class Worker:
    """The supervisor's view of a serving process."""

    pid: int
    end: Connection
    """Our end of the pipe. The other is open for as long as the process lives."""
    ready: bool = False
    weights: str = ""
    """The digest of the weights it serves."""
    outdated: bool = False
    """Whether the weights may have changed after it read them, while it was not ready and ignored signals."""
    counts: Counts = field(default_factory=Counts)
    """The counts it last sent."""
    asked: bool = False
    """Whether it owes an answer to a request for its counts."""
    unanswered: int = 0
    """How many checks in a row found it owing one, or not ready yet."""

    def ask(self) -> None:
        if not self.asked:
            self.asked = True
            self.send(CountsRequest())

    def send(self, message: CountsRequest | TotalReply) -> None:
        with suppress(OSError):  # it has just died, which the loop will notice
            self.end.send(message)

    def signal(self, sent: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, sent)


class Supervisor:
    """Keeps as many processes serving as the settings say.

    Args:
        listener: Bound to the address that the processes will share; taken over.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = replace(settings, threads=max(1, settings.threads // settings.processes))
        self._family, self._address = listener.family, listener.getsockname()
        self._reserved = self._bind()  # keeps others off the address while nobody listens; gets no connections
        listener.close()
        # With SO_REUSEADDR, other programs could bind to the address while nobody listens. The listening sockets need
        # it, or the next start would have to wait for a minute.
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._workers: list[Worker] = []
        self._rounds: dict[Worker, tuple[set[Worker], float]] = {}
        """For each worker that wants the total: the workers that still owe their counts, and when to stop waiting."""
        self._gone = Counts()
        self._classes: tuple[str, ...] | None = None
        """The class names of the first process, which all others must share."""
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._start_at = 0.0
        """The earliest time to start the next process."""
        self._failures = 0
        """How many processes in a row ended before they served."""
        self._announced = False
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Run until the last process has ended, and return the exit code."""
        self._import()
        signals, signalled = Pipe(duplex=False)
        for each in SIGNALS:
            signal.signal(each, lambda sent, _frame: signalled.send(sent))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if whoever started us ignores it, no exit codes are kept
        try:
            self._start()
        except OSError as error:
            say(f"No process could be started: {error.strerror}.", sys.stderr)
            return COULD_NOT_START
        try:
            self._look_after(signals)
        finally:
            for worker in self._workers:  # if we fail here, the workers notice and stop
                worker.end.close()
        return self._exit_code

    def _import(self) -> None:
        """Import, before any fork, what would take each process most of its start and two thirds of its memory.

        A fork of a process with threads may hang, and in one of a process that has used CUDA there is none. Imports
        leave neither behind (`tests/test_processes.py`).
        """
        import app.server

        if self._settings.engine != "torch":
            with suppress(Exception):  # it is not installed, or broken; who needs it will say so
                import app.openvino_engine  # noqa: F401
        gc.freeze()  # to search these objects for garbage would copy the memory that holds them

    def _look_after(self, signals: Connection) -> None:
        while self._workers or self._missing:
            self._fill()
            handlers: dict[Any, Callable[[], None]] = {signals: lambda: self._pass_on(signals.recv())}
            for worker in self._workers:
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
        """How many processes to start; none until the first proves the settings good, so that only one complains."""
        return self._settings.processes - len(self._workers) if self._announced and not self._stopping else 0

    def _fill(self) -> None:
        while self._missing and time.monotonic() >= self._start_at:
            try:
                self._start()
            except OSError as error:  # for the moment there is no memory, or the limit on processes is reached
                logger.error("Another process could not be started and will be tried again: %s.", error.strerror)
                self._start_at = time.monotonic() + RETRY_SECONDS

    def _check(self) -> None:
        for worker in self._workers:
            worker.unanswered += worker.asked or not worker.ready
            if worker.ready:
                worker.ask()
            if worker.unanswered == PATIENCE and worker.ready:
                logger.error("Process %s is stuck and is killed.", worker.pid)
                worker.signal(signal.SIGKILL)
            elif worker.unanswered == PATIENCE:
                logger.error("Process %s has not begun to serve yet.", worker.pid)

    def _start(self) -> None:
        own, its = Pipe()
        with self._bind() as listener, its:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # or the process might take one as the supervisor does
            try:
                pid = os.fork()
                if pid == 0:
                    self._work(listener, its, own)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._workers.append(Worker(pid, own))

    def _work(self, listener: socket.socket, its: Connection, own: Connection) -> NoReturn:
        """Serve; runs in the new process, and ends it."""
        exit_code = COULD_NOT_START
        try:
            os.setpgrp()  # Ctrl-C goes to the supervisor alone, which passes it on
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._reserved.close()
            for end in (own, *(worker.end for worker in self._workers)):
                end.close()  # or their pipes would outlive the supervisor
            with suppress(OSError, ValueError):  # this system has no such thing
                score = Path("/proc/self/oom_score_adj")
                score.write_text(str(min(int(score.read_text()) + OOM_SCORE, 1000)))
            from app.server import serve  # imported long since

            exit_code = serve(self._settings, listener, Link(its), self._classes)
        except BaseException:  # whatever it is: what called this belongs to the supervisor
            traceback.print_exc()
        finally:
            os._exit(exit_code)

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
            worker.signal(sent)

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
            self._bury(worker)
            return
        match message:
            case ReadyNotice(engine, weights, classes):
                worker.ready = self._announced = True
                worker.unanswered = 0
                self._failures = 0
                self._classes = classes
                self._settings = replace(self._settings, engine=engine)
                if worker.outdated:
                    worker.signal(signal.SIGHUP)
                self._reload_others(worker, weights)
            case ReloadNotice(weights):
                self._reload_others(worker, weights)
            case TotalRequest():
                asked = {each for each in self._workers if each.ready}
                self._rounds[worker] = asked, time.monotonic() + REPLY_SECONDS
                for each in asked:
                    each.ask()
            case CountsReply(counts):
                worker.counts, worker.asked, worker.unanswered = counts, False, 0
                self._count_off(worker)

    def _reload_others(self, worker: Worker, weights: str) -> None:
        """Have every process that serves other weights than `worker` read the file again."""
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
        worker.end.close()
        exit_code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        self._gone.merge(replace(worker.counts, pids=(), waiting=0, ready=True))
        self._count_off(worker)
        if self._stopping:
            return
        if not self._announced:
            if exit_code != COULD_NOT_START:
                logger.error("Process %d ended (exit code %s) before it could serve.", worker.pid, exit_code)
            self._exit_code = COULD_NOT_START
            return
        logger.error("Process %d ended (exit code %s). Another one replaces it.", worker.pid, exit_code)
        if exit_code == -signal.SIGKILL and not (worker.ready and worker.unanswered >= PATIENCE):  # or we killed it
            logger.error("It was killed, most likely for lack of memory: give it more, or lower CIFAR_PROCESSES.")
        if not worker.ready:  # an immediate retry would fail, too, so wait longer each time
            self._failures += 1
            self._start_at = time.monotonic() + min(RETRY_SECONDS * 2 ** (self._failures - 1), MOST_RETRY_SECONDS)

"""Work beside other work: in steps, between which its thread does something else, or in a thread of its own. So weights
are replaced while requests run."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

STEP_SECONDS = 0.002
"""How long a step waits for the other thread, so that the wait costs that thread no processor time."""


def finish(steps: Generator[None, None, T]) -> T:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            result: T = finished.value
            return result


def aside(work: Callable[[], T]) -> Generator[None, None, T]:
    """What `work` returns or raises, run in its own thread.

    That thread has to end: one that ran parallel torch code and lives on would keep a pool of OpenMP threads, and with
    more of those than cores OpenMP stops spinning, which makes a forward pass of the service twice as slow.
    """
    future = in_thread(work)
    try:
        while not future.done():
            wait([future], STEP_SECONDS)
            yield
    finally:
        wait([future])  # also if nobody wants it any more: a thread that computes while the process ends aborts it
    return future.result()


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a daemon thread of its own. An event loop's executor has few threads, and neither the loop nor the
    process would end before the last of them does."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # so that one who leaves cannot cancel it

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever waits raises it; they would otherwise wait for ever
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

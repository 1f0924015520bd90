"""Work in steps, between which its thread does something else: how weights are replaced while requests run."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
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
    with ThreadPoolExecutor(1) as helper:
        future = helper.submit(work)
        while not future.done():
            wait([future], STEP_SECONDS)
            yield
        return future.result()

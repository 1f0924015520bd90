"""Grouping, limits and closing, with numbers for pictures. Gates rather than sleeps: nothing depends on speed."""

import asyncio
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from app import admission, batching, entries
from app.admission import Admission, Limits, Load
from app.batching import BROKEN_BATCHES, PATIENCE, Batcher, Building
from app.errors import DeadlineExceeded, NotReady, Overloaded

pytestmark = pytest.mark.anyio

LIMITS = Limits(max_batch=4, max_waiting=100, max_waiting_bytes=10_000, deadline_seconds=60)


class Doubler:
    """Parses a text as a number and doubles it; keeps what it saw. A closed gate holds the inference thread."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: dict[str, set[str]] = {"prepare": set(), "run": set(), "build": set()}
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()

    def prepare(self, text: str) -> int:
        self.threads["prepare"].add(threading.current_thread().name)
        return int(text)

    def build(self) -> Building[int, int]:
        yield
        self.threads["build"].add(threading.current_thread().name)
        return self.run

    def run(self, numbers: list[int]) -> list[int]:
        self.threads["run"].add(threading.current_thread().name)
        self.batches.append(list(numbers))
        self.running.set()
        self.gate.wait()
        if 13 in numbers:
            raise RuntimeError("an unlucky number")
        return [2 * number for number in numbers]


def start(doubler: Doubler, limits: Limits = LIMITS) -> Batcher[str, int, int]:
    batcher: Batcher[str, int, int] = Batcher(doubler.prepare, limits)
    batcher.start(doubler.build())
    return batcher


class Clock:
    """Stands still unless a test moves it."""

    seconds = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the batcher reads instead of the time."""
    clock = Clock()
    for module in (batching, entries):
        monkeypatch.setattr(module, "monotonic", lambda: clock.seconds)
    return clock


async def hold(doubler: Doubler, batcher: Batcher[str, int, int]) -> "asyncio.Future[int]":
    """Submit one item and return when it runs and cannot finish, so that what follows has to queue."""
    doubler.gate.clear()
    doubler.running.clear()
    held = batcher.submit("0", 1, light=True)
    await asyncio.to_thread(doubler.running.wait)
    return held


async def test_a_lone_item_runs_at_once_and_alone() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    assert await batcher.submit("21", 1, light=True) == 42
    assert doubler.batches == [[21]]
    batcher.close()


async def test_queued_items_run_together_in_order_up_to_max_batch() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    futures = [batcher.submit(str(number), 1, light=True) for number in range(1, 10)]
    doubler.gate.set()
    assert await asyncio.gather(held, *futures) == [2 * number for number in range(10)]
    assert doubler.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    batcher.close()


async def test_batches_of_a_large_request_and_of_single_pictures_alternate() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    many = batcher.submit_all([(str(number), 1, 1) for number in range(100, 110)], light=True)
    singles = [batcher.submit(str(number), 1, light=True) for number in range(1, 7)]
    doubler.gate.set()
    await asyncio.gather(held, *many, *singles)
    assert doubler.batches == [[0], [100, 101, 102, 103], [1, 2, 3, 4], [104, 105, 106, 107], [5, 6], [108, 109]]
    batcher.close()


async def test_slow_preparation_of_a_large_request_alternates_with_other_requests() -> None:
    doubler, prepared = Doubler(), list[str]()
    gate, begun = threading.Event(), threading.Event()

    def prepare(text: str) -> int:
        prepared.append(text)
        begun.set()
        gate.wait()
        return doubler.prepare(text)

    batcher: Batcher[str, int, int] = Batcher(prepare, LIMITS)
    batcher.start(doubler.build())
    many = batcher.submit_all([(str(number), 1, 1) for number in range(1, 6)], light=False)
    await asyncio.to_thread(begun.wait)
    singles = [batcher.submit(str(number), 1, light=False) for number in (11, 12)]
    gate.set()
    await asyncio.gather(*many, *singles)
    assert prepared == ["1", "11", "2", "12", "3", "4", "5"]
    batcher.close()


async def test_one_item_of_many_pictures_counts_as_a_large_request() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    single = batcher.submit("1", 1, light=True)
    many = batcher.submit_all([("9", 3, 3)], light=True)
    assert batcher.waiting == 5
    doubler.gate.set()
    assert await asyncio.gather(held, single, *many) == [0, 2, 18]
    assert doubler.batches == [[0], [9], [1]]
    assert batcher.waiting == 0
    batcher.close()


async def test_batches_of_single_pictures_double_while_four_such_batches_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "USUAL_BATCH", 2)
    doubler = Doubler()
    limits = Limits(max_batch=9, max_waiting=100, max_waiting_bytes=10_000, deadline_seconds=60)
    batcher = start(doubler, limits)
    held = await hold(doubler, batcher)
    singles = [batcher.submit("1", 1, light=True) for _ in range(20)]
    doubler.gate.set()
    await asyncio.gather(held, *singles)
    assert [len(batch) for batch in doubler.batches] == [1, 8, 4, 4, 2, 2]
    doubler.batches.clear()
    held = await hold(doubler, batcher)
    many = batcher.submit_all([("1", 1, 2)] * 8, light=True)
    singles = [batcher.submit("2", 1, light=True) for _ in range(18)]
    doubler.gate.set()
    await asyncio.gather(held, *many, *singles)
    assert doubler.batches == [[0], *8 * [[1], [2, 2]], [2, 2]]  # usual size: an item of many has two pictures
    batcher.close()


async def test_no_batch_is_doubled_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "USUAL_BATCH", 2)
    doubler = Doubler()
    batcher = start(doubler, replace(LIMITS, max_batch=9))
    held = await hold(doubler, batcher)
    singles = [batcher.submit("1", 1, light=True) for _ in range(70)]  # enough for four batches of 16
    doubler.gate.set()
    await asyncio.gather(held, *singles)
    assert max(len(batch) for batch in doubler.batches) == 8
    batcher.close()


async def test_only_a_single_item_can_make_a_batch_exceed_max_batch() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    futures = batcher.submit_all([("1", 1, 3), ("2", 1, 2), ("3", 1, 2), ("4", 1, 9)], light=True)
    doubler.gate.set()
    await asyncio.gather(held, *futures)
    assert doubler.batches == [[0], [1], [2, 3], [4]]
    batcher.close()


async def test_one_thread_builds_and_runs_while_the_event_loop_prepares_light_items() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    await batcher.submit("1", 1, light=True)
    here = threading.current_thread().name
    assert doubler.threads == {"prepare": {here}, "run": {"inference"}, "build": {"inference"}}
    assert here != "inference"
    batcher.close()


async def test_heavy_items_are_prepared_in_the_decode_thread() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    assert await batcher.submit("4", 1, light=False) == 8
    assert doubler.threads == {"prepare": {"decode"}, "run": {"inference"}, "build": {"inference"}}
    batcher.close()


@pytest.mark.parametrize("light", [True, False])
async def test_an_item_that_cannot_be_prepared_fails_alone(light: bool) -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    futures = [batcher.submit(text, 1, light=light) for text in ("1", "x", "3")]
    doubler.gate.set()
    one, broken, three = await asyncio.gather(*futures, return_exceptions=True)
    assert (await held, one, three) == (0, 2, 6)
    assert isinstance(broken, ValueError)
    batcher.close()


async def test_only_consecutive_failures_mark_the_engine_broken() -> None:
    batcher = start(Doubler())
    for number in ["13"] * (BROKEN_BATCHES - 1) + ["1"] + ["13"] * (BROKEN_BATCHES - 1):
        await asyncio.gather(batcher.submit(number, 1, light=True), return_exceptions=True)
        assert not batcher.broken
    await asyncio.gather(batcher.submit("13", 1, light=True), return_exceptions=True)
    assert batcher.broken
    batcher.close()


async def test_an_engine_that_hangs_is_broken_until_it_goes_on() -> None:
    batcher = start(doubler := Doubler())
    held = await hold(doubler, batcher)
    while not batcher.broken:
        batcher.check_alive()
    doubler.gate.set()
    assert await held == 0
    while batcher.broken:
        batcher.check_alive()
        await asyncio.sleep(0.01)
    batcher.close()


async def test_a_decoder_that_hangs_makes_it_broken_until_it_goes_on() -> None:
    """Given-up pictures behind it would count as waiting for ever, until nothing is admitted any more."""
    gate = threading.Event()

    def prepare(text: str) -> int:
        if text == "1":
            gate.wait()
        return int(text)

    batcher: Batcher[str, int, int] = Batcher(prepare, LIMITS)
    batcher.start(Doubler().build())
    held = batcher.submit("1", 1, light=False)
    while not batcher.broken:
        batcher.check_alive()
        assert await batcher.submit("2", 1, light=True) == 4
    gate.set()
    assert await held == 2
    while batcher.broken:
        batcher.check_alive()
        await asyncio.sleep(0.01)
    batcher.close()


async def test_an_idle_engine_is_not_broken_and_a_slow_one_only_after_many_checks() -> None:
    batcher = start(doubler := Doubler())
    for _ in range(2 * PATIENCE):
        while len(batcher._responsive) < 2:
            await asyncio.sleep(0)
        batcher.check_alive()
    held = await hold(doubler, batcher)
    while len(batcher._responsive) < 2:
        batcher._responsive.add(batcher._inference_thread)
        await asyncio.sleep(0)
    for _ in range(PATIENCE):
        batcher.check_alive()
        assert not batcher.broken
        with pytest.raises(ValueError, match="invalid literal"):  # an answer, but not the engine's
            await batcher.submit("x", 1, light=True)
    batcher.check_alive()
    assert batcher.broken
    doubler.gate.set()
    assert await held == 0
    batcher.close()


async def test_a_batch_that_fails_is_tried_item_by_item() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    futures = [batcher.submit(text, 1, light=True) for text in ("1", "13", "3")]
    doubler.gate.set()
    one, unlucky, three = await asyncio.gather(*futures, return_exceptions=True)
    assert (await held, one, three) == (0, 2, 6)
    assert isinstance(unlucky, RuntimeError)
    assert doubler.batches == [[0], [1, 13, 3], [1], [13], [3]]
    batcher.close()


async def test_items_beyond_max_waiting_are_refused_and_told_when_to_retry() -> None:
    doubler = Doubler()
    batcher = start(doubler, Limits(max_batch=4, max_waiting=3, max_waiting_bytes=10_000, deadline_seconds=60))
    held = await hold(doubler, batcher)
    admitted = [batcher.submit("1", 1, light=True), batcher.submit("2", 1, light=True)]
    with pytest.raises(Overloaded, match=r"\(pictures waiting: 3\)\. Try again in 1 second\.") as refusal:
        batcher.submit("3", 1, light=True)
    assert refusal.value.retry_after_seconds == 1
    doubler.gate.set()
    assert await asyncio.gather(held, *admitted) == [0, 2, 4]
    assert await batcher.submit("3", 1, light=True) == 6  # there is room again
    batcher.close()


async def test_bytes_beyond_max_waiting_bytes_are_refused() -> None:
    doubler = Doubler()
    batcher = start(doubler, Limits(max_batch=4, max_waiting=100, max_waiting_bytes=100, deadline_seconds=60))
    held = await hold(doubler, batcher)  # 1 byte
    with pytest.raises(Overloaded):
        batcher.submit_all([("1", 60, 1), ("2", 60, 1)], light=True)
    admitted = batcher.submit("1", 99, light=True)
    with pytest.raises(Overloaded):
        batcher.submit("2", 1, light=True)
    doubler.gate.set()
    assert [await held, await admitted] == [0, 2]
    assert await batcher.submit("2", 1000, light=True) == 4  # alone, any admitted size is served
    batcher.close()


async def test_a_request_that_would_miss_its_deadline_is_refused_with_the_expected_wait(clock: Clock) -> None:
    doubler = Doubler()
    batcher = start(doubler, Limits(max_batch=1, max_waiting=100, max_waiting_bytes=10_000, deadline_seconds=20))
    held = await hold(doubler, batcher)
    clock.seconds = 8.0
    doubler.gate.set()
    await held  # one item took 8 seconds
    held = await hold(doubler, batcher)
    admitted = [batcher.submit("1", 1, light=True), batcher.submit("2", 1, light=True)]
    with pytest.raises(Overloaded, match=r"would take 24 seconds; it may take 20\. Try again in 24 s") as refusal:
        batcher.submit("3", 1, light=True)
    assert refusal.value.retry_after_seconds == 24
    doubler.gate.set()
    await asyncio.gather(held, *admitted)
    batcher.close()


def test_each_batch_has_a_weight_of_one_tenth_in_the_mean_time() -> None:
    admission = Admission(LIMITS)
    for seconds in (10.0, 0.0):
        admission.learn(seconds)
    admission.enter(Load(1, 1, light=True, bulk=False))
    assert admission.expected_wait_seconds(Load(0, 1, light=True, bulk=False)) == pytest.approx(9.0)


def test_expected_wait_of_single_pictures_includes_only_part_of_large_requests() -> None:
    admission = Admission(LIMITS)
    admission.learn(1.0)
    admission.learn_preparation(10.0)
    for _ in range(50):
        admission.enter(Load(1, 1, light=False, bulk=True))
    for light in (True, False):
        assert admission.expected_wait_seconds(Load(0, 1, light=light, bulk=True)) == (50 if light else 500)
    assert admission.expected_wait_seconds(Load(0, 1, light=True, bulk=False)) == 4  # the batch that runs
    assert admission.expected_wait_seconds(Load(0, 1, light=False, bulk=False)) == 10  # the one that is prepared
    for _ in range(3):
        admission.enter(Load(1, 1, light=False, bulk=False))
    assert admission.expected_wait_seconds(Load(0, 1, light=True, bulk=False)) == 4 + 2 * 3
    assert admission.expected_wait_seconds(Load(0, 1, light=False, bulk=False)) == 10 + 10 * 2 * 3
    for _ in range(50):
        admission.leave(Load(1, 1, light=False, bulk=True))
    assert admission.expected_wait_seconds(Load(0, 1, light=False, bulk=False)) == 30
    for _ in range(3):
        admission.leave(Load(1, 1, light=False, bulk=False))
    assert (
        admission.expected_wait_seconds(Load(0, 1, light=False, bulk=True))
        == admission.waiting
        == admission.waiting_bytes
        == 0
    )


async def test_measured_preparation_time_refuses_heavy_items_but_not_light_ones(
    clock: Clock,
) -> None:
    doubler = Doubler()

    def prepare(text: str) -> int:
        clock.seconds += 8.0 * (text == "7")
        return doubler.prepare(text)

    batcher: Batcher[str, int, int] = Batcher(prepare, LIMITS)
    batcher.start(doubler.build())
    assert await batcher.submit("7", 1, light=False) == 14  # took 8 seconds, which none of the others will
    held = await hold(doubler, batcher)
    photos = [batcher.submit("1", 1, light=False) for _ in range(8)]
    with pytest.raises(Overloaded, match="Try again in 64 seconds"):
        batcher.submit("2", 1, light=False)
    small = batcher.submit("3", 1, light=True)
    doubler.gate.set()
    assert await asyncio.gather(held, small, *photos) == [0, 6] + 8 * [2]
    assert batcher.waiting == 0
    batcher.close()


@pytest.mark.parametrize("light", [True, False])
async def test_an_item_past_its_deadline_is_not_run(light: bool, clock: Clock) -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    late = batcher.submit("1", 1, light=light)
    clock.seconds = 61.0
    doubler.gate.set()
    assert await held == 0
    with pytest.raises(DeadlineExceeded, match="waited longer than 60 seconds for its turn"):
        await late
    assert doubler.batches == [[0]]
    batcher.close()


@pytest.mark.parametrize(("asked", "granted"), [(5, 5), (600, 60)])
async def test_a_client_may_shorten_the_deadline_and_not_lengthen_it(
    asked: float, granted: float, clock: Clock
) -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    (late,) = batcher.submit_all([("1", 1, 1)], deadline_seconds=asked, light=True)
    clock.seconds = granted + 1
    doubler.gate.set()
    assert await held == 0
    with pytest.raises(DeadlineExceeded, match=f"waited longer than {granted} seconds for its turn"):
        await late
    batcher.close()


@pytest.mark.parametrize("light", [True, False])
async def test_cancelled_items_are_not_run(light: bool) -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    leaving, staying = batcher.submit("1", 1, light=light), batcher.submit("2", 1, light=light)
    leaving.cancel()
    doubler.gate.set()
    assert [await held, await staying] == [0, 4]
    assert [number for batch in doubler.batches for number in batch] == [0, 2]
    assert batcher.waiting == 0  # it no longer counts
    batcher.close()


async def test_closing_answers_all_admitted_items_and_refuses_new_ones() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    futures = [batcher.submit(str(number), 1, light=number % 3 > 0) for number in range(1, 13)]
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))
    while batcher.running:
        await asyncio.sleep(0)
    with pytest.raises(NotReady):
        batcher.submit("1", 1, light=True)
    doubler.gate.set()
    await closing
    assert [future.result() for future in (held, *futures)] == [2 * number for number in range(13)]


@pytest.mark.usefixtures("clock")  # or the held item might be too late itself
async def test_closing_does_not_wait_forever_for_a_stuck_thread() -> None:
    doubler = Doubler()
    batcher = start(doubler, replace(LIMITS, deadline_seconds=0.01))
    held = await hold(doubler, batcher)
    try:
        batcher.close()
        assert not held.done()
    finally:
        doubler.gate.set()
    assert await held == 0


def test_what_was_admitted_in_an_event_loop_that_ended_leaves_without_it() -> None:
    """As each test of some frameworks, and each request without `with TestClient`, has its own."""
    doubler = Doubler()
    batcher = start(doubler)

    async def leave() -> None:
        await hold(doubler, batcher)

    async def follow() -> None:
        doubler.gate.set()
        while batcher.waiting:
            await asyncio.sleep(0)
        assert await batcher.submit("21", 1, light=True) == 42

    asyncio.run(leave())
    asyncio.run(follow())
    assert doubler.batches == [[0], [21]]
    batcher.close()


def test_what_was_admitted_leaves_although_its_event_loop_does_not_go_on() -> None:
    batcher = start(doubler := Doubler())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(hold(doubler, batcher))
    doubler.gate.set()
    batcher.close()
    assert batcher.waiting == 0
    loop.close()


def test_several_event_loops_are_answered_together() -> None:
    doubler = Doubler()
    batcher = start(doubler, replace(LIMITS, max_batch=32))
    admitted = threading.Barrier(3)

    async def ask(first: int) -> list[int]:
        answers = [batcher.submit(str(number), 1, light=number % 2 > 0) for number in range(first, first + 4)]
        await asyncio.to_thread(admitted.wait)
        return await asyncio.gather(*answers)

    async def ask_from_everywhere() -> None:
        held = await hold(doubler, batcher)
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(asyncio.run, ask(first)) for first in (20, 30)]
            admitted.wait()
            doubler.gate.set()
        assert [other.result() for other in others] == [[40, 42, 44, 46], [60, 62, 64, 66]]
        assert await held == 0

    asyncio.run(ask_from_everywhere())
    assert batcher.waiting == 0
    assert batcher.statistics.pictures == batcher.statistics.success.count == 9
    batcher.close()


def assert_no_thread_is_left() -> None:
    for thread in threading.enumerate():
        if thread.name in ("inference", "decode"):
            thread.join(60)  # the one that passes on the signal to stop ends a little later
            assert not thread.is_alive()


def building(factor: int, error: BaseException | None = None) -> Building[int, int]:
    """A function that multiplies, in three steps."""
    for _ in range(3):
        yield
    if error is not None:
        raise error
    return lambda numbers: [factor * number for number in numbers]


@pytest.mark.parametrize("error", [RuntimeError("no such device"), BaseException("no such device, says a library")])
def test_a_failed_build_raises_in_start_and_leaves_no_thread(error: BaseException) -> None:
    batcher: Batcher[str, int, int] = Batcher(int, LIMITS)
    with pytest.raises(type(error), match="no such device"):
        batcher.start(building(2, error=error))
    assert batcher.closed
    assert_no_thread_is_left()


async def test_only_items_admitted_after_an_exchange_run_on_the_new_function() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    before = batcher.submit_all([(str(number), 1, 1) for number in range(1, 12)], light=True)
    seen: list[int] = []

    def watched() -> Building[int, int]:
        for _ in range(3):
            seen.append(len(doubler.batches))
            yield
        return lambda numbers: [3 * number for number in numbers]

    swapping = batcher.swap(watched())
    meanwhile = batcher.submit("12", 1, light=True)
    doubler.gate.set()
    await asyncio.wrap_future(swapping)
    assert seen == [1, 2, 3]  # a step after each batch, also while there is more to do
    after = batcher.submit("1000", 1, light=True)
    assert await asyncio.gather(held, *before, meanwhile, after) == [*range(0, 26, 2), 3000]
    assert await batcher.submit("2", 1, light=True) == 6
    batcher.close()


async def test_a_batch_is_split_when_its_items_belong_to_different_functions() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    futures = [batcher.submit("1", 1, light=True)]
    batcher._run = lambda numbers: [5 * number for number in numbers]
    futures.append(batcher.submit("1", 1, light=True))
    doubler.gate.set()
    assert await asyncio.gather(held, *futures) == [0, 2, 5]
    assert doubler.batches == [[0], [1]]
    batcher.close()


async def test_an_exchange_that_fails_changes_nothing() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    with pytest.raises(ValueError, match="no good"):
        await asyncio.wrap_future(batcher.swap(building(3, error=ValueError("no good"))))
    assert await batcher.submit("2", 1, light=True) == 4
    await asyncio.wrap_future(batcher.swap(building(3)))
    assert await batcher.submit("2", 1, light=True) == 6
    batcher.close()


async def test_whoever_no_longer_waits_for_an_exchange_harms_nobody() -> None:
    batcher = start(doubler := Doubler())
    held = await hold(doubler, batcher)
    waiting = asyncio.wrap_future(batcher.swap(building(3)))
    waiting.cancel()
    doubler.gate.set()
    assert await held == 0
    await asyncio.wrap_future(batcher.swap(building(5)))
    assert await batcher.submit("2", 1, light=True) == 10
    batcher.close()


def test_one_that_is_closed_before_its_start_refuses_it() -> None:
    batcher: Batcher[str, int, int] = Batcher(int, LIMITS)
    batcher.close()
    with pytest.raises(NotReady):
        batcher.start(building(2))
    assert_no_thread_is_left()


async def test_the_old_function_is_freed_after_an_exchange() -> None:
    batcher: Batcher[str, int, int] = Batcher(int, LIMITS)
    batcher.start(building(2))
    old = weakref.ref(batcher._run)
    assert await batcher.submit("2", 1, light=True) == 4
    await asyncio.wrap_future(batcher.swap(building(3)))
    assert await batcher.submit("2", 1, light=True) == 6
    assert old() is None
    batcher.close()


async def test_an_exchange_is_given_up_when_the_service_stops() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    held = await hold(doubler, batcher)
    given_up_in: list[str] = []

    def endless() -> Building[int, int]:
        try:
            while True:
                yield
        finally:
            given_up_in.append(threading.current_thread().name)

    building = endless()  # kept, so that it is not the garbage collector who gives it up
    swapping = batcher.swap(building)
    doubler.gate.set()
    batcher.close()
    assert await held == 0
    with pytest.raises(NotReady):
        swapping.result()
    assert given_up_in == ["inference"]
    with pytest.raises(NotReady):
        batcher.swap(endless())


async def test_idle_work_waits_until_nothing_is_queued_and_runs_in_the_inference_thread() -> None:
    doubler = Doubler()
    batcher = start(doubler)
    seen: list[tuple[str, int]] = []
    done = threading.Event()

    def work() -> Iterator[None]:
        for _ in range(3):
            seen.append((threading.current_thread().name, len(doubler.batches)))
            yield
        done.set()

    held = await hold(doubler, batcher)
    futures = [batcher.submit(str(number), 1, light=True) for number in range(8)]
    batcher.run_when_idle(work())
    doubler.gate.set()
    await asyncio.gather(held, *futures)
    await asyncio.to_thread(done.wait)
    assert seen == [("inference", 3)] * 3  # after the held item and two batches of four
    assert await batcher.submit("5", 1, light=True) == 10
    batcher.close()


async def test_idle_work_waits_until_nothing_has_come_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "QUIET_SECONDS", 60)
    doubler = Doubler()
    batcher = start(doubler)
    steps: list[int] = []

    def endless() -> Iterator[None]:
        while True:
            steps.append(len(doubler.batches))
            yield

    batcher.run_when_idle(endless())
    for number in range(10):  # by a client who asks one by one
        assert await batcher.submit(str(number), 1, light=True) == 2 * number
    batcher.close()
    assert steps == []


async def test_an_exchange_drops_the_pending_idle_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep all it needs in memory until a quiet moment."""
    monkeypatch.setattr(batching, "QUIET_SECONDS", 60)
    doubler = Doubler()
    batcher = start(doubler)

    def work() -> Iterator[None]:
        yield from ()

    idle = work()
    kept = weakref.ref(idle)
    batcher.run_when_idle(idle)
    del idle
    await asyncio.wrap_future(batcher.swap(building(3)))
    assert kept() is None
    assert await batcher.submit("2", 1, light=True) == 6
    batcher.close()


async def test_idle_work_that_fails_stops_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    doubler = Doubler()
    batcher = start(doubler)
    done = threading.Event()

    def failing() -> Iterator[None]:
        yield
        raise RuntimeError("broken")

    def working() -> Iterator[None]:
        yield
        done.set()

    batcher.run_when_idle(failing())
    batcher.run_when_idle(working())
    await asyncio.to_thread(done.wait)
    assert "was given up" in caplog.text
    assert await batcher.submit("5", 1, light=True) == 10
    batcher.close()


async def test_closing_does_not_wait_for_idle_work() -> None:
    doubler = Doubler()
    batcher = start(doubler)

    def endless() -> Iterator[None]:
        while True:
            yield

    batcher.run_when_idle(endless())
    assert await batcher.submit("5", 1, light=True) == 10
    batcher.close()


async def test_check_room_refuses_when_an_item_would_be_refused() -> None:
    doubler = Doubler()
    batcher = start(doubler, Limits(max_batch=4, max_waiting=2, max_waiting_bytes=10_000, deadline_seconds=60))
    held = await hold(doubler, batcher)
    batcher.check_room()
    waiting = batcher.submit("1", 1, light=True)
    with pytest.raises(Overloaded, match="pictures waiting: 2"):
        batcher.check_room()
    doubler.gate.set()
    assert (await held, await waiting) == (0, 2)
    batcher.check_room()
    batcher.close()
    with pytest.raises(NotReady):
        batcher.check_room()

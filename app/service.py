"""What the routes serve: a loaded network behind a batcher, its report, and the limits on request bodies."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app import data, images, memory, predictor, self_test
from app.admission import Limits, usual_batch
from app.batching import Batcher, Building
from app.checkpoint import Checkpoint, load
from app.device import describe
from app.entries import Answer
from app.errors import CheckpointError, DataError, NotFound, NotReady, WeightsRefused
from app.exchange import LIGHT_BYTES, Intake
from app.images import Resize
from app.model import IMAGE_BYTES
from app.predictor import Estimate, Predictor
from app.report import Evaluation, report
from app.settings import Settings
from app.statistics import Predictions, Statistics
from app.steps import aside, finish, in_thread

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 8
"""Images per idle step of the evaluation; a request that comes at the wrong moment waits for one step, some 3 ms."""
EVALUATION_SECONDS = 10
"""When to ask again for figures being measured: seconds for the header Retry-After."""

Pixels = bytes | memoryview
"""The pixels of one picture or of several, a byte each (N, H, W, C)."""
Item = tuple[bytes, Resize | None] | memoryview
"""A picture as uploaded, or raw pixels."""
Rows = list[Estimate]
"""An estimate for each picture."""


class Verdict(NamedTuple):
    """Estimates, and the weights they came from, which may have been replaced since."""

    rows: Rows
    checkpoint: Checkpoint


@dataclass
class Served:
    """Weights, the network made from them, and its figures measured here."""

    checkpoint: Checkpoint
    predictor: Predictor = field(init=False)
    """The network; made in the inference thread."""
    measured: Evaluation | None = None
    measuring: bool = False
    """Whether `measured` will follow."""


class Service:
    """Holds everything that lives as long as the process."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.draining = False
        self.predictions = Predictions()
        self.on_swap: Callable[[str], None] = lambda _sha256: None
        """Called with the digest of the weights being served, after each successful reload."""
        self.intake = Intake(
            max_bytes=settings.max_body_bytes,
            max_waiting_bytes=settings.max_waiting_bytes,
            seconds=settings.deadline_seconds,
        )
        self._served = Served(checkpoint)
        self._starting: Future[None] | None = None
        self._start_lock = threading.Lock()
        self._reload_lock = threading.Lock()
        self._limits = Limits(
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            max_waiting_bytes=settings.max_waiting_bytes,
            deadline_seconds=settings.deadline_seconds,
        )
        self._batcher = self._new_batcher()

    def _new_batcher(self) -> Batcher[Item, Pixels, Verdict]:
        return Batcher(self._prepare, self._limits)

    async def start(self) -> None:
        """Return when the network is warm; at once if it is running, or still stopping. If there is a data set, an
        evaluation goes on in the background.

        The first request does so, too, for programs that embed the application without running its lifespan, as tests
        and mounts do. A closed service may be started again, as tests do with each `with TestClient(app)`.

        Raises:
            StartError: the engine cannot be used, or the weights compute wrongly here.
        """
        if not (self.running or self._batcher.closing):
            await asyncio.wrap_future(self._begin())

    def _begin(self) -> Future[None]:
        """The newest start, or another if that has come to its end. All first requests share it, and it goes on when
        one of them leaves."""
        with self._start_lock:
            if self._batcher.closed:
                self._batcher, self._starting = self._new_batcher(), None
            if self._starting is None:
                self._starting = in_thread(partial(self._start, self._batcher))
            return self._starting

    def _start(self, batcher: Batcher[Item, Pixels, Verdict]) -> None:
        batcher.start(self._build(self._served, self.settings.engine))
        memory.release()
        self._start_evaluation()

    async def close(self) -> None:
        """Answer everything admitted, then end."""
        await asyncio.wrap_future(in_thread(self._batcher.close))

    def check_engine(self) -> None:
        """To be called every few seconds, so that an engine or a decoder that hangs makes it `broken`."""
        self._batcher.check_alive()

    async def reload(self) -> bool:
        """Serve what the weights file holds now, and return whether that is new.

        Requests are answered meanwhile. An unfinished evaluation of the old weights is dropped.

        Raises:
            WeightsRefused: the file cannot be used, or is for other classes. The old weights stay in service.
            NotReady: the service has not been started, or is stopping.
        """
        changed = await asyncio.wrap_future(in_thread(self._reload))
        self.on_swap(self.checkpoint.sha256)  # also if it was the same: other processes may have failed to read it
        return changed

    def _reload(self) -> bool:
        self._batcher.check_open()
        with self._reload_lock:
            try:
                served = Served(load_aside(self.settings.weights))
                if served.checkpoint.sha256 == self.checkpoint.sha256:
                    logger.info("The weights file was read: it is the one being served.")
                    return False
                check_replaces(served.checkpoint, self.checkpoint.classes)
                self._batcher.swap(self._build(served, self.engine)).result()
            except CheckpointError as error:
                raise WeightsRefused(f"{error} The weights {self.checkpoint.sha256[:12]} stay in service.") from None
            self._served = served
            self._start_evaluation()
            logger.info("The weights were replaced. Serving %s.", self.describe())
            return True

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights that answer new requests. An answer itself says which weights it came from."""
        return self._served.checkpoint

    @property
    def engine(self) -> str:
        """The name of the engine in use."""
        return self._served.predictor.engine.name

    @property
    def running(self) -> bool:
        """Whether it has been started and not closed."""
        return self._batcher.running

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self.running and not self.draining

    @property
    def broken(self) -> bool:
        """Whether nothing can be answered any more, and only a new process can help."""
        return self._batcher.broken

    def describe(self) -> str:
        """What is served, in words, for the line that people see at the start."""
        engine, known = self._served.predictor.engine, self.checkpoint.evaluation
        accuracy = f" ({known.accuracy:.2%} on {known.dataset})" if known is not None else ""
        return (
            f"{self.settings.weights}: {self.checkpoint.architecture} {self.checkpoint.sha256[:12]}{accuracy}, "
            f"{str(engine.dtype).removeprefix('torch.')} with {engine.name} on "
            f"{describe(self.device, self.settings.threads)}"
        )

    @property
    def waiting(self) -> int:
        """Pictures admitted and not yet answered."""
        return self._batcher.waiting

    @property
    def statistics(self) -> Statistics:
        return self._batcher.statistics

    def check_room(self) -> None:
        """Raise if not even a small picture could be admitted now.

        Raises:
            Overloaded, NotReady: it could not.
        """
        self._batcher.check_room()

    def predict(self, picture: bytes, resize: Resize | None) -> Answer[Verdict]:
        """The verdict on one picture; cancel it when the client has left.

        Raises:
            Overloaded, NotReady: at once. The future may fail with any other `RequestError`.
        """
        return self._batcher.submit((picture, resize), len(picture), light=_is_light(picture, resize))

    def predict_pictures(
        self, pictures: Sequence[bytes], resize: Resize | None, deadline_seconds: float | None = None
    ) -> list[Answer[Verdict]]:
        """For each picture, a verdict of one row or what is wrong with it; all from the same weights.

        Raises:
            Overloaded, NotReady: at once, if not all of them can be admitted.
        """
        items: list[tuple[Item, int, int]] = [((picture, resize), len(picture), 1) for picture in pictures]
        light = len(pictures) == 1 and _is_light(pictures[0], resize)
        return self._batcher.submit_all(items, deadline_seconds, light=light)

    def predict_pixels(self, pixels: memoryview, deadline_seconds: float | None = None) -> list[Answer[Verdict]]:
        """The verdicts on many pictures of raw pixels, in groups for the caller to join; all from the same weights.

        Each group is a usual batch: a whole request would hold up everything else for as long as it runs.

        Raises:
            Overloaded, NotReady: as `predict_pictures`.
        """
        step = usual_batch(self.settings.max_batch) * IMAGE_BYTES
        groups = [pixels[start : start + step] for start in range(0, len(pixels), step)]
        items: list[tuple[Item, int, int]] = [(group, len(group), len(group) // IMAGE_BYTES) for group in groups]
        return self._batcher.submit_all(items, deadline_seconds, light=True)

    def report(self) -> dict[str, Any]:
        """The figures per class of the loaded weights, as plain types.

        Raises:
            NotFound: the weights came without figures, and nothing can be measured here.
            NotReady: nothing has been measured yet.
        """
        served = self._served
        measuring = served.measuring  # read first: another thread sets what was measured, and then this
        checkpoint, measured = served.checkpoint, served.measured
        evaluation = measured or checkpoint.evaluation
        if evaluation is None and measuring:
            raise NotReady("The weights are being evaluated on the data set.", retry_after_seconds=EVALUATION_SECONDS)
        if evaluation is None and self.settings.data is not None:
            raise NotFound("These weights carry no evaluation, and cannot get one here; the service's log says why.")
        if evaluation is None:
            raise NotFound(
                "These weights carry no evaluation. Start the service with a data set (CIFAR_DATA or --data) to have "
                "them evaluated, or train with `python -m training train`, which puts the figures into the file."
            )
        return {
            "source": "measured" if measured else "checkpoint",
            "weights": {"name": checkpoint.architecture, "sha256": checkpoint.sha256},
            "trained": checkpoint.trained,
            **report(evaluation, checkpoint.classes),
        }

    def _start_evaluation(self) -> None:
        if self.settings.data is not None:
            self._served.measuring = True
            threading.Thread(target=self._read_data, args=(self._served,), name="data", daemon=True).start()

    # Event loop for light items, else decode thread

    def _prepare(self, item: Item) -> Pixels:
        if isinstance(item, memoryview):
            return item
        return images.decode(*item, self.settings.max_pixels)

    # Inference thread

    def _build(self, served: Served, engine_name: str) -> Building[Pixels, Verdict]:
        served.predictor = yield from predictor.build(
            served.checkpoint,
            self.device,
            engine_name=engine_name,
            threads=self.settings.threads,
            max_batch=self.settings.max_batch,
        )
        yield
        try:
            yield from served.predictor.warm_up()
            self_test.check(served.predictor.predict, served.checkpoint.self_test_NK)
        except CheckpointError as error:
            tried = served.predictor.engine.name
            if engine_name != "auto" or tried == "torch":
                raise
            logger.warning("The engine %s is not used. %s Using the engine torch.", tried, error)
            return (yield from self._build(served, "torch"))
        return partial(self._run, served)

    def _run(self, served: Served, items: Sequence[Pixels]) -> list[Verdict]:
        answers = served.predictor.estimate_each(items)
        probabilities_NK = [row.probabilities_K for rows in answers for row in rows]
        self.predictions.record(probabilities_NK, served.checkpoint.classes)
        return [Verdict(rows, served.checkpoint) for rows in answers]

    def _evaluate(self, served: Served, split: data.Split, digest: str) -> Iterator[None]:
        parts = []
        try:
            for pixels_NCHW in split.pixels_NCHW.split(EVALUATION_BATCH):
                if served is not self._served:  # replaced; the new weights get their own evaluation
                    return
                parts.append(served.predictor.logits(pixels_NCHW))
                yield
            logits_NK = torch.cat(parts)
            served.measured = served.checkpoint.evaluate(logits_NK, split.labels_N, dataset=split.name, digest=digest)
            logger.info("Evaluated on %s: %d images.", split.name, len(split))
        finally:
            served.measuring = False

    # Its own thread: reading takes seconds, and no other thread may wait

    def _read_data(self, served: Served) -> None:
        assert self.settings.data is not None
        try:
            split = data.read_test(self.settings.data).labelled_for(served.checkpoint.classes)
            digest = split.digest
        except Exception as error:  # whatever it is, /metrics/per-class must not promise figures for ever
            logger.error("The weights are not evaluated here. %s", error, exc_info=not isinstance(error, DataError))
            served.measuring = False
            return
        if served is self._served:
            self._batcher.run_when_idle(self._evaluate(served, split, digest))


def _is_light(picture: bytes, resize: Resize | None) -> bool:
    """Whether decoding is little work: at most 1,024 pixels from little data. One to resize may have fifty million."""
    return resize is None and len(picture) <= LIGHT_BYTES


def check_replaces(checkpoint: Checkpoint, classes: tuple[str, ...]) -> None:
    """Check that it is for the `classes` being served. Clients may rely on the names or on class_id, and would misread
    other answers without noticing.

    Raises:
        CheckpointError: it is for others.
    """
    if checkpoint.classes != classes:
        raise CheckpointError(
            f"The weights file is for the classes {', '.join(checkpoint.classes)}; the weights being served "
            f"are for {', '.join(classes)}. Start a separate service for it."
        )


def load_aside(path: Path) -> Checkpoint:
    """`load` in a thread that ends afterwards; `aside` says why."""
    return finish(aside(partial(load, path)))

"""What the routes serve: one loaded network behind a batcher, and its report. Knows nothing of HTTP."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from app import data, images
from app.admission import Limits
from app.batching import Batcher
from app.checkpoint import Checkpoint
from app.device import describe
from app.errors import DataError, NotFound
from app.images import Resize
from app.predictor import Predictor
from app.report import evaluate_probabilities, report
from app.settings import Settings
from app.statistics import Statistics

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 8
"""Images per idle step of the evaluation: what a request that comes at the wrong moment waits for, some 3 ms."""

Upload = tuple[bytes, Resize | None]
Rows = list[list[float]]
"""Probabilities (N, K) in plain numbers."""


class Service:
    """Holds everything that lives as long as the process."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, device: torch.device) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.device = device
        self.evaluation = checkpoint.evaluation
        self.source = "checkpoint"
        self.draining = False
        self._batcher: Batcher[Upload | Tensor, Tensor, Rows] = Batcher(
            prepare=self._prepare,
            build=self._build,
            limits=Limits(
                max_batch=settings.max_batch,
                max_waiting=settings.max_waiting,
                max_waiting_bytes=settings.max_waiting_bytes,
                deadline_seconds=settings.deadline_seconds,
            ),
        )

    async def start(self) -> None:
        """Return when the network is warm. An evaluation, if data were given, goes on in the background."""
        await self._batcher.start()
        if self.settings.data is not None:
            threading.Thread(target=self._read_data, name="data", daemon=True).start()

    async def close(self) -> None:
        """Answer everything that was admitted, then end."""
        await self._batcher.close()

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self._batcher.ready and not self.draining

    def describe(self) -> str:
        """What is served, in words, for the line that a person sees at the start."""
        accuracy = ""
        if self.evaluation is not None:
            known = report(self.evaluation, self.checkpoint.classes)
            accuracy = f" ({known['accuracy']:.2%} on {known['dataset']['name']})"
        return (
            f"{self.settings.weights}: {self.checkpoint.architecture} {self.checkpoint.sha256[:12]}{accuracy}, "
            f"{str(self._predictor.dtype).removeprefix('torch.')} on {describe(self.device)}"
        )

    @property
    def expected_wait_seconds(self) -> float:
        return self._batcher.expected_wait_seconds

    @property
    def statistics(self) -> Statistics:
        return self._batcher.statistics

    def predict(self, picture: bytes, resize: Resize | None) -> "asyncio.Future[Rows]":
        """One row: the probabilities of the classes, in their order; to be cancelled when the client has left.

        Raises:
            Overloaded, NotReady: at once. The future may fail with any other `RequestError`.
        """
        return self._batcher.submit((picture, resize), len(picture))

    def predict_pictures(
        self, pictures: Sequence[bytes], resize: Resize | None, deadline_seconds: float | None = None
    ) -> "asyncio.Future[list[Rows | BaseException]]":
        """For each picture one row, or what is wrong with it.

        Raises:
            Overloaded, NotReady: at once, if not all of them can be admitted.
        """
        items: list[tuple[Upload | Tensor, int, int]] = [((picture, resize), len(picture), 1) for picture in pictures]
        return asyncio.gather(*self._batcher.submit_all(items, deadline_seconds), return_exceptions=True)

    def predict_pixels(
        self, pixels_NCHW: Tensor, deadline_seconds: float | None = None
    ) -> "asyncio.Future[list[Rows]]":
        """The rows of many pictures (uint8), in groups that have to be joined.

        Each group is one full batch: whole requests would hold up everything else for as long as they take.

        Raises:
            Overloaded, NotReady: as `predict_pictures`.
        """
        groups = pixels_NCHW.split(self.settings.max_batch)
        items: list[tuple[Upload | Tensor, int, int]] = [(group, group.nbytes, len(group)) for group in groups]
        return asyncio.gather(*self._batcher.submit_all(items, deadline_seconds))

    def report(self) -> dict[str, Any]:
        """The figures per class of the loaded weights, as plain types.

        Raises:
            NotFound: the weights came without figures, and nothing has been measured here.
        """
        if self.evaluation is None:
            raise NotFound(
                "These weights carry no evaluation. Start the service with a data set (CIFAR_DATA or --data) to have "
                "them evaluated, or train with `python -m training train`, which puts the figures into the file."
            )
        return {
            "source": self.source,
            "weights": {"name": self.checkpoint.architecture, "sha256": self.checkpoint.sha256},
            "trained": self.checkpoint.trained,
            **report(self.evaluation, self.checkpoint.classes),
        }

    # Inference thread, or for large pictures the decode thread

    def _prepare(self, item: Upload | Tensor) -> Tensor:
        if isinstance(item, Tensor):
            return item
        return images.decode(*item, self.settings.max_pixels).unsqueeze(0)

    # Inference thread

    def _build(self) -> Callable[[Sequence[Tensor]], list[Rows]]:
        self._predictor = Predictor(
            self.checkpoint, self.device, threads=self.settings.threads, max_batch=self.settings.max_batch
        )
        return self._predictor.predict_each

    def _evaluate(self, split: data.Split) -> Iterator[None]:
        parts = []
        for pixels_NCHW in split.pixels_NCHW.split(EVALUATION_BATCH):
            parts.append(self._predictor.predict(pixels_NCHW))
            yield
        evaluated_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.evaluation = evaluate_probabilities(
            torch.cat(parts), split.labels_N, dataset=split.name, digest=split.digest, evaluated_at=evaluated_at
        )
        self.source = "measured"
        logger.info("Evaluated on %s: %d images.", split.name, len(split))

    # A thread of its own: reading takes seconds and none of the others may wait

    def _read_data(self) -> None:
        assert self.settings.data is not None
        try:
            split = data.read_test(self.settings.data)
        except DataError as error:
            logger.error("The weights are not evaluated here. %s", error)
            return
        if split.classes != self.checkpoint.classes:
            logger.error(
                "The weights are not evaluated here. The data set has the classes %s; the weights were trained for %s.",
                ", ".join(split.classes),
                ", ".join(self.checkpoint.classes),
            )
            return
        self._batcher.run_when_idle(self._evaluate(split))

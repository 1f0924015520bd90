"""The loaded network, ready to answer: folded, in an engine, warm. Build and call it in the same thread.

Shape letters: N images, C = 3, H = W = 32, D features, K classes.
"""

from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from app import engine, model
from app.admission import usual_batch
from app.calibration import Calibration, energy
from app.checkpoint import Checkpoint
from app.engine import Engine
from app.errors import CheckpointError
from app.images import to_tensor
from app.model import IMAGE_BYTES, IMAGE_SIZE
from app.steps import aside


class Estimate(NamedTuple):
    """What the network makes of one picture, in plain numbers."""

    probabilities_K: list[float]
    familiarity: float | None
    """Share of held-out images that resemble the training images less, in [0, 1]; None if the weights cannot tell."""


class Predictor:
    """Pixels in, probabilities out."""

    def __init__(
        self, engine: Engine, head: nn.Linear, calibration: Calibration, max_batch: int, device: torch.device
    ) -> None:
        self.engine = engine
        self._head, self._calibration = head, calibration
        self._max_batch, self._device = max_batch, device

    def warm_up(self) -> Iterator[None]:
        """Run batches of several sizes, one per step: the first run of a size also chooses its kernels.

        On a GPU the sizes are 1, 2, 4, 8, ... pictures. On an NVIDIA GPU all others are filled up to these, which run
        twice, because the second run records them. On a CPU the sizes are one picture and the usual batch: the first
        batch of any other size takes some 5 ms longer, and running more would add up to a fifth to the start.
        """
        sizes = {2**power for power in range(self._max_batch.bit_length())} | {self._max_batch}
        if self._device.type == "cpu":
            sizes = {1, usual_batch(self._max_batch)}
        for size in sorted(sizes):
            for _ in range(2 if self._device.type == "cuda" else 1):
                self.predict(torch.zeros(size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8))
                yield

    @torch.inference_mode()
    def logits(self, pixels_NCHW: Tensor) -> Tensor:
        """The network's logits (N, K), float64 on the CPU, of uint8 pixels (N, C, H, W).

        Raises:
            CheckpointError: they are not finite, or too few: the weights do not suit the engine, or the device fails.
        """
        features_ND = torch.cat([self.engine(part) for part in pixels_NCHW.split(self._max_batch)])
        logits_NK: Tensor = self._head(features_ND)
        if len(logits_NK) != len(pixels_NCHW) or not logits_NK.isfinite().all():
            raise CheckpointError(
                f"With the engine {self.engine.name} on {self._device}, these weights give logits that are not finite "
                "numbers, or too few."
            )
        return logits_NK.double()

    @torch.inference_mode()
    def predict(self, pixels_NCHW: Tensor) -> Tensor:
        """Probabilities (N, K), calibrated, float64 so that each row sums to 1."""
        return self._calibration.probabilities(self.logits(pixels_NCHW))

    @torch.inference_mode()
    def estimate(self, pixels_NCHW: Tensor) -> list[Estimate]:
        """The probabilities of each picture, and how familiar it is."""
        logits_NK = self.logits(pixels_NCHW)
        rows_NK = self._calibration.probabilities(logits_NK).tolist()
        if self._calibration.energy_quantiles is None:
            return [Estimate(row_K, None) for row_K in rows_NK]
        return list(map(Estimate, rows_NK, map(self._calibration.familiarity, energy(logits_NK).tolist())))

    def estimate_each(self, items: Sequence[bytes | memoryview]) -> list[list[Estimate]]:
        """The estimates for each item: the pixels of one picture or of several, a byte each (N, H, W, C)."""
        estimates = iter(self.estimate(to_tensor(items)))
        return [list(islice(estimates, len(pixels) // IMAGE_BYTES)) for pixels in items]


def build(
    checkpoint: Checkpoint, device: torch.device, *, engine_name: str = "auto", threads: int, max_batch: int
) -> Generator[None, None, Predictor]:
    """Fold and translate the network, in steps, none of which takes much longer than a batch.

    Args:
        engine_name: torch, openvino, or auto for the faster one.
        threads: How many a forward pass on a CPU uses; no more than there are cores.
        max_batch: Larger batches are split.
    """
    folded = yield from aside(lambda: model.fold(checkpoint.network()))
    # The last layer is small; in bfloat16 its logits would be so coarse that two classes often shared the highest.
    body, head = model.split(folded)
    chosen = yield from engine.choose(body, device, name=engine_name, threads=threads, batch=usual_batch(max_batch))
    return Predictor(chosen, head, checkpoint.calibration, max_batch, device)

"""The loaded network, ready to answer: on its device, in its number format, folded and warm.

Build it and call it in one and the same thread: from another one, torch's threads are made anew and a forward pass of
two threads takes twice the time.

Shape letters: N images, C = 3, H = W = 32, K classes.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from app import model
from app.checkpoint import Checkpoint
from app.device import choose_dtype
from app.model import IMAGE_SIZE


class Predictor:
    """Pixels in, probabilities out."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, threads: int, max_batch: int) -> None:
        """Fold and move the network.

        Args:
            threads: How many a forward pass uses on a CPU; not more than there are cores.
            max_batch: Larger batches are split.
        """
        torch.set_num_threads(threads)
        self.device = device
        self.dtype = choose_dtype(device)
        self._max_batch = max_batch
        self._temperature = checkpoint.temperature
        network = model.fold(checkpoint.network())
        self._network = network.to(device, self.dtype).to(memory_format=torch.channels_last)

    def warm_up(self) -> Iterator[None]:
        """Run each size of a batch once, one a step, because the first run of a size also chooses its kernels.

        About a quarter of a second altogether on a CPU.
        """
        for size in range(1, self._max_batch + 1):
            self.predict(torch.zeros(size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8))
            yield

    @torch.inference_mode()
    def predict(self, pixels_NCHW: Tensor) -> Tensor:
        """Probabilities (N, K), float64 on the CPU so that each row sums to 1, of uint8 pixels (N, C, H, W)."""
        logits = [
            self._network(part.to(self.device, memory_format=torch.channels_last))
            for part in pixels_NCHW.split(self._max_batch)
        ]
        return (torch.cat(logits).cpu().double() / self._temperature).softmax(dim=1)

    def predict_each(self, items: Sequence[Tensor]) -> list[list[list[float]]]:
        """For each item of pixels (N, C, H, W) its probabilities (N, K), in plain numbers."""
        # Joined as (N, H, W, C), the order they have in memory.
        pixels_NHWC = torch.cat([pixels_NCHW.permute(0, 2, 3, 1) for pixels_NCHW in items])
        rows = iter(self.predict(pixels_NHWC.permute(0, 3, 1, 2)).tolist())
        return [list(islice(rows, len(pixels_NCHW))) for pixels_NCHW in items]

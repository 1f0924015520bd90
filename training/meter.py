"""What an epoch shows while it runs and what it leaves for the log."""

import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from training.config import Recipe
from training.errors import TrainingError


class Meter:
    """Adds up an epoch's loss on the device, and reads it only to show it: reading waits for the device."""

    def __init__(self, recipe: Recipe, epoch: int, steps: int, *, show: bool) -> None:
        self.recipe, self.epoch, self.steps, self.show = recipe, epoch, steps, show
        title = f"epoch {epoch + 1}/{recipe.epochs}"
        self.bar = tqdm(total=steps, desc=title, leave=False, disable=None if show else True)  # None: on terminals only
        self.start = time.perf_counter()
        self.step = self.images = 0
        self.learning_rate = 0.0
        self.loss_sum: Tensor = torch.zeros(())
        self.recent: Tensor = torch.zeros(())

    def update(self, loss_sum: Tensor, num_images: int, learning_rate: float) -> None:
        """Count one step; `loss_sum` is summed over its `num_images` images."""
        self.step, self.images, self.learning_rate = self.step + 1, self.images + num_images, learning_rate
        self.loss_sum, self.recent = self.loss_sum + loss_sum, self.recent + loss_sum / num_images
        self.bar.update()
        every = self.recipe.report_every
        if every and self.step % every == 0:
            self._refuse_unless_finite(self.loss_sum)
            if self.show:
                tqdm.write(f"[{self.epoch + 1}, {self.step:5d}] loss: {self.recent.item() / every:.3f}")
            self.recent = torch.zeros(())
        if not self.bar.disable and self.step % max(1, self.steps // 50) == 0:
            speed = self.images / (time.perf_counter() - self.start)
            loss = self.loss_sum.item() / self.images
            self.bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.4f}, {speed:.0f} images/s")

    def close(self, network: nn.Module) -> dict[str, float]:
        """The figures of the epoch, over all processes.

        Raises:
            TrainingError: the loss or a weight of `network` is not finite.
        """
        self.bar.close()
        # No loss of this epoch shows what the last update did, so the weights themselves are checked.
        unfit = sum((0 * parameter.detach().sum() for parameter in network.parameters()), torch.zeros(()))
        totals = torch.stack([self.loss_sum + unfit, torch.as_tensor(float(self.images), device=self.loss_sum.device)])
        if dist.is_initialized():
            dist.all_reduce(totals)
        self._refuse_unless_finite(totals)
        loss_sum, images = totals.tolist()
        seconds = time.perf_counter() - self.start
        return {
            "epoch": self.epoch + 1,
            "loss": loss_sum / images,
            "learning_rate": self.learning_rate,
            "train_seconds": seconds,
            "images_per_second": images / seconds,
        }

    def _refuse_unless_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            self.bar.close()
            raise TrainingError(
                f"The loss is no longer finite in epoch {self.epoch + 1}, step {self.step}. "
                "Start a new run with a lower --learning-rate or a longer --warmup."
            )

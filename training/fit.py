"""The training loop, which readers of the PyTorch tutorial will recognise, and what a long run needs around it.

Shape letters: N images, C = 3, H = W = 32, K classes.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from app import memory
from app.data import Split
from app.device import choose_dtype, choose_memory_format
from app.files import read_regular, save_tensors
from app.model import IMAGE_SIZE, CifarNet, Normalized
from app.recorded import Recorded, Step
from training.augment import Draws, augment, draw, epoch_generator, shrink
from training.config import Recipe
from training.distill import Teachers, loss
from training.errors import TrainingError
from training.meter import Meter
from training.muon import Muon

CHANNELS = 3
WHITENING_IMAGES = 5000
LOW_RESOLUTIONS = (20, 26)
AHEAD = {"cuda": 10_000}
"""Images to augment together, in whole batches, by device: a GPU needs that many to be busy. Elsewhere it is one batch
at a time: more would not stay in a CPU's caches."""


Row = dict[str, float]
"""An epoch's figures, as shown in the log and the learning curves."""


@dataclass(frozen=True)
class Workers:
    """This process's place among those that train together (torchrun sets RANK, LOCAL_RANK and WORLD_SIZE)."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join_workers(device: torch.device) -> Workers:
    """Join the other processes if torchrun started several; otherwise, be the only one.

    Raises:
        TrainingError: its variables in the environment are not complete.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return Workers()
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise TrainingError(
            f"WORLD_SIZE is {count}, but: {error}. Start several processes with torchrun, or unset WORLD_SIZE for one."
        ) from None
    return Workers(dist.get_rank(), dist.get_world_size())


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The number format that the networks compute a step in."""
    return choose_dtype(device) if recipe.precision == "auto" else torch.float32


def initialize(network: Normalized, recipe: Recipe, pixels_NCHW: Tensor) -> None:
    """Set what a network takes from its data before training: the normalisation, as the recipe says, and whitening."""
    if recipe.normalization == "data":
        for channel in range(CHANNELS):
            std, mean = torch.std_mean(pixels_NCHW[:, channel].double() / 255)  # all channels at once take gigabytes
            network.mean[channel] = mean
            network.std[channel] = std.clamp_min(1 / 255)  # std is 0 for a channel without content
    if isinstance(network, CifarNet):
        network.set_whitening(pixels_NCHW[:WHITENING_IMAGES])


def optimizers_for(network: nn.Module, recipe: Recipe) -> list[Optimizer]:
    """The optimizers a recipe asks for; each parameter group has its peak learning rate as `peak`.

    Weights decay; biases and batch norms decay as fast if they have their own learning rate, else not at all. With
    muon, the weights of hidden layers have their own optimizer.
    """
    biases: dict[str, Any] = {}
    if recipe.bias_learning_rate:
        decay = recipe.weight_decay * recipe.learning_rate / recipe.bias_learning_rate
        biases = {"peak": recipe.bias_learning_rate, "weight_decay": decay}
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # Neither layers that see pixels nor the last one, whose norm decides how sure the network can be.
    hidden = [p for p in parameters if p.ndim > 1 and p.shape[1] > CHANNELS][:-1] if recipe.optimizer == "muon" else []
    taken = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    peak = {"peak": recipe.learning_rate}
    groups: list[dict[str, Any]] = [
        peak | {"params": [p for p in rest if p.ndim > 1], "weight_decay": recipe.weight_decay},
        peak | {"params": [p for p in rest if p.ndim <= 1], **biases},
    ]
    sgd = SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    if not hidden:
        return [sgd]
    return [sgd, Muon([{"params": hidden, "peak": recipe.muon_learning_rate}], momentum=recipe.muon_momentum)]


def set_learning_rates(optimizers: list[Optimizer], factor: float, device: torch.device) -> None:
    """Set each group's rate to `factor` times its peak, in place: a recorded step reads it from a fixed address."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.zeros((), device=device)
            group["lr"].fill_(factor * group["peak"])


def learning_rate_factor(step: int, total: int, recipe: Recipe) -> float:
    """The share of the peak: rises from 0 to 1 during the warm-up, then falls to 0 at `total` if the recipe decays."""
    rise = recipe.warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return (total - step) / (total - rise) if recipe.decay else 1.0


def resolution(epoch: int, recipe: Recipe) -> int:
    """The side of the pictures in `epoch`; the low resolutions share the recipe's low-resolution epochs equally."""
    for number, size in enumerate(LOW_RESOLUTIONS, start=1):
        if epoch < round(number / len(LOW_RESOLUTIONS) * recipe.low_resolution * recipe.epochs, 6):  # 7.0000001 is 7
            return size
    return IMAGE_SIZE


def fit(
    network: Normalized,
    train: Split,
    recipe: Recipe,
    *,
    device: torch.device,
    teachers: Teachers | None = None,
    workers: Workers = Workers(),
    validate: Callable[[nn.Module], Row] | None = None,
    on_epoch: Callable[[list[Row]], None] | None = None,
    state_file: Path | None = None,
    resume: bool = False,
    show_progress: bool = False,
) -> list[Row]:
    """Train `network` in place on `train` as `recipe` says.

    `teachers` are for a recipe with distillation. After each epoch, in the first process only, `validate` is called,
    `state_file` is written, and `on_epoch` is called with the figures of all epochs so far. If `resume` is set, the
    state is read at the start.

    Returns:
        The figures of each epoch, in the first process.

    Raises:
        TrainingError: the loss is no longer finite, the batch does not divide, or the state file is from another run.
    """
    steps = _steps(train, recipe, workers)
    memory.keep()
    dtype = compute_dtype(recipe, device)
    memory_format = _place((network, teachers) if teachers else (network,), recipe, device)
    model: nn.Module = DistributedDataParallel(network) if workers.count > 1 else network
    optimizers = optimizers_for(network, recipe)
    introduction = teachers.introduction if teachers else "none"
    rows: list[Row] = []
    origin = {**_fields(recipe), "images": train.digest, "teachers": introduction}
    if resume and state_file is not None and state_file.exists():
        state = _read_state(state_file)
        _check_origin(state["origin"], origin)
        rows = _restore(state, network, optimizers)
    _check_same(len(rows), workers)
    if rows and workers.is_first and on_epoch is not None:  # in case the run stopped between writing state and log
        on_epoch(rows)

    def learn(shown_NCHW: Tensor, pixels_NCHW: Tensor, labels_NK: Tensor, scale: Tensor) -> Tensor:
        """Learn from `scale` times the loss of a batch, summed over its images; return the unscaled sum.

        The network sees `shown_NCHW`; the teachers see `pixels_NCHW`, which may be larger.
        """
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits_NK = model(shown_NCHW.contiguous(memory_format=memory_format))
            answers_NK = teachers(pixels_NCHW.contiguous(memory_format=memory_format)) if teachers else None
        loss_sum = loss(logits_NK.float(), labels_NK, answers_NK, recipe)
        (scale * loss_sum).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss_sum.detach()

    take_step: Step = Recorded(learn, warm_up=3) if device.type == "cuda" and workers.count == 1 else learn
    images_NCHW = train.pixels_NCHW.to(device)
    labels_NK = F.one_hot(train.labels_N, len(train.classes)).float().to(device)
    for epoch in range(len(rows), recipe.epochs):
        model.train()
        generator = epoch_generator(recipe.seed, epoch)
        order_N = torch.randperm(len(train), generator=generator).to(device)
        draws = draw(len(train), epoch, recipe, generator).to(device)
        meter = Meter(recipe, epoch, steps, show=show_progress and workers.is_first)
        # Parts of equal size: every image is used in every epoch, and no last batch is too small for a batch norm.
        batches = order_N.tensor_split(steps)
        mine = [batch_N[workers.rank :: workers.count] for batch_N in batches]
        size = resolution(epoch, recipe)
        for step, (pixels_NCHW, targets_NK) in enumerate(_augmented(images_NCHW, labels_NK, mine, draws, recipe)):
            shown_NCHW = pixels_NCHW if size == IMAGE_SIZE else shrink(pixels_NCHW, size)
            factor = learning_rate_factor(epoch * steps + step, recipe.epochs * steps, recipe)
            set_learning_rates(optimizers, factor, device)
            # Gradients are averaged over the processes; this scale makes that the mean over the whole batch.
            scale = torch.full((), workers.count / len(batches[step]), device=device)
            loss_sum = take_step(shown_NCHW, pixels_NCHW, targets_NK, scale)
            meter.update(loss_sum, len(pixels_NCHW), factor * recipe.learning_rate)
        row = meter.close(network)
        if workers.is_first:
            if validate is not None:
                row |= validate(network)
            rows.append(row)
            if state_file is not None:
                _save_state(state_file, origin, network, optimizers, rows)
            if on_epoch is not None:
                on_epoch(rows)
    return rows


def _steps(train: Split, recipe: Recipe, workers: Workers) -> int:
    """The number of steps in an epoch."""
    if recipe.batch_size % workers.count:
        raise TrainingError(
            f"A batch of {recipe.batch_size} images cannot be shared evenly by {workers.count} processes; "
            f"choose --batch-size as a multiple of {workers.count}."
        )
    steps = max(1, round(len(train) / recipe.batch_size))
    if len(train) // steps < workers.count:
        raise TrainingError(
            f"{len(train):,} images make batches of {len(train) // steps}, too few for {workers.count} processes; "
            "start fewer of them, or choose a larger --batch-size."
        )
    return steps


def _place(modules: Iterable[nn.Module], recipe: Recipe, device: torch.device) -> torch.memory_format:
    """Prepare the device and move the networks to it; return the memory format that their pictures need."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # recorded steps and gradient exchange use the current device
    torch.backends.cudnn.benchmark = True  # steps are alike, so trying NVIDIA's algorithms once pays off
    torch.backends.cudnn.allow_tf32 = recipe.precision == "auto"
    memory_format = choose_memory_format(device) if recipe.precision == "auto" else torch.contiguous_format
    for module in modules:
        module.to(device)
        module.to(memory_format=memory_format)  # type: ignore[call-overload, unused-ignore]  # torch < 2.14
    return memory_format


def _augmented(
    images_NCHW: Tensor, labels_NK: Tensor, batches: list[Tensor], draws: Draws, recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels of each batch of indices, both mixed as drawn."""
    ahead = max(1, AHEAD.get(images_NCHW.device.type, 0) // len(batches[0]))
    for first in range(0, len(batches), ahead):
        part = batches[first : first + ahead]
        index_N, sizes = torch.cat(part), [len(batch_N) for batch_N in part]
        mixed_NK = labels_NK[index_N]
        if recipe.cutmix:
            mixed_NK = mixed_NK.lerp(labels_NK[draws.partner_N[index_N]], draws.patch_share(index_N)[:, None])
        pixels_NCHW = augment(images_NCHW, index_N, draws, recipe)
        yield from zip(pixels_NCHW.split(sizes), mixed_NK.split(sizes), strict=True)


def _check_same(epochs: int, workers: Workers) -> None:
    """Refuse to train unless all processes resume from the same epoch."""
    if workers.count == 1:
        return
    counts: list[int] = [0] * workers.count
    dist.all_gather_object(counts, epochs)
    if len(set(counts)) > 1:
        raise TrainingError(
            f"The processes would resume after different epochs ({', '.join(map(str, counts))}): not all of them "
            "find the run's state. Have their machines share the folder runs/."
        )


def _save_state(
    file: Path, origin: dict[str, Any], network: nn.Module, optimizers: list[Optimizer], rows: list[Row]
) -> None:
    content = {
        "origin": origin,
        "network": network.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rows": rows,
    }
    save_tensors(file, content)


def check_same_recipe(state_file: Path, recipe: Recipe) -> None:
    """Check that the run to resume, whose state `fit` left in `state_file`, has this recipe.

    Raises:
        TrainingError: it has another recipe, or the file is damaged.
    """
    _check_origin(_read_state(state_file)["origin"], _fields(recipe))


def _fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields that affect the result."""
    return {name: value for name, value in vars(recipe).items() if name != "report_every"}


def _read_state(file: Path) -> dict[str, Any]:
    raw = io.BytesIO(read_regular(file))
    try:
        state: dict[str, Any] = torch.load(raw, map_location="cpu", weights_only=True)
        if not {"origin", "network", "optimizers", "rows"} <= state.keys():
            raise EOFError
    except Exception:  # torch raises nearly anything for damaged bytes
        raise TrainingError(f"{file} is damaged or cut short; start a new run under another --name.") from None
    return state


def _check_origin(begun: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"other {name}" if name in ("images", "teachers") else f"{name} {begun.get(name)} (now {value})"
        for name, value in now.items()
        if begun.get(name) != value
    ]
    if changed:
        raise TrainingError(
            f"The run to resume was started with other values: {', '.join(changed)}. "
            "Resume it with the same flags, images and teachers, or start a new run under another --name."
        )


def _restore(state: dict[str, Any], network: nn.Module, optimizers: list[Optimizer]) -> list[Row]:
    network.load_state_dict(state["network"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the loaded one is on the CPU, and each step sets it anyway
        for parameter, momentum in optimizer.state.items():
            for name, value in momentum.items():  # fused sgd assumes the same memory layout for both
                momentum[name] = torch.empty_like(parameter).copy_(value)
    rows: list[Row] = state["rows"]
    return rows

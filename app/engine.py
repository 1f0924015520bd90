"""What computes the features: torch, or on a CPU OpenVINO where it is installed and faster.

An engine takes any number of pictures. The first run of a batch size also chooses kernels, and on an NVIDIA GPU, where
batches are filled up to 1, 2, 4, 8, ..., the second run records them. Build and call it in the same thread: for
another one torch creates new threads, and a forward pass of two threads takes twice the time.

Shape letters: N images, C = 3, H = W = 32, D features.
"""

import importlib
import logging
import time
from collections.abc import Generator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from app.bfloat16 import round_weights
from app.device import choose_dtype, choose_memory_format
from app.errors import SettingsError
from app.model import IMAGE_SIZE, Normalized
from app.recorded import Recorded, Step
from app.steps import aside

logger = logging.getLogger(__name__)

REPETITIONS = 5
ENOUGH_SECONDS = 0.1
"""No more repetitions after this long: on a slow machine, which starts slowly anyway, two must do."""


class Engine(Protocol):
    """A network without its last layer, ready to compute."""

    name: str
    dtype: torch.dtype
    """The number format of the costly layers; the features are float32."""

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        """Features (N, D), float32 on the CPU, of uint8 pixels in 0..255 (fastest if channels are last in memory)."""


class TorchEngine:
    """The network on any device."""

    name = "torch"

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        torch.set_num_threads(threads)
        self.dtype = dtype
        self._device = device
        self._memory_format = choose_memory_format(device)
        network.to(device).to(memory_format=self._memory_format)  # type: ignore[call-overload, unused-ignore]  # torch < 2.14
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for layer in layers:
            layer.to(dtype)
        layers[0].register_forward_pre_hook(_to_own_dtype)
        self._network: Step = network
        if device.type == "cuda":
            if device.index is not None:
                torch.cuda.set_device(device)  # recording uses the current device
            self._network = Recorded(network, warm_up=1, shared_memory=torch.cuda.graph_pool_handle())

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        count = len(pixels_NCHW)
        if self._device.type == "cuda":
            pixels_NCHW = filled_up(pixels_NCHW)
        features_ND = self._network(pixels_NCHW.to(self._device, memory_format=self._memory_format))
        return features_ND[:count].float().cpu()


def filled_up(pixels_NCHW: Tensor) -> Tensor:
    """Repeat the last picture to fill a power of two: only those few sizes are recorded, before the first request."""
    count = len(pixels_NCHW)
    return pixels_NCHW[torch.arange(1 << (count - 1).bit_length()).clamp_max(count - 1)]


def check_available(name: str, device: torch.device) -> None:
    """Check early that the engine `name` can be used on `device`.

    Raises:
        SettingsError: it cannot.
    """
    if name != "openvino":
        return
    if device.type != "cpu":
        raise SettingsError(
            f"The engine openvino computes only on a CPU, and the device is {device}. "
            "Set the device to cpu, or the engine to auto or torch."
        )
    try:
        importlib.import_module("app.openvino_engine")
    except ImportError:
        raise SettingsError(
            "The engine openvino was asked for, but OpenVINO is not installed. "
            "Install it with `pip install openvino`, or set the engine to auto or torch."
        ) from None


def choose(
    network: Normalized, device: torch.device, *, name: str, threads: int, batch: int
) -> Generator[None, None, Engine]:
    """Build the engine `name`; "auto" takes the fastest one.

    Works in steps, between which this thread may compute with other engines. Another thread does whatever takes long.

    Args:
        network: Folded and without its last layer (`model.split`), float32; the engine takes it over.
        threads: How many a forward pass on a CPU uses.
        batch: The batch size at which the engines are compared, besides single pictures.
    """
    dtype = serving_dtype(device)
    if dtype == torch.bfloat16:
        yield from aside(partial(round_weights, network))
    engines: list[Engine] = []
    if name != "torch" and device.type == "cpu":
        try:
            from app.openvino_engine import OpenVinoEngine, trace
        except ImportError:
            logger.info("OpenVINO, which is faster on most CPUs, is not installed; the engine is torch.")
        else:
            engines.append((yield from aside(partial(OpenVinoEngine, trace(network), dtype, threads))))
    if name != "openvino":
        engines.append(TorchEngine(network, device, dtype, threads))
    fastest = min(engines, key=lambda engine: _cost(engine, batch)) if len(engines) > 1 else engines[0]
    if fastest.name != "torch":
        torch.set_num_threads(1)  # torch's remaining work is too little to wake another thread for
    return fastest


def serving_dtype(device: torch.device) -> torch.dtype:
    """float16 where an NVIDIA GPU has hardware for bfloat16: as fast, and eight times as precise.

    bfloat16's range is needed only for gradients, in training. The largest error of a probability on 5,000 validation
    images was 0.004, against 0.012 in bfloat16 with all that `round_weights` does.
    """
    dtype = choose_dtype(device)
    return torch.float16 if device.type == "cuda" and dtype == torch.bfloat16 else dtype


@torch.inference_mode()
def _cost(engine: Engine, batch: int) -> float:
    """Seconds for one picture times seconds for a full batch: twice as fast counts the same for either."""
    cost = 1.0
    for size in (1, batch):
        pixels_NCHW = torch.zeros(size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        engine(pixels_NCHW)
        taken: list[float] = []
        while len(taken) < REPETITIONS and sum(taken) < ENOUGH_SECONDS:
            start = time.perf_counter()
            engine(pixels_NCHW)
            taken.append(time.perf_counter() - start)
        cost *= min(taken)
        logger.info("The engine %s takes %.2f ms for a batch of %d.", engine.name, 1e3 * min(taken), size)
    return cost


def _to_own_dtype(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
    return (inputs[0].to(layer.weight.dtype),)

"""Choosing the device, and the number format on it. Shared by the service and the training package."""

import logging

import torch

from app.errors import SettingsError
from app.settings import DEVICES, device_name

logger = logging.getLogger(__name__)


def choose_device(name: str | None = None) -> torch.device:
    """The device `name` if given, else the first of cuda, mps, cpu that this machine has and that works.

    Raises:
        SettingsError: torch does not know the device, this machine does not have it, or it does not work.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        for kind in ("cuda", "mps"):
            try:
                if available[kind]:
                    return _working(kind)
            except SettingsError as error:
                logger.warning("%s", error)
        return torch.device("cpu")
    try:
        kind, _, index = device_name(name).partition(":")
    except ValueError as accepted:
        raise SettingsError(f"The device {name!r} is unknown; it must be {accepted}.") from None
    if not available[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        usable = ", ".join(kind for kind in DEVICES if available[kind])
        raise SettingsError(f"The device {name!r} is not available on this machine; it has: {usable}.")
    return _working(name)


def _working(name: str) -> torch.device:
    """The device, if torch can compute there. The usual builds have no kernels for NVIDIA's oldest GPUs, and another
    program may have taken a GPU, or all of its memory, for itself."""
    device = torch.device(name)
    try:
        torch.zeros(1, device=device).add_(1)
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SettingsError(f"The device {name!r} does not work ({reason}); cpu does.") from None
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere.

    NVIDIA's GPUs have since Ampere (compute capability 8.0); on older ones torch emulates it.
    Without AVX512-BF16 or AMX an x86 CPU emulates bfloat16 and is slower than with float32; `torch.cpu` reads the
    processor's own flags. Apple's GPU stays with float32: giving up half the digits would gain little at this size.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32
    return torch.float32


def choose_memory_format(device: torch.device) -> torch.memory_format:
    """channels_last, where convolutions are fastest: training on two cores is a fifth faster, even in float32. Not on
    Apple's GPU, where torch has had bugs with it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def describe(device: torch.device, threads: int | None = None) -> str:
    """The hardware in words, for logs and model cards; `threads` default to torch's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, {threads or torch.get_num_threads()} threads"
    return "Apple GPU"

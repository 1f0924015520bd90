"""Which device a name chooses, the error for each it cannot choose, and the number format there."""

import pytest
import torch

from app.device import choose_device, choose_dtype
from app.errors import SettingsError

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with that many NVIDIA GPUs, perhaps Apple's; torch fails on the kinds named after that."""
    gpus, apples, *broken = request.param
    zeros = torch.zeros

    def zeros_unless_broken(size: int, device: torch.device) -> torch.Tensor:
        if device.type in broken:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nDebug it.")
        return zeros(size)

    monkeypatch.setattr(torch, "zeros", zeros_unless_broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apples)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("machine", "name", "device"),
    [
        ((2, True), None, "cuda"),
        ((0, True), None, "mps"),
        ((0, False), None, "cpu"),
        ((2, True), "cpu", "cpu"),
        ((2, True), "cuda", "cuda"),
        ((2, True), "cuda:1", "cuda:1"),
        ((2, True), "mps", "mps"),
    ],
    indirect=["machine"],
)
def test_a_device_is_chosen_by_name_or_the_best_available_is_taken(name: str | None, device: str) -> None:
    assert choose_device(name) == torch.device(device)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("machine", [(2, True)], indirect=True)
@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "cuda:²", "cuda:-1", "cuda:01", "cpu:0", "mps:0"])
def test_an_unknown_device_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="is unknown") as refusal:
        choose_device(name)
    assert str(refusal.value) == f"The device {name!r} is unknown; it must be cuda, cuda:0, cuda:1, ..., mps or cpu."


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("machine", "name", "usable"),
    [
        ((0, False), "cuda", "cpu"),
        ((0, False), "mps", "cpu"),
        ((0, True), "cuda:0", "mps, cpu"),
        ((2, False), "cuda:2", "cuda, cpu"),
    ],
    indirect=["machine"],
)
def test_a_device_missing_on_this_machine_is_refused(name: str, usable: str) -> None:
    with pytest.raises(SettingsError, match="is not available") as refusal:
        choose_device(name)
    assert str(refusal.value) == f"The device {name!r} is not available on this machine; it has: {usable}."


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("machine", [(1, False, "cuda")], indirect=True)
def test_a_device_that_does_not_work_is_passed_over_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """The usual build of torch sees old GPUs, but has no kernels for them."""
    sentence = (
        "The device 'cuda' does not work (CUDA error: no kernel image is available for execution on the device); "
        "cpu does."
    )
    assert choose_device() == CPU
    assert caplog.messages == [sentence]
    with pytest.raises(SettingsError, match="does not work") as refusal:
        choose_device("cuda")
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
    ids=["both", "amx", "avx512", "neither", "unknown"],
)
def test_a_cpu_uses_bfloat16_only_where_it_is_native(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(CPU) is dtype


def test_a_gpu_has_bfloat16_only_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs, the one that is asked about counts, not the current one."""
    capabilities = {"cuda:0": (7, 5), "cuda:1": (8, 0), "cuda:2": (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    dtypes = [choose_dtype(torch.device(name)) for name in capabilities]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert choose_dtype(torch.device("mps")) is torch.float32

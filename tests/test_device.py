"""Which device a name chooses, the sentence for each that it cannot, and the number format there."""

import pytest
import torch

from app.device import choose_device, choose_dtype

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """One with so many NVIDIA GPUs, and perhaps Apple's."""
    gpus, apples = request.param
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
def test_the_device_of_that_name_or_the_first_there_is(name: str | None, device: str) -> None:
    assert choose_device(name) == torch.device(device)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("machine", [(2, True)], indirect=True)
@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "cuda:²", "cuda:-1", "cpu:0", "mps:0"])
def test_a_name_that_no_device_has(name: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as refusal:
        choose_device(name)
    assert str(refusal.value) == f"The device {name!r} is unknown; accepted is cuda, cuda:0, cuda:1, ..., mps or cpu."


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
def test_a_device_that_is_not_on_this_machine(name: str, usable: str) -> None:
    with pytest.raises(ValueError, match="is not available") as refusal:
        choose_device(name)
    assert str(refusal.value) == f"The device {name!r} is not available on this machine; it has: {usable}."


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
    ids=["both", "amx", "avx512", "neither", "nothing is known"],
)
def test_a_cpu_has_bfloat16_only_where_it_multiplies_it_natively(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(CPU) is dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_has_bfloat16_only_where_it_is_not_emulated(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch itself says yes to emulation, too, unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_dtype(torch.device("cuda")) is dtype
    assert choose_dtype(torch.device("mps")) is torch.float32

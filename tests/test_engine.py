"""Every engine says what the plain float32 network says, and a bad choice of one is refused early."""

import copy
import functools
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_openvino
from torch import Tensor, nn

from app import bfloat16, engine, model
from app.device import choose_dtype
from app.errors import SettingsError
from app.steps import finish

CPU = torch.device("cpu")
NAMES = ["torch", pytest.param("openvino", marks=needs_openvino)]


def pictures(count: int, seed: int = 1) -> Tensor:
    """Smooth ones (all noise looks the same to a network), of ten kinds in turn."""
    kinds = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(count // 10 + 1, 1, 1, 1)
    others = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    coarse_N344 = 0.6 * kinds[:count] + 0.4 * others
    return (F.interpolate(coarse_N344, size=(32, 32), mode="bicubic") * 255).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module", params=["net", "cifar_net"])  # wide_cifar_net has the same layers as cifar_net
def network(request: pytest.FixtureRequest) -> model.Normalized:
    return trained(request.param)


def trained(architecture: str) -> model.Normalized:
    """A folded network whose layers are random but the last one, which knows the ten kinds by least squares."""
    torch.manual_seed(0)
    network = model.build(architecture, num_classes=10).requires_grad_(False)
    network.mean.copy_(torch.tensor([0.49, 0.48, 0.45]))
    network.std.copy_(torch.tensor([0.25, 0.24, 0.26]))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # take the statistics as they are
    network.train()(pictures(500))
    *_, last = (layer for layer in network.eval().modules() if isinstance(layer, nn.Linear))
    inputs: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _layer, given: inputs.append(given[0]))
    network(pictures(500))
    hook.remove()
    features_ND = inputs[0].double()
    wanted_NK = 8 * torch.eye(10, dtype=torch.float64).repeat(50, 1)
    size = features_ND.square().mean() * len(features_ND)
    gram_DD = features_ND.T @ features_ND + 1e-1 * size * torch.eye(features_ND.shape[1])
    solution_DK = torch.linalg.solve(gram_DD, features_ND.T @ wanted_NK)
    last.weight.copy_(solution_DK.T)
    if last.bias is not None:
        last.bias.zero_()
    return model.fold(network)


def choose(network: model.Normalized, name: str, threads: int = 1, max_batch: int = 4) -> engine.Engine:
    with torch.inference_mode(False):  # tensors made in it could not be changed by another thread
        body = model.split(network)[0]
    return finish(engine.choose(body, CPU, name=name, threads=threads, batch=max_batch))


@functools.cache
@torch.inference_mode()
def logits_of_many(network: model.Normalized, name: str) -> Tensor:
    """Of a thousand pictures."""
    return logits(network, name, pictures(1000, seed=2))


@torch.inference_mode()
def logits(network: model.Normalized, name: str, pixels_NCHW: Tensor) -> Tensor:
    chosen, (_, head) = choose(network, name), model.split(network)
    features_ND = torch.cat([chosen(part) for part in pixels_NCHW.split(50)])
    assert features_ND.dtype == torch.float32
    found: Tensor = head(features_ND)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_says_what_the_float32_network_says(network: model.Normalized, name: str) -> None:
    pixels_NCHW = pictures(500, seed=2)
    expected_NK = network(pixels_NCHW)
    assert expected_NK.softmax(dim=1).max(dim=1).values.mean() > 0.5, "only a network that has opinions proves anything"
    given_NK = logits_of_many(network, name)[:500]
    assert (given_NK.argmax(1) == expected_NK.argmax(1)).float().mean() >= 0.998
    tolerance = 1e-4 if choose_dtype(CPU) == torch.float32 else 0.02
    torch.testing.assert_close(given_NK.softmax(1), expected_NK.softmax(1), atol=tolerance, rtol=0)


@needs_openvino
def test_openvino_in_float32_is_exact_on_machines_that_serve_in_bfloat16_too(network: model.Normalized) -> None:
    """Where it serves in bfloat16, no other test would see how it computes GELU after a maximum in float32."""
    from app.openvino_engine import OpenVinoEngine, trace

    pixels_NCHW = pictures(200, seed=2)
    body, head = model.split(network)
    with torch.inference_mode():
        given_NK = head(OpenVinoEngine(trace(body), torch.float32, threads=1)(pixels_NCHW))
    torch.testing.assert_close(given_NK.softmax(1), network(pixels_NCHW).softmax(1), atol=1e-4, rtol=0)


def test_float16_agrees_with_float32_more_closely(network: model.Normalized) -> None:
    pixels_NCHW = pictures(40, seed=2)
    body, head = model.split(network)
    with torch.inference_mode():
        given_NK = head(engine.TorchEngine(body, CPU, torch.float16, threads=1)(pixels_NCHW))
    torch.testing.assert_close(given_NK.softmax(1), network(pixels_NCHW).softmax(1), atol=0.005, rtol=0)


@pytest.mark.parametrize(
    ("device", "known", "expected"),
    [("cuda", torch.bfloat16, torch.float16), ("cuda", torch.float32, torch.float32), ("cpu", torch.bfloat16, None)],
)
def test_a_gpu_serves_in_float16(
    device: str, known: torch.dtype, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "choose_dtype", lambda _: known)
    assert engine.serving_dtype(torch.device(device)) == (expected or known)


@pytest.mark.parametrize(("count", "filled"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_padding_to_a_power_of_two_keeps_the_pictures_first(count: int, filled: int) -> None:
    given_NCHW = pictures(count)
    filled_NCHW = engine.filled_up(given_NCHW)
    assert len(filled_NCHW) == filled
    assert filled_NCHW[:count].equal(given_NCHW)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_recorded_batches_on_a_gpu_are_answered_as_on_the_cpu(network: model.Normalized, device: str) -> None:
    """Each size is met first, recorded, and met again after another one has used the same memory."""
    pixels_NCHW = pictures(60, seed=2)
    expected_NK = network(pixels_NCHW)
    body, head = model.split(network)
    here = torch.device(device)
    chosen = engine.TorchEngine(body, here, engine.serving_dtype(here), threads=1)
    with torch.inference_mode():
        for part, size in enumerate([1, 8, 1, 8, 7, 1, 7, 8, 1, 7]):
            chosen_N = torch.arange(size) + 5 * part
            given_NK = head(chosen(pixels_NCHW[chosen_N])).softmax(1)
            torch.testing.assert_close(given_NK, expected_NK[chosen_N].softmax(1), atol=0.005, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_classes_tie(network: model.Normalized, name: str) -> None:
    """With logits in bfloat16 they do, for about one picture in five hundred."""
    assert (logits_of_many(network, name).topk(2).values.diff() != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_weights_may_lie_in_memory_in_any_order(network: model.Normalized, name: str) -> None:
    pixels_NCHW = pictures(3)
    expected_NK = logits(network, name, pixels_NCHW)
    # As training leaves them.
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]  # torch < 2.14
    for order in (torch.contiguous_format, torch.channels_last):
        pixels_NCHW = pixels_NCHW.contiguous(memory_format=order)
        torch.testing.assert_close(logits(channels_last, name, pixels_NCHW), expected_NK)


def test_rounded_kernels_are_bfloat16_and_keep_their_sums() -> None:
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = nn.Conv2d(16, 32, 3).to(memory_format=memory_format)  # type: ignore[call-overload, unused-ignore]  # torch < 2.14
        before = layer.weight.detach().clone()
        bfloat16.round_kernels(layer)
        plain, diffused = before.bfloat16().float(), layer.weight
        assert torch.equal(diffused, diffused.bfloat16().float())
        errors = [(each - before).sum(dim=(2, 3)).abs().mean() for each in (plain, diffused)]
        assert errors[1] < 0.5 * errors[0]
        assert (diffused - before).abs().max() <= 2 * (plain - before).abs().max()


def test_the_first_layer_keeps_pixel_precision_in_bfloat16(network: model.Normalized) -> None:
    """In bfloat16, with a result that is not rounded, it is right to sixteen binary digits."""
    kept = copy.deepcopy(network)
    before, after = (next(each for each in of.modules() if isinstance(each, nn.Conv2d)) for of in (network, kept))
    bfloat16.keep_pixels(kept, after)
    pixels_NCHW = pictures(20)
    seen_NCHW, rounded_OCHW = kept.normalize(pixels_NCHW), after.weight.bfloat16().float()
    assert torch.equal(seen_NCHW, seen_NCHW.bfloat16().float())
    with torch.no_grad():
        expected = before(network.normalize(pixels_NCHW))
        found = F.conv2d(seen_NCHW, rounded_OCHW, after.bias)
        plain = F.conv2d(
            network.normalize(pixels_NCHW).bfloat16().float(), before.weight.bfloat16().float(), before.bias
        )
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
    assert (found - expected).abs().max() < 0.1 * (plain - expected).abs().max()


def test_a_bias_is_right_to_sixteen_binary_digits(network: model.Normalized) -> None:
    kept = copy.deepcopy(network)
    (before, layer), (_, plain) = (
        [each for each in of.modules() if isinstance(each, nn.Conv2d)][:2] for of in (kept, network)
    )
    for each in (layer, plain):
        assert each.bias is not None
        each.bias.data += 3  # so that there is something to round
    bfloat16.keep_bias(before, layer)
    pixels_NCHW = pictures(20)
    with torch.no_grad():
        inputs_NCHW = F.gelu(before(network.normalize(pixels_NCHW)))
        assert (inputs_NCHW[:, -1] == bfloat16.LEVEL).all()
        expected_NCHW = plain(inputs_NCHW[:, :-1])
        found_NCHW = layer(inputs_NCHW)
        without_NCHW = F.conv2d(inputs_NCHW[:, :-1], plain.weight, layer.bias, padding=plain.padding)
    assert layer.bias is not None
    assert layer.bias.equal(layer.bias.bfloat16().float())
    torch.testing.assert_close(found_NCHW, expected_NCHW, atol=1e-5, rtol=1e-5)
    assert (without_NCHW - expected_NCHW).abs().max() > 1e-3


@needs_openvino
@pytest.mark.parametrize("fastest", ["torch", "openvino"])
def test_auto_takes_the_faster(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_cost", lambda each, _max_batch: 1.0 if each.name == fastest else 2.0)
    assert choose(trained("net"), "auto").name == fastest


@needs_openvino
def test_the_times_are_of_one_picture_and_of_a_full_batch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose(trained("net"), "auto", max_batch=7)
    assert [record.args[::2] for record in caplog.records if isinstance(record.args, tuple)] == [
        (name, size) for name in ("openvino", "torch") for size in (1, 7)
    ]


def test_auto_without_openvino_is_torch_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "app.openvino_engine", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    engine.check_available("auto", CPU)
    with caplog.at_level(logging.INFO):
        assert choose(trained("net"), "auto").name == "torch"
    assert "is not installed; the engine is torch" in caplog.text


def test_openvino_is_refused_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "app.openvino_engine", raising=False)
    with pytest.raises(SettingsError, match=r"OpenVINO is not installed\. Install it with `pip install openvino`, or"):
        engine.check_available("openvino", CPU)


def test_openvino_on_another_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="computes only on a CPU, and the device is cuda:1"):
        engine.check_available("openvino", torch.device("cuda:1"))


@needs_openvino
def test_openvino_telemetry_is_not_imported() -> None:
    """It would run in a fork of the service that keeps its sockets open."""
    imported = "import sys, app.openvino_engine; print([name for name in sys.modules if 'telemetry' in name])"
    ran = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@needs_openvino
def test_torch_uses_one_thread_when_the_engine_is_openvino() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        choose(trained("net"), "openvino", threads=2)
        assert torch.get_num_threads() == 1
        choose(trained("net"), "torch", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

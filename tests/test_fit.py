"""The training loop: it learns, repeats itself exactly, resumes exactly, and stops with a sentence."""

import dataclasses
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_checkpoint
from torch import Tensor, nn

from app import model
from app.checkpoint import CIFAR10_CLASSES, Checkpoint
from app.data import Split
from training.augment import draw, epoch_generator
from training.config import RECIPES, Recipe
from training.distill import Teachers
from training.errors import TrainingError
from training.fit import (
    AHEAD,
    Row,
    Workers,
    _augmented,
    _check_same,
    fit,
    initialize,
    learning_rate_factor,
    optimizers_for,
    resolution,
    set_learning_rates,
)
from training.muon import Muon

CPU = torch.device("cpu")
DEBUG = RECIPES["debug"]


def stripes(count: int, seed: int = 0) -> Split:
    """Two classes that differ in the direction of their stripes, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(count) % 2
    wave = (torch.arange(32) // 4 % 2 * 120.0).expand(32, 32)
    pattern = torch.stack([wave, wave.T])[labels_N][:, None].expand(-1, 3, -1, -1)
    noise = torch.rand(count, 3, 32, 32, generator=generator) * 100
    return Split(
        name="stripes",
        classes=("upright", "flat"),
        pixels_NCHW=(pattern + noise).to(torch.uint8),
        labels_N=labels_N,
    )


def train(recipe: Recipe, split: Split, **options: object) -> tuple[dict[str, Tensor], list[Row]]:
    torch.manual_seed(recipe.seed)
    network = model.build(recipe.network, num_classes=len(split.classes))
    initialize(network, recipe, split.pixels_NCHW)
    rows = fit(network, split, recipe, device=CPU, **options)  # type: ignore[arg-type]
    return network.state_dict(), rows


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("sgd", 0.2), ("muon", 0.02)])
def test_the_default_network_learns_stripes(optimizer: str, learning_rate: float) -> None:
    recipe = Recipe(
        network="cifar_net",
        epochs=6,
        batch_size=8,
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        muon_learning_rate=0.05,
    )
    split = stripes(48)
    torch.manual_seed(0)
    network = model.build("cifar_net", num_classes=2)
    initialize(network, recipe, split.pixels_NCHW)
    rows = fit(network, split, recipe, device=CPU)
    with torch.no_grad():
        right = network.eval()(split.pixels_NCHW).argmax(dim=1) == split.labels_N
    assert right.double().mean() > 0.9
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_low_resolution_epochs_shrink_the_students_pictures_but_not_the_teachers() -> None:
    recipe = dataclasses.replace(DEBUG, network="cifar_net", epochs=5, low_resolution=0.6, distillation=0.5)
    split = stripes(32)
    network, teacher = (model.build(name, num_classes=2) for name in ("cifar_net", "net"))
    known: dict[str, Any] = {"architecture": "net", "arguments": {"num_classes": 2}, "classes": split.classes}
    teachers = Teachers([Checkpoint(state_dict=teacher.state_dict(), **known)], split.classes)
    initialize(network, recipe, split.pixels_NCHW)
    sizes: dict[str, list[int]] = {"network": [], "teachers": []}
    network.register_forward_pre_hook(lambda _, inputs: sizes["network"].append(inputs[0].shape[-1]))
    teachers.register_forward_pre_hook(lambda _, inputs: sizes["teachers"].append(inputs[0].shape[-1]))
    fit(network, split, recipe, device=CPU, teachers=teachers)
    assert sizes == {"network": [20] * 4 + [26] * 2 + [32] * 4, "teachers": [32] * 10}


def test_the_number_of_low_resolution_epochs_is_not_off_by_rounding() -> None:
    recipe = dataclasses.replace(DEBUG, network="cifar_net", epochs=100, low_resolution=0.07)
    assert [resolution(epoch, recipe) for epoch in range(100)].count(32) == 93


@pytest.mark.parametrize(
    "recipe", [DEBUG, dataclasses.replace(RECIPES["fast"], batch_size=16, epochs=4)], ids=["net", "fast"]
)
@pytest.mark.parametrize("kept", [[0, 0, 0], [0, 1, None]], ids=["grey", "no blue"])
def test_missing_colours_do_not_harm_training(recipe: Recipe, kept: list[int | None]) -> None:
    split = stripes(64)
    channels = [split.pixels_NCHW[:, index] if index is not None else torch.zeros(64, 32, 32) for index in kept]
    split = dataclasses.replace(split, pixels_NCHW=torch.stack(channels, dim=1).to(torch.uint8))
    _, rows = train(recipe, split)
    assert rows[-1]["loss"] < rows[0]["loss"] < 10


def test_the_seed_determines_the_weights() -> None:
    split = stripes(40)
    first, _ = train(DEBUG, split)
    second, _ = train(DEBUG, split)
    other, _ = train(dataclasses.replace(DEBUG, seed=1), split)
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize(
    "recipe",
    [DEBUG, dataclasses.replace(DEBUG, network="cifar_net", optimizer="muon", muon_learning_rate=0.1)],
    ids=["debug", "muon"],
)
def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path, recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, epochs=3)
    split = stripes(40)
    whole, _ = train(recipe, split)

    def interrupt(rows: list[dict[str, float]]) -> None:
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, split, state_file=tmp_path / "state.pt", on_epoch=interrupt)
    logged: list[list[float]] = []
    resumed, rows = train(
        recipe,
        split,
        state_file=tmp_path / "state.pt",
        resume=True,
        on_epoch=lambda rows: logged.append([row["epoch"] for row in rows]),
    )
    assert same(whole, resumed)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert logged == [[1, 2], [1, 2, 3]]  # the row that the interrupt kept out of the log as well


def test_a_run_resumes_under_another_memory_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from Apple's GPU to a CPU. The momentum must follow: fused SGD does not check its layout."""
    recipe, split = dataclasses.replace(DEBUG, epochs=2), stripes(40)
    whole, _ = train(recipe, split)

    def interrupt(_rows: list[dict[str, float]]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.fit.choose_memory_format", lambda _device: torch.contiguous_format)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, split, state_file=tmp_path / "state.pt", on_epoch=interrupt)
    resumed, _ = train(recipe, split, state_file=tmp_path / "state.pt", resume=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"recipe": dataclasses.replace(DEBUG, batch_size=8, epochs=3)},
            r"other values: epochs 2 \(now 3\), batch_size 16 \(now 8\)\.",
        ),
        ({"split": stripes(44)}, "other values: other images"),
        ({"teachers": Teachers([random_checkpoint()], CIFAR10_CLASSES)}, "other values: other teachers"),
    ],
)
def test_resuming_with_other_values_is_refused(tmp_path: Path, other: dict[str, Any], sentence: str) -> None:
    run: dict[str, Any] = {"recipe": DEBUG, "split": stripes(40), "state_file": tmp_path / "state.pt"}
    train(**run)
    with pytest.raises(TrainingError, match=sentence):
        train(**run | other, resume=True)


def test_a_run_may_resume_with_another_report_every(tmp_path: Path) -> None:
    run: dict[str, Any] = {"split": stripes(40), "state_file": tmp_path / "state.pt"}
    train(DEBUG, **run)
    train(dataclasses.replace(DEBUG, report_every=1), **run, resume=True)


def test_an_invalid_state_file_is_refused(tmp_path: Path) -> None:
    contents: list[Any] = [[1, 2], {"network": {}}]
    for content in contents:
        torch.save(content, tmp_path / "state.pt")
        with pytest.raises(TrainingError, match=r"state\.pt is damaged or cut short"):
            train(DEBUG, stripes(40), state_file=tmp_path / "state.pt", resume=True)


def test_processes_that_would_resume_from_different_epochs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(counts: list[int], own: int) -> None:
        counts[:] = [own, 0]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    _check_same(0, Workers(rank=0, count=2))
    with pytest.raises(TrainingError, match=r"would resume after different epochs \(3, 0\)"):
        _check_same(3, Workers(rank=0, count=2))


@pytest.mark.parametrize(
    ("images", "batch_size", "sentence"),
    [(40, 15, "15 images cannot be shared evenly by 2 processes"), (3, 2, "3 images make batches of 1, too few for 2")],
)
def test_batches_that_the_processes_cannot_share_are_refused(images: int, batch_size: int, sentence: str) -> None:
    recipe = dataclasses.replace(DEBUG, batch_size=batch_size)
    with pytest.raises(TrainingError, match=sentence):
        train(recipe, stripes(images), workers=Workers(rank=1, count=2))


@pytest.mark.parametrize("kept", [0, 1000, 5000, 20000, -100])
def test_a_truncated_state_file_is_refused(tmp_path: Path, kept: int) -> None:
    state_file, split = tmp_path / "state.pt", stripes(40)
    train(DEBUG, split, state_file=state_file)
    state_file.write_bytes(state_file.read_bytes()[:kept])
    with pytest.raises(TrainingError, match=r"state\.pt is damaged or cut short"):
        train(DEBUG, split, state_file=state_file, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    state_file, split = tmp_path / "state.pt", stripes(40)
    network = model.build("net", num_classes=2)

    def ruin(rows: list[dict[str, float]]) -> None:
        if len(rows) == 2:
            nn.init.constant_(network.get_parameter("fc3.bias"), float("nan"))

    recipe = dataclasses.replace(DEBUG, epochs=4)
    with pytest.raises(TrainingError, match=r"no longer finite in epoch 3.*--learning-rate"):
        fit(network, split, recipe, device=CPU, state_file=state_file, on_epoch=ruin)
    state = torch.load(state_file, weights_only=True)
    assert len(state["rows"]) == 2
    assert all(tensor.isfinite().all() for tensor in state["network"].values())


def test_weights_that_the_last_step_ruined_are_not_saved(tmp_path: Path) -> None:
    # One step an epoch: its loss is finite, and what its update does shows in no loss of this epoch.
    recipe = dataclasses.replace(
        DEBUG, batch_size=40, learning_rate=100.0, weight_decay=1.0, momentum=0.0, nesterov=False
    )
    with pytest.raises(TrainingError, match="no longer finite"):
        train(dataclasses.replace(recipe, epochs=60, decay=False), stripes(40), state_file=tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["network"].values())


def test_running_loss_is_printed_as_the_tutorial_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(RECIPES["tutorial"], report_every=5)
    train(recipe, stripes(40), show_progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split(" loss: ")[0] for line in lines] == ["[1,     5]", "[1,    10]", "[2,     5]", "[2,    10]"]
    assert all(0.3 < float(line.split(" loss: ")[1]) < 1.1 for line in lines)


def test_the_log_has_the_rate_and_the_speed_of_each_epoch() -> None:
    _, rows = train(DEBUG, stripes(40))
    rates = [DEBUG.learning_rate * factor for factor in (0.75, 0.25)]  # of the last of two steps
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert [row["images_per_second"] * row["train_seconds"] for row in rows] == pytest.approx([40, 40])


def test_measuring_after_an_epoch_does_not_change_the_training() -> None:
    recipe, split = dataclasses.replace(DEBUG, network="cifar_net"), stripes(32)

    def validate(network: nn.Module) -> Row:
        network.eval()
        return {}

    assert same(train(recipe, split)[0], train(recipe, split, validate=validate)[0])


def test_every_image_is_used_once_an_epoch_whatever_the_batch() -> None:
    split = stripes(47)
    _, rows = train(dataclasses.replace(DEBUG, learning_rate=0.0, batch_size=10, jpeg=0.0, cutout=0), split)
    _, alone = train(dataclasses.replace(DEBUG, learning_rate=0.0, batch_size=47, jpeg=0.0, cutout=0), split)
    assert rows[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-3)


def test_normalisation_comes_from_the_training_pixels() -> None:
    network = model.build("net", num_classes=2)
    pixels_NCHW = stripes(40).pixels_NCHW
    initialize(network, DEBUG, pixels_NCHW)
    normalized = network.normalize(pixels_NCHW)
    assert normalized.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert normalized.std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    untouched = model.build("net")
    initialize(untouched, RECIPES["tutorial"], pixels_NCHW)
    assert untouched.mean.tolist() == [0.5, 0.5, 0.5]


def test_learning_rate_rises_and_falls() -> None:
    recipe = dataclasses.replace(DEBUG, warmup=0.2)
    factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
    assert max(factors) == factors[20] == 1.0
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert 0 < factors[-1] < 0.02
    assert {learning_rate_factor(step, 100, RECIPES["tutorial"]) for step in range(100)} == {1.0}


@pytest.mark.parametrize("name", RECIPES)
def test_each_parameter_has_exactly_one_optimizer(name: str) -> None:
    recipe = RECIPES[name]
    network: nn.Module = model.build(recipe.network)
    groups = [group for optimizer in optimizers_for(network, recipe) for group in optimizer.param_groups]
    owned = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in network.parameters() if parameter.requires_grad)
    decayed = {id(p) for group in groups if group.get("weight_decay") for p in group["params"]}
    vectors = {id(p) for p in network.parameters() if p.ndim == 1 and p.requires_grad}
    assert decayed & vectors == (vectors if recipe.bias_learning_rate else set())


def test_each_group_has_the_rate_and_the_decay_of_the_recipe() -> None:
    recipe = RECIPES["default"]
    (weights, biases), (hidden,) = (each.param_groups for each in optimizers_for(model.build("cifar_net"), recipe))
    assert (weights["peak"], biases["peak"], hidden["peak"]) == (0.005, 25, 0.08)
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.2, pytest.approx(0.2 * 0.005 / 25))
    assert (weights["momentum"], weights["nesterov"], hidden["momentum"]) == (0.85, True, 0.6)
    _, (hidden,) = (each.param_groups for each in optimizers_for(model.build("net"), RECIPES["net"]))
    assert (hidden["peak"], hidden["momentum"]) == (0.02, 0.9)
    plain = dataclasses.replace(RECIPES["net"], optimizer="sgd")
    ((weights, biases),) = (each.param_groups for each in optimizers_for(model.build("net"), plain))
    assert (weights["peak"], biases["peak"]) == (0.05, 0.05)
    assert (weights["weight_decay"], biases["weight_decay"]) == (5e-4, 0)


def test_learning_rates_scale_with_their_peaks() -> None:
    optimizers = optimizers_for(model.build("cifar_net"), RECIPES["default"])
    for factor in (0.5, 0.25):
        set_learning_rates(optimizers, factor, CPU)
        rates = [float(group["lr"]) for each in optimizers for group in each.param_groups]
        assert rates == pytest.approx([0.005 * factor, 25 * factor, 0.08 * factor])


def test_a_mixed_picture_has_a_mixed_label() -> None:
    """Each image shows its class alone, so that the share of a class is that of its pixels."""
    recipe = dataclasses.replace(DEBUG, cutmix=1.0, jpeg=0.0, cutout=0)
    labels_NK = torch.eye(4).repeat(8, 1)
    images_NCHW = (50 * labels_NK.argmax(1)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    draws = draw(32, 0, recipe, epoch_generator(0, 0))
    ((pixels_NCHW, targets_NK),) = _augmented(images_NCHW, labels_NK, [torch.randperm(32)], draws, recipe)
    shares_NK = torch.stack([(pixels_NCHW[:, 0] == 50 * k).double().mean(dim=(1, 2)) for k in range(4)], dim=1)
    torch.testing.assert_close(targets_NK.double(), shares_NK, atol=1e-6, rtol=0)
    assert (targets_NK.amax(dim=1) < 0.9).sum() > 8


@pytest.mark.parametrize(
    ("name", "others"), [("net", ["conv1.weight", "fc3.weight"]), ("default", ["whiten.weight", "head.weight"])]
)
def test_muon_optimizes_all_weights_except_the_first_and_last_layers(name: str, others: list[str]) -> None:
    network: nn.Module = model.build(RECIPES[name].network)
    sgd, muon = optimizers_for(network, RECIPES[name])
    names = {id(parameter): name for name, parameter in network.named_parameters() if parameter.ndim > 1}
    assert isinstance(muon, Muon)
    assert [names[id(p)] for p in muon.param_groups[0]["params"]] == [n for n in names.values() if n not in others]
    trained = [name for name in others if network.get_parameter(name).requires_grad]
    assert [names[id(p)] for p in sgd.param_groups[0]["params"]] == trained


def test_augmenting_several_batches_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, split = dataclasses.replace(DEBUG, cutmix=0.5), stripes(47)
    one_by_one, _ = train(recipe, split)
    monkeypatch.setitem(AHEAD, "cpu", 2 * recipe.batch_size)
    together, _ = train(recipe, split)
    assert same(one_by_one, together)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_tf32_is_allowed_unless_precision_is_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "float32")  # the opposite, and put back
    train(dataclasses.replace(DEBUG, epochs=1, precision=precision), stripes(16))  # type: ignore[arg-type]
    assert torch.backends.cudnn.allow_tf32 == (precision == "auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("count", [40, 47], ids=["even batches", "batches of two sizes"])
def test_recorded_steps_on_a_gpu_match_plain_steps_on_the_cpu(count: int) -> None:
    """At rates so low that rounding does not grow: weights off by a thousandth change no loss by more than 2 %."""
    recipe = dataclasses.replace(
        DEBUG,
        network="cifar_net",
        optimizer="muon",
        muon_learning_rate=0.01,
        learning_rate=0.002,
        precision="float32",
        epochs=6,
    )
    split, losses = stripes(count), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = model.build(recipe.network, num_classes=2)
        initialize(network, recipe, split.pixels_NCHW)
        losses.append([row["loss"] for row in fit(network, split, recipe, device=torch.device(device))])
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.005)


RESIDENT = """
import resource, torch
from app import memory

def resident_after_a_large_tensor():
    torch.ones(1 << 26)  # 256 MiB, freed at once
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident_after_a_large_tensor()
memory.keep()
print(resident_after_a_large_tensor() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 * 2**20

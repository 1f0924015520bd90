"""What teachers say, what becomes of it, and that a network can learn from nothing else."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import random_checkpoint
from torch import Tensor, nn

from app import model
from app.calibration import Calibration
from app.checkpoint import CIFAR10_CLASSES
from app.data import Split
from app.errors import CheckpointError
from training.config import RECIPES, Recipe
from training.distill import TEMPERATURE, Teachers, loss
from training.fit import fit, initialize

CPU = torch.device("cpu")


def test_teacher_probabilities_are_softened_by_the_temperature(photos_NCHW: Tensor) -> None:
    teacher = random_checkpoint()
    answers_NK = Teachers([teacher], CIFAR10_CLASSES)(photos_NCHW)
    torch.testing.assert_close(answers_NK, (teacher.network()(photos_NCHW) / TEMPERATURE).softmax(dim=1))
    assert not answers_NK.requires_grad


def test_several_teachers_are_averaged_equally(photos_NCHW: Tensor) -> None:
    first = random_checkpoint()
    other = dataclasses.replace(first, state_dict={name: 2 * value for name, value in first.state_dict.items()})
    one_NK, two_NK = (Teachers([teacher], CIFAR10_CLASSES)(photos_NCHW) for teacher in (first, other))
    assert not torch.allclose(one_NK, two_NK, atol=1e-3)
    torch.testing.assert_close(Teachers([first, other], CIFAR10_CLASSES)(photos_NCHW), (one_NK + two_NK) / 2)


@pytest.mark.parametrize("classes", [("dark", "light"), CIFAR10_CLASSES[1:]])
def test_a_teacher_of_other_classes_is_refused(classes: tuple[str, ...]) -> None:
    sentence = f"knows the classes plane, car.*the images show {classes[0]}, {classes[1]}"
    with pytest.raises(CheckpointError, match=sentence):
        Teachers([random_checkpoint()], classes)


def test_a_teacher_may_know_the_classes_in_another_order(photos_NCHW: Tensor) -> None:
    """Folders are in alphabetical order, CIFAR-10's classes are not."""
    teacher, classes = random_checkpoint(), tuple(sorted(CIFAR10_CLASSES))
    other = dataclasses.replace(teacher, state_dict={name: 2 * value for name, value in teacher.state_dict.items()})
    reordered = dataclasses.replace(
        other,
        classes=classes,
        state_dict={
            name: value[[CIFAR10_CLASSES.index(label) for label in classes]] if name.startswith("fc3") else value
            for name, value in other.state_dict.items()
        },
    )
    expected_NK = Teachers([teacher, other], CIFAR10_CLASSES)(photos_NCHW)
    given_NK = Teachers([teacher, reordered], classes)(photos_NCHW)
    torch.testing.assert_close(given_NK, expected_NK[:, [CIFAR10_CLASSES.index(label) for label in classes]])
    assert not torch.allclose(given_NK, expected_NK, atol=1e-3)


def test_a_teacher_answers_with_its_calibration_applied(photos_NCHW: Tensor) -> None:
    """Logits of twice the size, and a calibration that takes that back, are the same answers."""
    plain = dataclasses.replace(random_checkpoint(), calibration=Calibration(cubic=0.4))
    head = [name for name in plain.state_dict if name.startswith("fc3")]
    louder = {name: value * 2 if name in head else value for name, value in plain.state_dict.items()}
    calibrated = dataclasses.replace(plain, state_dict=louder, calibration=Calibration(temperature=2.0, cubic=0.05))
    assert len(head) == 2
    answers = [Teachers([teacher], CIFAR10_CLASSES)(photos_NCHW) for teacher in (calibrated, plain)]
    torch.testing.assert_close(*answers)


def test_without_a_teacher_the_loss_is_the_cross_entropy_to_the_mixed_labels() -> None:
    """Two labels in the shares 0.7 and 0.3 cost as much as each does, in these shares."""
    logits_NK = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    first_N, second_N = torch.arange(6), torch.arange(6) + 4
    mixed_NK = 0.7 * F.one_hot(first_N, 10) + 0.3 * F.one_hot(second_N, 10)
    costs = [F.cross_entropy(logits_NK, labels_N, reduction="sum") for labels_N in (first_N, second_N)]
    torch.testing.assert_close(loss(logits_NK, mixed_NK, None, Recipe()), 0.7 * costs[0] + 0.3 * costs[1])


def test_a_smoothed_label_is_spread_over_all_classes() -> None:
    logits_NK = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    labels_NK = torch.eye(10)[:6]
    expected = F.cross_entropy(logits_NK, 0.8 * labels_NK + 0.02, reduction="sum")
    torch.testing.assert_close(loss(logits_NK, labels_NK, None, Recipe(label_smoothing=0.2)), expected)


def test_distillation_loss_is_smallest_where_the_network_matches_its_teacher() -> None:
    """The teacher's own logits answer its softened probabilities; half of them, or twice, do so worse."""
    recipe = Recipe(distillation=1.0)
    logits_NK = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    labels_NK, answers_NK = torch.eye(10)[:6], (logits_NK / TEMPERATURE).softmax(dim=1)
    least = loss(logits_NK, labels_NK, answers_NK, recipe)
    assert least < loss(logits_NK / 2, labels_NK, answers_NK, recipe)
    assert least < loss(logits_NK * 2, labels_NK, answers_NK, recipe)
    equal_NK = logits_NK.clone().requires_grad_()
    loss(equal_NK, labels_NK, answers_NK, recipe).backward()
    torch.testing.assert_close(equal_NK.grad, torch.zeros(6, 10), atol=1e-6, rtol=0)


def test_label_and_teacher_losses_are_weighted_by_their_shares() -> None:
    logits_NK = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    labels_NK, answers_NK = torch.eye(10)[:6], torch.full((6, 10), 0.1)
    both = Recipe(distillation=0.3)
    expected = 0.7 * loss(logits_NK, labels_NK, None, Recipe()) + 0.3 * loss(
        logits_NK, labels_NK, answers_NK, dataclasses.replace(both, distillation=1.0)
    )
    torch.testing.assert_close(loss(logits_NK, labels_NK, answers_NK, both), expected)


def test_the_distillation_loss_is_scaled_by_the_temperature_squared() -> None:
    logits_NK = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    answers_NK = torch.full((6, 10), 0.1)
    expected = -(TEMPERATURE**2) * (answers_NK * (logits_NK / TEMPERATURE).log_softmax(dim=1)).sum()
    torch.testing.assert_close(loss(logits_NK, torch.eye(10)[:6], answers_NK, Recipe(distillation=1.0)), expected)


class Brightness(nn.Module):
    """Is sure that a picture is dark if its middle is; remembers what it saw."""

    introduction = "a light meter"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        self.seen.append(pixels_NCHW)
        light_N = pixels_NCHW[:, :, 8:24, 8:24].float().mean(dim=(1, 2, 3)) > 105
        return F.one_hot(light_N.long(), 2).float()


def test_a_network_learns_from_its_teacher_alone_at_distillation_1() -> None:
    """The labels are all wrong, and distillation 1 does not look at them."""
    count = 80
    truth_N = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels_NCHW = (noise + 150 * truth_N[:, None, None, None]).to(torch.uint8)
    split = Split(name="greys", classes=("dark", "light"), pixels_NCHW=pixels_NCHW, labels_N=1 - truth_N)
    recipe = dataclasses.replace(RECIPES["debug"], epochs=4, distillation=1.0)
    torch.manual_seed(0)
    network, teacher = model.build(recipe.network, num_classes=2), Brightness()
    initialize(network, recipe, pixels_NCHW)
    learned: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _network, inputs: learned.append(inputs[0]))
    fit(network, split, recipe, device=CPU, teachers=teacher)  # type: ignore[arg-type]
    hook.remove()
    assert sum(map(len, teacher.seen)) == 4 * count
    assert all(map(torch.equal, teacher.seen, learned))
    with torch.no_grad():
        assert (network.eval()(pixels_NCHW).argmax(dim=1) == truth_N).double().mean() > 0.9

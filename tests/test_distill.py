"""What teachers say, what becomes of it, and that a network can learn from nothing else."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import random_checkpoint
from torch import Tensor

from app import model
from app.data import Split
from app.errors import CheckpointError
from training.config import RECIPES, Recipe
from training.distill import SHIFTS, TEMPERATURE, ask, lessons, loss
from training.fit import fit, initialize

CPU = torch.device("cpu")


def split_of(pixels_NCHW: Tensor) -> Split:
    teacher = random_checkpoint()
    return Split(
        name="photos",
        classes=teacher.classes,
        pixels_NCHW=pixels_NCHW,
        labels_N=torch.arange(len(pixels_NCHW)) % 10,
    )


def test_a_teacher_is_asked_for_each_view_and_softened(photos_NCHW: Tensor) -> None:
    teacher = random_checkpoint()
    answers_NK = ask([teacher], split_of(photos_NCHW), CPU)
    padded = F.pad(photos_NCHW.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    mean_NK = torch.zeros(8, 10)
    for down, right in SHIFTS:
        moved = padded[:, :, 2 + down : 34 + down, 2 + right : 34 + right]
        for view in (moved, moved.flip(3)):
            mean_NK += teacher.network()(view).log_softmax(dim=1) / 6
    torch.testing.assert_close(answers_NK, (mean_NK / TEMPERATURE).softmax(dim=1), atol=5e-3, rtol=0)


def test_several_teachers_count_alike(photos_NCHW: Tensor) -> None:
    split, first = split_of(photos_NCHW), random_checkpoint()
    other = dataclasses.replace(first, state_dict={name: 2 * value for name, value in first.state_dict.items()})
    one_NK, two_NK = (ask([teacher], split, CPU) for teacher in (first, other))
    assert not torch.allclose(one_NK, two_NK, atol=1e-3)
    torch.testing.assert_close(ask([first, other], split, CPU), (one_NK + two_NK) / 2)


def test_a_teacher_of_other_classes_is_refused(photos_NCHW: Tensor) -> None:
    split = dataclasses.replace(split_of(photos_NCHW), classes=("dark", "light"))
    with pytest.raises(CheckpointError, match=r"knows the classes plane, car.*the images show dark, light"):
        ask([random_checkpoint()], split, CPU)


def test_a_teacher_is_as_sure_as_when_it_is_served(photos_NCHW: Tensor) -> None:
    """Logits of twice the size, and a calibration that takes that back, are the same answers."""
    split, plain = split_of(photos_NCHW), random_checkpoint()
    head = [name for name in plain.state_dict if name.startswith("fc3")]
    louder = {name: value * 2 if name in head else value for name, value in plain.state_dict.items()}
    calibrated = dataclasses.replace(
        plain, state_dict=louder, calibration=dataclasses.replace(plain.calibration, temperature=2.0)
    )
    assert len(head) == 2
    torch.testing.assert_close(ask([calibrated], split, CPU), ask([plain], split, CPU), atol=5e-3, rtol=0)


def test_lessons_are_smoothed_labels_and_answers() -> None:
    labels_N = torch.tensor([1, 0])
    assert lessons(labels_N, 2, Recipe()).tolist() == [[[0, 1]], [[1, 0]]]
    answers_NK = torch.tensor([[0.5, 0.5], [0.3, 0.7]])
    both_NLK = lessons(labels_N, 2, Recipe(label_smoothing=0.1, distillation=0.5), answers_NK)
    torch.testing.assert_close(both_NLK[:, 0], torch.tensor([[0.05, 0.95], [0.95, 0.05]]))
    torch.testing.assert_close(both_NLK[:, 1], answers_NK)


def test_without_a_teacher_the_loss_is_that_of_smoothed_labels() -> None:
    """The same as torch's own label smoothing."""
    recipe = Recipe(label_smoothing=0.2)
    logits_NK, labels_N = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    expected = F.cross_entropy(logits_NK, labels_N, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(loss(logits_NK, lessons(labels_N, 10, recipe), recipe), expected)


def test_distillation_is_least_where_the_network_is_as_sure_as_its_teacher() -> None:
    """The teacher's own logits answer its softened probabilities; half of them, or twice, do so worse."""
    recipe = Recipe(distillation=1.0)
    logits_NK, labels_N = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    told_NLK = lessons(labels_N, 10, recipe, (logits_NK / TEMPERATURE).softmax(dim=1))
    least = loss(logits_NK, told_NLK, recipe)
    assert least < loss(logits_NK / 2, told_NLK, recipe)
    assert least < loss(logits_NK * 2, told_NLK, recipe)
    equal_NK = logits_NK.clone().requires_grad_()
    loss(equal_NK, told_NLK, recipe).backward()
    torch.testing.assert_close(equal_NK.grad, torch.zeros(6, 10), atol=1e-6, rtol=0)


def test_labels_and_teachers_count_in_their_shares() -> None:
    logits_NK, labels_N = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    answers_NK = torch.full((6, 10), 0.1)
    both = Recipe(distillation=0.3)
    told_NLK = lessons(labels_N, 10, both, answers_NK)
    expected = 0.7 * loss(logits_NK, told_NLK[:, :1], Recipe()) + 0.3 * loss(
        logits_NK, told_NLK, dataclasses.replace(both, distillation=1.0)
    )
    torch.testing.assert_close(loss(logits_NK, told_NLK, both), expected)


def test_a_network_learns_what_the_teacher_says_and_not_the_labels() -> None:
    """The labels are all wrong, and distillation 1 does not look at them."""
    count = 80
    truth_N = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels_NCHW = (noise + 150 * truth_N[:, None, None, None]).to(torch.uint8)
    split = Split(name="greys", classes=("dark", "light"), pixels_NCHW=pixels_NCHW, labels_N=1 - truth_N)
    recipe = dataclasses.replace(RECIPES["debug"], epochs=4, distillation=1.0)
    torch.manual_seed(0)
    network = model.build(recipe.network, num_classes=2)
    initialize(network, recipe, pixels_NCHW)
    answers_NK = F.one_hot(truth_N, 2).float()
    fit(network, split, recipe, device=CPU, answers_NK=answers_NK)
    with torch.no_grad():
        assert (network.eval()(pixels_NCHW).argmax(dim=1) == truth_N).double().mean() > 0.9

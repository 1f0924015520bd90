"""Pictures of none of the classes, and the comparison of what notices them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import random_checkpoint

from app import data, model
from app.checkpoint import CIFAR10_CLASSES, Checkpoint, save
from app.data import Split
from training import commands as cli
from training.calibrate import complete
from training.evaluate import forward
from training.pictures import SOURCES
from training.unfamiliar import USED, auroc, compare, format_comparison, score


def reds(count: int, seed: int) -> Split:
    """Something to be familiar with: reddish pictures of ten brightnesses."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(count) % 10
    pixels_NCHW = torch.randint(0, 40, (count, 3, 32, 32), generator=generator)
    pixels_NCHW[:, 0] += 100 + 10 * labels_N[:, None, None]
    return Split(name="reds", classes=CIFAR10_CLASSES, pixels_NCHW=pixels_NCHW.to(torch.uint8), labels_N=labels_N)


def red_detector() -> Checkpoint:
    """A network whose first logit says how much redder than green a picture is; the others say nothing."""
    given = random_checkpoint()
    state = {name: tensor if name in ("mean", "std") else tensor * 0 for name, tensor in given.state_dict.items()}
    state["conv1.weight"][0, :2] = torch.tensor([1.0, -1.0])[:, None, None] / 25
    state["conv2.weight"][0, 0, 2, 2] = 1
    state["fc1.weight"][0, :25] = 1 / 25
    state["fc2.weight"][0, 0] = 1
    state["fc3.weight"][0, 0] = 10
    return dataclasses.replace(given, state_dict=state)


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_makes_distinct_pictures_reproducibly(name: str) -> None:
    first, again, other = (SOURCES[name](8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert (first.dtype, tuple(first.shape)) == (torch.uint8, (8, 3, 32, 32))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 8


def test_auroc_by_hand() -> None:
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 0
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])) == pytest.approx((2 + 3) / 6)


def test_feature_scores_are_higher_for_pictures_like_those_trained_on_than_for_noise() -> None:
    body, head = model.split(random_checkpoint().network())
    train, held_out = reds(200, seed=0), reds(60, seed=1)
    known_ND = forward(body, train.pixels_NCHW)
    noise_NCHW = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    real, made = (
        score(features_ND, head(features_ND), known_ND, train.labels_N)
        for features_ND in (forward(body, pixels_NCHW) for pixels_NCHW in (held_out.pixels_NCHW, noise_NCHW))
    )
    assert all(len(values_N) == 60 and values_N.isfinite().all() for values_N in [*real.values(), *made.values()])
    for method in ("Mahalanobis", "5 neighbours"):  # random logits have no opinion to go by
        assert auroc(real[method], made[method]) > 0.99


@pytest.mark.parametrize("known", [2, 4, 20])
def test_few_known_images_are_enough(known: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features_ND, known_ND = (torch.rand(count, 84, generator=generator) for count in (6, known))
    scores = score(features_ND, torch.rand(6, 2, generator=generator), known_ND, torch.arange(known) % 2)
    assert all(len(values_N) == 6 and values_N.isfinite().all() for values_N in scores.values())


def test_the_comparison_has_a_row_for_each_source_and_flags_few_of_the_held_out() -> None:
    train, held_out = reds(200, seed=0), reds(100, seed=1)
    whole = complete(red_detector(), held_out, None)
    found = compare(whole, train, held_out, count=4)
    assert [row["source"] for row in found["sources"]] == list(SOURCES)
    flagged = found["held_out"]["flagged"]
    assert flagged <= 0.1  # of the images and their JPEGs together it is one in twenty
    assert found["held_out"] == {"name": "reds", "images": 100, "flagged": flagged}
    noise = next(row for row in found["sources"] if row["source"] == "uniform noise")
    assert (noise["flagged"], noise["auroc"][USED]) == (1, 1)
    text = format_comparison(found)
    assert "AUROC of 100 images, reds, against 4 pictures of each source" in text
    assert len({len(line) for line in text.splitlines()[2:]}) == 1


def test_weights_without_a_familiarity_calibration_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = reds(200, seed=0), reds(20, seed=1)
    monkeypatch.setenv("CIFAR_DATA", "anywhere")
    monkeypatch.setattr(data, "read", lambda _folder: (train, test))
    monkeypatch.setattr(data, "read_test", lambda _folder: test)
    save(random_checkpoint(), tmp_path / "bare.pth")
    assert cli.main(["unfamiliar", "--weights", str(tmp_path / "bare.pth")]) == 2
    assert "carry no calibration of familiarity; name those of a run with --validation 0.1" in capsys.readouterr().err
    whole, out = tmp_path / "whole.pth", tmp_path / "out.json"
    sha256 = save(complete(random_checkpoint(), test, None), whole)
    assert cli.main(["unfamiliar", "--weights", str(whole), "--count", "2", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    assert found["held_out"]["images"] == 20
    assert found["weights"]["sha256"] == sha256

"""Which runs are made, that each is made once, and that what is taken out is really out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_checkpoint
from torch import nn

from app import model
from app.checkpoint import Checkpoint
from app.data import Split
from training import ablate as module
from training.ablate import ablate, settings
from training.config import RECIPES, Recipe
from training.errors import TrainingError
from training.log import read_rows

CPU = torch.device("cpu")
DEBUG = dataclasses.replace(RECIPES["debug"], epochs=1)


def greys(count: int = 80) -> Split:
    """Two classes, dark and light."""
    labels_N = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels_NCHW = (noise + 150 * labels_N[:, None, None, None]).to(torch.uint8)
    return Split(name="greys", classes=("dark", "light"), pixels_NCHW=pixels_NCHW, labels_N=labels_N)


def test_each_ingredient_of_the_default_recipe_is_taken_out_once() -> None:
    recipe, plain = RECIPES["default"], Recipe()
    table = settings(recipe)
    assert table.pop("") == {}
    assert {"flip", "shift", "cutmix", "distillation", "jpeg", "weight_decay"} <= table.keys()
    assert not {"network", "seed", "epochs", "optimizer", "learning_rate"} & table.keys()
    for name, changes in table.items():
        assert changes == {name: getattr(plain, name)}
        assert getattr(recipe, name) != getattr(plain, name)


def test_the_plain_recipe_has_no_ingredient() -> None:
    assert settings(Recipe()) == {"": {}}


def test_each_run_is_logged_as_one_line_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, trained = tmp_path / "new" / "ablation.jsonl", []

    def count(recipe: Recipe, *_rest: object) -> nn.Module:
        trained.append((recipe.seed, recipe.flip, recipe.shift, recipe.validation))
        if len(trained) == 7:
            raise KeyboardInterrupt
        return nn.Identity()

    monkeypatch.setattr(module, "_train", count)
    monkeypatch.setattr(module, "validate", lambda *_: {"validation_accuracy": len(trained) / 10})
    recipe = Recipe(network="net", flip=True, shift=1, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        ablate(greys(), recipe, [0, 5, 6], file, device=CPU)
    assert trained[:6] == [(seed, *rest, 0.1) for seed in (0, 5) for rest in ((True, 1), (False, 1), (True, 0))]
    rows = read_rows(file)
    assert [row["validation_accuracy"] for row in rows] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert [row["setting"] for row in rows[:3]] == ["the whole recipe", "flip False", "shift 0"]
    assert [(row["ingredient"], row["epochs"]) for row in rows[:3]] == [("", 3), ("flip", 3), ("shift", 3)]

    trained.clear()
    seen: list[module.Row] = []
    everything = ablate(greys(), recipe, [0, 5, 6], file, device=CPU, on_row=seen.append)
    assert [seed for seed, *_ in trained] == [6, 6, 6]
    assert everything == read_rows(file) == rows + seen
    trained.clear()
    longer = ablate(greys(), dataclasses.replace(recipe, epochs=4), [0, 0], file, device=CPU)
    assert len(trained) == 3
    assert len(longer) == 12


def test_runs_that_cannot_be_compared_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_train", lambda *_: nn.Identity())
    monkeypatch.setattr(module, "validate", lambda *_: {"validation_accuracy": 0.5})
    images, recipe, file = greys(), Recipe(distillation=0.5), tmp_path / "a.jsonl"
    teacher = dataclasses.replace(random_checkpoint(), sha256="a teacher's")

    def run(images: Split = images, recipe: Recipe = recipe, teacher: Checkpoint = teacher) -> None:
        ablate(images, recipe, [0], file, device=CPU, teachers=[teacher])

    run()
    others: list[dict[str, Any]] = [
        {"recipe": dataclasses.replace(recipe, learning_rate=0.2)},
        {"images": greys(100)},
        {"teacher": dataclasses.replace(teacher, sha256="another's")},
    ]
    for other in others:
        with pytest.raises(TrainingError, match=r"a\.jsonl has runs of another recipe, on other images or with other"):
            run(**other)
    run()


def test_teachers_are_used_only_where_the_recipe_distils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[float, bool]] = []

    def listen(_network: nn.Module, _train: Split, recipe: Recipe, **options: object) -> None:
        heard.append((recipe.distillation, options["teachers"] is not None))

    monkeypatch.setattr(module, "fit", listen)
    recipe, images = Recipe(network="net", distillation=0.5), greys()
    arguments = {"num_classes": len(images.classes)}
    weights = model.build("net", **arguments).state_dict()
    teacher = Checkpoint(architecture="net", arguments=arguments, state_dict=weights, classes=images.classes)
    ablate(images, recipe, [0], tmp_path / "a.jsonl", device=CPU, teachers=[teacher])
    assert heard == [(0.5, True), (0.0, False)]


def test_real_runs_learn_and_are_reproducible(tmp_path: Path) -> None:
    """Dark and light are easy to tell apart, whatever is taken out."""
    recipe = dataclasses.replace(DEBUG, epochs=3)
    rows = [ablate(greys(), recipe, [0], tmp_path / name, device=CPU) for name in ("a", "b")]
    assert rows[0] == rows[1]
    assert {row["ingredient"] for row in rows[0]} == {"", "flip", "shift", "jpeg", "cutout"}
    assert all(min(row["validation_accuracy"], row["jpeg_accuracy"]) > 0.8 for row in rows[0])
    assert [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()] == rows[0]


@pytest.mark.parametrize("content", ["hello", "{}\n[1]"])
def test_a_file_that_is_not_a_log_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(TrainingError, match=r"notes\.txt is not a log with one JSON object per line"):
        read_rows(tmp_path / "notes.txt")

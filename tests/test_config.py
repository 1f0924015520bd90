"""Recipes: what they promise, and how flags override them."""

import argparse
import dataclasses

import pytest

from training.config import RECIPES, Recipe, add_flags, descriptions, override
from training.errors import TrainingError


def test_the_tutorial_recipe_has_the_tutorials_values() -> None:
    recipe = RECIPES["tutorial"]
    chosen = (recipe.network, recipe.batch_size, recipe.epochs, recipe.learning_rate, recipe.momentum)
    assert chosen == ("net", 4, 2, 0.001, 0.9)
    assert (recipe.optimizer, recipe.nesterov, recipe.decay, recipe.weight_decay) == ("sgd", False, False, 0.0)
    assert (recipe.normalization, recipe.report_every, recipe.flip, recipe.shift) == ("half", 2000, False, 0)


def test_every_field_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    defaults = vars(parser.parse_args([]))
    assert defaults == {field.name: None for field in dataclasses.fields(Recipe)}
    given = vars(parser.parse_args(["--batch-size", "8", "--no-flip", "--learning-rate", "0.5", "--network", "net"]))
    recipe = override(RECIPES["default"], given)
    assert (recipe.batch_size, recipe.flip, recipe.learning_rate, recipe.network) == (8, False, 0.5, "net")
    assert recipe.epochs == RECIPES["default"].epochs


def test_each_flag_says_what_it_is() -> None:
    assert descriptions().keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert descriptions()["epochs"] == "Passes over the training images."


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"momentum": 0.0}, ["--no-nesterov"]),
        ({"seed": 20261127034500}, ["seed is 20261127034500", "0 to 1000000000"]),
        ({"epochs": 0}, ["epochs is 0", "1 to"]),
        ({"shift": 17}, ["shift is 17", "0 to 16"]),
        ({"network": "resnet"}, ["'resnet'", "net, cifar_net"]),
        ({"optimizer": "muon", "muon_learning_rate": 0.0}, ["muon_learning_rate"]),
        ({"network": "net", "low_resolution": 0.5}, ["low_resolution", "32x32"]),
    ],
)
def test_bad_values_are_refused_by_name(flags: dict[str, object], words: list[str]) -> None:
    with pytest.raises(TrainingError, match=r"\.$") as refusal:
        override(RECIPES["debug"], flags)
    for word in words:
        assert word in str(refusal.value)

"""The card says what the files beside it say, leaves out what is missing, and links only existing pictures."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import random_checkpoint, random_evaluation

from app import model
from app.calibration import Calibration
from app.checkpoint import Checkpoint, load, save
from training.card import write_card
from training.errors import TrainingError
from training.log import write_rows

ROBUSTNESS = {
    "weights": {"file": "held.pth", "sha256": "abcdef" * 10, "trained_on": "45,000 of CIFAR-10 training"},
    "dataset": {"name": "validation (5,000 held-out training images)", "sha256": "123456" * 10, "images": 5000},
    "rows": [
        {"pictures": "as they are", "accuracy": 0.9, "fall": 0.0},
        {"pictures": "JPEG quality 75", "accuracy": 0.875, "fall": 2.5},
    ],
}
ABLATION = [
    {
        "ingredient": name,
        "setting": setting,
        "seed": seed,
        "epochs": 4,
        "device": "a CPU",
        "teachers": "a net",
        "validation_accuracy": accuracy / 100,
        "jpeg_accuracy": accuracy / 200,
    }
    for name, setting, accuracies in (("", "the whole recipe", (80, 82, 84)), ("flip", "flip False", (79, 79.5, 80)))
    for seed, accuracy in enumerate(accuracies)
]
EPOCHS = [{"epoch": epoch, "loss": 1 / epoch, "learning_rate": 0.1, "train_seconds": 1.0} for epoch in (1, 2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(random_checkpoint(evaluation=random_evaluation()), tmp_path / "a.pth")
    return tmp_path


def card(folder: Path) -> str:
    written = write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", text))
    assert {path.name for path in written} == {"README.md", *shown}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    return text


def test_weights_alone_make_a_card(folder: Path) -> None:
    save(random_checkpoint(), folder / "bare.pth")
    text = card(folder)
    checkpoint = load(folder / "a.pth")
    evaluation = checkpoint.evaluation
    assert evaluation is not None
    right = int(evaluation.confusion_KK.diagonal().sum())
    assert f"**{right / 200:.2%}** of 200 images right" in text
    assert "62,006 parameters" in text
    assert checkpoint.sha256 in text
    assert "| recipe | `random` |" in text
    assert f"| expected calibration error | {evaluation.ece:.4f} | {evaluation.uncalibrated_ece:.4f} |" in text
    assert "Temperature 1.0000, cubic term 0.0000: a logit's distance d" in text
    assert "Prediction sets" not in text
    assert "| **cat** | " + " | ".join(map(str, evaluation.confusion_KK[3].tolist())) + " |" in text
    assert {path.name for path in folder.glob("*.png")} == {"a.confusion.png", "a.reliability.png"}
    assert text.index("## a.pth") < text.index("## bare.pth") < text.index("## Limits")
    for missing in ("Robustness", "Learning curves", "Ablation", "something else"):
        assert missing not in text


def test_the_calibration_says_where_it_is_from(folder: Path) -> None:
    held_out = Calibration(temperature=0.75, set_threshold=0.2, images="validation", count=9, digest="f" * 64)
    sets = dataclasses.replace(random_evaluation(), coverage=0.9512, set_size=1.25)
    save(dataclasses.replace(random_checkpoint(evaluation=sets), calibration=held_out), folder / "a.pth")
    text = card(folder)
    assert (
        "Temperature 0.7500, cubic term 0.0000, fitted on validation, sha256 `ffffffffffff`: a logit's distance" in text
    )
    assert "for 95% of pictures): 95.12% of them hold it; they have 1.250 classes on average." in text


def test_robustness_adds_the_accuracy_on_exact_pixels(folder: Path) -> None:
    (folder / "a.robustness.json").write_text(json.dumps(ROBUSTNESS))
    text = card(folder)
    sentence = next(line for line in text.splitlines() if line.startswith("**90.00%**"))
    assert "of 5,000 images right (95 % Wilson interval 89.14% to 90.80%)" in sentence
    assert "validation (5,000 held-out training images)" in sentence
    assert "by the weights `abcdefabcdef`, which were trained on 45,000 of CIFAR-10 training" in sentence
    assert "| JPEG quality 75 | 87.50% | 2.50 |" in text
    assert "measured apart from these files: three public ResNets" in text


def test_a_readme_that_is_not_a_model_card_is_not_overwritten(folder: Path) -> None:
    write_card(folder)
    write_card(folder)
    (folder / "README.md").write_text("# My project\n")
    with pytest.raises(TrainingError, match=r"README\.md is not a model card, but would be overwritten"):
        write_card(folder)
    assert (folder / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("kind", ["robustness", "unfamiliar"])
@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"weights": {}, "dataset": {}, "rows": []}'])
def test_a_damaged_file_beside_the_weights_is_named(folder: Path, kind: str, content: str) -> None:
    (folder / f"a.{kind}.json").write_text(content)
    with pytest.raises(
        TrainingError, match=rf"a\.{kind}\.json is damaged, .* `python -m training {kind}` writes such files"
    ):
        write_card(folder)


@pytest.mark.parametrize(
    ("name", "command"), [("ablation.jsonl", "ablate"), ("a.log.jsonl", "train"), ("a.validation.log.jsonl", "train")]
)
def test_a_log_without_the_expected_fields_is_named(folder: Path, name: str, command: str) -> None:
    write_rows(folder / name, [{}])
    with pytest.raises(TrainingError, match=f"{name} is damaged, .* `python -m training {command}` writes such files"):
        write_card(folder)


def test_each_source_of_unfamiliar_pictures_has_a_row(folder: Path) -> None:
    found = {
        "weights": {"sha256": "abcdef" * 10, "trained_on": "45,000 of CIFAR-10 training"},
        "held_out": {"name": "some images", "images": 100, "flagged": 0.05},
        "pictures_per_source": 500,
        "used": "energy",
        "sources": [{"source": "noise", "auroc": {"entropy": 0.5, "energy": 0.98765}, "flagged": 0.875}],
        "mean_auroc": {"entropy": 0.5, "energy": 0.98765},
        "mean_flagged": 0.875,
    }
    (folder / "a.unfamiliar.json").write_text(json.dumps(found))
    text = card(folder)
    assert "| source | called unfamiliar | energy | entropy |" in text
    assert "| noise | 87.5% | 0.988 | 0.500 |" in text
    assert "(of some images: 5.0%)" in text
    assert "By the weights `abcdefabcdef`, which were trained on 45,000 of CIFAR-10 training." in text


def test_the_curves_come_from_the_run_with_validation_if_there_is_one(folder: Path) -> None:
    write_rows(folder / "a.log.jsonl", EPOCHS)
    text = card(folder)
    assert "Of the run that made these weights, from its log." in text
    plain = (folder / "a.curves.png").read_bytes()
    validated = [{**row, "validation_loss": 1.0, "validation_accuracy": 0.5} for row in EPOCHS]
    write_rows(folder / "a.validation.log.jsonl", validated)
    assert "Of the same recipe with images held out, from its log." in card(folder)
    assert (folder / "a.curves.png").read_bytes() != plain


def test_the_ablation_has_mean_and_standard_deviation_over_seeds(folder: Path) -> None:
    write_rows(folder / "ablation.jsonl", [*ABLATION, {**ABLATION[0], "epochs": 8, "validation_accuracy": 0.9}])
    text = card(folder)
    assert "| the whole recipe | 3 | 82.00 ± 2.00 |  | 41.00 ± 1.00 |  |" in text
    assert "| flip False | 3 | 79.50 ± 0.50 | -2.50 | 39.75 ± 0.25 | -1.25 |" in text
    assert "With `--epochs 8`, on a CPU:" in text
    assert "| the whole recipe | 1 | 90.00 |  | 40.00 |  |" in text
    assert text.count("The recipe with fewer epochs") == text.count("Taught by a net. Each device") == 1


def test_an_ingredient_is_compared_on_its_own_device(folder: Path) -> None:
    better = zip(ABLATION, (0.91, 0.92, 0.93, 0.9, 0.91, 0.92), strict=True)
    elsewhere = [{**run, "device": "a GPU", "validation_accuracy": accuracy} for run, accuracy in better]
    write_rows(folder / "ablation.jsonl", [*ABLATION, *elsewhere])
    text = card(folder)
    assert "| flip False | 3 | 79.50 ± 0.50 | -2.50 |" in text
    assert "| flip False | 3 | 91.00 ± 1.00 | -1.00 |" in text


def test_an_ingredient_is_compared_under_its_own_seeds(folder: Path) -> None:
    write_rows(folder / "ablation.jsonl", [*ABLATION[:3], ABLATION[5]])
    assert "| flip False | 1 | 80.00 | -4.00 | 40.00 | -2.00 |" in card(folder)


def test_a_card_for_other_classes_says_nothing_specific_to_cifar10(folder: Path) -> None:
    (folder / "a.robustness.json").write_text(json.dumps(ROBUSTNESS))
    checkpoint = random_checkpoint(evaluation=random_evaluation())
    own = dataclasses.replace(checkpoint, classes=tuple(f"my {name}" for name in checkpoint.classes))
    save(own, folder / "a.pth")
    text = card(folder)
    for word in ("Krizhevsky", "ResNet", "ten classes"):
        assert word not in text


def named(folder: Path, names: list[str]) -> str:
    """The card of weights that know these classes."""
    known = Checkpoint(
        architecture="net",
        arguments={"num_classes": len(names)},
        state_dict=model.build("net", num_classes=len(names)).state_dict(),
        classes=tuple(names),
        evaluation=dataclasses.replace(random_evaluation(), confusion_KK=torch.eye(len(names)).long()),
    )
    save(known, folder / "a.pth")
    return card(folder)


def test_the_confusion_table_of_many_classes_is_left_out_but_not_its_picture(folder: Path) -> None:
    names = [f"number {index}" for index in range(31)]
    assert "Confusion matrix; rows are" in named(folder, names[:30])
    text = named(folder, names)
    assert "Confusion matrix; rows are" not in text
    assert "a.confusion.png" in text
    assert "| number 30 | 1 |" in text


def test_a_bar_in_a_name_does_not_break_a_table(folder: Path) -> None:
    text = named(folder, ["cat|dog", "bird"])
    assert r"| cat\|dog | 1 |" in text
    assert r"|  | cat\|dog | bird |" in text


def test_picture_links_are_escaped_for_unusual_weights_names(folder: Path) -> None:
    (folder / "a.pth").rename(folder / "my (new) net.pth")
    write_card(folder)
    assert "](my%20%28new%29%20net.confusion.png)" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_folder_without_weights_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"There are no weights \(\*\.pth\) in"):
        write_card(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def test_the_same_files_make_the_same_card(folder: Path) -> None:
    write_rows(folder / "a.log.jsonl", EPOCHS)
    card(folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    card(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first

"""What each command of `python -m training` does; `flags` has their flags."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app import data, model
from app.calibration import Calibration
from app.checkpoint import Checkpoint, load, save
from app.data import Split
from app.device import choose_device, describe
from app.errors import AppError
from app.files import write_atomically
from app.report import report
from training import plots, robustness
from training.ablate import VALIDATION, ablate
from training.calibrate import complete
from training.card import write_card
from training.config import RECIPES, Recipe, override
from training.data import download, find, hold_out, locate
from training.distill import Teachers
from training.errors import TrainingError
from training.evaluate import evaluate, format_report, predict, validate
from training.fit import Row, check_same_recipe, compute_dtype, fit, initialize, join_workers
from training.flags import RUNS, parser
from training.log import RunLog, read_rows, write_rows
from training.provenance import check_teachers, hold_out_for, load_teachers, provenance, take_over_calibration
from training.summary import summarize
from training.unfamiliar import compare, format_comparison

NAMED_CLASSES = 5
FLATTERED = "The calibration was fitted to these very images, which slightly flatters its figures and the sets'."


def train_command(options: argparse.Namespace) -> None:
    """The experiment, from the recipe to the file that the service loads."""
    flags = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)}
    recipe = override(RECIPES[options.recipe], flags)
    device = choose_device(_local_gpu(options.device))
    dtype = compute_dtype(recipe, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    workers = join_workers(device)
    torch.manual_seed(recipe.seed)

    if options.resume and not options.name:
        raise TrainingError("Which run should be resumed? Give its --name, the folder under runs/.")
    # With the process id, because a script may start several runs in one second.
    run = RUNS / (options.name or f"{options.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    if options.resume and (run / "state.pt").exists():
        check_same_recipe(run / "state.pt", recipe)
    if options.calibration and recipe.validation:
        raise TrainingError("A run with --validation makes its own calibration; leave out one of the two flags.")
    teachers = load_teachers(options.teacher, recipe)
    images, test = data.read(find(options.data, os.environ))
    check_teachers(options.teacher, teachers, recipe, images)
    if options.calibration and options.calibration.exists():  # refuse before the training, not after it
        take_over_calibration(options.calibration, recipe, images, teachers)
    train, held_out = hold_out(images, recipe.validation) if recipe.validation else (images, None)

    network = model.build(recipe.network, num_classes=len(train.classes))
    initialize(network, recipe, train.pixels_NCHW)
    log = RunLog(run, resume=options.resume) if workers.is_first else None
    if log:
        if options.resume and not (run / "state.pt").exists():
            log.say(f"{run} has no finished epoch yet; starting from the beginning.")
        _announce(log, options.recipe, recipe, train)
        log.say(f"{len(train):,} images of {train.name} on {describe(device)}, {str(dtype).removeprefix('torch.')}")

    rows = fit(
        network,
        train,
        recipe,
        device=device,
        teachers=Teachers(teachers, train.classes) if teachers else None,
        workers=workers,
        validate=None if held_out is None else lambda network: validate(network, held_out, device),
        on_epoch=log.epoch if log else None,
        state_file=run / "state.pt",
        resume=options.resume,
        show_progress=True,
    )
    if not log:
        return
    log.draw(rows)

    untested = Checkpoint(
        architecture=recipe.network,
        arguments={"num_classes": len(train.classes)},
        state_dict=network.cpu().state_dict(),
        classes=train.classes,
        trained=provenance(
            options.recipe,
            recipe,
            train,
            teachers,
            seconds=round(sum(row["train_seconds"] for row in rows), 1),
            processes=workers.count,
            device=describe(device),
            precision=str(dtype),
        ),
    )
    taken_over = take_over_calibration(options.calibration, recipe, images, teachers) if options.calibration else None
    calibrated = complete(untested, held_out, taken_over, device)
    log.say(_describe(calibrated.calibration))
    # The only use of the test images, once everything is decided; they stay unused if images were held out.
    evaluation = evaluate(calibrated, test if held_out is None else held_out, device)
    checkpoint = dataclasses.replace(calibrated, evaluation=evaluation)
    weights = options.out or run / "cifar_net.pth"
    save(checkpoint, run / "cifar_net.pth")
    log.say(format_report(report(evaluation, checkpoint.classes)))
    if held_out is not None:
        log.say(FLATTERED)
    if options.out:
        _publish(checkpoint, options.out, rows, options.calibration)
    log.say(f"Wrote {weights}. Serve it with: CIFAR_WEIGHTS={shlex.quote(str(weights))} make serve")


def _announce(log: RunLog, name: str, recipe: Recipe, train: Split) -> None:
    """Say what is about to be trained, and which classes have no image to train on."""
    log.say(
        f"Recipe {name}, in {log.folder}: " + ", ".join(f"{field} {value}" for field, value in vars(recipe).items())
    )
    seen = set(train.labels_N.tolist())
    if unseen := [each for label, each in enumerate(train.classes) if label not in seen]:
        log.say(
            f"No image to train on, among those not held out, for {len(unseen)} of {len(train.classes)} classes: "
            f"{', '.join(unseen[:NAMED_CLASSES])}{', ...' if len(unseen) > NAMED_CLASSES else '.'}"
        )


def _publish(checkpoint: Checkpoint, weights: Path, rows: list[Row], calibration: Path | None) -> None:
    """Write the weights and, beside them, what the model card reads: the log of their run and that of the run that
    the calibration comes from. Files that belong to earlier weights are removed."""
    save(checkpoint, weights)
    _forget_others(weights)
    write_rows(weights.with_suffix(".log.jsonl"), rows)
    if calibration and (validated := read_rows(calibration.parent / "log.jsonl")):
        write_rows(weights.with_suffix(".validation.log.jsonl"), validated)


def _forget_others(weights: Path) -> None:
    """Remove the files beside `weights` that belong to earlier weights."""
    for kind in (".log.jsonl", ".validation.log.jsonl", ".robustness.json", ".unfamiliar.json"):
        weights.with_suffix(kind).unlink(missing_ok=True)


def _describe(calibration: Calibration) -> str:
    if calibration.set_threshold is None:
        return "Neither held-out images (--validation) nor a --calibration: the probabilities are uncalibrated."
    sets = f"prediction sets hold the classes with a probability of {calibration.set_threshold:.4f} or more."
    if not calibration.set_threshold:
        sets = "so few images guarantee nothing, so the prediction sets hold all classes."
    return (
        f"Calibrated on {calibration.images}: temperature {calibration.temperature:.4f}, cubic term "
        f"{calibration.cubic:.4f}; {sets}"
    )


def _local_gpu(asked: str | None) -> str | None:
    """Under torchrun, each process takes the GPU of its local rank unless another device is asked for."""
    local_rank = os.environ.get("LOCAL_RANK")
    ours = local_rank and asked in (None, "cuda") and torch.cuda.is_available()
    return f"cuda:{local_rank}" if ours else asked


def _split(options: argparse.Namespace, weights: Checkpoint | None = None) -> Split:
    """The images to measure or show: the test images or, with --validation, those that a run held out.

    Raises:
        DataError, TrainingError: as `hold_out_for`.
    """
    folder, share = find(options.data, os.environ), options.validation
    split = hold_out_for(weights, data.read(folder)[0], share)[1] if share else data.read_test(folder)
    return split if weights is None else split.labelled_for(weights.classes)


def evaluate_command(options: argparse.Namespace) -> None:
    device, checkpoint = choose_device(options.device), load(options.weights)
    split = _split(options, checkpoint)
    evaluation = evaluate(checkpoint, split, device, batch_size=options.batch_size)
    figures = report(evaluation, checkpoint.classes)
    figures["weights"] = _identify(options.weights, checkpoint)
    print(json.dumps(figures, indent=2) if options.json else format_report(figures))
    if checkpoint.calibration.digest == split.digest and not options.json:
        print(FLATTERED)
    if options.out:
        save(dataclasses.replace(checkpoint, evaluation=evaluation), options.out)
        if options.out.resolve() != options.weights.resolve():
            _forget_others(options.out)


def robustness_command(options: argparse.Namespace) -> None:
    device, checkpoint = choose_device(options.device), load(options.weights)
    split = _split(options, checkpoint)
    result = {
        "weights": _identify(options.weights, checkpoint),
        "dataset": {"name": split.name, "sha256": split.digest, "images": len(split)},
        "rows": robustness.measure(checkpoint, split, device),
    }
    _put_out(result, robustness.format_robustness(result), options)


def unfamiliar_command(options: argparse.Namespace) -> None:
    device, checkpoint = choose_device(options.device), load(options.weights)
    train, split = data.read(find(options.data, os.environ))
    if options.validation:
        train, split = hold_out_for(checkpoint, train, options.validation)
    split = split.labelled_for(checkpoint.classes)
    found = compare(checkpoint, train, split, options.count, device)
    _put_out({"weights": _identify(options.weights, checkpoint), **found}, format_comparison(found), options)


def _identify(file: Path, checkpoint: Checkpoint) -> dict[str, str]:
    trained_on = checkpoint.trained.get("images", "images that the file does not name")
    return {"file": file.name, "sha256": checkpoint.sha256, "trained_on": trained_on}


def _put_out(result: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    """Print the result as a table or as JSON; with --out, write the JSON to a file as well, for the model card."""
    print(json.dumps(result, indent=2) if options.json else text)
    if options.out:
        write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())


def ablate_command(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = override(RECIPES[options.recipe], {"epochs": options.epochs})
    device = choose_device(options.device)
    teachers = load_teachers(options.teacher, recipe)
    train, _ = data.read(find(options.data, os.environ))
    check_teachers(options.teacher, teachers, dataclasses.replace(recipe, validation=VALIDATION), train)
    rows = ablate(
        train,
        recipe,
        options.seeds,
        options.out,
        device=device,
        teachers=teachers,
        on_row=lambda row: print(
            f"seed {row['seed']}, {row['setting']}: {row['validation_accuracy']:.2%}, "
            f"as JPEG {row['jpeg_accuracy']:.2%}",
            flush=True,
        ),
    )
    print(f"{options.out} has {len(rows)} runs.")


def show_command(options: argparse.Namespace) -> None:
    device = choose_device(options.device)
    weights = load(options.weights) if options.weights else None
    split = _split(options, weights)
    chosen_N = torch.randperm(len(split), generator=torch.Generator().manual_seed(options.seed))[: options.count]
    pixels_NCHW = split.pixels_NCHW[chosen_N]
    predicted_N = None
    if weights is not None:
        predicted_N = predict(weights.network(), pixels_NCHW, device=device).argmax(dim=1)
    figure = plots.image_grid(pixels_NCHW, split.labels_N[chosen_N], split.classes, predicted_N)
    if options.out is None and plots.has_display():
        plots.show(figure)
    else:
        out = options.out or RUNS / "grid.png"
        plots.save(figure, out)
        print(f"Wrote {out}.")


def plot_command(options: argparse.Namespace) -> None:
    device, checkpoint = choose_device(options.device), load(options.weights)
    evaluation = evaluate(checkpoint, _split(options, checkpoint), device)
    figures = {
        "confusion.png": plots.confusion_matrix(evaluation.confusion_KK, checkpoint.classes, evaluation.dataset),
        "per_class.png": plots.per_class_bars(evaluation.confusion_KK, checkpoint.classes, evaluation.dataset),
        "reliability.png": plots.reliability_diagram(evaluation.bins_B3, evaluation.ece, evaluation.dataset),
    }
    for name, figure in figures.items():
        plots.save(figure, options.out / name)
        print(f"Wrote {options.out / name}: {options.weights.name} {checkpoint.sha256[:12]} on {evaluation.dataset}.")


def summary_command(options: argparse.Namespace) -> None:
    print(summarize(model.build(options.network)))


def card_command(options: argparse.Namespace) -> None:
    for path in write_card(options.folder):
        print(f"Wrote {path}.")


def download_command(options: argparse.Namespace) -> None:
    folder = locate(options.data, os.environ)
    download(folder)
    print(f"CIFAR-10 is in {folder}.")


def _check_writable(file: Path) -> None:
    """Check that `file` can be written, before hours of work rather than after.

    Raises:
        TrainingError: it is not a regular file, or cannot be created.
    """
    if file.is_dir():
        raise TrainingError(f"{file} is a folder; --out takes a file, for example {file / 'result'}.")
    if file.exists() and not file.is_file():
        raise TrainingError(f"{file} is a device or a pipe, which would be replaced; --out takes a regular file.")
    there = next(parent for parent in file.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise TrainingError(f"Nothing can be written into {there}; name another place with --out.")


COMMANDS = {
    "train": train_command,
    "evaluate": evaluate_command,
    "robustness": robustness_command,
    "ablate": ablate_command,
    "show": show_command,
    "plot": plot_command,
    "unfamiliar": unfamiliar_command,
    "summary": summary_command,
    "card": card_command,
    "download": download_command,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence, not a traceback."""
    root = parser()
    options, unknown = root.parse_known_args(arguments)
    if unknown:  # the parser's own message would show the usage of all commands, not of this one
        given = unknown[0].partition("=")[0]
        root.exit(2, f"{options.command} takes no {given}. See python -m training {options.command} --help.\n")
    try:
        if out := getattr(options, "out", None):
            _check_writable(out / "confusion.png" if options.command == "plot" else out)
        COMMANDS[options.command](options)
        if torch.distributed.is_initialized():  # not after a failure: the processes would wait for each other
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
    except BrokenPipeError:  # from `| head`, say; flushing the rest at exit would print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except AppError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be read or written: {error.strerror or error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "Interrupted; finished work is kept. To go on with a training run, repeat its command with "
            "--resume --name NAME, its folder under runs/.",
            file=sys.stderr,
        )
        return 130
    return 0

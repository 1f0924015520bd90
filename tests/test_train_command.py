"""`python -m training` as a user runs it, on a small data set in CIFAR-10's binary layout."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from running import ROOT, eventually

from app import self_test
from app.checkpoint import load
from app.data import RECORD_BYTES, Split, read
from training import commands as cli
from training import plots
from training.config import RECIPES
from training.flags import parser
from training.log import RunLog
from training.provenance import provenance


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with such images and two finished runs: `held`, with a tenth of them held out, and `plain`."""
    folder = write_images(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = ["train", "--recipe", "debug", "--data", "."]
        assert cli.main([*train, "--name", "held", "--validation", "0.1"]) == 0
        assert cli.main([*train, "--name", "plain"]) == 0
    return folder


@pytest.fixture
def finished_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(finished, tmp_path, dirs_exist_ok=True))


def write_images(parent: Path) -> Path:
    """120 training and 30 test images: each class has its own grey, so that there is something to learn."""
    folder = parent / "cifar-10-batches-bin"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    for name, count in zip(names, [24] * 5 + [30], strict=True):
        labels_N1 = torch.arange(count)[:, None] % 10
        noise = torch.randint(0, 20, (count, 3072), generator=generator)
        records = torch.cat([labels_N1, labels_N1 * 23 + noise], dim=1).to(torch.uint8)
        (folder / name).write_bytes(bytes(records.flatten().tolist()))
    return parent


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


def run(*arguments: str, folder: Path, program: Sequence[str] = ("-m", "training")) -> str:
    """What `train` prints; it must succeed."""
    command = [sys.executable, *program, "train", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def log_rows(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_weights_log_and_curves(data_folder: Path) -> None:
    out = run("--recipe", "debug", "--data", ".", "--name", "first", "--out", "out/net.pth", folder=data_folder)
    folder = data_folder / "runs" / "first"
    assert {"cifar_net.pth", "log.jsonl", "curves.png", "state.pt"} <= {path.name for path in folder.iterdir()}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [row["epoch"] for row in log_rows(data_folder, "first")] == [1, 2]

    checkpoint = load(data_folder / "out" / "net.pth")
    train, test = read(data_folder)
    assert checkpoint.architecture == "net"
    assert checkpoint.trained["data_sha256"] == train.digest
    assert checkpoint.trained["recipe"] == "debug"
    assert checkpoint.trained["batch_size"] == RECIPES["debug"].batch_size
    assert checkpoint.evaluation is not None
    assert checkpoint.evaluation.digest == test.digest
    assert int(checkpoint.evaluation.confusion_KK.sum()) == 30
    assert (data_folder / "out" / "net.log.jsonl").read_text() == (folder / "log.jsonl").read_text()
    assert "CIFAR_WEIGHTS=out/net.pth" in out
    assert f"epoch   2  loss {log_rows(data_folder, 'first')[1]['loss']:.4f}" in out


def test_held_out_images_replace_the_test_images(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    assert cli.main(["train", "--recipe", "debug", "--data", ".", "--name", "held", "--validation", "0.1"]) == 0
    checkpoint = load(data_folder / "runs" / "held" / "cifar_net.pth")
    assert checkpoint.evaluation is not None
    assert checkpoint.evaluation.dataset == "validation (12 held-out training images)"
    rows = log_rows(data_folder, "held")
    assert rows[-1]["validation_accuracy"] == checkpoint.evaluation.confusion_KK.diagonal().sum().item() / 12
    calibration = checkpoint.calibration
    fitted = f": temperature {calibration.temperature:.4f}, cubic term {calibration.cubic:.4f}; so few images guarantee"
    assert fitted in capsys.readouterr().out
    assert calibration.temperature != 1.0
    assert calibration.images == f"{checkpoint.evaluation.dataset}, as they are and as JPEG of quality 75"
    assert calibration.count == 12
    assert calibration.digest == checkpoint.evaluation.digest
    assert calibration.set_threshold == 0.0  # 12 images cannot promise 95 %: a set holds all classes
    assert (checkpoint.evaluation.coverage, checkpoint.evaluation.set_size) == (1.0, 10.0)


@pytest.mark.parametrize(
    ("seen", "named"),
    [
        (6, "for 4 of 10 classes: frog, horse, ship, truck."),
        (4, "for 6 of 10 classes: deer, dog, frog, horse, ship, ..."),
    ],
)
def test_classes_that_are_held_out_altogether_are_named(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seen: int, named: str
) -> None:
    monkeypatch.chdir(data_folder)
    first = Path("cifar-10-batches-bin/data_batch_1.bin")
    records = bytearray(first.read_bytes())
    records[seen * RECORD_BYTES :: RECORD_BYTES] = bytes(24 - seen)  # the labels from there on
    first.write_bytes(records)
    train = ["train", "--recipe", "debug", "--data", ".", "--validation"]
    assert cli.main([*train, "0.9", "--name", "few"]) == 0
    assert f"No image to train on, among those not held out, {named}\n" in capsys.readouterr().out
    assert cli.main([*train, "0.1", "--name", "enough"]) == 0
    assert "No image to train on" not in capsys.readouterr().out


def test_a_run_on_all_images_takes_over_the_calibration_of_one_with_held_out_images(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    train = ["train", "--recipe", "debug", "--data", "."]
    final = [*train, "--name", "final", "--calibration", "runs/held/cifar_net.pth"]
    assert cli.main(final) == 2  # it has trained before it misses the file
    assert "run the same command with --resume" in capsys.readouterr().err
    assert cli.main([*train, "--name", "held", "--validation", "0.2"]) == 0
    before = Path("runs/final/log.jsonl").read_text()
    assert cli.main([*final, "--resume"]) == 0
    assert Path("runs/final/log.jsonl").read_text() == before  # no step was trained for it
    held, taken = load(Path("runs/held/cifar_net.pth")), load(Path("runs/final/cifar_net.pth"))
    assert taken.calibration == held.calibration
    assert taken.calibration.count == 24
    drawn_NK = held.calibration.probabilities(taken.network()(self_test.drawings()))
    torch.testing.assert_close(taken.self_test_NK, drawn_NK, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--network", "cifar_net"], "is for the network net and the classes plane, car"),
        (["--epochs", "3", "--cutout", "2"], "is from a run that differs in: cutout, epochs. Name one"),
        (
            ["--distillation", "0.5", "--teacher", "runs/plain/cifar_net.pth"],
            "is from a run that differs in: distillation, teachers. Name one",
        ),
        (["--validation", "0.1"], "A run with --validation makes its own calibration"),
        (
            ["--calibration", "runs/plain/cifar_net.pth"],
            "has no calibration; name one written by a run with --validation",
        ),
        (["--out", "runs"], "runs is a folder; --out takes a file, for example runs/result."),
        (["--out", os.devnull], f"{os.devnull} is a device or a pipe, which would be replaced; --out takes a regular"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused_before_the_training(
    finished_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(finished_folder)
    train = ["train", "--recipe", "debug", "--data", "."]
    assert cli.main([*train, "--name", "final", "--calibration", "runs/held/cifar_net.pth", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs/final/state.pt").exists()


def test_a_student_learns_from_a_teacher_and_names_it(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    train = ["train", "--recipe", "debug", "--data", "."]
    taught = [*train, "--distillation", "0.5", "--teacher", "runs/plain/cifar_net.pth"]
    assert cli.main([*taught, "--name", "student"]) == 0
    teacher, student = (load(Path(f"runs/{name}/cifar_net.pth")) for name in ("plain", "student"))
    assert teacher.trained["teachers"] == "none"
    assert re.fullmatch(
        rf"net {teacher.sha256[:12]}, 2 epochs \(\d+\.\d\d% of CIFAR-10 test, 30 images\)", student.trained["teachers"]
    )
    capsys.readouterr()
    ablate = ["ablate", "--recipe", "debug", "--data", ".", "--teacher", "runs/plain/cifar_net.pth"]
    assert cli.main(ablate) == 2
    assert "The recipe has distillation 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--distillation", "0.5"], "it learns from a teacher. Train one with --recipe teacher"),
        (["--teacher", "runs/plain/cifar_net.pth"], "The recipe has distillation 0; leave out --teacher"),
        (["--distillation", "0.5", "--teacher", "missing.pth"], "missing.pth"),
        (
            ["--distillation", "0.5", "--teacher", "runs/plain/cifar_net.pth", "--validation", "0.1"],
            "cifar_net.pth may have seen images that this run holds out, and would pass them on",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_the_training(
    finished_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(finished_folder)
    train = ["train", "--recipe", "debug", "--data", "."]
    assert cli.main([*train, "--name", "student", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs/student").exists()


def test_a_calibration_is_reused_only_from_the_run_that_made_it(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    final = ["train", "--recipe", "debug", "--data", ".", "--calibration"]
    other = ["--seed", "1", "--precision", "float32", "--report-every", "3"]  # which do not matter to it
    assert cli.main([*final, "runs/held/cifar_net.pth", "--name", "final", "--out", "new/net.pth", *other]) == 0
    assert "[1,     3] loss: " in capsys.readouterr().out
    assert cli.main([*final, "runs/final/cifar_net.pth"]) == 2
    assert "has the calibration of another run; name one written by a run with --validation" in capsys.readouterr().err
    beside = [Path("new/net").with_suffix(kind) for kind in (".log.jsonl", ".validation.log.jsonl", ".robustness.json")]
    beside[-1].write_text("{}")
    evaluate = ["evaluate", "--data", ".", "--out", "new/net.pth", "--weights"]
    for weights, left in [("new/net.pth", True), ("runs/plain/cifar_net.pth", False)]:
        assert cli.main([*evaluate, weights]) == 0
        assert [file.exists() for file in beside] == 3 * [left]


def test_weights_trained_on_other_images_are_refused_with_held_out_images(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    folder = Path("cifar-10-batches-bin")
    first, last = folder / "data_batch_1.bin", folder / "data_batch_5.bin"
    first.write_bytes(last.read_bytes())  # which the runs have held out in part
    held = "runs/held/cifar_net.pth"
    for command in ("evaluate", "robustness", "unfamiliar", "plot", "show"):
        assert cli.main([command, "--weights", held, "--data", ".", "--validation", "0.1"]) == 2
        assert "These weights may have seen some of the images" in capsys.readouterr().err
    train = ["train", "--recipe", "debug", "--data", "."]
    assert cli.main([*train, "--distillation", "0.5", "--teacher", held, "--validation", "0.1"]) == 2
    assert "may have seen images that this run holds out" in capsys.readouterr().err
    assert cli.main([*train, "--calibration", held]) == 2
    assert "is from a run that differs in: data_sha256. Name one" in capsys.readouterr().err


def test_two_processes_reach_the_loss_of_one(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same global batch, same pictures: only the order of additions differs (the debug network has no batch norm)."""
    flags = ["--recipe", "debug", "--data", ".", "--epochs", "3", "--precision", "float32", "--device", "cpu"]
    monkeypatch.chdir(data_folder)
    assert cli.main(["train", *flags, "--name", "one"]) == 0
    alone = ("--standalone", "--local-addr=127.0.0.1")  # not every machine can look up its own name
    torchrun = ("-m", "torch.distributed.run", *alone, "--nproc_per_node=2", "-m", "training")
    run(*flags, "--name", "two", folder=data_folder, program=torchrun)
    one, two = log_rows(data_folder, "one"), log_rows(data_folder, "two")
    assert len(one) == len(two) == 3
    state = torch.load(data_folder / "runs" / "two" / "state.pt", weights_only=True)
    expected = torch.load(data_folder / "runs" / "one" / "state.pt", weights_only=True)
    for name, tensor in expected["network"].items():
        torch.testing.assert_close(state["network"][name], tensor, rtol=1e-3, atol=1e-4)
    losses = [row["loss"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx(losses, rel=1e-3)


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """A job in the background of a script ignores SIGINT, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_finished_run_is_not_overwritten_even_without_its_state(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    train = ["train", "--recipe", "debug", "--data", ".", "--name", "kept"]
    assert cli.main(train) == 0
    weights = Path("runs/kept/cifar_net.pth").read_bytes()
    Path("runs/kept/state.pt").unlink()
    Path("runs/kept/log.jsonl").unlink()
    for flags, sentence in (([], "already holds a run"), (["--resume"], "no state.pt to resume from")):
        assert cli.main([*train, *flags]) == 2
        assert sentence in capsys.readouterr().err
    assert Path("runs/kept/cifar_net.pth").read_bytes() == weights


def test_an_unwritable_output_is_refused_before_training(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    Path("file").touch()
    assert cli.main(["train", "--recipe", "debug", "--data", ".", "--name", "early", "--out", "file/net.pth"]) == 2
    assert "file; name another place with --out." in capsys.readouterr().err
    assert not Path("runs/early").exists()
    assert cli.main(["evaluate", "--weights", "nowhere.pth", "--data", ".", "--out", "new/net.pth"]) == 2
    assert not Path("new").exists()


INTERRUPTED_AT_THE_START = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["training", "summary"]
runpy.run_module("training", run_name="__main__")
"""


@pytest.mark.usefixtures("heeding_interrupts")
def test_interrupting_the_import_of_torch_ends_the_command_silently() -> None:
    command = [sys.executable, "-c", INTERRUPTED_AT_THE_START]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
    in_background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    ended = subprocess.run(in_background, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "2,489,656" in ended.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.usefixtures("heeding_interrupts")
def test_interrupting_leaves_no_half_written_file(data_folder: Path, sent: signal.Signals) -> None:
    flags = ["--recipe", "debug", "--data", ".", "--name", "long", "--epochs", "100000"]
    state_file = data_folder / "runs" / "long" / "state.pt"
    train = [sys.executable, "-m", "training", "train", *flags]
    with subprocess.Popen(train, cwd=data_folder, env=environment(data_folder), stderr=subprocess.PIPE) as process:
        eventually(state_file.exists)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert b"repeat its command with --resume --name NAME" in errors
    left = {path.name for path in state_file.parent.iterdir()}
    assert left <= {".lock", "state.pt", "log.jsonl", "curves.png"}
    assert len(torch.load(state_file, weights_only=True)["rows"]) >= 1


def test_an_interrupted_run_goes_on_to_the_same_weights(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    train = ["train", "--recipe", "debug", "--data", ".", "--epochs", "4", "--resume", "--name"]
    assert cli.main([*train, "whole"]) == 0
    assert "runs/whole has no finished epoch yet; starting from the beginning" in capsys.readouterr().out
    write = RunLog.epoch

    def interrupt(log: RunLog, rows: list[dict[str, float]]) -> None:
        if len(rows) == 3:
            raise KeyboardInterrupt
        write(log, rows)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "epoch", interrupt)
        assert cli.main([*train, "stopped"]) == 130
    assert [row["epoch"] for row in log_rows(data_folder, "stopped")] == [1, 2]
    assert cli.main([*train, "stopped"]) == 0
    assert [row["epoch"] for row in log_rows(data_folder, "stopped")] == [1, 2, 3, 4]
    whole, stopped = (load(Path(f"runs/{name}/cifar_net.pth")).state_dict for name in ("whole", "stopped"))
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "device", [[], ["--device", "cuda"], ["--device", "cuda:0"]], ids=["default", "cuda", "cuda:0"]
)
def test_a_run_on_a_gpu_leaves_weights_for_any_device(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, device: list[str]
) -> None:
    monkeypatch.chdir(data_folder)
    assert cli.main(["train", "--recipe", "debug", "--data", ".", "--name", "a", "--validation", "0.1", *device]) == 0
    checkpoint = load(Path("runs/a/cifar_net.pth"))
    assert checkpoint.trained["device"] == torch.cuda.get_device_name()
    assert checkpoint.calibration.energy_quantiles is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", "nowhere"], ["distillation", "--teacher"]),  # before the data is read, or downloaded
        (["train", "--recipe", "fast", "--data", "nowhere"], ["nowhere", "--data"]),
        (["train", "--validation", "0.1", "--calibration", "a.pth", "--data", "nowhere"], ["leave out one"]),
        (["ablate", "--data", "nowhere"], ["distillation", "--teacher"]),
        (["evaluate", "--data", "nowhere", "--device", "tpu"], ["'tpu'", "cuda"]),
        (["show", "--data", "nowhere", "--device", "tpu"], ["'tpu'", "cuda"]),
        (["train", "--recipe", "debug", "--data", ".", "--device", "tpu"], ["'tpu'", "cuda"]),
        (["train", "--recipe", "debug", "--data", ".", "--epochs", "0"], ["epochs is 0"]),
        (["train", "--recipe", "debug", "--data", ".", "--resume"], ["Which run", "--name"]),
        (["evaluate", "--data", ".", "--weights", "missing.pth"], ["missing.pth"]),
    ],
)
def test_mistakes_end_in_one_sentence(
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(data_folder)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err


@pytest.mark.parametrize("count", ["2", "abc"])
def test_a_stray_variable_of_torchrun_is_named(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert cli.main(["train", "--recipe", "debug", "--data", str(data_folder)]) == 2
    assert f"WORLD_SIZE is {count}, but: " in capsys.readouterr().err


def test_an_unknown_field_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["train", "--learning-rat", "0.1"])
    assert refusal.value.code == 2
    assert "--learning-rat" in capsys.readouterr().err


def test_evaluate_puts_its_figures_into_a_file_of_the_same_weights(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run with held-out images can be served with figures of the test images."""
    monkeypatch.chdir(finished_folder)
    assert cli.main(["evaluate", "--weights", "runs/held/cifar_net.pth", "--data", ".", "--out", "new/net.pth"]) == 0
    before, after = load(Path("runs/held/cifar_net.pth")), load(Path("new/net.pth"))
    assert before.evaluation is not None
    assert after.evaluation is not None
    assert before.evaluation.dataset.startswith("validation")
    assert after.evaluation.dataset == "CIFAR-10 test, 30 images"
    assert after.calibration == before.calibration
    assert after.trained == before.trained
    assert all(torch.equal(after.state_dict[name], tensor) for name, tensor in before.state_dict.items())


def test_evaluate_agrees_with_the_file_and_prints_only_json(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    weights = "runs/plain/cifar_net.pth"
    assert cli.main(["evaluate", "--weights", weights, "--data", ".", "--json", "--batch-size", "7"]) == 0
    figures = json.loads(capsys.readouterr().out)
    evaluation = load(Path(weights)).evaluation
    assert evaluation is not None
    assert figures["confusion"] == evaluation.confusion_KK.tolist()
    assert figures["weights"] == {
        "file": "cifar_net.pth",
        "sha256": load(Path(weights)).sha256,
        "trained_on": "120 of CIFAR-10 training, 120 images",
    }
    assert figures["calibration"]["nll"] == pytest.approx(evaluation.nll, rel=1e-4)


def test_a_write_failure_is_reported_in_one_sentence_after_the_figures(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(finished_folder)
    monkeypatch.setattr(os, "fsync", fsync)
    known = ["--weights", "runs/plain/cifar_net.pth", "--data", ".", "--out", "full"]
    for command, figures in (("evaluate", "accuracy"), ("robustness", "JPEG quality 75")):
        assert cli.main([command, *known]) == 2
        said = capsys.readouterr()
        assert figures in said.out
        assert re.fullmatch(r"\S+ cannot be read or written: .+\.\n", said.err)


def test_resuming_with_another_recipe_is_reported_before_missing_teachers(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    assert cli.main(["train", "--resume", "--name", "plain", "--data", "."]) == 2
    said = capsys.readouterr().err
    assert "was started with other values: network net (now cifar_net), epochs " in said
    assert "Resume it with the same flags" in said


@pytest.mark.parametrize(("command", "unknown"), [("train", "--lr"), ("evaluate", "weights.pth")])
def test_a_flag_that_the_command_does_not_take_is_refused(
    command: str, unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, unknown, "0.1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{command} takes no {unknown}. See python -m training {command} --help.\n"


@pytest.mark.parametrize("count", ["-1", "0", "x", "1000001"])
@pytest.mark.parametrize(
    ("command", "most"),
    [(["train", "--threads"], "1,024"), (["ablate", "--epochs"], "1,000,000")],
    ids=["1024", "10**6"],
)
def test_counts_have_bounds(command: list[str], most: str, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, count])
    assert f"{count!r} is not a whole number from 1 to {most}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["ablate", "--epochs", "1", "--seeds", "0"]], ids=lambda each: each[0])
def test_a_run_uses_the_requested_number_of_threads(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(data_folder)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assert cli.main([*command, "--recipe", "debug", "--data", ".", "--threads", "3"]) == 0
    assert told == [3]


@pytest.mark.parametrize("seed", ["99999999999999999999", "1000000001", "-1", "x"])
@pytest.mark.parametrize("command", [["show", "--seed"], ["ablate", "--seeds", "0"]])
def test_seeds_have_the_bounds_of_the_recipes(
    command: list[str], seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, seed])
    assert f"{seed!r} is not a whole number from 0 to 1,000,000,000" in capsys.readouterr().err
    parser().parse_args([*command, "1000000000"])


def test_a_command_line_that_is_not_utf8_is_recorded_with_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "train", "--data", os.fsdecode(b"caf\xe9")])
    train = Split(name="none", classes=("a",), pixels_NCHW=torch.zeros(0), labels_N=torch.zeros(0))
    found = provenance("debug", RECIPES["debug"], train, [])
    assert found["command"] == "python -m training train --data 'caf?'"


@pytest.mark.parametrize("command", ["robustness", "unfamiliar"])
def test_each_command_suggests_its_own_file(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or a name may be wrapped
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert set(re.findall(r"cifar_net\.(\w+)\.json", capsys.readouterr().out)) == {command}


@pytest.mark.parametrize(
    ("asked", "taken"), [(None, "cuda:3"), ("cuda", "cuda:3"), ("cpu", "cpu"), ("cuda:1", "cuda:1")]
)
def test_each_process_of_torchrun_takes_the_gpu_of_its_rank(
    asked: str | None, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli._local_gpu(asked) == taken


def test_the_commands_write_the_files_the_card_is_made_from(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_folder)
    train, held_out = ["train", "--recipe", "debug", "--data", "."], ["--validation", "0.1"]
    held = "runs/held/cifar_net.pth"
    Path("weights").mkdir()
    of_others = [Path(f"weights/net.{name}") for name in ("validation.log.jsonl", "robustness.json", "unfamiliar.json")]
    for file in of_others:
        file.write_text("of other weights")
    assert cli.main([*train, "--name", "final", "--calibration", held, "--out", "weights/net.pth"]) == 0
    assert [file.exists() for file in of_others] == [True, False, False]
    robustness = ["robustness", "--weights", held, "--data", ".", *held_out, "--out", "weights/net.robustness.json"]
    assert cli.main(robustness) == 0
    assert cli.main(["card", "--folder", "weights"]) == 0
    assert Path("weights/net.validation.log.jsonl").read_bytes() == Path("runs/held/log.jsonl").read_bytes()
    assert Path("weights/net.curves.png").read_bytes() == Path("runs/held/curves.png").read_bytes()
    text = Path("weights/README.md").read_text(encoding="utf-8")
    final, evaluation = load(Path("weights/net.pth")), load(Path(held)).evaluation
    assert final.evaluation is not None
    assert evaluation is not None
    right, right_held = (int(each.confusion_KK.diagonal().sum()) for each in (final.evaluation, evaluation))
    assert f"**{right / 30:.2%}** of 30 images right" in text
    assert f"**{right_held / 12:.2%}** of 12 images right" in text
    assert "trained on 108 of CIFAR-10 training, 120 images" in text
    both = "validation (12 held-out training images), as they are and as JPEG of quality 75"
    assert f"fitted on {both}, sha256 `{evaluation.digest[:12]}`" in text


def test_the_first_row_of_robustness_agrees_with_evaluate(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    held = ["--weights", "runs/held/cifar_net.pth", "--data", ".", "--validation", "0.1", "--json"]
    assert cli.main(["evaluate", *held[:-1]]) == 0
    assert "fitted to these very images" in capsys.readouterr().out
    assert cli.main(["evaluate", *held]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert cli.main(["robustness", *held, "--out", "new/robustness.json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"][0]["accuracy"] == evaluated["accuracy"]
    assert result["dataset"] == evaluated["dataset"]
    checkpoint = load(Path("runs/held/cifar_net.pth"))
    assert result["weights"]["sha256"] == checkpoint.sha256
    assert result["weights"]["trained_on"] == "108 of CIFAR-10 training, 120 images"
    assert json.loads(Path("new/robustness.json").read_text()) == result
    assert cli.main(["robustness", *held[:-1]]) == 0
    assert "JPEG quality 75" in capsys.readouterr().out
    for command in ("evaluate", "robustness", "unfamiliar", "plot", "show"):
        assert cli.main([command, *held[:-2], "0.2"]) == 2  # they have seen half of those
        assert "a run with --validation 0.2" in capsys.readouterr().err


def test_an_ablation_goes_on_where_it_stopped(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    flags = ["ablate", "--recipe", "debug", "--data", ".", "--epochs", "1", "--out", "ablation.jsonl"]
    assert cli.main([*flags, "--seeds", "0"]) == 0
    first = Path("ablation.jsonl").read_text()
    assert cli.main([*flags, "--seeds", "0", "1"]) == 0
    assert Path("ablation.jsonl").read_text().startswith(first)
    assert "has 10 runs" in capsys.readouterr().out


def test_pictures_are_written(
    finished_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_folder)
    weights = "runs/plain/cifar_net.pth"
    assert cli.main(["show", "--data", ".", "--weights", weights, "--count", "8", "--out", "grid.png"]) == 0
    first = Path("grid.png").read_bytes()
    monkeypatch.setattr(plots, "has_display", lambda: False)
    assert cli.main(["show", "--data", ".", "--weights", weights, "--count", "8", "--seed", "1"]) == 0
    assert Path("runs/grid.png").read_bytes() != first
    assert cli.main(["plot", "--data", ".", "--weights", weights, "--out", "plots"]) == 0
    assert cli.main(["summary", "--network", "net"]) == 0
    assert "62,006" in capsys.readouterr().out
    assert cli.main(["plot", "--data", ".", "--weights", weights, "--out", "grid.png"]) == 2
    assert capsys.readouterr().err.endswith("grid.png; name another place with --out.\n")
    names = ["grid.png", "plots/confusion.png", "plots/per_class.png", "plots/reliability.png"]
    for name in names:
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_a_closed_output_pipe_gives_no_traceback() -> None:
    ran = subprocess.Popen(
        [sys.executable, "-m", "training", "summary"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert ran.stdout is not None
    assert ran.stderr is not None
    with ran, ran.stderr:
        ran.stdout.close()
        assert ran.stderr.read() == b""
    assert ran.returncode == 1

"""The log that a run leaves."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock

from training.errors import TrainingError
from training.log import RunLog

ROWS = [
    {"epoch": 1, "loss": 2.0, "learning_rate": 0.1, "images_per_second": 10.0, "train_seconds": 1.0},
    {"epoch": 2, "loss": 1.5, "learning_rate": 0.05, "images_per_second": 10.0, "train_seconds": 1.0},
]


def test_a_run_leaves_its_log_and_its_curves(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", resume=False).epoch(ROWS)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "curves.png", "log.jsonl"]


def test_an_epoch_of_a_run_with_validation_says_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunLog(tmp_path, resume=False).epoch([ROWS[0] | {"validation_accuracy": 0.75, "validation_loss": 0.5}])
    assert "epoch   1  loss 2.0000  validation 75.00%, loss 0.5000  10 images/s, 1 s" in capsys.readouterr().out


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    """As with `make train` in two terminals. A run that ended before its first epoch can only start anew."""
    going_on = RunLog(tmp_path, resume=False)
    for resume in (False, True):
        with pytest.raises(TrainingError, match="going on in another process"):
            RunLog(tmp_path, resume=resume)
    del going_on
    RunLog(tmp_path, resume=False)


@pytest.mark.parametrize(("number", "trains"), [(errno.ENOLCK, True), (errno.EACCES, False)])
def test_a_file_system_without_locks_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, trains: bool
) -> None:
    def acquire(_lock: FileLock, **_options: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with nullcontext() if trains else pytest.raises(OSError, match="Permission denied"):
        RunLog(tmp_path, resume=False)


def test_an_existing_run_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "state.pt").touch()
    with pytest.raises(TrainingError, match="already holds a run"):
        RunLog(tmp_path, resume=False)


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    left, state = tmp_path / ".state.pt.x7", tmp_path / "state.pt"
    left.touch()
    state.touch()
    RunLog(tmp_path, resume=True)
    assert (left.exists(), state.exists()) == (False, True)

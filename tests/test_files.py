"""A file is written whole or not at all, and only regular files are read."""

import os
import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from app.files import read_regular, write_atomically


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    file = tmp_path / "weights.pth"
    write_atomically(file, b"old")

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
    monkeypatch.undo()
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.filterwarnings("ignore:unclosed file")  # of an interrupt between `open` and `with`; closed all the same
def test_an_interrupt_at_any_moment_leaves_one_whole_file_and_nothing_else(tmp_path: Path) -> None:
    """A signal can come between any two Python instructions, in the libraries it calls, too."""
    file = tmp_path / "weights.pth"
    write_atomically(file, b"old")
    for moment in count():
        left = moment

        def interrupt(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            frame.f_trace_opcodes = True
            left -= event in ("opcode", "line")
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            write_atomically(file, b"new")
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(None)
        assert file.read_bytes() in (b"old", b"new"), moment
        assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"], moment
    assert moment > 10
    assert file.read_bytes() == b"new"


def test_the_new_content_is_on_the_disk_before_it_replaces_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(os.fstat(descriptor).st_size))
    write_atomically(tmp_path / "weights.pth", b"new")
    assert on_disk == [3]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as refusal:
        write_atomically(tmp_path / "folder", b"new")
    assert refusal.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "film.mp4"
    file.write_bytes(b"1234")
    assert read_regular(file, max_bytes=4) == b"1234"
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_regular(file, max_bytes=3)

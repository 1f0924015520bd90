"""Writing a file as a whole or not at all."""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def save_tensors(path: Path, content: dict[str, Any]) -> str:
    """`torch.save`, but atomic. Returns the sha256 of the file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def forget_unfinished(path: Path) -> None:
    """Remove what `write_atomically` leaves beside `path` when the process is killed."""
    for temporary in path.parent.glob(f".{path.name}.*"):
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` as a whole or not at all, whenever the process is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it private to this user; a container serves it as another
            os.replace(temporary, path)
        except BaseException:  # an interrupt, too, must leave no temporary file
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:  # it names the temporary file, which the user does not know
        raise OSError(error.errno, error.strerror, str(path)) from None

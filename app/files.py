"""Reading and writing files as a whole or not at all."""

import errno
import hashlib
import io
import math
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def read_regular(path: Path, max_bytes: float = math.inf) -> bytes:
    """The content of a file. Pipes and devices are refused: they may never end, or block the reader for ever.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `max_bytes`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    return path.read_bytes()


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
    """Replace `path` with `content` as a whole or not at all, even if the process is interrupted."""
    # Named before it is made (`tempfile` does both at once), so that no interrupt leaves a file that nobody knows of.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # whatever the umask: a container serves it as another user
            temporary.replace(path)
        except BaseException:  # an interrupt, too
            with suppress(OSError):  # it was never made
                temporary.unlink()
            raise
    except OSError as error:  # it names the temporary file, of which the user knows nothing
        raise OSError(error.errno, error.strerror, str(path)) from None

"""Labelled images from a folder. The only reader of data sets: training reads both parts, the service the test part.

Three layouts are recognised, in this order:

    CIFAR-10, binary    data_batch_1.bin ... data_batch_5.bin and test_batch.bin
    CIFAR-10, python    data_batch_1 ... data_batch_5 and test_batch, as torchvision downloads them
    class folders       one folder per class with its pictures directly in it: cats/1.png, dogs/a.jpg, ...
                        or each part in a folder of its own: train/cats/1.png, test/cats/2.png, ...

The first two may lie in the folder itself or in the subfolder their archive unpacks to. Pictures of class folders are
cut to the centre square and resized to 32x32 (`app.images`, "crop"). Unless the parts have folders, a fifth of each
class is the test part, chosen by the hash of the file names, so that a training picture hardly ever becomes a test
picture.

Shape letters: N images, C = 3 channels, H = W = 32.
"""

import ctypes
import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from app import images, numpy_pickle
from app.checkpoint import CIFAR10_CLASSES, is_text
from app.errors import DataError, RequestError
from app.files import read_regular
from app.machine import available_cpus
from app.model import IMAGE_BYTES, IMAGE_SIZE

RECORD_BYTES = 1 + IMAGE_BYTES
BATCH_IMAGES = 10_000
TRAINING_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
PICTURE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif"),  # recognised only so that the error can name them
}
MAX_PICTURE_BYTES = 512 * 1024 * 1024
"""More than `MAX_PIXELS` take in any format; anything larger is most likely a film."""
TEST_SHARE = 1 / 5
OWN_PARTS = {"training": "train", "test": "test"}
"""The folder of each part, in a data set that is already divided."""
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
"""What Windows and macOS leave in folders and archives, besides hidden files."""
NAMED_FILES = 5
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError),
    *(OverflowError, MemoryError),  # a length that no file has
)

# A copy of the test set is in circulation whose images were once encoded as JPEG. Figures on it are not comparable with
# published ones, so it must not pass for the test set; only its content tells them apart.
KNOWN_COPIES = {"12f8dfd385fadf8ec94e77c8de765d9b2dff30e56d893543bbef3118534efaaa": "CIFAR-10 test, JPEG q75"}

HOW_TO_GET = (
    "Name a folder with --data DIR or CIFAR_DATA; it holds CIFAR-10 (cifar-10-batches-bin or cifar-10-batches-py) or "
    "one folder of pictures per class: DIR/CLASS/PICTURE, or DIR/train/CLASS/PICTURE and DIR/test/CLASS/PICTURE. "
    "`python -m training download` fetches CIFAR-10."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The training or the test part of a data set, in memory."""

    name: str
    """Its name in words, for reports: "CIFAR-10 test"."""
    classes: tuple[str, ...]
    pixels_NCHW: Tensor
    """uint8, (N, 3, 32, 32), red, green, blue."""
    labels_N: Tensor
    """int64, indices into `classes`."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def labelled_for(self, classes: tuple[str, ...]) -> "Split":
        """The same images, with labels that index into `classes`, which may list class folders in another order.

        Raises:
            DataError: the images have other classes.
        """
        if self.classes == classes:
            return self
        if sorted(self.classes) != sorted(classes):
            raise DataError(
                f"The weights know the classes {', '.join(classes)}; the images ({self.name}) have the classes "
                f"{', '.join(self.classes)}. Use images of the classes that the weights were trained for, or train new "
                "weights on these."
            )
        places_K = torch.tensor([classes.index(name) for name in self.classes])
        return replace(self, classes=classes, labels_N=places_K[self.labels_N])

    @cached_property
    def digest(self) -> str:
        """sha256 over the pixels, image after image as (C, H, W), then the labels as 64-bit little-endian integers.

        It depends on the content only: the binary and the python layout of the same images have the same digest.
        """
        digest = hashlib.sha256()
        for tensor in (self.pixels_NCHW.contiguous(), self.labels_N.contiguous()):
            digest.update(_memory(tensor))
        return digest.hexdigest()


def read(folder: Path) -> tuple[Split, Split]:
    """The training and the test part of the data set in `folder`.

    Raises:
        DataError: There is no data set, or a part of it cannot be used.
    """
    train, test = _read(folder, ("training", "test"))
    return train, test


def read_test(folder: Path) -> Split:
    """The test part only; like `read` otherwise."""
    return _read(folder, ("test",))[0]


def _read(folder: Path, parts: Sequence[str]) -> list[Split]:
    try:
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder}. {HOW_TO_GET}")
        for layout, suffix, parse in (("bin", ".bin", _parse_records), ("py", "", _parse_pickle)):
            if (found := _find_batches(folder, layout, suffix)) is not None:
                return [_cifar10(part, found, suffix, parse) for part in parts]
        names = _folders(folder)
        deep = [folder / name / deeper for name in names for deeper in _folders(folder / name)]
        if names == sorted(OWN_PARTS.values()) and any(map(_has_pictures, deep)):
            return _read_own_parts(folder, parts)
        if any(_has_pictures(folder / name) for name in names):
            divided = [_divide(_list(folder / name, 2, "one to train on and one to test with")) for name in names]
            return _read_class_folders(folder, names, divided, parts)
        for deeper in sorted(deep, key=lambda path: path.parent.name != OWN_PARTS["training"]):
            if _has_pictures(deeper):
                raise DataError(
                    f"The pictures in {folder} are a folder too deep, as in {deeper.relative_to(folder)}; they must be "
                    "DIR/CLASS/PICTURE, or DIR/train/CLASS/PICTURE and DIR/test/CLASS/PICTURE with no other folders. "
                    f"Name {deeper.parent} if its folders are the classes, or move the pictures up."
                )
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read: {error.strerror}. Give the user who runs this the right to read it "
            "and everything in it."
        ) from None
    raise DataError(f"The folder {folder} holds no recognisable data set. {HOW_TO_GET}")


# CIFAR-10


def _find_batches(folder: Path, layout: str, suffix: str) -> Path | None:
    """The folder that holds batches of that layout: `folder` itself or the one its archive unpacks to."""
    names = [name + suffix for name in (*TRAINING_BATCHES, TEST_BATCH)]
    for candidate in (folder, folder / f"cifar-10-batches-{layout}"):
        if any((candidate / name).is_file() for name in names):
            return candidate
    return None


def _cifar10(part: str, folder: Path, suffix: str, parse: Callable[[Path, bytearray], tuple[Tensor, Tensor]]) -> Split:
    names = (TEST_BATCH,) if part == "test" else TRAINING_BATCHES
    paths = [folder / (name + suffix) for name in names]
    pixels, labels = [], []
    for path in paths:
        pixels_NCHW, labels_N = parse(path, _read_bytes(path))
        wrong_N = (labels_N < 0) | (labels_N >= len(CIFAR10_CLASSES))
        if wrong_N.any():
            number = int(wrong_N.nonzero()[0])
            raise DataError(
                f"In the file {path} image number {number} has the label {int(labels_N[number])}; labels go from 0 to "
                f"{len(CIFAR10_CLASSES) - 1}. The file is damaged or is not CIFAR-10."
            )
        pixels.append(pixels_NCHW)
        labels.append(labels_N)
    name = f"CIFAR-10 {part}"
    if sum(map(len, labels)) != BATCH_IMAGES * len(paths):
        name = f"{name}, {sum(map(len, labels)):,} images"
    split = Split(name=name, classes=CIFAR10_CLASSES, pixels_NCHW=torch.cat(pixels), labels_N=torch.cat(labels))
    if part == "test" and split.digest in KNOWN_COPIES:
        return replace(split, name=KNOWN_COPIES[split.digest])
    return split


def _read_bytes(path: Path) -> bytearray:
    """The file as a bytearray, because torch warns of tensors that share the memory of immutable bytes."""
    try:
        return bytearray(read_regular(path))
    except FileNotFoundError:
        raise DataError(f"The data set in {path.parent} lacks the file {path.name}. {HOW_TO_GET}") from None
    except OSError as error:
        raise DataError(f"The file {path} cannot be read: {error.strerror}.") from None


def _parse_records(path: Path, raw: bytearray) -> tuple[Tensor, Tensor]:
    """A record is one byte of label, then the red, the green and the blue plane, row by row."""
    if not raw or len(raw) % RECORD_BYTES:
        raise DataError(
            f"The file {path} is cut short: it has {len(raw):,} bytes and needs {BATCH_IMAGES * RECORD_BYTES:,}, "
            f"or for fewer images a multiple of {RECORD_BYTES:,}. Copy or download it again."
        )
    records = torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), records[:, 0].long()


def _parse_pickle(path: Path, raw: bytearray) -> tuple[Tensor, Tensor]:
    """A pickled dict, written by Python 2: `labels`, a list, and `data`, a numpy array of uint8, (N, 3072)."""
    try:
        batch = numpy_pickle.load(raw)
        labels, data = batch[b"labels"], batch[b"data"]
        if data.shape != (len(labels), IMAGE_BYTES) or len(data.content) != len(labels) * IMAGE_BYTES:
            raise ValueError("labels and pixels differ in number")
        pixels = torch.frombuffer(bytearray(data.content), dtype=torch.uint8)
        return pixels.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor(labels, dtype=torch.int64)
    except UNREADABLE:
        raise DataError(
            f"The file {path} ({len(raw):,} bytes) is not a batch of CIFAR-10's python version, or it is cut short. "
            "Nothing in it was run. Copy or download it again."
        ) from None


# Class folders


Divided = tuple[list[Path], list[Path]]
"""The training and the test pictures of a class."""


def _read_own_parts(folder: Path, parts: Sequence[str]) -> list[Split]:
    train, test = (folder / name for name in OWN_PARTS.values())
    for part in (train, test):
        if _has_pictures(part):
            raise DataError(
                f"The folder {part} has pictures beside its class folders, where they are not read. Move them into a "
                "class folder or elsewhere."
            )
    names = _folders(train)
    if different := sorted({*names} ^ {*_folders(test)}):
        raise DataError(
            f"In {folder}, train and test do not have the same class folders; only one of them has "
            f"{', '.join(different[:NAMED_FILES])}{', ...' if len(different) > NAMED_FILES else ''}. Add them to the "
            "other, or remove them."
        )
    divided = [(_list(train / name, 1, "to train on"), _list(test / name, 1, "to test with")) for name in names]
    return _read_class_folders(folder, names, divided, parts)


def _read_class_folders(folder: Path, names: list[str], divided: list[Divided], parts: Sequence[str]) -> list[Split]:
    if len(names) < 2:
        raise DataError(f"The folder {folder} has only one class folder, {names[0]}; a classifier needs at least two.")
    for name in names:
        if not is_text(name):
            raise DataError(f"The name of the class folder {name!r} is not UTF-8. Rename it.")
    chosen: dict[str, list[tuple[Path, int]]] = {"training": [], "test": []}
    for label, of_class in enumerate(divided):
        for part, paths in zip(chosen, of_class, strict=True):
            chosen[part] += [(path, label) for path in paths]
    # Mixes the classes, because training holds out the last images.
    chosen = {part: sorted(pictures, key=lambda picture: _rank(picture[0])) for part, pictures in chosen.items()}
    # All parts together, so that everything unreadable is reported together.
    pixels_NCHW = _decode([path for part in parts for path, _ in chosen[part]], folder)
    return [
        Split(
            name=f"{folder.resolve().name} {part}".encode(errors="replace").decode(),  # the folder's may not be UTF-8
            classes=tuple(names),
            pixels_NCHW=part_NCHW,
            labels_N=torch.tensor([label for _, label in chosen[part]], dtype=torch.int64),
        )
        for part, part_NCHW in zip(parts, torch.split(pixels_NCHW, [len(chosen[part]) for part in parts]), strict=True)
    ]


def _visible(folder: Path) -> list[Path]:
    """Everything in the folder except hidden and system files."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return [path for path in found if path.name.lower() not in SYSTEM_FILES]


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in _visible(folder) if path.is_dir())


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())


def _list(class_folder: Path, least: int, purpose: str) -> list[Path]:
    """The files of a class. Those that are not pictures are reported later."""
    found = _visible(class_folder)
    for deeper in (path for path in found if path.is_dir()):
        if _has_pictures(deeper):
            raise DataError(
                f"The class folder {class_folder} has pictures in its folder {deeper.name}, where they are not read. "
                "Move them up, or move that folder away."
            )
    paths = [path for path in found if not path.is_dir()]  # broken links stay in, to be reported as well
    if len(paths) < least:
        raise DataError(
            f"The class folder {class_folder} has {len(paths) or 'no'} picture{'s' * (not paths)}; a class needs at "
            f"least {least}, {purpose}, directly in its folder. Add some or remove the folder."
        )
    return paths


def _divide(paths: list[Path]) -> Divided:
    ranked = sorted(paths, key=_rank)
    count = max(1, round(len(paths) * TEST_SHARE))
    return ranked[count:], ranked[:count]


def _rank(path: Path) -> bytes:
    """A sort key as good as random, but stable: pictures keep their order when others come or go."""
    return hashlib.sha256(os.fsencode(Path(path.parent.name, path.name))).digest()


def _decode(paths: list[Path], folder: Path) -> Tensor:
    """The pictures as uint8 (N, 3, 32, 32). In threads, because Pillow decodes without holding the GIL."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        decoded = list(pool.map(_decode_or_refuse, paths))
    broken = {
        str(path.relative_to(folder)): result
        for path, result in sorted(zip(paths, decoded, strict=True), key=lambda pair: pair[0])
        if isinstance(result, str)
    }
    if broken:
        named = [*broken][:NAMED_FILES]
        raise DataError(
            f"Of the {len(paths):,} files read in {folder}, {len(broken):,} cannot be used: {', '.join(named)}"
            f"{', ...' if len(broken) > NAMED_FILES else '.'} Of {named[0]}: {broken[named[0]]} "
            "Repair these files or move them away."
        )
    return images.to_tensor(result for result in decoded if isinstance(result, bytes)).contiguous()


def _decode_or_refuse(path: Path) -> bytes | str:
    """The pixels, or a sentence that says what is wrong with the file."""
    try:
        return images.decode(read_regular(path, MAX_PICTURE_BYTES), resize="crop")
    except RequestError as error:
        return str(error)
    except OSError as error:
        return f"It cannot be read: {error.strerror}."


def _memory(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a contiguous CPU tensor, valid while it lives; torch itself offers them only through numpy."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())

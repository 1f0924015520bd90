"""Each data layout is written, read back, and broken in every way that has an error message."""

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Hostile
from PIL import Image
from torch import Tensor

from app import data, numpy_pickle
from app.checkpoint import CIFAR10_CLASSES
from app.errors import DataError
from training.data import find, hold_out, locate
from training.errors import TrainingError

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def batch(seed: int, images: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels_NCHW = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return pixels_NCHW, torch.randint(0, 10, (images,), generator=generator)


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(BATCHES):
        pixels_NCHW, labels_N = batch(seed)
        records = torch.cat([labels_N.to(torch.uint8)[:, None], pixels_NCHW.flatten(1)], dim=1)
        (folder / f"{name}.bin").write_bytes(bytes(records.flatten().tolist()))
    return folder


def python_2_pickle(pixels: bytes, labels: list[int]) -> bytes:
    """What Python 2 and numpy 1 wrote: texts and pixels as 8-bit strings, which Python 3 has no way to write."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    state = b"(K\x01K" + bytes([len(labels)]) + b"M\x00\x0c\x86" + dtype + b"\x89" + text(pixels) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + state + text(b"labels") + listed + b"u."


def write_python(folder: Path) -> Path:
    """Half of the files as Python 2 wrote them, half as today's numpy writes that protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(BATCHES):
        pixels_NCHW, labels_N = batch(seed)
        rows, labels = pixels_NCHW.flatten(1).numpy(), labels_N.tolist()
        old = python_2_pickle(rows.tobytes(), labels)
        new = pickle.dumps({b"data": rows, b"labels": labels, b"batch_label": b"one of six"}, protocol=2)
        (folder / name).write_bytes(old if seed % 2 else new)
    return folder


def write_class_folders(folder: Path, counts: dict[str, int], size: tuple[int, int] = (32, 32)) -> Path:
    """Each picture is of one colour that tells its class and its number."""
    suffixes = ("png", "PNG", "bmp", "webp")
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = Image.new("RGB", size, (40 * label, number, 0))
            picture.save(folder / name / f"{number:03}.{suffixes[number % 4]}", lossless=True)  # for WebP
    return folder


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_reads_the_binary_layout(tmp_path: Path, subfolder: str) -> None:
    write_binary(tmp_path / subfolder)
    train, test = data.read(tmp_path)
    assert torch.equal(train.pixels_NCHW, torch.cat([batch(seed)[0] for seed in range(5)]))
    assert torch.equal(train.labels_N, torch.cat([batch(seed)[1] for seed in range(5)]))
    assert torch.equal(test.pixels_NCHW, batch(5)[0])
    assert torch.equal(test.labels_N, batch(5)[1])
    assert train.classes == test.classes == CIFAR10_CLASSES
    assert (train.pixels_NCHW.dtype, train.labels_N.dtype, len(train), len(test)) == (torch.uint8, torch.int64, 35, 7)


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
def test_reads_the_python_layout_and_finds_the_same_data(tmp_path: Path, subfolder: str) -> None:
    write_python(tmp_path / "py" / subfolder)
    write_binary(tmp_path / "bin")
    for pickled, binary in zip(data.read(tmp_path / "py"), data.read(tmp_path / "bin"), strict=True):
        assert torch.equal(pickled.pixels_NCHW, binary.pixels_NCHW)
        assert torch.equal(pickled.labels_N, binary.labels_N)
        assert pickled.digest == binary.digest
        assert pickled.name == binary.name


def test_the_test_part_can_be_read_alone(tmp_path: Path) -> None:
    write_binary(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    assert len(data.read_test(tmp_path)) == 7
    with pytest.raises(DataError, match=r"lacks the file data_batch_2\.bin"):
        data.read(tmp_path)


def test_the_digest_is_sha256_of_pixels_then_labels() -> None:
    pixels_NCHW, labels_N = batch(0)
    split = data.Split(name="x", classes=CIFAR10_CLASSES, pixels_NCHW=pixels_NCHW, labels_N=labels_N)
    content = pixels_NCHW.numpy().tobytes() + labels_N.numpy().astype("<i8").tobytes()
    assert split.digest == hashlib.sha256(content).hexdigest()
    channels_last = pixels_NCHW.contiguous(memory_format=torch.channels_last)
    same = data.Split(name="y", classes=CIFAR10_CLASSES, pixels_NCHW=channels_last, labels_N=labels_N)
    assert same.digest == split.digest


def test_a_part_of_cifar10_does_not_pass_for_the_whole(tmp_path: Path) -> None:
    train, test = data.read(write_binary(tmp_path))
    assert (train.name, test.name) == ("CIFAR-10 training, 35 images", "CIFAR-10 test, 7 images")


def test_the_complete_cifar10_is_named_without_a_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BATCH_IMAGES", 7)
    assert [part.name for part in data.read(write_binary(tmp_path))] == ["CIFAR-10 training", "CIFAR-10 test"]


def test_a_known_copy_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_binary(tmp_path)
    monkeypatch.setitem(data.KNOWN_COPIES, data.read_test(tmp_path).digest, "CIFAR-10 test, somehow changed")
    assert data.read_test(tmp_path).name == "CIFAR-10 test, somehow changed"


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    write_python(tmp_path)
    trap = tmp_path / "trap"
    hostile = pickle.dumps({b"data": Hostile(trap), b"labels": []}, protocol=2)
    (tmp_path / "test_batch").write_bytes(hostile)
    with pytest.raises(DataError, match="Nothing in it was run"):
        data.read_test(tmp_path)
    assert not trap.exists()
    pickle.loads(hostile)  # the file is indeed a trap for whoever reads it with pickle
    assert trap.exists()


@pytest.mark.parametrize(
    "name", ["numpy\nndarray", "numpy\ndtype", "numpy.core.multiarray\n_reconstruct", "_codecs\nencode"]
)
def test_a_pickle_cannot_change_what_it_looks_up(name: str) -> None:
    """BUILD with such a pair sets attributes of the object below it: here of the stand-ins for all later files."""
    look_up = b"\x80\x02c" + name.encode() + b"\n"
    with contextlib.suppress(TypeError):
        numpy_pickle.load(look_up + b"N}X\x04\x00\x00\x00markK\x01s\x86b.")
    assert not hasattr(numpy_pickle.load(look_up + b"."), "mark")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2, 3], protocol=2),
        pickle.dumps({b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**70]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8, order="F"), b"labels": [1, 2]}, protocol=2),
        b"\x80\x04\x8e" + b"\xff" * 8,
        python_2_pickle(bytes(3072), [1])[:-100],
    ],
    ids=[
        *("empty", "text", "list", "no data", "wrong count", "wrong dtype", "text label", "huge label", "by columns"),
        *("impossible length", "cut short"),
    ],
)
def test_a_file_that_is_not_a_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    write_python(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=rf"test_batch \({len(content):,} bytes\) is not a batch of CIFAR-10's python"):
        data.read_test(tmp_path)


def test_a_truncated_file_says_bytes_expected_and_found(tmp_path: Path) -> None:
    write_binary(tmp_path)
    file = tmp_path / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin is cut short: it has 21,510 bytes and needs 30,730,000"):
        data.read(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="it has 0 bytes"):
        data.read(tmp_path)


def test_a_label_out_of_range_says_which_image(tmp_path: Path) -> None:
    write_binary(tmp_path)
    file = tmp_path / "test_batch.bin"
    content = bytearray(file.read_bytes())
    content[4 * 3073] = 10
    file.write_bytes(content)
    with pytest.raises(DataError, match="image number 4 has the label 10; labels go from 0 to 9"):
        data.read_test(tmp_path)
    write_python(tmp_path / "py")
    (tmp_path / "py" / "test_batch").write_bytes(
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, protocol=2)
    )
    with pytest.raises(DataError, match="image number 0 has the label -1"):
        data.read_test(tmp_path / "py")


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_no_data_says_how_to_get_it(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "nowhere"
    if make:
        (folder / ".hidden").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / ".hidden" / "picture.png")
    with pytest.raises(DataError, match=r"(?s)nowhere.*--data DIR or CIFAR_DATA.*python -m training download"):
        data.read(folder)


def test_reads_class_folders_and_divides_each_class(tmp_path: Path) -> None:
    counts = {"ant": 10, "bee": 25, "cow": 2}
    write_class_folders(tmp_path, counts)
    (tmp_path / "notes.txt").write_text("files beside the class folders do not matter")
    (tmp_path / "ant" / ".DS_Store").write_text("nor do hidden ones")
    train, test = data.read(tmp_path)
    assert train.classes == test.classes == ("ant", "bee", "cow")
    assert train.labels_N.bincount().tolist() == [8, 20, 1]
    assert test.labels_N.bincount().tolist() == [2, 5, 1]
    assert test.name == f"{tmp_path.name} test"
    seen = set()
    for split in (train, test):
        for pixels_CHW, label in zip(split.pixels_NCHW, split.labels_N.tolist(), strict=True):
            red, number, _ = pixels_CHW[:, 0, 0].tolist()
            assert (pixels_CHW == pixels_CHW[:, :1, :1]).all()
            assert red == 40 * label  # the picture is still with its label
            seen.add((label, number))
    assert len(seen) == 37  # each picture is in one part, once


@pytest.mark.parametrize("suffix", [".gif", ".JPG", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"])
def test_class_folders_may_hold_any_single_picture_format(tmp_path: Path, suffix: str) -> None:
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for number in range(5):
            Image.new("RGB", (32, 32)).save(tmp_path / label / f"{number}{suffix}")
    assert [len(part) for part in data.read(tmp_path)] == [8, 2]


def test_the_split_of_class_folders_is_stable_when_repeated_or_a_picture_is_added(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"ant": 30, "bee": 30})

    def parts() -> list[set[tuple[int, ...]]]:
        return [{tuple(image[:, 0, 0].tolist()) for image in split.pixels_NCHW} for split in data.read(tmp_path)]

    first, again = data.read(tmp_path), data.read(tmp_path)
    assert [split.digest for split in first] == [split.digest for split in again]
    assert first[1].digest == data.read_test(tmp_path).digest
    labels = first[0].labels_N.tolist()
    assert labels != sorted(labels)  # so the last images, which `hold_out` takes, are of all classes
    trained, tested = parts()
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "ant" / "new.png")
    trained_now, tested_now = parts()
    assert trained | tested < trained_now | tested_now
    assert len(tested_now & trained) <= 1


def test_the_split_of_class_folders_does_not_depend_on_their_location(tmp_path: Path) -> None:
    here = write_class_folders(tmp_path / "here", {"ant": 30, "bee": 30})
    there = Path(shutil.copytree(here, tmp_path / "there"))
    assert [split.digest for split in data.read(here)] == [split.digest for split in data.read(there)]


def test_pictures_of_other_sizes_are_cut_to_their_centre(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(2):
            picture = Image.new("RGB", (96, 64), "red")
            picture.paste("blue", (16, 0, 80, 64))
            picture.save(tmp_path / name / f"{number}.png")
    train, _ = data.read(tmp_path)
    assert train.pixels_NCHW.shape == (2, 3, 32, 32)
    red, green, blue = train.pixels_NCHW[0].float().mean(dim=(1, 2)).tolist()
    assert red < 3  # the antialiasing lets a trace of the edge in; all of the picture would be a third red
    assert green == 0
    assert blue > 250


def test_an_unreadable_folder_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_path: Path) -> None:  # as user nobody in a container meets it; the tests may run as root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    for read in (data.read, data.read_test):
        with pytest.raises(DataError, match=r"cannot be read: Permission denied\. Give the user"):
            read(tmp_path)


def test_unreadable_pictures_are_counted_and_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"ant": 20, "bee": 20})
    for number in range(6):
        (tmp_path / "bee" / f"b{number}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "ant" / "notes.txt").write_text("no picture either")
    with pytest.raises(DataError, match=r"Of the 47 files .* 7 cannot be used: ant/notes\.txt, bee/b0\.jpg") as caught:
        data.read(tmp_path)
    assert "bee/b3.jpg, ... Of ant/notes.txt: The 17 bytes are not a readable picture" in str(caught.value)


def test_no_picture_is_left_out_without_a_word(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, {"ant": 3, "bee": 3})
    link = folder / "bee" / "gone.png"
    link.symlink_to(folder / "nowhere.png")
    with pytest.raises(DataError, match=r"bee/gone\.png. Of bee/gone\.png: It cannot be read: No such file"):
        data.read(folder)
    link.unlink()
    (folder / "ant" / "more").mkdir()
    assert [len(part) for part in data.read(folder)] == [4, 2]
    Image.new("RGB", (32, 32)).save(folder / "ant" / "more" / "1.png")
    with pytest.raises(DataError, match=r"ant has pictures in its folder more, where they are not read. Move them up"):
        data.read(folder)


def test_a_film_among_the_pictures_is_not_read_into_memory(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, {"ant": 3, "bee": 3})
    with (folder / "bee" / "film.mp4").open("wb") as film:
        film.truncate(data.MAX_PICTURE_BYTES + 1)  # a hole, which takes no room
    with pytest.raises(DataError, match=r"Of bee/film\.mp4: It cannot be read: more than 536,870,912 bytes"):
        data.read(folder)


def test_system_files_in_class_folders_are_ignored(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, {"ant": 3, "bee": 3})
    for left in ("ant/Thumbs.db", "bee/.DS_Store", "bee/desktop.ini"):
        (folder / left).write_bytes(b"no picture")
    (folder / "__MACOSX").mkdir()
    assert data.read(folder)[0].classes == ("ant", "bee")


def test_class_folders_may_be_divided_already(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"ant": 4, "bee": 1})
    write_class_folders(tmp_path / "test", {"ant": 1, "bee": 2})
    train, test = data.read(tmp_path)
    assert (train.name, test.name) == (f"{tmp_path.name} training", f"{tmp_path.name} test")
    assert train.classes == test.classes == ("ant", "bee")
    assert train.labels_N.bincount().tolist() == [4, 1]
    assert test.labels_N.bincount().tolist() == [1, 2]
    assert data.read_test(tmp_path).digest == test.digest


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        ({"ant": 1}, r"train and test do not have the same class folders; only one of them has bee\. Add them to"),
        ({"ant": 1, "bee": 0}, r"test/bee has no pictures; a class needs at least 1, to test with, directly"),
    ],
    ids=["missing class", "no picture"],
)
def test_both_parts_have_pictures_of_each_class(tmp_path: Path, test: dict[str, int], sentence: str) -> None:
    write_class_folders(tmp_path / "train", {"ant": 2, "bee": 2})
    write_class_folders(tmp_path / "test", test)
    with pytest.raises(DataError, match=sentence):
        data.read(tmp_path)


def test_unlabelled_test_pictures_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"ant": 2, "bee": 2})
    (tmp_path / "test").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "1.png")
    with pytest.raises(DataError, match=r"test has pictures beside its class folders, where they are not read\. Move"):
        data.read(tmp_path)


def test_class_folders_one_level_too_deep_are_refused_with_the_right_path(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "new", {"ant": 2, "bee": 2})
    folder = write_class_folders(tmp_path / "train", {"ant": 2, "bee": 2})
    with pytest.raises(
        DataError, match=r"a folder too deep, as in train/ant; .* Name \S+/train if its folders are"
    ) as no:
        data.read(tmp_path)
    assert f"Name {folder} if" in str(no.value)


def test_unsupported_formats_are_refused_naming_those_accepted(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, {"ant": 2, "bee": 2})
    for picture in [*folder.glob("*/*.png")]:
        picture.rename(picture.with_suffix(".heic")).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"cannot be used: ant/000\.heic, .*PNG, JPEG"):
        data.read(folder)


def test_a_class_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, {"ant": 2, "bee": 2})
    try:
        (folder / "bee").rename(folder / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.raises(DataError, match=r"The name of the class folder 'caf\\udce9' is not UTF-8"):
        data.read(folder)


def test_a_folder_name_that_is_not_utf8_is_shown_with_a_question_mark(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    assert data.read_test(write_class_folders(folder, {"ant": 2, "bee": 2})).name == "caf? test"


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"ant": 3, "bee": 0}, r"bee has no pictures; a class needs at least 2, one to"),
        ({"ant": 3, "bee": 1}, r"bee has 1 picture; a class needs at least 2, one to"),
        ({"ant": 3}, r"has only one class folder, ant; a classifier needs at least two"),
    ],
)
def test_too_few_pictures_or_classes_are_refused(tmp_path: Path, counts: dict[str, int], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        data.read(write_class_folders(tmp_path, counts))


def test_locate_prefers_the_flag_then_the_environment() -> None:
    assert locate("here", {"CIFAR_DATA": "there"}) == Path("here")
    assert locate(None, {"CIFAR_DATA": "there"}) == Path("there")
    assert locate(None, {}) == locate("", {"CIFAR_DATA": ""}) == Path("data")


def test_hold_out_takes_the_last_images(tmp_path: Path) -> None:
    train, _ = data.read(write_binary(tmp_path))
    rest, held = hold_out(train, 0.2)
    assert (len(rest), len(held)) == (28, 7)
    assert torch.equal(held.pixels_NCHW, batch(4)[0])
    assert torch.equal(held.labels_N, batch(4)[1])
    assert torch.equal(torch.cat([rest.labels_N, held.labels_N]), train.labels_N)
    assert held.name == "validation (7 held-out training images)"
    assert len({train.digest, rest.digest, held.digest}) == 3


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, 0.001, 0.999, float("nan")])
def test_hold_out_refuses_a_share_that_leaves_nothing(tmp_path: Path, share: float) -> None:
    train, _ = data.read(write_binary(tmp_path))
    with pytest.raises(TrainingError, match=f"A share of {share} of 35 training images cannot be held out"):
        hold_out(train, share)


def test_a_failed_download_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_arguments: object, **_options: object) -> None:
        raise ConnectionResetError("[Errno 104] reset by peer")

    for name in ("torchvision", "torchvision.datasets"):  # importing it takes seconds
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(CIFAR10=unreachable))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"could not be downloaded \(ConnectionResetError\)") as caught:
        find(None, {})
    assert "Errno" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data.lock"]


def test_cifar10_is_downloaded_if_there_is_no_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(folder: str, *, download: bool) -> None:
        assert download
        write_python(Path(folder))

    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(CIFAR10=fetch))
    monkeypatch.chdir(tmp_path)
    assert find("elsewhere", {}) == find(None, {"CIFAR_DATA": "elsewhere"}) == Path("elsewhere")
    assert not Path("data").exists()
    for _ in range(2):
        train, _ = data.read(find(None, {}))
        assert len(train) == 35
    assert capsys.readouterr().err == "There is no folder data; downloading CIFAR-10 into it, 170 MB.\n"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data.lock"}

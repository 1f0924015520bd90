"""Every format and mode of Pillow, every way of resizing, and whatever a stranger may send."""

import base64
import random
import struct
import subprocess
import sys
import zlib
from typing import Any, get_args

import pytest
import torch
from conftest import drawing, encode
from PIL import Image, PngImagePlugin
from running import ROOT
from torch import Tensor

from app.errors import BadRequest, BodyTooLarge, RequestError, WrongSize
from app.images import FORMATS, Resize, decode, to_tensor
from app.settings import MAX_PIXELS


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)


def pixels(data: bytes, resize: Resize | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """What `decode` gives, as (C, H, W)."""
    return to_tensor([decode(data, resize, max_pixels)])[0]


def grey(value: int) -> Tensor:
    return torch.full((3, 32, 32), value, dtype=torch.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "GIF"])
def test_lossless_formats_are_decoded_exactly(format: str) -> None:
    picture = drawing().quantize(64).convert("RGB") if format == "GIF" else drawing()
    pixels_CHW = pixels(encode(picture, format, **({"lossless": True} if format == "WEBP" else {})))
    assert pixels_CHW.dtype == torch.uint8
    assert torch.equal(pixels_CHW, as_tensor(picture))


def test_jpeg_is_decoded_approximately() -> None:
    difference = pixels(encode(drawing(), "JPEG", quality=95)).int() - as_tensor(drawing()).int()
    assert difference.abs().float().mean() < 6


def test_channels_are_red_green_blue_and_rows_come_before_columns() -> None:
    picture = Image.new("RGB", (32, 32))
    picture.putpixel((5, 20), (10, 20, 30))  # Pillow says (x, y)
    pixels_CHW = pixels(encode(picture))
    assert pixels_CHW[:, 20, 5].tolist() == [10, 20, 30]
    assert pixels_CHW.sum() == 60


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[:, 0, 0].tolist() == [255, 0, 0]


def test_a_camera_file_of_several_jpegs() -> None:
    data = encode(drawing(300, 300), "MPO", save_all=True, append_images=[drawing(300, 300)])
    assert pixels(data, "stretch").shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("mode", "colour", "format", "expected"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("L", 100, "PNG", (100, 100, 100)),
        ("L", 100, "JPEG", (100, 100, 100)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("LA", (100, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 40, 0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 40, 0, 51), "PNG", (244, 212, 204)),
        ("RGBA", (200, 40, 0, 51), "WEBP", (244, 212, 204)),
        ("I;16", 65535, "PNG", (255, 255, 255)),
        ("I;16", 257 * 7, "PNG", (7, 7, 7)),
        ("I;16", 300, "PNG", (1, 1, 1)),
        ("CMYK", (0, 0, 0, 0), "JPEG", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), "JPEG", (0, 0, 0)),
        ("YCbCr", (128, 128, 128), "JPEG", (128, 128, 128)),
    ],
)
def test_modes(mode: str, colour: float | tuple[float, ...], format: str, expected: tuple[int, int, int]) -> None:
    data = encode(Image.new(mode, (32, 32), colour), format, **({"lossless": True} if format == "WEBP" else {}))
    assert pixels(data)[:, 16, 16].tolist() == pytest.approx(expected, abs=1)


def test_a_jpeg_with_too_many_passes_is_refused() -> None:
    photo = encode(drawing(64, 64), "JPEG", progressive=True)
    last = photo[photo.rindex(b"\xff\xda") : -2]
    assert decode(photo, "crop", max_pixels=1 << 16) == decode(photo, "crop")
    with pytest.raises(BodyTooLarge, match="makes 110 passes over its 64 x 64 pixels"):
        decode(photo[:-2] + 100 * last + photo[-2:], "crop", max_pixels=1 << 16)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    picture = Image.new("I;16", (32, 32))
    picture.frombytes(b"".join(struct.pack("<H", 64 * index) for index in range(1024)))
    assert pixels(encode(picture))[0].flatten().tolist() == [round(64 * index / 257) for index in range(1024)]


def test_a_transparent_16_bit_value_is_drawn_over_white() -> None:
    picture = Image.new("I;16", (32, 32), 257 * 7)
    assert torch.equal(pixels(encode(picture, transparency=257 * 7)), grey(255))
    assert torch.equal(pixels(encode(picture, transparency=257 * 7 + 1)), grey(7))


def test_a_palette_with_transparency_is_drawn_over_white() -> None:
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((0, 0), 0)
    pixels_CHW = pixels(encode(picture, transparency=0))
    assert pixels_CHW[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels_CHW[:, 1, 1].tolist() == [40, 50, 60]


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header_chunk(width: int, height: int, bits: int, colour_type: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))


@pytest.mark.parametrize(
    ("bits", "colour_type", "pixel_row", "transparent", "expected"),
    [
        (2, 0, b"\x55" * 8, b"\0\1", (255, 255, 255)),
        (4, 0, b"\x33" * 16, b"\0\3", (255, 255, 255)),
        (4, 0, b"\x44" * 16, b"\0\3", (68, 68, 68)),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" * 32, b"\x12\x34\x56\x78\x9a\xbc", (255, 255, 255)),
        (16, 2, bytes(6 * 32), b"\1\0" * 3, (0, 0, 0)),
    ],
)
def test_a_transparent_colour_of_any_bit_depth_is_drawn_over_white(
    bits: int, colour_type: int, pixel_row: bytes, transparent: bytes, expected: tuple[int, int, int]
) -> None:
    head = SIGNATURE + header_chunk(32, 32, bits, colour_type) + chunk(b"tRNS", transparent)
    data = head + chunk(b"IDAT", zlib.compress((b"\0" + pixel_row) * 32)) + chunk(b"IEND", b"")
    assert tuple(pixels(data)[:, 16, 16].tolist()) == expected


def test_a_large_compressed_bmp_is_refused_before_it_is_decoded() -> None:
    """Pillow reads these in Python."""
    head = struct.pack("<IIIHHIIIIII", 40, 7000, 7000, 1, 8, 1, 2, 0, 0, 1, 0) + bytes(4) + b"\0\1"
    data = struct.pack("<2sIHHI", b"BM", 14 + len(head), 0, 0, 58) + head
    with pytest.raises(BodyTooLarge, match="compressed BMP of 7000 x 7000; the limit for those is 1,000,000"):
        decode(data, "crop")


def test_a_transparent_colour_without_an_alpha_channel_is_drawn_over_white() -> None:
    data = encode(Image.new("RGB", (32, 32), (1, 2, 3)), transparency=(1, 2, 3))
    assert torch.equal(pixels(data), grey(255))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, format: str) -> None:
    turns = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ]
    upright, turn = drawing(), turns[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    difference = pixels(encode(stored, format, exif=exif)).int() - as_tensor(upright).int()
    assert difference.abs().float().mean() < 12  # what lossy compression costs; any other turn is above 40


def test_a_wrong_size_is_refused_suggesting_resize() -> None:
    with pytest.raises(WrongSize) as refusal:
        pixels(encode(drawing(40, 20)))
    assert str(refusal.value).startswith("The picture is 40 x 20; the network takes 32 x 32. Send that size, or add ")
    assert all(f"?resize={way}" in str(refusal.value) for way in get_args(Resize))
    assert refusal.value.detail == {"width": 40, "height": 20, "expected": [32, 32]}


@pytest.mark.parametrize("resize", get_args(Resize))
def test_a_picture_of_the_right_size_is_left_alone(resize: Resize) -> None:
    assert torch.equal(pixels(encode(drawing()), resize), as_tensor(drawing()))


def thirds() -> Image.Image:
    """96 x 32: red, green, blue."""
    picture = Image.new("RGB", (96, 32))
    for index, colour in enumerate(("red", "lime", "blue")):
        picture.paste(colour, (32 * index, 0, 32 * index + 32, 32))
    return picture


def test_crop_takes_the_centre_square() -> None:
    assert torch.equal(pixels(encode(thirds()), "crop"), as_tensor(Image.new("RGB", (32, 32), "lime")))


def test_stretch_keeps_all() -> None:
    pixels_CHW = pixels(encode(thirds()), "stretch")
    assert [pixels_CHW[:, 16, column].tolist() for column in (4, 16, 27)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_pad_keeps_all_and_adds_white() -> None:
    pixels_CHW = pixels(encode(thirds()), "pad")
    assert [pixels_CHW[:, 16, column].tolist() for column in (4, 16, 27)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert torch.equal(pixels_CHW[:, :10], torch.full((3, 10, 32), 255, dtype=torch.uint8))
    assert torch.equal(pixels_CHW[:, 22:], torch.full((3, 10, 32), 255, dtype=torch.uint8))


@pytest.mark.parametrize("resize", get_args(Resize))
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (33, 31), (200, 7)])
def test_extreme_sizes(size: tuple[int, int], resize: Resize) -> None:
    assert pixels(encode(Image.new("RGB", size, (9, 9, 9))), resize)[:, 15, 15].tolist() == [9, 9, 9]


def test_scaling_down_counts_every_pixel() -> None:
    board = Image.new("L", (512, 512))
    board.putdata([255 * ((x + y) % 2) for y in range(512) for x in range(512)])
    assert (pixels(encode(board), "stretch").int() - 128).abs().max() <= 2


def test_a_big_jpeg_scaled_by_the_decoder_looks_the_same() -> None:
    big = drawing(400, 300).resize((1600, 1200))
    data = encode(big, "JPEG", quality=95)
    expected = as_tensor(big.resize((32, 32), Image.Resampling.BICUBIC))
    assert (pixels(data, "stretch").int() - expected.int()).abs().float().mean() < 3


def png_header(width: int, height: int) -> bytes:
    return SIGNATURE + header_chunk(width, height, 8, 2) + struct.pack(">I", 10**9) + b"IDAT"


@pytest.mark.parametrize("resize", [None, "crop"])
def test_a_tiny_file_that_claims_to_be_huge_is_refused_by_its_header(resize: Resize | None) -> None:
    with pytest.raises(BodyTooLarge, match="The picture is 60000 x 1000; the limit is 50,000,000 pixels"):
        pixels(png_header(60_000, 1000), resize)
    with pytest.raises(BodyTooLarge, match="more than 100,000,000 pixels; the limit is 50,000,000"):
        pixels(png_header(60_000, 2000), resize)  # Pillow's own limit would let it pass
    with pytest.raises(BodyTooLarge, match="The picture is 65536 x 1; the limit is 65,535 pixels on a side"):
        pixels(png_header(65_536, 1), resize)


HUGE_GIF = b"".join(
    [
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6),
        b"!\xf9\x04\x09\0\0\0\0",  # its frame is to be cleared, for which Pillow allocates on opening
        b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;",
    ]
)


def test_no_memory_is_allocated_for_a_refused_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr("PIL.Image.core.fill", lambda *given: made.append(given))
    with pytest.raises(BodyTooLarge):
        pixels(HUGE_GIF)
    assert made == []


def test_a_larger_pixel_limit_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)  # and put back afterwards: it will be raised
    with pytest.raises(BadRequest, match="cut short or damaged"):
        pixels(png_header(60_000, 2000), "crop", max_pixels=200_000_000)


def test_concurrent_decoding_keeps_separate_pixel_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a request while a data set is read."""
    small, opened = encode(drawing()), Image.open

    def meanwhile(*arguments: Any, **options: Any) -> Image.Image:
        monkeypatch.setattr("PIL.Image.open", opened)
        pixels(small, max_pixels=1024)
        return opened(*arguments, **options)

    monkeypatch.setattr("PIL.Image.open", meanwhile)
    assert pixels(encode(drawing(100, 100)), "crop").shape == (3, 32, 32)


def test_the_limit_is_on_pixels_and_inclusive() -> None:
    data = encode(drawing(50, 20))
    assert pixels(data, "crop", max_pixels=1000).shape == (3, 32, 32)
    with pytest.raises(BodyTooLarge):
        pixels(data, "crop", max_pixels=999)


def without_palette(png: bytes) -> bytes:
    start = png.index(b"PLTE") - 4
    (length,) = struct.unpack_from("!i", png, start)
    return png[:start] + png[start + 12 + length :]


def texts(count: int, *, zip: bool) -> bytes:
    """A PNG with that many MB of text."""
    info = PngImagePlugin.PngInfo()
    for name in range(count):
        info.add_text(str(name), "x" * 1_000_000, zip=zip)
    return encode(drawing(), "PNG", pnginfo=info)


@pytest.mark.parametrize("zip", [False, True])
def test_a_png_with_too_much_text_is_refused(zip: bool) -> None:
    assert torch.equal(pixels(texts(1, zip=zip)), as_tensor(drawing()))
    with pytest.raises(BodyTooLarge, match="The PNG has more than 1 MB of text besides its pixels"):
        pixels(texts(2, zip=zip))


def segment(marker: int, content: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_pieces(format: str, at: int, piece: bytes, count: int) -> bytes:
    plain = encode(drawing(), format)
    return plain[:at] + piece * count + plain[at:]


@pytest.mark.parametrize(
    ("format", "at", "piece"),
    [
        ("JPEG", 2, segment(0xE1, b"Exif\0\0" + b"x" * 2000)),  # Pillow joins them, copying all before each
        ("JPEG", 2, segment(0xFE)),
        ("JPEG", 2, b"\xff"),
        ("JPEG", 20, b"\0"),
        ("PNG", 33, chunk(b"tEXt", b"a\0b")),
        ("PNG", 33, chunk(b"abCd", b"")),
        ("PNG", 33, chunk(b"IDAT", b"")),
        ("GIF", 13 + 3 * 256, b"\x21\xfe\x01x\0"),
    ],
    ids=["exif", "comments", "fill bytes", "no marker", "texts", "unknown chunks", "empty chunks", "blocks"],
)
def test_only_a_picture_in_too_many_pieces_is_refused(format: str, at: int, piece: bytes) -> None:
    assert torch.equal(pixels(with_pieces(format, at, piece, 100)), pixels(encode(drawing(), format)))
    with pytest.raises(BodyTooLarge, match="The picture is in too many pieces"):
        pixels(with_pieces(format, at, piece, 70_000))


def test_megabytes_of_metadata_are_skipped() -> None:
    """As phones write it for the depth of a photo."""
    data = with_pieces("JPEG", 2, segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 65_000), 120)
    assert torch.equal(pixels(data), pixels(encode(drawing(), "JPEG")))


def test_a_palette_with_too_many_colours_is_refused() -> None:
    data = bytearray(encode(drawing().quantize(256), "BMP"))
    pixels(bytes(data))
    data[46:50] = struct.pack("<I", 257)
    with pytest.raises(BadRequest, match="not a readable picture"):
        pixels(bytes(data))


def test_odd_metadata_causes_no_warning() -> None:
    entry = struct.pack("<HHII", 0x8298, 2, 1000, 1_000_000)  # a text that lies beyond the end
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + b"\0\0\0\0"
    code = "import sys; from app.images import decode; decode(sys.stdin.buffer.read())"
    ran = subprocess.run([sys.executable, "-c", code], input=with_chunk(b"eXIf", exif), capture_output=True, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture\0",
        encode(drawing())[:-200],
        encode(drawing(), "JPEG")[:300],
        without_palette(encode(drawing().quantize(16))),
        encode(drawing())[:-12] + chunk(b"zTXt", b"a\0\1") + encode(drawing())[-12:],
    ],
    ids=["empty", "few bytes", "cut png", "cut jpeg", "no palette", "unknown compression after the pixels"],
)
def test_an_unreadable_picture_is_refused_naming_accepted_formats(data: bytes) -> None:
    with pytest.raises(BadRequest) as refusal:
        pixels(data)
    assert str(refusal.value) == (
        f"The {len(data):,} bytes are not a readable picture: another format, cut short or damaged. "
        "PNG, JPEG, WebP, BMP and GIF are accepted."
    )


@pytest.mark.parametrize(
    ("data", "likely"),
    [
        (
            encode(drawing()).replace(b"\r", b"").replace(b"\n", b""),
            "a PNG without its line endings, as `curl -d`",
        ),
        (b"data:image/png;base64," + base64.b64encode(encode(drawing())), "they begin like a data URL; send the bytes"),
        (base64.b64encode(encode(drawing())), "they begin like a PNG in base64; send the bytes"),
        (base64.b64encode(encode(drawing(), "JPEG")), "they begin like a JPEG in base64; send the bytes"),
        (encode(drawing(), "PDF"), "they begin like a PDF. PNG, JPEG"),
        (b"<svg/>", "they begin like SVG. PNG, JPEG"),
        (b'<?xml version="1.0"?><svg/>', "they begin like SVG or other XML. PNG, JPEG"),
        (encode(drawing(), "TIFF"), "they begin like TIFF. PNG, JPEG"),
        (b"\0\0\0\x18ftypheic", "they begin like HEIC or a film. PNG, JPEG"),
        (b"\0\0\0\x20ftypavif", "they begin like AVIF. PNG, JPEG"),
        (b"cat.png", "they are text, perhaps the name of the file: curl sends the file itself with -F file=@"),
        (b"A poem.\n" * 100, "they are text. PNG, JPEG"),
        (bytes(range(256)) * 12, "as many as the raw pixels of one picture, which /predict/batch takes. PNG, JPEG"),
    ],
    ids=[
        "curl -d",
        "data url",
        "png64",
        "jpeg64",
        "pdf",
        "svg",
        "xml",
        "tiff",
        "heic",
        "avif",
        "name",
        "text",
        "raw pixels",
    ],
)
def test_common_mistakes_are_recognised_and_named(data: bytes, likely: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        pixels(data)
    assert str(refusal.value).startswith(f"The {len(data):,} bytes are not a readable picture: {likely}")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of broken metadata, which does not stop Pillow
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_decoded_or_refused_and_nothing_else(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP") else {}
    pictures = [drawing(), drawing().quantize(16), drawing().convert("L")]
    whole = [encode(p if format not in ("JPEG", "WEBP") else p.convert("RGB"), format, **options) for p in pictures]
    chance = random.Random(11)
    refused = 0
    for _ in range(400):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), 300))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        try:
            assert pixels(bytes(data), chance.choice([None, "crop"]), 10**6).shape == (3, 32, 32)
        except RequestError:
            refused += 1
    assert refused > 0


def test_memory_is_channels_last() -> None:
    """The predictor stacks pictures in that order; another one would still be right, but slower."""
    assert pixels(encode(drawing())).stride() == (1, 96, 3)


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk, its checksum valid."""
    plain = encode(drawing())
    place = plain.index(b"IDAT") - 4
    return plain[:place] + chunk(kind, content) + plain[place:]


@pytest.mark.parametrize("keyword", [b"exif", b"xmp", b"XML:com.adobe.xmp", b"Raw profile type exif", b"transparency"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [(b"tEXt", b"\0hello"), (b"zTXt", b"\0\0" + zlib.compress(b"hello")), (b"iTXt", b"\0\0\0\0\0hello")],
)
def test_png_text_with_any_keyword_is_ignored(keyword: bytes, kind: bytes, text: bytes) -> None:
    assert decode(with_chunk(kind, keyword + text)) == decode(encode(drawing()))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as above
def test_damaged_exif_does_not_prevent_decoding() -> None:
    """Each byte is changed, one at a time: the picture is turned or not, but decoded."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "camera"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    good = encode(drawing(), "JPEG", exif=exif, quality=95)
    start, end = good.index(b"Exif"), good.index(b"Exif") + len(exif.tobytes())
    upright, turned = (decode(encode(drawing(), "JPEG", quality=95, **options)) for options in ({}, {"exif": exif}))
    for place in range(start, end):
        for value in (0, 255):
            assert decode(good[:place] + bytes([value]) + good[place + 1 :]) in (upright, turned)


def test_colour_profiles_are_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.PngImagePlugin._safe_zlib_decompress", refuse)
    profile = with_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1000)))
    assert decode(profile) == decode(encode(drawing()))


WITHOUT_FILES = """
import resource, sys
from app.errors import BadRequest
from app.images import decode

resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for given in sys.argv[1:]:
    try:
        print(len(decode(bytes.fromhex(given))))
    except BadRequest:
        print("no picture")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no such limit")
def test_the_first_picture_is_read_even_if_no_file_can_be_opened() -> None:
    """Right after the start, many connections may take every file that may be open."""
    given = [encode(drawing(), kind).hex() for kind in FORMATS] + [b"none".hex()]
    command = [sys.executable, "-c", WITHOUT_FILES, *given]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout.split("\n") == ["3072"] * 5 + ["no picture", ""], ran.stderr

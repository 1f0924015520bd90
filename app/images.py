"""Bytes of a picture -> the pixels a network takes. The only file that knows Pillow.

Decided here, for every picture and every caller:

    formats       PNG, JPEG, WebP, BMP and GIF (its first frame), recognised by their content, not by their name
    orientation   as the EXIF tag says, so that a phone's portrait stands upright
    transparency  laid over white
    16-bit grey   divided by 257, so that 65535 becomes 255; never clipped
    size          32x32; any other is handled as `Resize` says; scaling is bicubic and antialiased

Shape letters: N pictures, C = 3 channels (red, green, blue), H = W = 32.
"""

import functools
import io
import re
import struct
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin
from torch import Tensor

from app.errors import BadRequest, BodyTooLarge, WrongSize
from app.model import IMAGE_BYTES, IMAGE_SIZE
from app.settings import MAX_PIXELS

Resize = Literal["crop", "stretch", "pad"]
"""crop: the centre square, scaled: keeps proportions, loses the edges. stretch: both sides scaled to 32: keeps
everything but the proportions. pad: the longer side scaled to 32, centred on white: keeps all, at less resolution."""

OWN_FAULTS = (BadRequest, BodyTooLarge, WrongSize)
"""What `decode` raises: faults of one picture, which do not affect others in the request."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
ACCEPTED = "PNG, JPEG, WebP, BMP and GIF are accepted."
SIZE = (IMAGE_SIZE, IMAGE_SIZE)
WHITE = (255, 255, 255)
MAX_SIDE = 65_535
"""No JPEG, WebP or GIF can have a longer side. Scaling a row of fifty million pixels takes 50 bytes for each."""
MAX_SCANS = 32
"""How many passes a JPEG of `max_pixels` may make over its pixels; a smaller one may make more. Up to 12 are usual; a
pass of 26 bytes can take 20 ms."""
MAX_BMP_RLE_PIXELS = 1_000_000
MAX_READS_BEFORE_PIXELS, MAX_READS = 10_000, 200_000
"""How many reads `MeteredFile` allows. A phone's photo needs a few dozen before its pixels; a PNG of 8 MB in chunks of
8 KB needs 50,000 in all."""
BMP_FIELDS = struct.Struct("<14x I 10x H 16x I")
"""Header size in bytes, bits per pixel, number of colours."""
GREY_SCALES = {"L;2": 85, "L;4": 17}
"""Factors from two and four bits to eight, by Pillow's names for the formats in a PNG."""
OTHERS = {
    b"\x89PNG\x1a": "a PNG without its line endings, as `curl -d` sends it; use --data-binary",
    b"data:": "they begin like a data URL; send the bytes that its base64 encodes",
    b"iVBORw0KGgo": "they begin like a PNG in base64; send the bytes that it encodes",
    b"/9j/": "they begin like a JPEG in base64; send the bytes that it encodes",
    b"%PDF": "they begin like a PDF",
    b"<svg": "they begin like SVG",
    b"<?xml": "they begin like SVG or other XML",
    b"II*\0": "they begin like TIFF",
    b"MM\0*": "they begin like TIFF",
}
"""What is often sent instead of a readable picture, by its first bytes."""
PICTURE_FILE = re.compile(
    rb"\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0....[\x0c\x28\x38\x6c\x7c]\0\0\0"
    rb"|\xff\xd8\xff([\xe0-\xef]..(JFIF|Exif|Adobe)|\xdb\0[\x43\x84]\0)",
    re.DOTALL,
)
"""How picture files begin, as far as no raw pixels would."""
METADATA = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
"""Pillow's keys for metadata that may hold an orientation. Most small pictures have none; a closer look takes 13 us."""

# What Pillow raises for bad bytes: cut short or damaged (OSError), a field out of range (ValueError), a broken chunk
# (SyntaxError), a missing palette (AssertionError), a header cut short (the others; seen only with earlier versions).
# tests/test_images.py damages pictures of every format to keep this list true.
DAMAGED = (OSError, ValueError, SyntaxError, AssertionError, IndexError, struct.error)

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # see `decode`
# Otherwise Pillow imports its formats with the first picture, or the first that is none: that takes 0.1 s, and fails
# while the process has as many files and connections open as it may.
Image.init()
# All texts of a PNG together may inflate to 1 MB. Pillow allows 64 MB, which keeps a core busy for 0.1 s.
PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK

# Pillow warns of odd metadata, which makes no difference here; one picture can cause sixty thousand warnings.
warnings.filterwarnings("ignore", module=r"PIL\.")


class MeteredFile(io.BytesIO):
    """The bytes of a picture, with a limit on how often they are read.

    Pillow walks segments, chunks and blocks in Python, with at least one read for each, and appends their content to
    what it has: so a read counts 1, and 1 more for every 256 KiB before it. Eight megabytes in a million pieces took up
    to three minutes, and held up all other decoding.
    """

    left = MAX_READS_BEFORE_PIXELS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1 + (self.tell() >> 18)
        if self.left < 0:
            raise BodyTooLarge(
                "The picture is in too many pieces: thousands of segments, chunks or blocks, most likely metadata. "
                "Save it again without them."
            )
        return super().read(size)


def _skip_profile(stream: PngImagePlugin.PngStream, _pos: int, length: int) -> bytes:
    """Skip colour profiles, unused here: a PNG may have any number, each of 1 KB that inflates to 1 MB."""
    assert stream.fp is not None
    return stream.fp.read(length)


PngImagePlugin.PngStream.chunk_iCCP = _skip_profile  # type: ignore[assignment]


def decode(data: bytes, resize: Resize | None = None, max_pixels: int = MAX_PIXELS) -> bytes:
    """The picture's pixels, a byte each (H, W, C).

    Args:
        resize: How to handle a picture that is not 32x32; None refuses it.

    Raises:
        BadRequest: The bytes are not a picture in one of the formats, or it is damaged.
        BodyTooLarge: The picture has more than `max_pixels` pixels, or is odd in a way that would take long.
        WrongSize: It is not 32x32 and `resize` is None.
    """
    # Pillow itself refuses more than twice its limit before it allocates memory, which for a GIF it does on opening.
    # All threads share that limit, and may ask for different ones, so it is never lowered: with a `max_pixels` below
    # the usual one, a GIF may still take a byte for each of 100 million pixels before `_check_size` refuses it.
    if max_pixels > (Image.MAX_IMAGE_PIXELS or 0):
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        _check_palette(data)
        with Image.open(source := MeteredFile(data), formats=FORMATS) as picture:
            source.left = MAX_READS
            _check_size(picture, resize, max_pixels)
            if picture.format in ("JPEG", "MPO"):
                _check_scans(data, picture, max_pixels)
                # The decoder halves the picture while both sides keep 4 x 32 pixels, which saves most of the time.
                picture.draft(None, (4 * IMAGE_SIZE, 4 * IMAGE_SIZE))
            _check_compression(picture)
            _scale_transparency(picture)
            picture.load()
            if isinstance(picture.info.get("transparency"), str):  # a PNG's text of that name
                del picture.info["transparency"]
            if METADATA & picture.info.keys():
                _set_upright(picture)
            return _resize(_to_rgb(picture), resize).tobytes()
    except Image.DecompressionBombError:
        raise BodyTooLarge(
            f"The picture has more than {2 * max_pixels:,} pixels; the limit is {max_pixels:,}. Send a smaller one.",
            detail={"max_pixels": max_pixels},
        ) from None
    except DAMAGED as error:
        if "MAX_TEXT" in str(error):  # Pillow's own words
            raise BodyTooLarge(
                "The PNG has more than 1 MB of text besides its pixels; save it without metadata."
            ) from None
        raise BadRequest(f"The {len(data):,} bytes are not a readable picture: {_likely(data)}. {ACCEPTED}") from None


def _likely(data: bytes) -> str:
    """The most likely explanation for bytes that are no picture."""
    for start, kind in OTHERS.items():
        if data.startswith(start):
            return kind
    if data[4:8] == b"ftyp":
        return f"they begin like {'AVIF' if data[8:11] == b'avi' else 'HEIC or a film'}"
    if len(data) == IMAGE_BYTES and not PICTURE_FILE.match(data):
        return "as many as the raw pixels of one picture, which /predict/batch takes"
    if data and data.isascii() and b"\0" not in data:
        name = ", perhaps the name of the file: curl sends the file itself with -F file=@picture.png"
        return "they are text" + (name if len(data) < 256 else "")
    return "another format, cut short or damaged"


def check_raw(pixels: bytes | bytearray) -> memoryview:
    """The raw pixels of N pictures (N, H, W, C), a byte each.

    Raises:
        BadRequest: They are empty, not a whole number of pictures, or a picture file.
    """
    if PICTURE_FILE.match(pixels):
        raise BadRequest(
            "The raw pixels begin like a picture file. Send picture files as fields of a form, or as the input 'image' "
            "of /v2."
        )
    if not pixels or len(pixels) % IMAGE_BYTES:
        raise BadRequest(
            f"The raw pixels have {len(pixels):,} bytes; that must be a multiple of {IMAGE_BYTES:,}: for each picture "
            f"{IMAGE_SIZE} rows of {IMAGE_SIZE} pixels of red, green and blue. Send picture files as fields of a form."
        )
    return memoryview(pixels)


def to_tensor(pictures: Iterable[bytes | memoryview]) -> Tensor:
    """The pixels of all pictures in one tensor: uint8 (N, C, H, W), channels last in memory."""
    pixels = bytearray().join(pictures)  # torch warns of tensors that share the memory of immutable bytes
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, IMAGE_SIZE, IMAGE_SIZE, 3).permute(0, 3, 1, 2)


def _check_size(picture: Image.Image, resize: Resize | None, max_pixels: int) -> None:
    """Check before reading beyond the header: a picture of a few bytes may claim to be huge."""
    width, height = picture.size
    if max(width, height) > MAX_SIDE:
        raise BodyTooLarge(
            f"The picture is {width} x {height}; the limit is {MAX_SIDE:,} pixels on a side. Send a smaller one.",
            detail={"width": width, "height": height, "max_side": MAX_SIDE},
        )
    if width * height > max_pixels:
        raise BodyTooLarge(
            f"The picture is {width} x {height}; the limit is {max_pixels:,} pixels. Send a smaller one.",
            detail={"width": width, "height": height, "max_pixels": max_pixels},
        )
    if resize is None and picture.size != SIZE:
        raise WrongSize(
            f"The picture is {width} x {height}; the network takes {IMAGE_SIZE} x {IMAGE_SIZE}. "
            "Send that size, or add ?resize=crop, ?resize=stretch or ?resize=pad to have it resized.",
            detail={"width": width, "height": height, "expected": list(SIZE)},
        )


def _check_palette(data: bytes) -> None:
    """Pillow walks the colours of a BMP in Python, and trusts a header that claims 65,536: 30 ms."""
    if data.startswith(b"BM") and len(data) >= BMP_FIELDS.size:
        header_bytes, bits, colours = BMP_FIELDS.unpack_from(data)
        if header_bytes >= 40 and bits <= 8 and colours > 256:  # shorter headers have none of these fields
            raise ValueError("more colours than a pixel can name")


def _check_scans(data: bytes, picture: Image.Image, max_pixels: int) -> None:
    scans = data.count(b"\xff\xda")  # each begins with this marker; nothing else but metadata can hold it
    if scans * max(picture.width * picture.height, 1 << 16) > MAX_SCANS * max_pixels:  # even a small one takes time
        raise BodyTooLarge(
            f"The JPEG makes {scans:,} passes over its {picture.width} x {picture.height} pixels; up to 12 are "
            "usual. Save it again as a baseline JPEG.",
            detail={"width": picture.width, "height": picture.height, "scans": scans},
        )


def _check_compression(picture: ImageFile.ImageFile) -> None:
    """Pillow decodes compressed BMPs in Python, which takes up to 0.2 us for a pixel."""
    if picture.tile and picture.tile[0].codec_name == "bmp_rle" and picture.width * picture.height > MAX_BMP_RLE_PIXELS:
        raise BodyTooLarge(
            f"The picture is a compressed BMP of {picture.width} x {picture.height}; the limit for those is "
            f"{MAX_BMP_RLE_PIXELS:,} pixels. Save it as PNG.",
            detail={"width": picture.width, "height": picture.height, "max_pixels": MAX_BMP_RLE_PIXELS},
        )


def _scale_transparency(picture: ImageFile.ImageFile) -> None:
    """Scale it to 8 bits, as Pillow does the pixels: of 16-bit colours, Pillow keeps only the higher eight bits."""
    transparent, mode = picture.info.get("transparency"), picture.tile[0].args if picture.tile else None
    if isinstance(transparent, int) and mode in GREY_SCALES:
        picture.info["transparency"] = transparent * GREY_SCALES[mode]
    elif isinstance(transparent, tuple) and mode == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)


def _set_upright(picture: Image.Image) -> None:
    with suppress(Exception):  # Pillow raises anything for damaged metadata, at the latest after turning the pixels
        ImageOps.exif_transpose(picture, in_place=True)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        levels = _eight_bits(picture.info.get("transparency"))
        return picture.convert("I").point(levels, "L").convert("RGB")
    if picture.has_transparency_data:
        coloured = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        over = Image.new("RGB", picture.size, WHITE)
        over.paste(coloured, mask=coloured)  # like alpha_composite, in half the memory
        return over
    return picture.convert("RGB")


@functools.lru_cache(4)  # making it takes 4 ms
def _eight_bits(transparent: int | None) -> list[int]:
    """The 8-bit value for each 16-bit value; white for the transparent one."""
    return [255 if value == transparent else (value + 128) // 257 for value in range(1 << 16)]


def _resize(rgb: Image.Image, resize: Resize | None) -> Image.Image:
    if rgb.size == SIZE:
        return rgb
    width, height = rgb.size
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return rgb.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if resize == "stretch":
        return rgb.resize(SIZE, Image.Resampling.BICUBIC)
    scale = IMAGE_SIZE / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    padded = Image.new("RGB", SIZE, WHITE)
    padded.paste(
        rgb.resize(inner, Image.Resampling.BICUBIC), ((IMAGE_SIZE - inner[0]) // 2, (IMAGE_SIZE - inner[1]) // 2)
    )
    return padded

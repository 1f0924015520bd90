"""Pictures that show none of CIFAR-10's classes, to see whether a network notices.

Nothing is downloaded: most are drawn, the rest come from samples that ship with matplotlib.
Shape letters: N pictures, C = 3, H = W = 32.
"""

import gzip
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy
import torch
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from app.images import to_tensor
from app.model import IMAGE_SIZE

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmtt10")
COLOURS = ("viridis", "magma", "terrain", "twilight", "turbo", "gray")


def uniform_noise(count: int, generator: torch.Generator) -> Tensor:
    return _bytes(torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))


def gaussian_noise(count: int, generator: torch.Generator) -> Tensor:
    """Noise of any strength around any colour."""
    mean_N311, strength_N111 = _colours(count, generator), 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    return _bytes(mean_N311 + strength_N111 * torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))


def clouds(count: int, generator: torch.Generator) -> Tensor:
    """Noise at all scales, stronger at coarser ones, as in photographs."""
    total = torch.zeros(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    for side in (2, 4, 8, 16, 32):
        noise = torch.randn(count, 3, side, side, generator=generator) / side
        total += F.interpolate(noise, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return _bytes(0.5 + 0.35 * total / total.std())


def constant_colours(count: int, generator: torch.Generator) -> Tensor:
    return _bytes(_colours(count, generator).expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE))


def gradients(count: int, generator: torch.Generator) -> Tensor:
    """Gradients from one colour to another, in any direction."""
    return _bytes(_mix((_slope(count, generator) + 1) / 2, generator))


def checkerboards(count: int, generator: torch.Generator) -> Tensor:
    cell_N11 = torch.randint(1, 9, (count, 1, 1), generator=generator)
    y_H1, x_W = torch.arange(IMAGE_SIZE)[:, None], torch.arange(IMAGE_SIZE)
    return _bytes(_mix(((y_H1 // cell_N11 + x_W // cell_N11) % 2).float(), generator))


def stripes(count: int, generator: torch.Generator) -> Tensor:
    """Waves of any direction, 2 to 32 pixels long."""
    length_N11 = 2 * 16 ** torch.rand(count, 1, 1, generator=generator)
    waves_NHW = torch.sin(_slope(count, generator) * math.pi * IMAGE_SIZE / length_N11)
    return _bytes(_mix((waves_NHW + 1) / 2, generator))


def fractals(count: int, generator: torch.Generator) -> Tensor:
    """Crops of Julia sets in one of matplotlib's colormaps."""
    angle_N11 = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    c_N11 = torch.polar(0.7885 * torch.ones_like(angle_N11), angle_N11)
    side_N11 = 0.1 + 1.2 * torch.rand(count, 1, 1, generator=generator)
    axis_W = torch.linspace(-1, 1, IMAGE_SIZE)
    z_NHW = torch.complex(
        side_N11 * axis_W + 0.5 * torch.randn(count, 1, 1, generator=generator),
        side_N11 * axis_W[:, None] + 0.5 * torch.randn(count, 1, 1, generator=generator),
    )
    steps_NHW = torch.zeros(z_NHW.shape)
    for _ in range(40):
        z_NHW = torch.where(z_NHW.abs() < 2, z_NHW * z_NHW + c_N11, z_NHW)
        steps_NHW += z_NHW.abs() < 2
    return _paint(steps_NHW / 40, generator)


def shapes(count: int, generator: torch.Generator) -> Tensor:
    """A few rectangles, ellipses and triangles on top of each other."""

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        for kind in torch.randint(0, 3, (int(_between(2, 7, generator)),), generator=generator).tolist():
            x0, x1, y0, y1 = (
                value for pair in torch.randint(-4, 36, (2, 2), generator=generator).tolist() for value in sorted(pair)
            )
            fill = _colour(generator)
            if kind == 2:
                canvas.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill)
            else:
                (canvas.rectangle if kind else canvas.ellipse)([x0, y0, x1, y1], fill)

    return _drawn(count, draw, generator)


def text(count: int, generator: torch.Generator) -> Tensor:
    """A few lines of small letters."""

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        font, fill = _font(int(_between(7, 14, generator)), generator), _colour(generator)
        letters = torch.randint(0, len(LETTERS), (4, 10), generator=generator).tolist()
        lines = "\n".join("".join(LETTERS[index] for index in line) for line in letters)
        canvas.multiline_text((_between(-6, 3, generator), _between(-6, 3, generator)), lines, fill, font, spacing=1)

    return _drawn(count, draw, generator)


def digits(count: int, generator: torch.Generator) -> Tensor:
    """One large digit."""

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        digit, centre = int(_between(0, 10, generator)), IMAGE_SIZE / 2 + _between(-3, 3, generator)
        font = _font(int(_between(20, 32, generator)), generator)
        canvas.text((centre, IMAGE_SIZE / 2), str(digit), _colour(generator), font, anchor="mm")

    return _drawn(count, draw, generator)


def icons(count: int, generator: torch.Generator) -> Tensor:
    """Toolbar icons of matplotlib's windows, from half as large as the picture to a little larger."""
    folder = Path(matplotlib.get_data_path(), "images")
    return _pasted(count, [_read(path) for path in sorted(folder.glob("*_large.png"))], generator)


def presents(count: int, generator: torch.Generator) -> Tensor:
    """A drawn present, rotated, on a plain background: an object of none of the classes."""
    return _pasted(count, [_read(_sample("Minduka_Present_Blue_Pack.png"))], generator)


def portrait(count: int, generator: torch.Generator) -> Tensor:
    """Square crops of a photograph of a woman in uniform (Grace Hopper)."""
    return _cropped(count, _read(_sample("grace_hopper.jpg")).convert("RGB"), generator)


def scan(count: int, generator: torch.Generator) -> Tensor:
    """Square crops of an MRI scan of a head."""
    values = numpy.frombuffer(gzip.decompress(_sample("s1045.ima.gz").read_bytes()), ">u2").reshape(256, 256)
    return _cropped(count, Image.fromarray((values / values.max() * 255).astype("uint8")).convert("RGB"), generator)


def terrain(count: int, generator: torch.Generator) -> Tensor:
    """Square crops of an elevation map in one of matplotlib's colormaps."""
    heights = torch.from_numpy(numpy.load(_sample("jacksboro_fault_dem.npz"))["elevation"]).float()
    low, high = heights.aminmax()
    grey = Image.fromarray(((heights - low) / (high - low) * 255).byte().numpy()).convert("RGB")
    return _paint(_cropped(count, grey, generator)[:, 0] / 255, generator)


SOURCES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    source.__name__.replace("_", " "): source
    for source in (
        uniform_noise,
        gaussian_noise,
        clouds,
        constant_colours,
        gradients,
        checkerboards,
        stripes,
        fractals,
        shapes,
        text,
        digits,
        icons,
        presents,
        portrait,
        scan,
        terrain,
    )
}
"""Functions by name, each of which makes N pictures, uint8 (N, C, H, W)."""


def _bytes(values: Tensor) -> Tensor:
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _colours(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 3, 1, 1, generator=generator)


def _colour(generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (3,), generator=generator).tolist())


def _slope(count: int, generator: torch.Generator) -> Tensor:
    """A ramp from -1 to 1 across each picture (N, H, W), in any direction."""
    angle_N11 = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    axis_W = torch.linspace(-1, 1, IMAGE_SIZE)
    return (angle_N11.cos() * axis_W + angle_N11.sin() * axis_W[:, None]) / (
        angle_N11.cos().abs() + angle_N11.sin().abs()
    )


def _mix(share_NHW: Tensor, generator: torch.Generator) -> Tensor:
    """Two random colours per picture, mixed with this share of the second."""
    first, second = _colours(len(share_NHW), generator), _colours(len(share_NHW), generator)
    return first + (second - first) * share_NHW[:, None]


def _paint(values_NHW: Tensor, generator: torch.Generator) -> Tensor:
    """Values from 0 to 1 in a random colormap, uint8 (N, C, H, W)."""
    chosen = torch.randint(0, len(COLOURS), (len(values_NHW),), generator=generator).tolist()
    painted = [
        torch.from_numpy(matplotlib.colormaps[COLOURS[index]](values_HW.numpy())[..., :3]).permute(2, 0, 1)
        for index, values_HW in zip(chosen, values_NHW, strict=True)
    ]
    return _bytes(torch.stack(painted))


def _drawn(count: int, draw: Callable[[ImageDraw.ImageDraw], None], generator: torch.Generator) -> Tensor:
    """Drawings on a plain background."""
    pictures = []
    for _ in range(count):
        picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _colour(generator))
        draw(ImageDraw.Draw(picture))
        pictures.append(picture.tobytes())
    return to_tensor(pictures)


def _pasted(count: int, things: Sequence[Image.Image], generator: torch.Generator) -> Tensor:
    """In each picture, one of `things`, which have transparent surroundings, at a random size on a plain background."""
    pictures = []
    for _ in range(count):
        thing = things[int(_between(0, len(things), generator))]
        thing = thing.rotate(_between(-30, 30, generator), Image.Resampling.BICUBIC, expand=True)
        side = int(_between(16, 40, generator))
        thing = thing.resize((side, side), Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _colour(generator))
        corner = tuple((IMAGE_SIZE - side) // 2 + int(_between(-4, 5, generator)) for _ in range(2))
        picture.paste(thing, cast(tuple[int, int], corner), thing)
        pictures.append(picture.tobytes())
    return to_tensor(pictures)


def _cropped(count: int, picture: Image.Image, generator: torch.Generator) -> Tensor:
    """Square crops at random places, with sides from an eighth of the picture's shorter side to all of it."""
    width, height = picture.size
    pictures = []
    for _ in range(count):
        side = min(width, height) * _between(1 / 8, 1, generator)
        left, top = _between(0, width - side, generator), _between(0, height - side, generator)
        box = (left, top, left + side, top + side)
        pictures.append(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, box=box).tobytes())
    return to_tensor(pictures)


def _font(size: int, generator: torch.Generator) -> ImageFont.FreeTypeFont:
    name = FONTS[int(_between(0, len(FONTS), generator))]
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def _sample(name: str) -> Path:
    return Path(cast(Any, cbook.get_sample_data(name, asfileobj=False)))


def _read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGBA")

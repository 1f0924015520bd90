"""How much accuracy is left when pictures are less clean than CIFAR-10's: compressed, shifted, darkened, enlarged.

Common corruptions in the sense of Hendrycks and Dietterich (2019, arXiv:1903.12261), chosen by what happens to
pictures before they are posted. Each is a deterministic function from pixels to pixels, uint8 (N, 3, 32, 32).
Shape letters: N images, C = 3, H = W = 32.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from app import images
from app.checkpoint import Checkpoint
from app.data import Split
from training.evaluate import evaluate

Corruption = Callable[[Tensor], Tensor]
JPEG_QUALITIES = (90, 75, 50)
SHIFTS = (1, 2, 3, 4)
FACTORS = (0.5, 0.75, 1.25, 1.5)
ENLARGED = (256, 256)
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def jpeg(quality: int, pixels_NCHW: Tensor) -> Tensor:
    """After a round trip through a real encoder and decoder, with chroma at half resolution (4:2:0)."""
    return _each(pixels_NCHW, lambda picture: _encode(picture, "JPEG", quality=quality, subsampling="4:2:0"))


def shift(rows: int, columns: int, pixels_NCHW: Tensor) -> Tensor:
    """Moved down and to the right (up and to the left where negative); the border repeats the outermost pixels."""
    height, width = pixels_NCHW.shape[2:]
    from_H = (torch.arange(height) - rows).clamp(0, height - 1)
    from_W = (torch.arange(width) - columns).clamp(0, width - 1)
    return pixels_NCHW[:, :, from_H[:, None], from_W]


def brightness(factor: float, pixels_NCHW: Tensor) -> Tensor:
    """Each value times `factor`, rounded and clipped."""
    return _to_pixels(pixels_NCHW * factor)


def contrast(factor: float, pixels_NCHW: Tensor) -> Tensor:
    """Each value's distance from the mean grey of its picture times `factor`, rounded and clipped.

    Grey weighs the colours as in ITU-R BT.601.
    """
    luma_C = torch.tensor([0.299, 0.587, 0.114])
    grey_N = torch.einsum("c,nchw->nhw", luma_C, pixels_NCHW.float()).mean(dim=(1, 2))
    grey_N111 = grey_N[:, None, None, None]
    return _to_pixels(grey_N111 + factor * (pixels_NCHW - grey_N111))


def mirror(pixels_NCHW: Tensor) -> Tensor:
    """Left and right swapped."""
    return pixels_NCHW.flip(3)


def enlarge(pixels_NCHW: Tensor) -> Tensor:
    """Enlarged to 256x256 as a PNG, and read as if posted with `?resize=stretch`."""
    return _each(pixels_NCHW, lambda picture: _encode(picture.resize(ENLARGED, Image.Resampling.BICUBIC), "PNG"))


def corruptions() -> dict[str, list[Corruption]]:
    """The corruptions to measure, in the order of the table; several variants are averaged."""
    table: dict[str, list[Corruption]] = {"as they are": [lambda pixels_NCHW: pixels_NCHW]}
    table |= {f"JPEG quality {quality}": [partial(jpeg, quality)] for quality in JPEG_QUALITIES}
    for distance in SHIFTS:
        name = f"shifted by {distance} pixel{'s' * (distance > 1)}"
        table[name] = [partial(shift, distance * down, distance * right) for down, right in DIRECTIONS]
    table |= {f"brightness x {factor:g}": [partial(brightness, factor)] for factor in FACTORS}
    table |= {f"contrast x {factor:g}": [partial(contrast, factor)] for factor in FACTORS}
    return table | {"mirrored": [mirror], "enlarged to 256x256, posted with ?resize=stretch": [enlarge]}


def measure(checkpoint: Checkpoint, split: Split, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """One row for each corruption: `pictures`, `accuracy` in [0, 1], `fall` in percentage points from the first row.

    The first row is what `python -m training evaluate` reports.

    Raises:
        DataError: The classes of the images are not those of the checkpoint.
    """
    rows: list[dict[str, Any]] = []
    for name, variants in corruptions().items():
        right = 0
        for corrupt in variants:
            corrupted = replace(split, pixels_NCHW=corrupt(split.pixels_NCHW))
            right += int(evaluate(checkpoint, corrupted, device).confusion_KK.diagonal().sum())
        accuracy = right / (len(variants) * len(split))
        clean = rows[0]["accuracy"] if rows else accuracy
        rows.append({"pictures": name, "accuracy": accuracy, "fall": 100 * (clean - accuracy)})
    return rows


def format_robustness(result: dict[str, Any]) -> str:
    """The rows as a table, under a heading that says what was measured."""
    dataset, rows = result["dataset"], result["rows"]
    width = max(len(row["pictures"]) for row in rows)
    lines = [
        f"{dataset['name']}: {dataset['images']:,} images, sha256 {dataset['sha256'][:12]}",
        f"weights {result['weights']['sha256'][:12]}, trained on {result['weights']['trained_on']}",
        "",
        f"{'':{width}}  accuracy  fall in points",
    ]
    lines += [f"{row['pictures']:{width}}  {row['accuracy']:8.2%}  {row['fall']:14.2f}" for row in rows]
    return "\n".join(
        [*lines, "", "Shifts: mean over up, down, left and right; the border repeats the outermost pixels."]
    )


def _to_pixels(values_NCHW: Tensor) -> Tensor:
    return values_NCHW.round().clamp(0, 255).to(torch.uint8)


def _each(pixels_NCHW: Tensor, encode: Callable[[Image.Image], bytes]) -> Tensor:
    """Encode every image, and decode it with the service's own code."""
    pictures = (Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in pixels_NCHW.permute(0, 2, 3, 1).contiguous())
    return images.to_tensor(images.decode(encode(picture), "stretch") for picture in pictures)


def _encode(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()

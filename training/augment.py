"""Augmentation as batched tensor operations on the device, uint8 in, uint8 out.

All random choices for an epoch are drawn at once (`Draws`), from a generator that depends only on the seed and the
epoch: a resumed run, or one split over several processes, sees exactly the same pictures.
Shape letters: N images, C = 3, H = W = 32.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.model import IMAGE_SIZE
from training.config import Recipe

JPEG_QUALITY_RANGE = (50, 95)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What happens to each image of the training set in one epoch."""

    shift_N2: Tensor
    """Shift in rows and columns."""
    flip_N: Tensor
    """Whether to mirror."""
    jpeg_quality_N: Tensor
    """JPEG quality from 1 to 100, or 0 for no compression."""
    cutout_N2: Tensor
    """Upper-left corner of the grey square."""
    partner_N: Tensor
    """Index of the image that the patch is taken from."""
    patch_N2: Tensor
    """Upper-left corner of the patch."""
    patch_side_N: Tensor
    """Side of the patch, or 0 for none."""

    def patch_share(self, index_N: Tensor) -> Tensor:
        """The share (N,) of each of these pictures that comes from its partner."""
        return (self.patch_side_N[index_N] / IMAGE_SIZE) ** 2

    def to(self, device: torch.device) -> "Draws":
        return Draws(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """An epoch's only source of randomness."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


def draw(num_images: int, epoch: int, recipe: Recipe, generator: torch.Generator) -> Draws:
    """Draw an epoch's augmentation. Flips alternate: an image that is mirrored in one epoch is not in the next."""
    random_flip_N = torch.rand(num_images, generator=epoch_generator(recipe.seed, -1)) < 0.5
    shift_N2 = torch.randint(-recipe.shift, recipe.shift + 1, (num_images, 2), generator=generator)
    quality_N = torch.randint(JPEG_QUALITY_RANGE[0], JPEG_QUALITY_RANGE[1] + 1, (num_images,), generator=generator)
    compressed_N = torch.rand(num_images, generator=generator) < recipe.jpeg
    cutout_N2 = torch.randint(0, IMAGE_SIZE - recipe.cutout + 1, (num_images, 2), generator=generator)
    partner_N = torch.randperm(num_images, generator=generator)
    mixed_N = torch.rand(num_images, generator=generator) < recipe.cutmix
    # The patch's share of the area is uniformly distributed.
    side_N = (IMAGE_SIZE * torch.rand(num_images, generator=generator).sqrt()).round().long() * mixed_N
    patch_N2 = torch.rand(num_images, 2, generator=generator) * (IMAGE_SIZE + 1 - side_N[:, None])
    return Draws(
        shift_N2=shift_N2,
        flip_N=(random_flip_N ^ (epoch % 2 == 1)) & recipe.flip,
        jpeg_quality_N=quality_N * compressed_N,
        cutout_N2=cutout_N2,
        partner_N=partner_N,
        patch_N2=patch_N2.long(),
        patch_side_N=side_N,
    )


def augment(images_NCHW: Tensor, index_N: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    """The images at `index_N`, augmented as drawn: uint8 (N, 3, 32, 32)."""
    pixels_NCHW = shift_and_flip(images_NCHW, index_N, draws.shift_N2[index_N], draws.flip_N[index_N])
    if recipe.cutmix:
        chosen = draws.patch_side_N[index_N].nonzero()[:, 0]
        into_N = index_N[chosen]
        partners_NCHW = shift_and_flip(
            images_NCHW, draws.partner_N[into_N], draws.shift_N2[into_N], draws.flip_N[into_N]
        )
        inside_N1HW = _square(draws.patch_N2[into_N], draws.patch_side_N[into_N])
        pixels_NCHW[chosen] = torch.where(inside_N1HW, partners_NCHW, pixels_NCHW[chosen])
    if recipe.jpeg:
        quality_N = draws.jpeg_quality_N[index_N]
        chosen = quality_N.nonzero()[:, 0]
        pixels_NCHW[chosen] = simulate_jpeg(pixels_NCHW[chosen], quality_N[chosen])
    if recipe.cutout:
        corner_N2 = draws.cutout_N2[index_N]
        # Mid-grey is within a few percent of the mean colour.
        pixels_NCHW = pixels_NCHW.masked_fill(_square(corner_N2, torch.full_like(corner_N2[:, 0], recipe.cutout)), 128)
    return pixels_NCHW


def shrink(pixels_NCHW: Tensor, size: int) -> Tensor:
    """The pictures resized to `size` x `size`, in float."""
    return F.interpolate(pixels_NCHW.float(), size=(size, size), mode="bilinear", antialias=True)


def shift_and_flip(images_NCHW: Tensor, index_N: Tensor, shift_N2: Tensor, flip_N: Tensor) -> Tensor:
    """Select a batch, shift it with reflected borders and mirror it: pick whole rows first, then columns.

    Five times as fast on a CPU as one gather over all four dimensions, which looks up an address for each byte.
    """
    count, (channels, size) = len(index_N), images_NCHW.shape[1:3]
    axis = torch.arange(size, device=images_NCHW.device)
    rows_NH = _reflect(axis + shift_N2[:, :1], size)
    columns_NW = _reflect(torch.where(flip_N[:, None], size - 1 - axis, axis) + shift_N2[:, 1:], size)
    planes_NC = index_N[:, None] * channels + torch.arange(channels, device=images_NCHW.device)
    rows_NCH = planes_NC[:, :, None] * size + rows_NH[:, None]
    picked_NCHW = images_NCHW.reshape(-1, size)[rows_NCH.flatten()].view(count, channels, size, size)
    return picked_NCHW.gather(3, columns_NW[:, None, None].expand_as(picked_NCHW))


def _reflect(position: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _square(corner_N2: Tensor, side_N: Tensor) -> Tensor:
    """Which pixels (N, 1, H, W) lie in each image's square."""
    axis = torch.arange(IMAGE_SIZE, device=corner_N2.device)
    inside_N2S = (axis >= corner_N2[:, :, None]) & (axis < (corner_N2 + side_N[:, None])[:, :, None])
    return (inside_N2S[:, 0, :, None] & inside_N2S[:, 1, None, :])[:, None]


# JPEG (ITU-T T.81): the example quantisation tables in its annex K, scaled by quality as libjpeg does.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
           18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
             99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RGB -> YCbCr (3, 3), its inverse, the 8x8 cosine basis, and the two quantisation tables (2, 8, 8)."""
    to_ycc = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
    )
    frequency, position = torch.arange(8.0)[:, None], torch.arange(8.0)[None, :]
    basis = torch.cos((2 * position + 1) * frequency * torch.pi / 16) / 2
    basis[0] /= 2**0.5
    tables = torch.tensor([[float(x) for x in table.split()] for table in (_LUMA, _CHROMA)]).reshape(2, 8, 8)
    return to_ycc.float().to(device), to_ycc.inverse().float().to(device), basis.to(device), tables.to(device)


def simulate_jpeg(pixels_NCHW: Tensor, quality_N: Tensor) -> Tensor:
    """The pixels after a JPEG round trip at `quality_N` (1 to 100, 4:2:0 chroma): uint8 in, uint8 out.

    Entropy coding is lossless and therefore left out; chroma is averaged 2x2 and enlarged bilinearly, as libjpeg does.
    """
    to_ycc, to_rgb, basis, tables = _constants(pixels_NCHW.device)
    quality_N = quality_N.float()
    scale_N = torch.where(quality_N < 50, (5000 / quality_N).floor(), 200 - 2 * quality_N)
    tables_2NHW = ((tables[:, None] * scale_N[:, None, None] + 50) / 100).floor().clamp(1, 255)

    ycc_NCHW = torch.einsum("dc,nchw->ndhw", to_ycc, pixels_NCHW.float())
    luma_NCHW = _quantize(ycc_NCHW[:, :1] - 128, tables_2NHW[0], basis) + 128
    half_NCHW = F.avg_pool2d(ycc_NCHW[:, 1:], 2)
    chroma_NCHW = F.interpolate(_quantize(half_NCHW, tables_2NHW[1], basis), scale_factor=2.0, mode="bilinear")
    rgb_NCHW = torch.einsum("dc,nchw->ndhw", to_rgb, torch.cat([luma_NCHW, chroma_NCHW], dim=1))
    return rgb_NCHW.round_().clamp_(0, 255).to(torch.uint8)


def _quantize(plane_NCHW: Tensor, table_N88: Tensor, basis: Tensor) -> Tensor:
    """Cosine-transform each 8x8 block, round to multiples of the table, and transform back."""
    n, c, h, w = plane_NCHW.shape
    blocks = plane_NCHW.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)  # (N, C, H/8, W/8, 8, 8)
    table = table_N88[:, None, None, None]
    coefficients = ((basis @ blocks @ basis.T) / table).round_() * table
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(n, c, h, w)

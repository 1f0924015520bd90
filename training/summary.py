"""A network layer by layer, with counts taken as one image passes through it.

Shape letters: N = 1 image, C = 3, H = W = 32.
"""

import copy
import io
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from app.model import IMAGE_SIZE


@dataclass(frozen=True)
class Layer:
    """One call of one module."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    """Shape for one image, without the batch dimension."""
    parameters: int
    multiply_adds: int


def layers(network: nn.Module) -> list[Layer]:
    """The innermost modules in the order they run; one that runs twice is listed twice, its parameters once.

    Multiply-adds are those of convolutions and linear layers. The rest (normalisation, activations, pooling) is not
    counted, as is usual: it takes a few operations per value where a convolution takes hundreds.
    """
    network = copy.deepcopy(network).cpu().eval()
    rows: list[Layer] = []
    seen: set[str] = set()

    def record(name: str, module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = 0 if name in seen else sum(parameter.numel() for parameter in module.parameters())
        seen.add(name)
        rows.append(
            Layer(name, type(module).__name__, tuple(output.shape[1:]), parameters, _multiply_adds(module, output))
        )

    for name, module in network.named_modules():
        if not any(module.children()):
            module.register_forward_hook(partial(record, name))
    with torch.inference_mode():
        network(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return rows


def _multiply_adds(module: nn.Module, output: Tensor) -> int:
    """Each output value of a convolution or a linear layer is one dot product with the weights of its channel."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        return output.numel() * module.weight[0].numel()
    return 0


def summarize(network: nn.Module) -> str:
    """A table: output shape, parameters and multiply-adds of each layer for one image; totals; the size of the file."""
    rows = layers(network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    table = [("layer", "type", "output", "parameters", "multiply-adds")]
    table += [
        (
            row.name,
            row.kind,
            " x ".join(map(str, row.output_shape)),
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.multiply_adds:,}" if row.multiply_adds else "",
        )
        for row in rows
    ]
    table.append(("total", "", "", f"{parameters:,}", f"{sum(row.multiply_adds for row in rows):,}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(cells, widths) for cells in table]
    rule = "-" * max(map(len, lines))
    return "\n".join(
        [
            f"{type(network).__name__}, one image of 3 x {IMAGE_SIZE} x {IMAGE_SIZE}",
            "",
            lines[0],
            rule,
            *lines[1:-1],
            rule,
            lines[-1],
            "",
            f"Its state_dict has {file.tell():,} bytes as a file. Multiply-adds are those of convolutions and linear "
            "layers.",
        ]
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """One row: names aligned left, numbers right."""
    aligned = [f"{cell:<{width}}" for cell, width in zip(cells[:3], widths[:3], strict=True)]
    aligned += [f"{cell:>{width}}" for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join(aligned).rstrip()

"""A network's answers for a set of images, the figures computed from them, and a table of those.

Shape letters: N images, C = 3, H = W = 32, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from app.calibration import UNCALIBRATED, Calibration
from app.checkpoint import Checkpoint
from app.data import Split
from app.device import choose_memory_format
from app.report import Evaluation, negative_log_likelihood

BATCH_SIZE = 250
MOST_NUMBERED_CLASSES = 30
"""Most classes for which a confusion matrix shows counts; more are too many to read: its picture keeps the colours."""


@torch.inference_mode()
def forward(
    network: nn.Module,
    pixels_NCHW: Tensor,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The output of a network for uint8 pixels (N, C, H, W): logits (N, K), or features; float32, on the CPU.

    Args:
        network: In evaluation mode; it is moved to `device`.
        batch_size: Images at a time; need not divide their number. It affects answers only through rounding.
    """
    assert not network.training, "dropout and batch norm would make an image's answer depend on its batch"
    network.to(device)
    memory_format = choose_memory_format(torch.device(device))
    # By default NVIDIA's convolutions round float32 to 10 bits (TF32), and may differ from run to run.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        parts = [
            network(part_NCHW.to(device, memory_format=memory_format))
            for part_NCHW in torch.split(pixels_NCHW, batch_size)
        ]
    return torch.cat(parts).cpu()


def predict(
    network: nn.Module,
    pixels_NCHW: Tensor,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    calibration: Calibration = UNCALIBRATED,
) -> Tensor:
    """Probabilities (N, K), float32 on the CPU, for uint8 pixels (N, C, H, W). Arguments as for `forward`."""
    return calibration.probabilities(forward(network, pixels_NCHW, batch_size, device))


def evaluate(
    checkpoint: Checkpoint, split: Split, device: torch.device | str = "cpu", batch_size: int = BATCH_SIZE
) -> Evaluation:
    """The figures of a checkpoint on a set of images, computed in float32 so that they can be reproduced.

    Raises:
        DataError: The classes of the images are not those of the checkpoint.
    """
    split = split.labelled_for(checkpoint.classes)
    logits_NK = forward(checkpoint.network(), split.pixels_NCHW, batch_size, device).double()
    return checkpoint.evaluate(logits_NK, split.labels_N, dataset=split.name, digest=split.digest)


def validate(network: nn.Module, held_out: Split, device: torch.device) -> dict[str, float]:
    """Loss, in nats, and accuracy, in [0, 1], of a network on held-out images; leaves it in evaluation mode."""
    probabilities_NK = predict(network.eval(), held_out.pixels_NCHW, device=device).double()
    right_N = probabilities_NK.argmax(dim=1) == held_out.labels_N
    return {
        "validation_loss": negative_log_likelihood(probabilities_NK, held_out.labels_N),
        "validation_accuracy": right_N.double().mean().item(),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report (`app.report.report`) as text: overall, per class, confusion (if classes are few), calibration."""
    dataset, calibration, rows = report["dataset"], report["calibration"], report["classes"]
    plain = calibration["uncalibrated"]
    width = max(len("class"), *(len(row["label"]) for row in rows))
    lines = [
        f"{dataset['name']}: {dataset['images']:,} images, sha256 {dataset['sha256'][:12]}",
        *_weights(report.get("weights")),
        f"accuracy {_percent(report['accuracy'])}  ({report['correct']:,} of {dataset['images']:,}; "
        f"95 % Wilson interval {_interval(report['interval'])})",
        "",
        f"{'class':{width}}  correct  total  accuracy  precision      F1  95 % interval of accuracy",
    ]
    lines += [
        f"{row['label']:{width}}  {row['correct']:7,}  {row['support']:5,}  {_percent(row['accuracy']):>8}  "
        f"{_percent(row['precision']):>9}  {row['f1']:6.4f}  {_interval(row['interval'])}"
        for row in rows
    ]
    if len(rows) <= MOST_NUMBERED_CLASSES:
        cell = max(5, *(len(row["label"]) + 1 for row in rows), *(len(f"{row['support']:,}") + 1 for row in rows))
        lines += ["", "confusion (row: true class, column: predicted class)"]
        lines.append(" " * width + "".join(f"{row['label']:>{cell}}" for row in rows))
        for row, counts in zip(rows, report["confusion"], strict=True):
            lines.append(f"{row['label']:{width}}" + "".join(f"{count:{cell},}" for count in counts))
    lines += [
        "",
        f"negative log likelihood     {calibration['nll']:.4f} nats",
        f"Brier score                 {calibration['brier']:.4f} (0 to 2)",
        f"expected calibration error  {calibration['ece']:.4f} ({calibration['ece_estimator']})",
        f"the three before calibration  {plain['nll']:.4f}, {plain['brier']:.4f}, {plain['ece']:.4f}",
    ]
    if (sets := report["prediction_sets"]) is not None:
        lines.append(
            f"prediction sets             {_percent(sets['coverage'])} hold the true class (target "
            f"{sets['target']:.0%}), {sets['mean_size']:.3f} classes on average"
        )
    return "\n".join(lines)


def _weights(weights: dict[str, str] | None) -> list[str]:
    if weights is None:  # just trained
        return []
    return [f"{weights['file']}: sha256 {weights['sha256'][:12]}, trained on {weights['trained_on']}"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"

"""Muon: momentum whose update of a matrix is replaced by the nearest semi-orthogonal matrix.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the form for convolutions follows
K. Jordan's CIFAR-10 speed runs. torch.optim.Muon takes matrices only, and its decay does not fix the norm.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from app.device import choose_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Bring all singular values of a matrix near 1, by a quintic Newton-Schulz iteration in `dtype`.

    The coefficients trade accuracy for speed: the values end between about 0.7 and 1.2, which is enough here.
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix.to(dtype)
    if tall := x.size(0) > x.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):  # x <- a x + (b g + c g g) x, where g = x x'
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """The optimizer for the weights of hidden layers, convolutional and linear.

    Each step first resets the norm of a weight to sqrt(outputs), which makes the learning rate a rotation rate. Where a
    batch norm follows, the scale of a weight has no effect on the output anyway; elsewhere the last layer, which has
    another optimizer, can make up for it, because ReLU passes a scale on.
    """

    def __init__(
        self, parameters: ParamsT, learning_rate: float | Tensor = 0.0, momentum: float = 0.6, steps: int = 5
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "momentum": momentum})
        self._steps = steps
        # Emulated bfloat16 takes thirty times as long as float32: longer than the rest of a step.
        self._dtype = choose_dtype(self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure, which nobody passes
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                buffer = state["momentum"]
                buffer.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(buffer, alpha=group["momentum"])
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                turn = orthogonalize(update.flatten(1), self._steps, self._dtype).view_as(weight)
                weight.sub_(turn * group["lr"])

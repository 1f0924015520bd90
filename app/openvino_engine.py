"""The network in OpenVINO, an optional dependency: import this file only where that may fail.

The graph is built node by node from the traced network: that takes a fifth of a second, against two seconds for
torch.export and OpenVINO's converter.

Shape letters: N images, C = 3, H = W = 32, D features.
"""

import operator
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from app.model import IMAGE_SIZE

# Importing OpenVINO imports its converter, which is not needed here, reports to Google Analytics, writes to the user's
# home, and forks this process with all its sockets to do so. Marking it as a missing module leaves it out.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]

import openvino  # noqa: E402
from openvino import opset13 as ops  # noqa: E402

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: ops.add,
    operator.sub: ops.subtract,
    operator.mul: ops.multiply,
    torch.cat: lambda parts, dim: ops.concat(parts, dim),
    F.relu: lambda x, **_: ops.relu(x),
    F.gelu: lambda x: ops.gelu(x, "erf"),
    F.max_pool2d: lambda x, size, **_: _max_pool(x, size),
    torch.flatten: lambda x, start: ops.reshape(x, [0] * start + [-1], special_zero=True),
}


def trace(network: nn.Module) -> fx.GraphModule:
    """Record the network's steps. Meanwhile no thread may call any network: tracing patches nn.Module globally."""
    return fx.symbolic_trace(network)


class OpenVinoEngine:
    """The network on the CPU."""

    name = "openvino"

    def __init__(self, network: fx.GraphModule, dtype: torch.dtype, threads: int) -> None:
        """Translate and compile a traced network, in any thread."""
        self.dtype = dtype
        pixels_NHWC = ops.parameter([-1, IMAGE_SIZE, IMAGE_SIZE, 3], openvino.Type.u8)
        pixels_NCHW = ops.convert(ops.transpose(pixels_NHWC, [0, 3, 1, 2]), openvino.Type.f32)
        features_ND = _Translator(network).run(pixels_NCHW)
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # two processes would choose the same cores
        }
        model = openvino.Model([features_ND], [pixels_NHWC])
        self._request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        pixels_NHWC = pixels_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(self._request.infer({0: pixels_NHWC}, share_inputs=True)[0])


class _Translator(fx.Interpreter):
    """Runs a network on graph nodes instead of tensors. Whatever depends on weights alone is computed right away."""

    @torch.no_grad()
    def call_module(self, target: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        (x,), layer = args, self.fetch_attr(target)
        match layer:
            case nn.Conv2d(weight=weight, bias=Tensor() as bias, stride=stride, padding=padding, dilation=dilation):
                x = ops.convolution(x, weight.contiguous().numpy(), stride, padding, padding, dilation)
                return ops.add(x, bias[:, None, None].numpy())
            case nn.MaxPool2d():
                return _max_pool(x, cast(int, layer.kernel_size))
            case nn.Linear():
                x = ops.matmul(x, layer.weight.numpy(), False, True)
                return x if layer.bias is None else ops.add(x, layer.bias.numpy())
            case nn.Identity():
                return x
        raise TypeError(f"{layer} has no translation")

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return FUNCTIONS[target](*map(_operand, args), **kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        match target:
            case "amax":
                return ops.reduce_max(args[0], kwargs["dim"], keep_dims=False)
            case "float":  # the graph's inputs and outputs already are
                return args[0]
        raise TypeError(f"{target} has no translation")


def _operand(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy()
    return ops.constant(value, openvino.Type.f32) if isinstance(value, float) else value


def _max_pool(x: Any, side: int) -> Any:
    """The maximum; a convolution's bias moves behind it, which gives the same result.

    In float32 OpenVINO moves whatever follows the maximum into the convolution before it: right for increasing
    functions, but not for GELU, which decreases below -0.75. An addition stays in place, and so does what follows it.
    """
    if (parent := x.get_node() if isinstance(x, openvino.Output) else x).get_type_name() == "Add":
        convolved, bias = parent.input_values()
        if convolved.get_node().get_type_name() == "Convolution":
            return ops.add(_max_pool(convolved, side), bias)
    return ops.max_pool(x, [side] * 2, [1, 1], [0] * 2, [0] * 2, [side] * 2).output(0)

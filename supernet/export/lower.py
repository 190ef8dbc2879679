"""What each operator of a traced torch network becomes in a deployed one.

A function here has the signature of the torch function it stands for, with names in place of tensors, so that
positional and keyword arguments, defaults and modules all arrive in one form.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from supernet.export import lower_tokens as tokens
from supernet.export.graph import Op
from supernet.export.operators import (
    POINTWISE,
    Add,
    AveragePool,
    Concat,
    GlobalAverage,
    MaxPool,
    Pad,
    Pointwise,
    Quantize,
    Reshape,
    Slice,
)
from supernet.quant.quantizer import Quantizer

BATCH = 2
"""Shapes are traced with two images, so that an operator which mixes images shows."""


@dataclass(frozen=True)
class At:
    """Where an operator stands: its name and the shapes of its first input and its output, batch included."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


Pair = int | Sequence[int]


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _add(at: At, x: str, other: Any, *, alpha: float = 1) -> list[Op]:
    if not isinstance(other, str) or not isinstance(x, str):
        return tokens.shifted(at, x, other, alpha)
    if alpha != 1:
        raise ValueError(f"{at.name} adds {alpha} times a tensor; only plain sums of two tensors are exported")
    return [Add(at.name, (x, other))]


def _mul(at: At, x: str, other: Any) -> list[Op]:
    if not isinstance(other, str) or not isinstance(x, str):
        return tokens.scaled(at, x, other)
    return [Pointwise(at.name, (x, other), "mul")]


def _concat(at: At, tensors: Sequence[Any], dim: int = 0) -> list[Op]:
    axis = dim % len(at.after)
    if axis == 0:
        raise ValueError(f"{at.name} joins along the batch; only joins along other axes are exported")
    if not all(isinstance(tensor, str) for tensor in tensors):
        return tokens.joined(at, tensors, axis)
    return [Concat(at.name, tensors, axis)]


def _max_pool(
    at: At,
    x: str,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> list[Op]:
    return [
        MaxPool(
            at.name, [x], _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation), ceil_mode
        )
    ]


def _avg_pool(
    at: At,
    x: str,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> list[Op]:
    if divisor_override is not None:
        raise ValueError(
            f"{at.name} divides by {divisor_override}; average pooling is exported with its own divisor only"
        )
    return [
        AveragePool(
            at.name, [x], _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), ceil_mode, count_include_pad
        )
    ]


def _adaptive_avg_pool(at: At, x: str, output_size: Any) -> list[Op]:
    height, width = at.before[2:]
    if at.after[2:] == (1, 1):
        return [GlobalAverage(at.name, [x])]
    if height % at.after[2] or width % at.after[3]:
        raise ValueError(
            f"{at.name} pools {height}x{width} to {at.after[2]}x{at.after[3]}; adaptive pooling is exported where its "
            "windows are of one size"
        )
    kernel = (height // at.after[2], width // at.after[3])
    return [AveragePool(at.name, [x], kernel, kernel, (0, 0), False, True)]


def _mean(at: At, x: str, dim: Any = None, keepdim: bool = False) -> list[Op]:
    dims = sorted(d % len(at.before) for d in ([dim] if isinstance(dim, int) else dim or ()))
    if len(at.before) == tokens.AXES and dims:
        return tokens.mean_of_tokens(at, x, dims, keepdim)
    if dims != [2, 3] or len(at.before) != 4:
        raise ValueError(
            f"{at.name} takes a mean over axes {dims or 'all'}; only the mean over height and width (2, 3) is exported"
        )
    return (
        [GlobalAverage(at.name, [x])]
        if keepdim
        else [GlobalAverage(f"{at.name}.mean", [x]), Reshape(at.name, [f"{at.name}.mean"], at.after[1:])]
    )


def _reshape(at: At, x: str, *_sizes: Any, **_named: Any) -> list[Op]:
    if at.after[0] != at.before[0]:
        raise ValueError(
            f"{at.name} mixes images: {at.before} becomes {at.after}; only shapes that keep the batch are exported"
        )
    return [Reshape(at.name, [x], at.after[1:])]


def _slice(at: At, x: str, index: Any) -> list[Op]:
    index = index if isinstance(index, tuple) else (index,)
    if any(type(i) is int for i in index):
        parts = tuple(slice(i, i + 1 or None) if type(i) is int else i for i in index)
        part = f"{at.name}.part"
        return [*_slice(At(part, at.before, at.before), x, parts), Reshape(at.name, [part], at.after[1:])]
    if not all(
        isinstance(i, slice) and all(v is None or isinstance(v, int) for v in (i.start, i.stop, i.step)) for i in index
    ):
        raise ValueError(f"{at.name} indexes with {index}; only slices with constant bounds are exported")
    cut = [
        (axis, i.start or 0, i.stop, i.step or 1)
        for axis, i in enumerate(index)
        if i not in (slice(None), slice(None, None, 1))
    ]
    if any(axis == 0 for axis, *_ in cut):
        raise ValueError(f"{at.name} takes a part of the batch; only slices along other axes are exported")
    return [Slice(at.name, [x], cut)]


def _pad(at: At, x: str, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> list[Op]:
    if mode != "constant" or value or min(pad) < 0:
        raise ValueError(
            f"{at.name} pads with mode={mode}, value={value}, widths {tuple(pad)}; only zeros around a tensor are "
            "exported"
        )
    return [Pad(at.name, [x], [*pad, *[0] * (2 * len(at.before) - len(pad))])]


def _pointwise(function: str) -> Callable[..., list[Op]]:
    def make(at: At, x: str, *_options: Any, **_named: Any) -> list[Op]:
        return [Pointwise(at.name, [x], function)]

    return make


def _gelu(at: At, x: str, approximate: str = "none") -> list[Op]:
    if approximate != "none":
        raise ValueError(f"{at.name} is GELU approximated by {approximate}; only the exact one is exported")
    return [Pointwise(at.name, [x], "gelu")]


FUNCTIONS: dict[Any, Callable[..., list[Op]]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    operator.mul: _mul,
    operator.imul: _mul,
    torch.mul: _mul,
    torch.cat: _concat,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_avg_pool,
    torch.mean: _mean,
    torch.flatten: _reshape,
    torch.reshape: _reshape,
    operator.getitem: _slice,
    F.pad: _pad,
    F.relu: _pointwise("relu"),
    torch.relu: _pointwise("relu"),
    torch.relu_: _pointwise("relu"),
    F.relu6: _pointwise("relu6"),
    F.sigmoid: _pointwise("sigmoid"),
    torch.sigmoid: _pointwise("sigmoid"),
    torch.tanh: _pointwise("tanh"),
    F.silu: _pointwise("silu"),
    F.hardswish: _pointwise("hardswish"),
    F.hardsigmoid: _pointwise("hardsigmoid"),
    F.gelu: _gelu,
    **tokens.FUNCTIONS,
}
METHODS: dict[str, Callable[..., list[Op]]] = {
    "add": _add,
    "add_": _add,
    "mul": _mul,
    "mul_": _mul,
    "mean": _mean,
    "flatten": _reshape,
    "view": _reshape,
    "reshape": _reshape,
    "relu": _pointwise("relu"),
    "relu_": _pointwise("relu"),
    "sigmoid": _pointwise("sigmoid"),
    "tanh": _pointwise("tanh"),
    **tokens.METHODS,
}
MODULES: dict[type[nn.Module], Callable[[At, str, Any], list[Op]]] = {
    nn.MaxPool2d: lambda at, x, m: _max_pool(at, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode),
    nn.AvgPool2d: lambda at, x, m: _avg_pool(
        at, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda at, x, m: _adaptive_avg_pool(at, x, m.output_size),
    nn.Flatten: lambda at, x, m: _reshape(at, x),
    nn.ZeroPad2d: lambda at, x, m: _pad(at, x, m.padding),
    nn.ReLU: lambda at, x, m: [Pointwise(at.name, [x], "relu")],
    nn.ReLU6: lambda at, x, m: [Pointwise(at.name, [x], "relu6")],
    nn.Sigmoid: lambda at, x, m: [Pointwise(at.name, [x], "sigmoid")],
    nn.Tanh: lambda at, x, m: [Pointwise(at.name, [x], "tanh")],
    nn.SiLU: lambda at, x, m: [Pointwise(at.name, [x], "silu")],
    nn.Hardswish: lambda at, x, m: [Pointwise(at.name, [x], "hardswish")],
    nn.Hardsigmoid: lambda at, x, m: [Pointwise(at.name, [x], "hardsigmoid")],
    nn.GELU: lambda at, x, m: _gelu(at, x, m.approximate),
    Quantizer: lambda at, x, m: [Quantize(at.name, [x])],
    **tokens.MODULES,
}
FREE = (nn.Identity, nn.modules.dropout._DropoutNd)
FREE_METHODS = ("contiguous", "detach", "clone")
MOVES = (_max_pool, _reshape, _slice, _pad, *tokens.MOVES)


def is_free(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node does nothing in evaluation."""
    if module is not None:
        return isinstance(module, FREE)
    if node.op == "call_function":
        return node.target is F.dropout and not node.kwargs.get("training", True)
    return node.op == "call_method" and node.target in FREE_METHODS


def is_move(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node's operator only moves values (`graph.Move`)."""
    if module is not None:
        return isinstance(module, nn.MaxPool2d | nn.Flatten | nn.ZeroPad2d)
    return _handler(node) in MOVES


def activation_of(node: fx.Node, module: nn.Module | None) -> str | None:
    """Name of the pointwise function that the node computes, if it is one."""
    if module is not None:
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(module))
    known = {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", "relu": "relu", "relu_": "relu"}
    return known.get(node.target) if node.op in ("call_function", "call_method") else None


def _handler(node: fx.Node) -> Callable[..., list[Op]] | None:
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def lower(node: fx.Node, module: nn.Module | None, at: At, names: dict[fx.Node, str | Tensor]) -> list[Op]:
    """The operators that stand for one node of the traced network (two where one operator is not enough).

    Args:
        node: of the traced graph.
        module: what it calls, if it calls a module.
        at: its name and shapes.
        names: tensor name of each node before it; the tensor itself where it is a constant.

    Raises:
        ValueError: an operator, or a use of one, that the exporter does not know; names the node.
    """
    args: Any = fx.node.map_arg(node.args, lambda n: names.get(n, n))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: names.get(n, n))
    kwargs = {("x" if key in ("input", "self") else key): value for key, value in kwargs.items()}
    if module is not None and type(module) in MODULES:
        return MODULES[type(module)](at, args[0], module)
    handler = _handler(node)
    if handler is None:
        what = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
        raise ValueError(
            f"{at.name} is {what}, which the exporter does not know; it knows convolutions, linear layers, sums, "
            f"joins, pooling, reshapes, transposes, slices, padding with zeros, attention of timm's Attention, "
            f"layer_norm, softmax and {', '.join(POINTWISE)}"
        )
    return handler(at, *args, **kwargs)


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the node's tensor with two images; None where it is no tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else None

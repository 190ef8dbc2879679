"""What the operators of transformers become: the tables of `supernet.export.lower`, continued.

A constant arrives as a tensor where a function of torch takes one; everything else as there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.export.graph import Op
from supernet.export.operators import Pad
from supernet.export.operators_tokens import LayerNorm, Mean, Scale, Shift, Softmax, Transpose

if TYPE_CHECKING:
    from supernet.export.lower import At


AXES = 3
"""Of a tensor of tokens: images, tokens, channels."""


def constant(at: At, value: Any) -> Tensor:
    """A number or a constant as a tensor that broadcasts against one image: of a batch of copies, one is kept.

    Raises:
        ValueError: it differs between images.
    """
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if tensor.dim() == len(at.after) and len(tensor) > 1:
        if not bool((tensor == tensor[:1]).all()):
            raise ValueError(f"{at.name} has a constant of its own for each image; only one for all is exported")
        return tensor[:1]
    return tensor


def shifted(at: At, x: Any, other: Any, alpha: float = 1) -> list[Op]:
    """x + other, one of which is a constant."""
    name, value = (x, other) if isinstance(x, str) else (other, x)
    return [Shift(at.name, [name], constant(at, value) * (alpha if name is x else 1))]


def scaled(at: At, x: Any, other: Any) -> list[Op]:
    """x * other, one of which is a constant."""
    name, value = (x, other) if isinstance(x, str) else (other, x)
    return [Scale(at.name, [name], constant(at, value))]


def _divided(at: At, x: Any, other: Any) -> list[Op]:
    if not isinstance(x, str) or isinstance(other, str):
        raise ValueError(f"{at.name} divides by a tensor; only division by a constant is exported")
    return [Scale(at.name, [x], 1 / constant(at, other))]


def joined(at: At, tensors: Sequence[Any], axis: int) -> list[Op]:
    """Constants (class tokens) before and behind one tensor: zeros around it, then the constants added.

    x + 0 and 0 + c are exact, no batch of copies is needed, and zeros can be put around codes.
    """
    places = [k for k, tensor in enumerate(tensors) if isinstance(tensor, str)]
    if len(places) != 1:
        raise ValueError(f"{at.name} joins constants with {len(places)} tensors; one tensor and constants are exported")
    before, behind = ([constant(at, t) for t in part] for part in (tensors[: places[0]], tensors[places[0] + 1 :]))
    widths = [sum(t.shape[axis] for t in part) for part in (before, behind)]
    shape = [1, *at.after[1:]]
    shape[axis] -= sum(widths)
    parts = [t.expand(1, *t.shape[1:]) for t in (*before, torch.zeros(shape), *behind)]
    around = [0] * (2 * len(shape))
    last = 2 * (len(shape) - 1 - axis)  # torch names the last axis first
    around[last : last + 2] = widths
    name = f"{at.name}.room"
    return [Pad(name, [tensors[places[0]]], around), Shift(at.name, [name], torch.cat(parts, axis))]


def mean_of_tokens(at: At, x: str, axes: Sequence[int], keep: bool) -> list[Op]:
    """Mean over tokens or channels of [n, t, c]."""
    if 0 in axes:
        raise ValueError(f"{at.name} takes a mean over the batch; only means over other axes are exported")
    return [Mean(at.name, [x], axes, keep)]


def _layer_norm(
    at: At,
    x: str,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_rest: Any,
) -> list[Op]:
    shape = tuple(int(n) for n in normalized_shape)
    gain = torch.ones(shape) if weight is None else weight
    return [LayerNorm(at.name, [x], gain, torch.zeros(shape) if bias is None else bias, eps)]


def _softmax(at: At, x: str, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> list[Op]:
    axis = len(at.after) if dim is None else dim % len(at.after)
    if dtype is not None or not 0 < axis < len(at.after):
        raise ValueError(f"{at.name} is a softmax with dim={dim}, dtype={dtype}; only one along an axis is exported")
    return [Softmax(at.name, [x], axis)]


def transpose(at: At, x: str, dim0: int, dim1: int) -> list[Op]:
    """Two axes change places."""
    order = list(range(len(at.before)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(at, x, order)


def permute(at: At, x: str, *dims: Any) -> list[Op]:
    """Axes in another order."""
    given = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    order = [d % len(at.before) for d in given]
    if order[0] != 0:
        raise ValueError(f"{at.name} moves the batch to axis {order.index(0)}; it must stay first to be exported")
    return [Transpose(at.name, [x], order)]


FUNCTIONS: dict[Any, Callable[..., list[Op]]] = {
    operator.truediv: _divided,
    torch.div: _divided,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    torch.transpose: transpose,
    torch.permute: permute,
}
METHODS: dict[str, Callable[..., list[Op]]] = {
    "div": _divided,
    "softmax": _softmax,
    "transpose": transpose,
    "permute": permute,
}
MODULES: dict[type[nn.Module], Callable[[Any, str, Any], list[Op]]] = {
    nn.LayerNorm: lambda at, x, m: _layer_norm(at, x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.Softmax: lambda at, x, m: _softmax(at, x, m.dim),
}
MOVES: tuple[Callable[..., list[Op]], ...] = (transpose, permute)

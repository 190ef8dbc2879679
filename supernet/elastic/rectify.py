"""ReLU at the end of a compiled region, with a backward that reads its result.

A compiler keeps for the backward whichever is smaller, the result or one byte for each element that says where it is
positive. Where the result leaves the region it is in memory anyway, and its C++ kernels write and read such bytes one
at a time: more than the rest of what ends a block takes (`benchmarks/step_time.py`, ours.depth.regional.no_sites).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from supernet.quant.ste import STEEP


class Rectify(torch.autograd.Function):
    """max(x, 0) [...]; the gradient passes where the result is positive, by a factor rather than a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.relu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return (grad * torch.clamp_max(out.to(torch.float32) * STEEP, 1)).to(grad.dtype)


def rectify(x: Tensor) -> Tensor:
    """`torch.relu` by `Rectify`."""
    out: Tensor = Rectify.apply(x)
    return out


def rectifies(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node of a traced network is a ReLU, in whichever way it was written, of a tensor nothing else reads.

    Args:
        module: what the node calls, if it calls a module.
    """
    if node.op == "call_module":
        found = isinstance(module, nn.ReLU)
    elif node.op == "call_method":
        found = node.target in ("relu", "relu_")
    else:
        found = node.target in (F.relu, torch.relu, torch.relu_)
    return found and len(node.all_input_nodes[0].users) == 1  # or one in place would be seen elsewhere

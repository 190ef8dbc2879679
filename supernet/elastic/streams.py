"""Which tensors of a traced network stay real numbers, so that no site is put on them.

A site pays where an integer kernel reads or writes the tensor. Normalisation of tokens, softmax and what surrounds them
have float kernels only, and integer products of tokens write real numbers as readily as codes. So the residual stream
of a transformer is a float stream: a site on it would add two conversions and an error, and no integer kernel.

| tensor                                                   | real, because                                  |
|----------------------------------------------------------|------------------------------------------------|
| made by layer normalisation or softmax                   | there is no integer kernel                     |
| made by a linear layer on tokens, or by a product        | its kernel writes real numbers too             |
| made of a real one by anything but a layer               | one float operand makes the operator float     |
| read by such operators only, and not made by a layer     | the same, seen from the other side             |

A convolution has an integer kernel only if its outcome is quantized; its site stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn

from supernet.elastic.attention import QuantMatMul
from supernet.elastic.layers import QuantLayer, QuantLinear
from supernet.elastic.stage import Stage

FLOAT_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.Softmax, QuantMatMul)
FLOAT_CALLS = (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.softmax, torch.softmax)
FLOAT_CALLS_FUSED = (F.scaled_dot_product_attention,)
FLOAT_METHODS = ("softmax",)
TOKENS = 3
"""A linear layer whose outcome has this many axes or more works on tokens."""


def real(
    graph: fx.Graph,
    module: Callable[[fx.Node], nn.Module | None],
    ranks: Mapping[fx.Node, int | None],
    consumers: Callable[[fx.Node], list[fx.Node]],
    ends: Callable[[fx.Node], bool],
    streams: set[fx.Node],
) -> set[fx.Node]:
    """The nodes whose tensors stay real; see the head of this file.

    Args:
        graph: traced, with quantized layers as single nodes.
        module: what a node calls, if it calls a module.
        ranks: number of axes of every node that depends on the input; None for several tensors at once.
        consumers: nodes that use a tensor's values.
        ends: whether a node is the last of a layer: the layer, or normalisation or activation behind it.
        streams: nodes that are known to be real.
    """
    found = {node for node in ranks if node in streams or _makes(node, module(node), ranks[node])}
    for node in graph.nodes:
        layer = isinstance(module(node), QuantLayer | Stage)
        if node in ranks and not layer and any(source in found for source in node.all_input_nodes):
            found.add(node)
    for node in reversed(graph.nodes):
        readers = consumers(node) if node in ranks and not ends(node) else []
        if readers and all(reader in found for reader in readers):
            found.add(node)
    return found


def _makes(node: fx.Node, module: nn.Module | None, rank: int | None) -> bool:
    """Whether the node makes real numbers, whatever it reads."""
    if module is not None:
        tokens = isinstance(module, QuantLinear) and rank is not None and rank >= TOKENS
        return tokens or isinstance(module, FLOAT_MODULES)
    if node.op == "call_function":
        return node.target in FLOAT_CALLS or node.target in FLOAT_CALLS_FUSED
    return node.op == "call_method" and node.target in FLOAT_METHODS

"""A traced graph before its nodes are looked at: constants found, and tuples of tensors taken apart."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

DIMENSION = {"chunk": 2, "split": 2, "unbind": 1}
"""Where each of these takes the axis."""
SPLITS = {torch.chunk: "chunk", torch.split: "split", torch.unbind: "unbind"}


class Shapes(ShapeProp):
    """Notes the shape of every tensor.

    Attributes:
        constants: tensors that do not depend on the input: parameters, and what is computed of them and of sizes.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.constants: dict[fx.Node, Tensor] = {}
        self._live: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and classify what it gives."""
        out = super().run_node(n)
        several = isinstance(out, list | tuple)
        if n.op == "placeholder" or any(source in self._live for source in n.all_input_nodes):
            if any(isinstance(t, Tensor) for t in (out if several else [out])):
                self._live.add(n)
        elif isinstance(out, Tensor):
            self.constants[n] = out
        return out


def take_apart(graph: fx.Graph) -> None:
    """Turn each part of `chunk`, `split` and `unbind` into an index of the tensor itself, in place."""
    for node in list(graph.nodes):
        kind = SPLITS.get(node.target) if node.op == "call_function" else str(node.target)
        if node.op not in ("call_function", "call_method") or kind not in DIMENSION:
            continue
        if any(user.target is not operator.getitem for user in node.users):
            continue  # named where it is read
        source, shapes = node.args[0], [meta.shape for meta in node.meta["tensor_meta"]]
        at = DIMENSION[kind]
        axis = int(node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0))
        axis %= len(source.meta["tensor_meta"].shape)
        ends = list(accumulate(1 if kind == "unbind" else shape[axis] for shape in shapes))
        for user in list(node.users):
            k = int(user.args[1]) % len(ends)
            part = k if kind == "unbind" else slice(ends[k - 1] if k else 0, ends[k])
            user.args = (source, (*[slice(None)] * axis, part))
        graph.erase_node(node)

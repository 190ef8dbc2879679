"""Compiled regions: the parts of a traced network, each structure compiled once and used wherever it recurs.

A network of repeated blocks is cut at its blocks. Blocks of one structure and one set of shapes share one compiled
graph, so compile time does not grow with depth; blocks of a Stage may be left out without another graph, because the
skip stays in Python between them. Weights, scales and the bound choice are inputs of the graphs, never constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from supernet.elastic.layers import QuantLayer
from supernet.elastic.rectify import rectifies, rectify
from supernet.elastic.stage import Stage
from supernet.elastic.wrap import trace
from supernet.quant import ste
from supernet.quant.quantizer import Quantizer

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What a kernel computes from one tensor is computed again rather than stored, up to a point: masks and ratios of the
# quantizer's backward cost more traffic than work. Inductor's defaults are (4, 30, 8). Measured on CPU, all kernels of
# a stem and three blocks of ResNet-20 at 128x16x32x32 as a share of the time of their convolutions, for reads and
# operations: (6, 100) 0.76, (9, 100) 0.67, (12, 100) 0.64, (16, 100) 0.63, (20, 70) 0.64, (12, 50) 0.66,
# (20, 50) 0.70. The last figure is where sums of many reads end.
INDUCTOR = {"realize_reads_threshold": 12, "realize_opcount_threshold": 100, "realize_acc_reads_threshold": 24}
VARIANTS = 64


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one graph for each set of shapes; a graph break is an error, and so is a silent fall back."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    # Dynamo takes a quantizer for an operator rather than read its code, forward and backward, at each of them: 18 of
    # the 28 s that a warm start of a ResNet-20 took under a profiler. AOTAutograd's cache has to be told that it may
    # keep such graphs; the code is part of its key, so a changed formula is not mistaken for the cached one (tested).
    torch.compiler.allow_in_graph(ste.fake_quantize)
    known = torch._inductor.config.unsafe_marked_cacheable_functions
    torch._inductor.config.unsafe_marked_cacheable_functions = known | {f"{ste.__name__}.fake_quantize": _digest()}
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    return torch.compile(function, fullgraph=True, dynamic=False, options=dict(INDUCTOR))


@cache
def _digest() -> str:
    """What the code of the quantizers' functions is known by."""
    return sha256(Path(ste.__file__).read_bytes()).hexdigest()


class Regions:
    """A network as a sequence of regions; called like the network.

    Args:
        model: traced with its sites, or still to be traced.
        compile: turns the forward function of a structure into its compiled form.

    Attributes:
        structures: number of different structures.

    Raises:
        ValueError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, compile: Callable[[Any], Callable[..., Any]] = compiled) -> None:
        self._known: dict[str, Callable[..., Any]] = {}
        self._compile = compile
        self._root = self._plan(model)

    def __call__(self, x: Tensor) -> Any:
        """What the network gives for `x`."""
        return self._root(x)

    @property
    def structures(self) -> int:
        """Number of different structures among the regions."""
        return len(self._known)

    def _plan(self, model: nn.Module) -> _Plan:
        graph = model if isinstance(model, fx.GraphModule) else trace(model)
        plan = _Plan(graph)
        for nodes in _cut(graph):
            stage = _module(graph, nodes[0])
            if isinstance(stage, Stage):
                plan.add(nodes, _Chain(stage, [self._plan(block) for block in stage]))
            else:
                plan.add(nodes, self._region(graph, nodes))
        return plan

    def _region(self, graph: fx.GraphModule, nodes: list[fx.Node]) -> Callable[..., Any]:
        """One region; regions of equal code are objects of one class with one compiled forward."""
        children, body = _extract(graph, nodes)
        template = fx.GraphModule(children, body)
        code = template.code
        if code not in self._known:
            self._known[code] = self._compile(type(template).forward)
        run, region = self._known[code], _Region()
        for name, child in children.items():
            region.add_module(name, child)
        return lambda *inputs: run(region, *inputs)


class _Region(nn.Module):
    """Holds the modules of one region under names that do not tell regions of one structure apart."""


class _Chain:
    """The blocks of a Stage, as many as its depth says."""

    def __init__(self, stage: Stage, blocks: list[_Plan]) -> None:
        self.stage, self.blocks = stage, blocks

    def __call__(self, x: Tensor) -> Tensor:
        for block in self.blocks[: self.stage.depth]:
            x = block(x)
        return x


class _Plan:
    """Regions in the order in which they run, with the names of what they take and give."""

    def __init__(self, graph: fx.GraphModule) -> None:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.inputs = [node.name for node in inputs]
        self.defaults = {node.name: node.args[0] for node in inputs if node.args}
        self.read = {n.name: _getter(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr"}
        (self.output,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        self.steps: list[tuple[Callable[..., Any], list[str], list[str]]] = []

    def add(self, nodes: list[fx.Node], run: Callable[..., Any]) -> None:
        """Append one region."""
        self.steps.append((run, [n.name for n in _taken(nodes)], [n.name for n in _given(nodes)]))

    def __call__(self, *values: Tensor) -> Any:
        known: dict[str, Any] = self.defaults | dict(zip(self.inputs, values, strict=False))
        known |= {name: read() for name, read in self.read.items()}
        for run, taken, given in self.steps:
            out = run(*[known[name] for name in taken])
            if len(given) == 1:
                known[given[0]] = out
            else:
                known.update(zip(given, out, strict=True))
        return fx.node.map_arg(self.output, lambda node: known[node.name])


def _getter(graph: fx.GraphModule, path: str) -> Callable[[], Any]:
    """Reads a parameter or buffer anew each time, since moving a network replaces its buffers."""
    return lambda: operator.attrgetter(path)(graph)


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _cut(graph: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Runs of nodes that make one region each: a block that recurs, a Stage, or what lies between."""
    blocks = _blocks(graph)
    places: dict[fx.Node, Hashable] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        module = _module(graph, node)
        if isinstance(module, Stage):
            places[node] = node
        elif isinstance(module, Quantizer):  # a site belongs to what it quantizes
            places[node] = places.get(node.all_input_nodes[0])
        else:
            places[node] = next((path for path in _stack(node) if path in blocks), None)
    for _, run in groupby(places, key=places.__getitem__):
        yield list(run)


def _stack(node: fx.Node) -> dict[str, type]:
    """Modules around a node, outermost first, by path."""
    return dict(node.meta.get("nn_module_stack", {}).values())


def _blocks(graph: fx.GraphModule) -> set[str]:
    """Paths of modules with quantized layers inside whose class occurs more than once."""
    paths: dict[type, set[str]] = {}
    for node in graph.graph.nodes:
        if isinstance(_module(graph, node), QuantLayer):
            for path, kind in _stack(node).items():
                if path != node.target and not issubclass(kind, CONTAINERS):
                    paths.setdefault(kind, set()).add(path)
    return {path for same in paths.values() if len(same) > 1 for path in same}


def _taken(nodes: list[fx.Node]) -> list[fx.Node]:
    """What a region reads from outside, in order of use."""
    inside = set(nodes)
    return list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))


def _given(nodes: list[fx.Node]) -> list[fx.Node]:
    """What a region computes that is read outside."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def _extract(graph: fx.GraphModule, nodes: list[fx.Node]) -> tuple[dict[str, nn.Module], fx.Graph]:
    """The region as a graph of its own, in which names say nothing about where it stood."""
    body, names, children = fx.Graph(), dict[str, str](), dict[str, nn.Module]()
    made, given = {node: body.placeholder(f"x{k}") for k, node in enumerate(_taken(nodes))}, _given(nodes)
    for k, node in enumerate(nodes):
        target = node.target
        if node in given and rectifies(node, _module(graph, node)):
            made[node] = body.call_function(rectify, (made[node.all_input_nodes[0]],))
            made[node].name = f"v{k}"
            continue
        if node.op == "call_module":
            target = names.setdefault(str(node.target), f"m{len(names)}")
            children[target] = graph.get_submodule(str(node.target))
        made[node] = body.node_copy(node, made.__getitem__)
        made[node].target, made[node].name = target, f"v{k}"
    given = [made[node] for node in given]
    body.output(given[0] if len(given) == 1 else tuple(given))
    return children, body

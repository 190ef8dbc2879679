"""From any torch model to a quantized one: find the layers, swap them, and put sites where a runtime needs them.

The graph is traced with torch.fx, block by block inside a Stage, so that blocks can still be left out. What a site is:
    a tensor that
is quantized. A tensor whose only consumer quantizes it (a convolution, a linear layer) has that consumer's site; every
other tensor between operators has an 8-bit site of its own, after which consumers with fewer bits requantize. Without
them a runtime falls back to float between layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from supernet.config import QuantConfig
from supernet.elastic.attention import MatMul, QuantMatMul
from supernet.elastic.layers import ADAPTERS as LAYERS
from supernet.elastic.layers import QuantLayer
from supernet.elastic.stage import Stage
from supernet.elastic.streams import real
from supernet.quant.quantizer import Quantizer

SITE_BITS = 8
QUANTIZED = (QuantLayer, QuantMatMul)
ADAPTERS: dict[type[nn.Module], Any] = {**LAYERS, MatMul: QuantMatMul}
"""What becomes what: the quantized class is made by `from_float`."""

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
ACTIVATION_CALLS = (F.relu, torch.relu, F.relu6, torch.relu_)
ON_GRID = (nn.MaxPool2d, nn.Flatten, nn.ZeroPad2d)
ON_GRID_CALLS: tuple[Callable[..., object], ...] = (
    *(operator.getitem, torch.flatten, F.pad, F.max_pool2d, torch.reshape),
    *(torch.transpose, torch.permute),
)
ON_GRID_METHODS = ("flatten", "view", "reshape", "contiguous", "transpose", "permute")
PARTS, PARTS_METHODS = (torch.chunk, torch.split, torch.unbind), ("chunk", "split", "unbind")


@dataclass(frozen=True)
class Found:
    """One layer met in a forward pass: see `supernet.config.Layer`."""

    name: str
    kind: str
    macs: int
    weights: int
    outputs: int
    behind_norm: bool
    bias: bool
    shape: tuple[int, ...]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model evaluates without gradients and without fused attention; afterwards each module has its mode.

    Torch's fused paths skip the modules that they stand for, and their products are not counted.
    """
    modes, fused = [(m, m.training) for m in model.modules()], torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode


def discover(model: nn.Module, example: Tensor) -> list[Found]:
    """Convolutions, linear layers and products in the order in which a forward pass meets them.

    A layer that is met several times is listed once with its MACs added up.

    Raises:
        ValueError: nothing to quantize.
    """
    found: dict[str, Found] = {}
    last: dict[int, str] = {}
    keep: list[Tensor] = []

    def meet(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                source = last.get(id(inputs[0]))
                if source:
                    found[source] = replace(found[source], behind_norm=True)
                return
            before = found.get(name)
            if isinstance(module, MatMul):
                count = output[0].numel() * inputs[0].shape[-1] + (before.macs if before else 0)
                found[name] = Found(name, "matmul", count, 0, 1, False, False, tuple(inputs[0].shape[1:]))
                return
            assert isinstance(module, nn.Conv2d | nn.Linear)
            kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
            count = (output.numel() // output.shape[0]) * (module.weight.numel() // module.weight.shape[0])
            count += before.macs if before else 0
            normed, bias = before is not None and before.behind_norm, module.bias is not None
            shape, (outputs, weights) = tuple(inputs[0].shape[1:]), (module.weight.shape[0], module.weight.numel())
            found[name] = Found(name, kind, count, weights, outputs, normed, bias, shape)
            last[id(output)] = name
            keep.append(output)

        return hook

    handles = [
        module.register_forward_hook(meet(name))
        for name, module in model.named_modules()
        if type(module) in ADAPTERS or isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to quantize: no nn.Conv2d or nn.Linear ran in its forward pass"
        )
    return list(found.values())


def swap(
    model: nn.Module, name: str, weight_choices: Sequence[QuantConfig], input_choices: Sequence[QuantConfig]
) -> None:
    """Replace the float layer at path `name`, and wherever else it is used, by a quantized one with its parameters.

    Both operands of a product have the choices of inputs.
    """
    layer = model.get_submodule(name)
    made = ADAPTERS[type(layer)].from_float(layer)
    made.quantize(input_choices if isinstance(layer, MatMul) else weight_choices, input_choices)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is layer:
                setattr(parent, child, made)


class _Tracer(fx.Tracer):
    """Keeps as one node what is quantized, normalised (timm's BatchNormAct2d too), cut short, or has no parts."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, QuantLayer | QuantMatMul | Quantizer | Stage | nn.modules.batchnorm._BatchNorm)
        plain = not any(True for _ in m.children()) and not any(True for _ in m.parameters(recurse=False))
        return kept or plain or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **options: Any) -> Any:
        """A node; an optional argument of the network is none, but has its default (no mask, for attention)."""
        if kind == "placeholder" and args:
            return args[0]
        return super().create_proxy(kind, target, args, *rest, **options)


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of `model`, with quantized layers, normalisation, stages and part-less modules as single nodes.

    Raises:
        ValueError: the forward pass depends on data or shapes in Python, so that there is no one graph.
    """
    try:
        with evaluating(model):  # a functional dropout would be traced as it is in training, for good
            graph = _Tracer().trace(model)
    except Exception as error:  # a forward pass may raise anything when it is given a proxy
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{type(model).__name__} cannot be traced ({reason}); "
            "pass sites=False to train it without deployment sites (it cannot be exported then)"
        ) from error
    return fx.GraphModule(model, graph, type(model).__name__)


def place_sites(model: nn.Module, choice: QuantConfig, example: Tensor) -> fx.GraphModule:
    """Trace `model` and insert an 8-bit site wherever a tensor between operators has none; see the head of this file.

    Args:
        model: with its layers already swapped.
        choice: how the sites quantize.
        example: one input, to tell tensors from numbers.

    Raises:
        ValueError: the model cannot be traced, or a block of a Stage is a single layer.
    """
    stages = [(path, m) for path, m in model.named_modules() if isinstance(m, Stage)]
    blocks = [(stage, f"{path}.{name}", block) for path, stage in stages for name, block in stage.named_children()]
    seen: dict[str, Tensor] = {}
    handles = []
    for _, path, block in blocks:
        if isinstance(block, QuantLayer | Stage):
            kind = type(block).__name__
            raise ValueError(f"a block of a Stage is a module with layers in it, {path} is a {kind}; wrap it")
        handles.append(block.register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: inputs[0]})))
    if isinstance(model, Stage):
        raise ValueError("a Stage cannot be the whole model; put it into an nn.Sequential")
    with evaluating(model):
        model(example)
    for handle in handles:
        handle.remove()
    streams = set[Stage]()
    for _, stage in reversed(stages):  # inner ones first
        parts = {path: _Sites(block, seen[path], streams) for owner, path, block in blocks if owner is stage}
        if all(part.gives_real() for part in parts.values()):
            streams.add(stage)
        for path, part in parts.items():
            setattr(stage, path.rpartition(".")[2], part.place(choice, on_grid=stage not in streams))
    return _Sites(model, example, streams).place(choice, on_grid=False)


class _Data(fx.Interpreter):
    """Runs a graph and notes its nodes: `live` depend on the input (and have so many axes; None for several tensors),
    `floats` are the real tensors among them, `plain` hold no tensor at all, `same` give in evaluation the very tensor
    that they take, unchanged (identity, dropout, stochastic depth)."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.same: set[fx.Node] = set()
        self.live: dict[fx.Node, int | None] = {}
        self.floats: set[fx.Node] = set()
        self.plain: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and classify what it gives."""
        sources = [self.env[source] for source in n.all_input_nodes[:1]]
        before = [t._version for t in sources if isinstance(t, Tensor)]  # what works in place gives what it takes too
        out = super().run_node(n)
        if n.op != "output" and before and out is sources[0] and out._version == before[0]:
            self.same.add(n)
        tensors = [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)]
        if not tensors:
            self.plain.add(n)
        elif n.op == "placeholder" or any(source in self.live for source in n.all_input_nodes):
            self.live[n] = out.dim() if isinstance(out, Tensor) else None
            if isinstance(out, Tensor) and out.is_floating_point():
                self.floats.add(n)
        return out


class _Sites:
    """The graph of one model or block, in which sites are placed.

    Args:
        model: what to trace.
        example: an input of it.
        streams: stages whose blocks take and give real numbers (supernet.elastic.streams).
    """

    def __init__(self, model: nn.Module, example: Tensor, streams: set[Stage]) -> None:
        self.traced, self.streams = trace(model), streams
        self.modules = dict(self.traced.named_modules(remove_duplicate=False))
        self.data = _Data(self.traced)
        with evaluating(self.traced):
            self.data.run(example)
        self.on_grid = False
        known = {node for node in self.traced.graph.nodes if self.module(node) in streams}
        self.real = real(self.traced.graph, self.module, self.data.live, self.consumers, self.ends, known)

    def gives_real(self) -> bool:
        """Whether the output is a real number, whatever the input is."""
        (output,) = (node for node in self.traced.graph.nodes if node.op == "output")
        return self.source(output) in self.real

    def place(self, choice: QuantConfig, on_grid: bool) -> fx.GraphModule:
        """Insert the sites and tell the layers behind them.

        Args:
            choice: how the sites quantize.
            on_grid: it is a block of a Stage whose input sits on a grid already, and so must its output.
        """
        self.on_grid = on_grid
        graph, gridded = self.traced.graph, set[fx.Node]()
        for node in list(graph.nodes):
            if (
                (node.op == "placeholder" and on_grid)
                or (isinstance(self.module(node), Stage) and node not in self.real)
                or (self.stays_on_grid(node) and self.source(node) in gridded)
            ):
                gridded.add(node)
            elif self.needs_site(node):
                name = f"site_{node.name}"
                self.traced.add_module(name, Quantizer([choice]))
                with graph.inserting_after(node):
                    site = graph.call_module(name)
                node.replace_all_uses_with(site)
                site.args = (node,)
                self.data.floats.add(site)
                gridded.add(site)
        self.take_grids(gridded)
        graph.lint()
        self.traced.recompile()
        return self.traced

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def source(self, node: fx.Node) -> fx.Node | None:
        """The tensor that a node takes first."""
        return next(iter(node.all_input_nodes), None)

    def stays_on_grid(self, node: fx.Node) -> bool:
        """Whether the node only moves values: its output sits on the grid of its input."""
        source, module = self.source(node), self.module(node)
        if node in self.data.same:
            return True
        if node.target is operator.getitem and source is not None and source not in self.data.floats:
            return self.splits(source)
        if node.target is F.pad and any(node.kwargs.get("value", v) not in (None, 0) for v in (node.args[3:4] or (0,))):
            return False
        if node.op == "call_method":
            return node.target in ON_GRID_METHODS or self.splits(node)
        if node.op == "call_function":
            return node.target in ON_GRID_CALLS or self.splits(node)
        return isinstance(module, ON_GRID) or getattr(module, "only_moves", False)

    def splits(self, node: fx.Node) -> bool:
        """Whether the node gives several parts of one tensor."""
        return node.target in (PARTS_METHODS if node.op == "call_method" else PARTS)

    def fuses(self, node: fx.Node) -> bool:
        """Whether the node is taken into its producer by a runtime: normalisation and clipping activations."""
        if node.op == "call_function":
            return node.target in ACTIVATION_CALLS
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return isinstance(self.module(node), (*ACTIVATIONS, nn.modules.batchnorm._BatchNorm))

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that use the tensor, looking through those that do nothing in evaluation."""
        return [r for user in node.users for r in (self.readers(user) if user in self.data.same else [user])]

    def ends(self, node: fx.Node) -> bool:
        """Whether the node is a layer, or normalisation or activation behind one, or a Stage."""
        source = self.source(node)
        behind = self.fuses(node) and source is not None and self.ends(source)
        return behind or isinstance(self.module(node), QuantLayer | Stage)

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that use the tensor's values, looking through those that only move them."""
        found = []
        for user in node.users:
            if user not in self.data.plain:
                found += self.consumers(user) if self.stays_on_grid(user) else [user]
        return found

    def needs_site(self, node: fx.Node) -> bool:
        """Whether values are made here that more than one layer's own quantizer, or something else, will read."""
        if node not in self.data.floats or self.stays_on_grid(node):
            return False
        if node in self.real:
            modules = [self.module(user) for user in self.consumers(node) if user.op != "output"]
            shared = len(modules) > 1 and all(isinstance(module, QuantLayer) for module in modules)
            return shared or any(isinstance(module, Stage) and module not in self.streams for module in modules)
        readers = self.readers(node)
        if len(readers) == 1 and self.fuses(readers[0]):
            return False  # an inner step of conv -> norm -> activation
        consumers = self.consumers(node)
        inner = [user for user in consumers if user.op != "output"]
        if self.on_grid and len(inner) < len(consumers):
            return True
        return bool(inner) and not (len(inner) == 1 and isinstance(self.module(inner[0]), QuantLayer))

    def take_grids(self, gridded: set[fx.Node]) -> None:
        """Layers whose every input sits on a site's grid take its codes where they ask for as many bits; of such
        choices, all alike, one is kept."""
        calls: dict[QuantLayer, list[bool]] = {}
        for node in self.traced.graph.nodes:
            layer = self.module(node)
            if isinstance(layer, QuantLayer):
                calls.setdefault(layer, []).append(self.source(node) in gridded)
        for layer in (layer for layer, on_grid in calls.items() if all(on_grid)):
            choices = layer.input_quantizer.choices
            alike = [c for c in choices if c.bits >= SITE_BITS]
            layer.input_quantizer = Quantizer([c for c in choices if c not in alike[1:]], bypass=SITE_BITS)

"""From any torch model to a quantized one: find the layers, swap them, and put sites where a runtime needs them.

The graph is traced with torch.fx, block by block inside a Stage, so that blocks can still be left out. What a site is: a tensor that
is quantized. A tensor whose only consumer quantizes it (a convolution, a linear layer) has that consumer's site; every other tensor
between operators has an 8-bit site of its own, after which consumers with fewer bits requantize. Without them a runtime falls back to
float between layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from supernet.config import QuantConfig
from supernet.elastic.layers import ADAPTERS, QuantLayer
from supernet.elastic.stage import Stage
from supernet.quant.quantizer import Quantizer

SITE_BITS = 8
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)
ACTIVATION_CALLS = (F.relu, torch.relu, F.relu6, torch.relu_)
ON_GRID = (nn.MaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.ZeroPad2d)
ON_GRID_CALLS: tuple[Callable[..., object], ...] = (operator.getitem, torch.flatten, F.pad, F.max_pool2d, torch.reshape)
ON_GRID_METHODS = ("flatten", "view", "reshape", "contiguous")


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


def discover(model: nn.Module, example: Tensor) -> list[Found]:
    """Convolutions and linear layers in the order in which a forward pass meets them.

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
                before = last.get(id(inputs[0]))
                if before:
                    found[before] = Found(**(vars(found[before]) | {"behind_norm": True}))
                return
            assert isinstance(module, nn.Conv2d | nn.Linear)
            kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
            count = (output.numel() // output.shape[0]) * (module.weight.numel() // module.weight.shape[0])
            count += found[name].macs if name in found else 0
            shape = tuple(inputs[0].shape[1:])
            found[name] = Found(
                name, kind, count, module.weight.numel(), module.weight.shape[0], False, module.bias is not None, shape
            )
            last[id(output)] = name
            keep.append(output)

        return hook

    handles = [
        module.register_forward_hook(meet(name))
        for name, module in model.named_modules()
        if type(module) in ADAPTERS or isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        was = model.training
        with torch.no_grad():
            model.eval()(example)
        model.train(was)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to quantize: no nn.Conv2d or nn.Linear ran in its forward pass"
        )
    return list(found.values())


def multiplications(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one example by the innermost module that spends them ("" for the model itself), whatever the operator."""
    batch = example.shape[0]
    counter = FlopCounterMode(display=False)
    was = model.training
    with torch.no_grad(), counter:
        model.eval()(example)
    model.train(was)
    inclusive = {path: sum(ops.values()) // 2 // batch for path, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    total = {path.removeprefix(root).lstrip("."): count for path, count in inclusive.items() if path != "Global"}
    own = dict(total)
    for path, count in total.items():
        if path:
            parent = path.rpartition(".")[0]
            while parent and parent not in total:
                parent = parent.rpartition(".")[0]
            own[parent] = own.get(parent, 0) - count
    return {path: count for path, count in own.items() if count > 0}


def swap(
    model: nn.Module, name: str, weight_choices: Sequence[QuantConfig], input_choices: Sequence[QuantConfig]
) -> None:
    """Replace the float layer at path `name` by a quantized one with the same parameters."""
    parent, _, child = name.rpartition(".")
    layer = model.get_submodule(name)
    made = ADAPTERS[type(layer)].from_float(layer)  # type: ignore[arg-type]
    setattr(model.get_submodule(parent), child, made.quantize(weight_choices, input_choices))


class _Tracer(fx.Tracer):
    """Keeps as one node what is quantized, normalised, cut short, or has no parts; timm's BatchNormAct2d is not inlined."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, QuantLayer | Quantizer | Stage | nn.modules.batchnorm._BatchNorm)
        plain = not any(True for _ in m.children()) and not any(True for _ in m.parameters(recurse=False))
        return kept or plain or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of `model`, with quantized layers, normalisation, stages and part-less modules as single nodes.

    Raises:
        ValueError: the forward pass depends on data or shapes in Python, so that there is no one graph.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced ({str(error).splitlines()[0]}); pass sites=False to train it without deployment sites "
            "(it cannot be exported then)"
        ) from error
    return fx.GraphModule(model, graph, type(model).__name__)


def place_sites(model: nn.Module, choice: QuantConfig) -> fx.GraphModule:
    """Trace `model` and insert an 8-bit site wherever a tensor between operators has none; see the head of this file.

    Args:
        model: with its layers already swapped.
        choice: how the sites quantize.
    """
    for stage in [m for m in model.modules() if isinstance(m, Stage)]:
        for name, block in list(stage.named_children()):
            setattr(stage, name, _sited(block, choice, is_block=True))
    return _sited(model, choice, is_block=False)


def _sited(model: nn.Module, choice: QuantConfig, is_block: bool) -> fx.GraphModule:
    traced = trace(model)
    graph, modules = traced.graph, dict(traced.named_modules())
    gridded: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if is_block:
                gridded.add(node)
        elif node.op == "output":
            continue
        elif isinstance(_module(node, modules), Stage) or (_stays_on_grid(node, modules) and node.args[0] in gridded):
            gridded.add(node)
        if node.op == "get_attr" or not node.users or _continues(node, modules):
            continue
        if node in gridded:
            _take_grid(node, modules)
        elif _needs_site(node, modules, is_block):
            name = f"site_{node.name}"
            traced.add_module(name, Quantizer([choice]))
            modules[name] = traced.get_submodule(name)
            with graph.inserting_after(node):
                site = graph.call_module(name)
            node.replace_all_uses_with(site)
            site.args = (node,)
            gridded.add(site)
            _take_grid(site, modules)
    graph.lint()
    traced.recompile()
    return traced


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _stays_on_grid(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node only moves values: its output sits on the grid of its input."""
    if node.op == "call_method":
        return node.target in ON_GRID_METHODS
    if node.op == "call_function":
        return node.target in ON_GRID_CALLS
    return isinstance(_module(node, modules), ON_GRID)


def _fuses(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is taken into its producer by a runtime: normalisation and clipping activations."""
    if node.op == "call_function":
        return node.target in ACTIVATION_CALLS
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return isinstance(_module(node, modules), (*ACTIVATIONS, nn.modules.batchnorm._BatchNorm))


def _continues(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the tensor is only an inner step of a fused chain (conv -> norm -> activation)."""
    users = list(node.users)
    return len(users) == 1 and _fuses(users[0], modules)


def _consumers(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Nodes that use the tensor's values, looking through those that only move them."""
    found = []
    for user in node.users:
        found += _consumers(user, modules) if _stays_on_grid(user, modules) else [user]
    return found


def _needs_site(node: fx.Node, modules: dict[str, nn.Module], is_block: bool) -> bool:
    if node.op == "placeholder" or _stays_on_grid(node, modules):
        return node.op == "placeholder" and len(_consumers(node, modules)) > 1
    consumers = _consumers(node, modules)
    if is_block and any(user.op == "output" for user in consumers):
        return True
    inner = [user for user in consumers if user.op != "output"]
    alone = len(inner) == 1 and isinstance(_module(inner[0], modules), QuantLayer)
    return bool(inner) and not alone


def _take_grid(node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Consumers of a sited tensor take its codes where they ask for as many bits; of such choices, all alike, one is kept."""
    for user in node.users:
        layer = _module(user, modules)
        if isinstance(layer, QuantLayer):
            choices = layer.input_quantizer.choices
            alike = [c for c in choices if c.bits >= SITE_BITS]
            layer.input_quantizer = Quantizer([c for c in choices if c not in alike[1:]], bypass=SITE_BITS)

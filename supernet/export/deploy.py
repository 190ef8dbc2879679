"""From a materialised subnet to a deployed network: traced flat, normalisation folded, each node one operator."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from supernet.elastic.attention import QuantMatMul
from supernet.elastic.layers import QuantLayer
from supernet.export.fold import check, fold
from supernet.export.graph import Deployed, Grid, Move, Op
from supernet.export.lower import BATCH, At, activation_of, is_free, is_move, lower, shape
from supernet.export.operators import Conv, Linear, Pad
from supernet.export.operators_tokens import Product
from supernet.export.prepare import Shapes, take_apart
from supernet.quant.quantizer import Quantizer

BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def deploy(subnet: nn.Module, example: Float[Tensor, "n ..."]) -> Deployed:
    """The deployed form of a materialised subnet: BatchNorm folded, biases in int32, integer codes between operators.

    Args:
        subnet: what `SuperNet.materialise` returns; its BatchNorm statistics are used as they are.
        example: inputs to trace shapes with; the first one counts.

    Raises:
        ValueError: a forward pass that cannot be traced, an operator that the exporter does not know, a BatchNorm that
            does not follow a layer alone, a grid that is not integer, a bias beyond int32.
    """
    flat = flatten(copy.deepcopy(subnet).eval())
    shapes = Shapes(flat)
    shapes.propagate(torch.cat([example[:1]] * BATCH))
    take_apart(flat.graph)
    plan = _Plan(flat, shapes.constants)
    plan.drop_free()
    plan.expand_inputs()
    folded = plan.fold_norms()
    plan.hoist_quantizers()
    plan.absorb()
    return plan.build(example[:1], folded)


class _Tracer(fx.Tracer):
    """Everything flat but what is quantized, what is normalised, and torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, QuantLayer | QuantMatMul | Quantizer | BatchNorm)
        return kept or super().is_leaf_module(m, module_qualified_name)


def flatten(subnet: nn.Module) -> fx.GraphModule:
    """The graph of a network, blocks and stages opened up; ValueError where its forward pass cannot be traced."""
    try:
        return fx.GraphModule(subnet, _Tracer().trace(subnet))
    except Exception as error:  # a forward pass may raise anything when it is given a proxy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{type(subnet).__name__} cannot be traced ({reason}), so it cannot be exported; its forward pass must not "
            "branch on its data"
        ) from error


@dataclass
class _Fused:
    """What goes into one operator beside itself."""

    norm: nn.Module | None = None
    activation: str | None = None
    quantizer: Quantizer | None = None
    site: str | None = None


class _Plan:
    """The flat graph, rewritten step by step until each node is one operator; `constants` are no operators."""

    def __init__(self, flat: fx.GraphModule, constants: dict[fx.Node, Tensor]) -> None:
        self.flat, self.graph, self.constants = flat, flat.graph, constants
        self.fused: dict[fx.Node, _Fused] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.flat.get_submodule(str(node.target)) if node.op == "call_module" else None

    def into(self, node: fx.Node) -> _Fused:
        """What is fused into a node's operator."""
        return self.fused.setdefault(node, _Fused())

    def erase(self, node: fx.Node) -> None:
        """Take a node with one input out; its readers read its input."""
        node.replace_all_uses_with(_source(node))
        self.graph.erase_node(node)

    def insert(self, path: str, after: fx.Node) -> fx.Node:
        """A new node of the same shape that calls the module at `path` on the output of `after`."""
        with self.graph.inserting_after(after):
            made = self.graph.call_module(path, (after,))
        made.meta = dict(after.meta)
        return made

    # -- rewriting -----------------------------------------------------------------------------------------------------
    def drop_free(self) -> None:
        """Take out what does nothing in evaluation: identities, dropout, nodes that nobody reads."""
        for node in list(self.graph.nodes):
            if is_free(node, self.module(node)):
                self.erase(node)
        self.graph.eliminate_dead_code()

    def expand_inputs(self) -> None:
        """Give every input quantizer that does not pass its input through a node of its own."""
        for node in list(self.graph.nodes):
            layer = self.module(node)
            if isinstance(layer, QuantLayer) and not layer.input_quantizer.row[4]:
                node.args = (self.insert(f"{node.target}.input_quantizer", _source(node)), *node.args[1:])
            elif isinstance(layer, QuantMatMul):
                left, right = (n for n in node.args if isinstance(n, fx.Node))
                sides = {"left": left, "right": right}
                node.args = tuple(self.insert(f"{node.target}.{side}_quantizer", n) for side, n in sides.items())

    def fold_norms(self) -> int:
        """Attach each BatchNorm to the layer that it alone follows; returns how many there were."""
        nodes = [node for node in self.graph.nodes if isinstance(self.module(node), BatchNorm)]
        left = [str(node.target) for node in nodes if not self._fold_norm(node)]
        if left:
            raise ValueError(
                "every BatchNorm must track statistics and be the only reader of a convolution or linear layer, but "
                f"{len(left)} of {len(nodes)} cannot be folded: {', '.join(left)}; put them behind a layer"
            )
        return len(nodes)

    def _fold_norm(self, node: fx.Node) -> bool:
        norm, source = self.module(node), _source(node)
        alone = len(source.users) == 1 and not self.into(source).norm
        if not isinstance(self.module(source), QuantLayer) or not alone or getattr(norm, "running_mean", None) is None:
            return False
        self.into(source).norm = norm
        act = getattr(norm, "act", None)  # timm's BatchNormAct2d: its activation follows
        if isinstance(act, nn.Module) and not isinstance(act, nn.Identity):
            made = self.insert(f"{node.target}.act", node)
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self.erase(node)
        return True

    def hoist_quantizers(self) -> None:
        """Move quantizers before what only moves values: that moves codes then, and the producer can be fused."""
        for node in reversed(list(self.graph.nodes)):
            if not isinstance(self.module(node), Quantizer) or not self._real(node):
                continue
            while self._moves(_source(node)) and len(_source(node).users) == 1:
                move = _source(node)
                if move.target is operator.getitem and len(_source(move).users) > 1:
                    break  # the other parts have quantizers of their own
                node.replace_all_uses_with(move)
                _source(move).append(node)
                node.args, move.args = (_source(move),), (node, *move.args[1:])
                node.meta = dict(_source(node).meta)

    def _moves(self, node: fx.Node) -> bool:
        return is_move(node, self.module(node))

    def _real(self, node: fx.Node) -> bool:
        """Whether what a quantizer reads comes, through moves, from real numbers and not from codes."""
        source = _source(node)
        while self._moves(source):
            source = _source(source)
        return not isinstance(self.module(source), Quantizer)

    def absorb(self) -> None:
        """Take a quantizer, or ReLU and quantizer, into the operator whose only reader it is."""
        for node in list(self.graph.nodes):
            fixed = node.op in ("placeholder", "output", "get_attr")
            if fixed or self._moves(node) or isinstance(self.module(node), Quantizer) or len(node.users) != 1:
                continue
            user = next(iter(node.users))
            function = activation_of(user, self.module(user))
            last = next(iter(user.users)) if function and len(user.users) == 1 else user
            quantizer = self.module(last)
            if not isinstance(quantizer, Quantizer):
                continue
            activation = function if last is not user else None
            fused = self.into(node)
            fused.activation, fused.quantizer, fused.site = activation, quantizer, str(last.target)
            for done in (last, user) if activation else (last,):
                self.erase(done)

    # -- operators -----------------------------------------------------------------------------------------------------
    def build(self, example: Tensor, folded: int) -> Deployed:
        """The operators of the rewritten graph, in order."""
        names: dict[fx.Node, str] = {}
        grids: dict[str, Grid | None] = {}
        ops: list[Op] = []
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        output = next(node for node in self.graph.nodes if node.op == "output").args[0]
        if len(inputs) != 1 or not isinstance(output, fx.Node):
            returned = "a tensor" if isinstance(output, fx.Node) else f"a {type(output).__name__}"
            raise ValueError(
                f"a network must take one tensor and return one to be exported, this one takes {len(inputs)} and "
                f"returns {returned}; wrap it in a module that does"
            )
        for node in self.graph.nodes:
            if node.op == "placeholder":
                names[node], grids[node.name] = node.name, None
            elif node in self.constants or shape(node) is None:  # sizes are no tensors, and numbers by now
                continue
            elif node.op != "output":
                names[node] = _name(node, grids)
                for op in self._operators(node, names, grids):
                    grids[op.name] = grids[op.inputs[0]] if isinstance(op, Move) else op.grid
                    ops.append(op)
        ops = merge_pads(ops, names[output])
        return Deployed(ops, names[inputs[0]], names[output], example, folded, (shape(output) or ())[1:])

    def _operators(self, node: fx.Node, names: dict[fx.Node, str], grids: dict[str, Grid | None]) -> list[Op]:
        fused, module, name = self.fused.get(node, _Fused()), self.module(node), names[node]
        quantizer, site = (module, str(node.target)) if isinstance(module, Quantizer) else (fused.quantizer, fused.site)
        grid = None
        if quantizer is not None:
            check(quantizer, str(site))
            grid = Grid.of(quantizer).after(fused.activation)
        before = next((n for n in node.all_input_nodes if n in names), node)
        ops: list[Op]
        if isinstance(module, QuantLayer):
            layer = fold(name, module, fused.norm, (names[before], _codes(grids[names[before]], name)), grid)
            if isinstance(layer, Linear):
                layer.lead = (shape(before) or ())[1:-1]
            ops = [layer]
        elif isinstance(module, QuantMatMul):
            ops = [_product(name, module, node, names, grids)]
        else:
            ops = lower(node, module, At(name, shape(before) or (), shape(node) or ()), {**self.constants, **names})
        last = next((op for op in reversed(ops) if not isinstance(op, Move)), None)
        if last is not None and grid is not None:
            last.grid, last.activation, last.site = grid, fused.activation, site
        return ops


def merge_pads(ops: Sequence[Op], result: str) -> list[Op]:
    """The operators with zeros around height and width, that one convolution alone reads, moved into its padding.

    As timm's Conv2dSame and TensorFlow pad: a convolution may pad more on one side than on the other.
    """
    readers = Counter(name for op in ops for name in {*op.inputs}) + Counter([result])
    pads = {op.name: op for op in ops if isinstance(op, Pad) and readers[op.name] == 1 and not any(op.padding[4:])}
    merged = set()
    for op in ops:
        pad = pads.get(op.inputs[0]) if isinstance(op, Conv) else None
        if isinstance(op, Conv) and pad is not None:
            left, right, top, bottom = pad.padding[:4]
            before = op.padding
            op.padding = (before[0] + top, before[1] + left, before[2] + bottom, before[3] + right)
            op.inputs = pad.inputs
            merged.add(pad.name)
    return [op for op in ops if op.name not in merged]


def _source(node: fx.Node) -> fx.Node:
    """What a node with one input reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _name(node: fx.Node, taken: dict[str, Grid | None]) -> str:
    """The module's path at its first call, else fx's name."""
    path = str(node.target)
    return path if node.op == "call_module" and path not in taken else node.name


def _product(
    name: str, module: QuantMatMul, node: fx.Node, names: dict[fx.Node, str], grids: dict[str, Grid | None]
) -> Product:
    """The product that a node is, of two tensors on grids."""
    operands = [names[n] for n in node.all_input_nodes]
    both = [_codes(grids[operand], name) for operand in operands]
    depth = (shape(node.all_input_nodes[0]) or (0,))[-1]
    return Product(name, operands, module.right_quantizer.choices[0], module.factor, depth, both)


def _codes(grid: Grid | None, name: str) -> Grid:
    if grid is None:
        raise ValueError(
            f"{name} expects its input on the grid of a site, but reads real numbers; materialise it again"
        )
    return grid

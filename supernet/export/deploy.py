"""From a materialised subnet to a deployed network: quantize, then fold.

The weight codes are those of the trained module (`encode(w)`), up to the sign of the BatchNorm's gain; the normalisation goes into
per-channel scales and an int32 bias. Folding first and quantizing then would give another network.

| gain gamma  | codes, zero-point                                | weight scale                       |
|-------------|--------------------------------------------------|------------------------------------|
| > 0         | q, z                                             | s_w gamma / sqrt(var + eps)        |
| < 0         | -q, -z; where they do not fit b bits: ~q, ~z     | s_w |gamma| / sqrt(var + eps)      |
| = 0         | 0, 0                                             | such that the bias is held exactly |

(~q - ~z = -(q - z), so the bitwise complement negates what has no room for a plain minus.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from supernet.elastic.layers import QuantConv2d, QuantLayer
from supernet.export.graph import Conv, Deployed, Grid, Layer, Linear, Move, Op
from supernet.export.lower import At, activation_of, is_free, is_move, lower, shape
from supernet.quant.quantizer import Quantizer

INT32 = 2**31 - 1
BIAS_STEPS = 1 << 20
NEGLIGIBLE = 2.0**-10
"""A channel whose largest possible contribution is below this share of an output step is constant."""


@torch.no_grad()
def deploy(subnet: nn.Module, example: Float[Tensor, "n ..."]) -> Deployed:
    """The deployed form of a materialised subnet: BatchNorm folded, biases in int32, integer codes between operators.

    Args:
        subnet: what `SuperNet.materialise` returns, with sites; its BatchNorm statistics are used as they are.
        example: inputs to trace shapes with; the first one counts.

    Raises:
        ValueError: an operator that the exporter does not know, a BatchNorm that does not follow a layer alone, a grid that is not integer,
            a bias beyond int32.
    """
    flat = _flatten(copy.deepcopy(subnet).eval())
    example = example[:1]
    ShapeProp(flat).propagate(torch.cat([example, example]))
    plan = _Plan(flat)
    plan.drop_free()
    plan.expand_inputs()
    folded = plan.fold_norms()
    plan.hoist_quantizers()
    plan.absorb()
    return plan.build(example, folded)


class _Tracer(fx.Tracer):
    """Everything flat but what is quantized, what is normalised, and torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantLayer | Quantizer | nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _flatten(subnet: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(subnet, _Tracer().trace(subnet))
    except Exception as error:  # a forward pass may raise anything when it is given a proxy
        raise ValueError(
            f"{type(subnet).__name__} cannot be traced ({str(error).splitlines()[0]}), so it cannot be exported; a forward pass must not branch on its data"
        ) from error


@dataclass
class _Fused:
    """What goes into one operator beside itself."""

    norm: nn.Module | None = None
    activation: str | None = None
    quantizer: Quantizer | None = None
    site: str | None = None


class _Plan:
    """The flat graph, rewritten step by step until each node is one operator."""

    def __init__(self, flat: fx.GraphModule) -> None:
        self.flat, self.graph = flat, flat.graph
        self.fused: dict[fx.Node, _Fused] = {}
        norms = [n for n in self.graph.nodes if isinstance(self.module(n), nn.modules.batchnorm._BatchNorm)]
        self.norms = len(norms)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.flat.get_submodule(str(node.target)) if node.op == "call_module" else None

    def sole_user(self, node: fx.Node) -> fx.Node | None:
        """The only reader of a tensor that only one reads."""
        users = list(node.users)
        return users[0] if len(users) == 1 else None

    def into(self, node: fx.Node) -> _Fused:
        """What is fused into a node's operator."""
        return self.fused.setdefault(node, _Fused())

    def erase(self, node: fx.Node) -> None:
        """Take a node with one input out; its readers read its input."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def insert(self, path: str, after: fx.Node, shape_of: fx.Node) -> fx.Node:
        """A new node that calls the module at `path` on the output of `after`; nothing reads it yet."""
        with self.graph.inserting_after(after):
            made = self.graph.call_module(path, (after,))
        made.meta = dict(shape_of.meta)
        return made

    # -- rewriting -------------------------------------------------------------------------------------------------------------
    def drop_free(self) -> None:
        """Take out what does nothing in evaluation: identities, dropout, unread nodes."""
        for node in list(self.graph.nodes):
            if is_free(node, self.module(node)):
                self.erase(node)
        self.graph.eliminate_dead_code()

    def expand_inputs(self) -> None:
        """Give every input quantizer that is at work a node of its own; equal readers of one tensor are left apart."""
        for node in list(self.graph.nodes):
            layer = self.module(node)
            if isinstance(layer, QuantLayer) and not layer.input_quantizer.row[4]:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                made = self.insert(f"{node.target}.input_quantizer", source, source)
                node.args = (made, *node.args[1:])

    def fold_norms(self) -> int:
        """Attach each BatchNorm to the layer that it alone follows; how many there were."""
        left = []
        for node in list(self.graph.nodes):
            norm = self.module(node)
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if not isinstance(self.module(source), QuantLayer) or len(source.users) != 1 or self.into(source).norm or norm.running_mean is None:
                left.append(str(node.target))
                continue
            self.into(source).norm = norm
            act = getattr(norm, "act", None)  # timm's BatchNormAct2d: its activation follows
            if isinstance(act, nn.Module) and not isinstance(act, nn.Identity):
                made = self.insert(f"{node.target}.act", node, node)
                node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
            source.meta = dict(node.meta)
            self.erase(node)
        if left:
            raise ValueError(
                f"every BatchNorm must follow one convolution or linear layer alone and track statistics, but {len(left)} of {self.norms} cannot be "
                f"folded: {', '.join(left)}; move them behind a layer, or leave them out"
            )
        return self.norms

    def hoist_quantizers(self) -> None:
        """Move quantizers before operators that only move values, so that those move codes and the producer is fused."""
        for node in reversed(list(self.graph.nodes)):
            if not isinstance(self.module(node), Quantizer):
                continue
            source = node.args[0]
            while isinstance(source, fx.Node) and is_move(source, self.module(source)) and self.sole_user(source) is node and self._real(source):
                before = source.args[0]
                assert isinstance(before, fx.Node)
                node.replace_all_uses_with(source)
                before.append(node)
                node.args, source.args = (before,), (node, *source.args[1:])
                node.meta = dict(before.meta)
                source = before

    def _real(self, node: fx.Node) -> bool:
        """Whether a moved tensor comes from real numbers, not from codes."""
        while is_move(node, self.module(node)):
            node = node.args[0]  # type: ignore[assignment]
        return not isinstance(self.module(node), Quantizer)

    def absorb(self) -> None:
        """Take an activation followed by a quantizer, or a quantizer alone, into the operator whose only reader it is."""
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "output", "get_attr") or is_move(node, self.module(node)) or isinstance(self.module(node), Quantizer):
                continue
            user = self.sole_user(node)
            function = activation_of(user, self.module(user)) if user else None
            last = self.sole_user(user) if user and function in ("relu", "relu6") else user
            quantizer = self.module(last) if last else None
            if last is None or not isinstance(quantizer, Quantizer):
                continue
            self.into(node).quantizer, self.into(node).site = quantizer, str(last.target)
            assert user is not None
            if last is not user:
                self.into(node).activation = function
                self.erase(user)
            self.erase(last)

    # -- operators -------------------------------------------------------------------------------------------------------------
    def build(self, example: Tensor, folded: int) -> Deployed:
        """The operators of the rewritten graph, in order."""
        names: dict[fx.Node, str] = {}
        grids: dict[str, Grid | None] = {}
        ops: list[Op] = []
        source, result = "", ""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                source = self._only(source, node.name, "input")
                names[node], grids[node.name] = node.name, None
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise ValueError(f"the network must return one tensor to be exported, got {type(node.args[0]).__name__}; wrap it in a module that does")
                result = names[node.args[0]]
                classes = (shape(node.args[0]) or (1,))[-1]
            elif shape(node) is not None:  # sizes and the like are no tensors; they are constants by now
                names[node] = self._name(node, set(grids))
                for op in self._operators(node, names, grids):
                    grids[op.name] = grids[op.inputs[0]] if isinstance(op, Move) else op.grid
                    ops.append(op)
        return Deployed(ops, source, result, example, folded, classes)

    @staticmethod
    def _only(before: str, name: str, what: str) -> str:
        if before:
            raise ValueError(f"the network must have one {what} to be exported, it has {before} and {name}")
        return name

    def _name(self, node: fx.Node, taken: set[str]) -> str:
        """The module's path where one module is called once, else fx's name."""
        path = str(node.target)
        return path if node.op == "call_module" and path not in taken else node.name

    def _operators(self, node: fx.Node, names: dict[fx.Node, str], grids: dict[str, Grid | None]) -> list[Op]:
        fused, module = self.fused.get(node, _Fused()), self.module(node)
        quantizer = module if isinstance(module, Quantizer) else fused.quantizer
        grid = None
        if quantizer is not None:
            _check(quantizer, names[node])
            grid = Grid.of(quantizer).after(fused.activation)
        inputs = [n for n in node.all_input_nodes if n in names]
        if isinstance(module, QuantLayer):
            before = grids[names[inputs[0]]]
            if before is None:
                raise ValueError(f"{names[node]} reads real numbers, but its input quantizer expects a site before it; materialise the subnet again")
            ops: list[Op] = [fold(names[node], module, fused.norm, (names[inputs[0]], before), grid)]
        else:
            at = At(names[node], shape(inputs[0]) or (), shape(node) or ())
            ops = lower(node, module, at, names)
        computing = [op for op in ops if not isinstance(op, Move)]
        if grid is not None:
            computing[-1].grid, computing[-1].activation = grid, fused.activation
            computing[-1].site = fused.site or str(node.target)
        return ops


def _check(quantizer: Quantizer, name: str) -> None:
    if not quantizer.integer or len(quantizer.choices) != 1:
        raise ValueError(f"{name} must be quantized by one choice on an integer grid to be exported, got {[str(c) for c in quantizer.choices]}")
    if not (torch.isfinite(quantizer.scale).all() and torch.isfinite(quantizer.zero_point).all() and (quantizer.scale > 0).all()):
        raise ValueError(f"{name} needs positive finite scales, got {quantizer.scale.tolist()[:4]}; calibrate the supernet first")


# -- folding -------------------------------------------------------------------------------------------------------------------
def fold(name: str, module: QuantLayer, norm: nn.Module | None, source: tuple[str, Grid], grid: Grid | None) -> Layer:
    """One layer with its BatchNorm, in integers; see the table at the head of this file.

    Args:
        name: of the operator.
        module: the trained layer.
        norm: the BatchNorm behind it.
        source: name and grid of its input.
        grid: of its output, if it has one.

    Raises:
        ValueError: a bias beyond int32, or a layer that the file format cannot hold.
    """
    quantizer = module.weight_quantizer
    _check(quantizer, f"the weight of {name}")
    weight = module.weight.double()
    scale, zero, low, high = quantizer.parameters_of(module.weight)
    codes = quantizer.encode(module.weight).long()
    scale, zero = scale.flatten().double(), zero.flatten().long()
    bias = None if module.bias is None else module.bias.double()
    if norm is not None:
        gain, offset = _gain(norm)
        codes, zero = _signed(codes, zero, gain, quantizer.choices[0].bits)
        scale, bias = scale * gain.abs(), offset + (0 if bias is None else bias * gain)
        weight = weight * gain.view(-1, *[1] * (weight.dim() - 1))
    elif len(quantizer.scale) == 1:
        scale, zero = scale[:1], zero[:1]
    layer = _shell(name, module, source, quantizer.choices[0].bits)
    codes, zero, scale, layer.constant = _without_dead(codes, zero, scale, bias, layer.reach, source[1], grid)
    scale, layer.fine = scale.float(), _fine(codes, zero)
    steps = None if bias is None else torch.round(bias / (scale * source[1].scale / layer.fine).double())
    shift = None if bias is None else bias.float()
    layer.hold(codes.short(), zero.short(), scale, None if steps is None else steps.long(), weight.float(), shift)
    worst = layer.bound * layer.fine + (0 if steps is None else int(steps.abs().max()))
    if worst > INT32:
        raise ValueError(
            f"{name} needs sums up to {worst:.3g}, more than an int32 holds (bias up to {float(bias.abs().max()) if bias is not None else 0:.3g} in steps of "
            f"{float(scale.min()) * source[1].scale:.3g}); give its input or its weight fewer bits, or recalibrate its BatchNorm"
        )
    return layer


def _gain(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """y = gain x + offset, in float64, for a BatchNorm in evaluation."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    mean, deviation = norm.running_mean.double(), torch.sqrt(norm.running_var.double() + norm.eps)
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    return gamma / deviation, beta - mean * gamma / deviation


def _signed(codes: Tensor, zero: Tensor, gain: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and zero-points negated in the channels of negative gain, within `bits` bits."""
    top = (1 << (bits - 1)) - 1
    rows = codes.flatten(1)
    fits = (-rows.amin(1) <= top) & (-zero <= top)
    negative = gain < 0
    shape = (-1, *[1] * (codes.dim() - 1))
    for these, change in ((negative & fits, torch.neg), (negative & ~fits, torch.bitwise_not)):
        codes = torch.where(these.view(shape), change(codes), codes)
        zero = torch.where(these, change(zero), zero)
    return codes, zero


def _fine(codes: Tensor, zero: Tensor) -> int:
    """The largest power of two by which centred codes can be multiplied and stay within +-64.

    At 2 bits the unit of the sums is so coarse that a bias rounded to it moves a 8-bit site by several steps; codes below 8 bits have room in an int8
    for a finer one. 64, not 127: two products of uint8 and int8 then still fit the int16 in which processors without VNNI add them.
    """
    largest = int((codes - zero.view(-1, *[1] * (codes.dim() - 1))).abs().max())
    return 1 << max(0, (64 // max(largest, 1)).bit_length() - 1)


def _without_dead(
    codes: Tensor, zero: Tensor, scale: Tensor, bias: Tensor | None, reach: int, before: Grid, grid: Grid | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Channels of gain 0, or of so small a gain that no input can move the output visibly, become constant: codes 0.

    Their scale is free then; it is chosen so that the bias takes 2^20 steps and is held to seven digits (scale 1 would round it to whole input
    steps).
    """
    shape = (-1, *[1] * (codes.dim() - 1))
    centred = (codes - zero.view(shape)).abs().flatten(1).sum(1).double()
    contribution = centred * reach * scale * before.scale
    step = grid.scale * NEGLIGIBLE if grid is not None else 0.0
    tiny = (scale == 0) | ((contribution < step) & (centred > 0) if bias is not None else torch.zeros_like(scale, dtype=torch.bool))
    if len(scale) != len(codes) or not tiny.any():
        return codes, zero, scale, 0
    assert bias is not None
    free = torch.where(bias == 0, 1.0, bias.abs() / (before.scale * BIAS_STEPS))
    codes = torch.where(tiny.view(shape), 0, codes)
    return codes, torch.where(tiny, 0, zero), torch.where(tiny, free, scale), int(tiny.sum())


def _shell(name: str, module: QuantLayer, source: tuple[str, Grid], bits: int) -> Layer:
    """The operator without its tensors."""
    reach = max(source[1].high - source[1].zero, source[1].zero - source[1].low)
    if not isinstance(module, QuantConv2d):
        return Linear(name, [source[0]], bits, reach)
    if module.padding_mode != "zeros":
        raise ValueError(f"{name} pads with padding_mode={module.padding_mode!r}; only zeros can be exported")
    stride, dilation = (tuple(getattr(module, what)) for what in ("stride", "dilation"))
    return Conv(name, [source[0]], bits, reach, stride, _padding(module), dilation, module.groups)


def _padding(module: QuantConv2d) -> tuple[int, int, int, int]:
    """Rows above, columns left, rows below, columns right."""
    if not isinstance(module.padding, str):
        top, left = module.padding
        return top, left, top, left
    whole = [d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return whole[0] // 2, whole[1] // 2, whole[0] - whole[0] // 2, whole[1] - whole[1] // 2

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
from supernet.elastic.wrap import trace
from supernet.export.graph import Conv, Deployed, Grid, Layer, Linear, Op
from supernet.export.lower import activation_of, is_free, is_move, lower
from supernet.quant.quantizer import Quantizer

INT32 = 2**31 - 1
BIAS_STEPS = 1 << 20
NEGLIGIBLE = 2.0**-10
"""A channel whose largest possible contribution is below this share of an output step is constant."""


def deploy(subnet: nn.Module, example: Float[Tensor, "n ..."]) -> Deployed:
    """The deployed form of a materialised subnet: BatchNorm folded, biases in int32, integer codes between operators.

    Args:
        subnet: what `SuperNet.materialise` returns, with sites; its BatchNorm statistics are used as they are.
        example: inputs to trace shapes with; the first one counts.

    Raises:
        ValueError: an operator that the exporter does not know, a BatchNorm that does not follow a layer alone, a grid that is not integer,
            a bias beyond int32.
    """
    flat = trace(copy.deepcopy(subnet).eval())
    example = example[:1]
    with torch.no_grad():
        ShapeProp(flat).propagate(torch.cat([example, example]))
    plan = _Plan(flat)
    plan.drop_free()
    plan.expand_inputs()
    folded = plan.fold_norms()
    plan.hoist_quantizers()
    plan.absorb()
    return plan.build(example, folded)


@dataclass
class _Fused:
    """What goes into one operator beside itself."""

    norm: nn.Module | None = None
    activation: str | None = None
    quantizer: Quantizer | None = None


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
            if not isinstance(quantizer, Quantizer) or node in self.fused and self.fused[node].quantizer:
                continue
            self.into(node).quantizer = quantizer
            assert user is not None and last is not None
            if last is not user:
                self.into(node).activation = function
                self.erase(user)
            self.erase(last)

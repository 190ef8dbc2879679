"""How tensors flow through a whole network: which operator reads and writes which tensor in memory.

The network is traced flat, at full depth, with its sites in place. What is a tensor in memory, and with how many bits
it lies there, is `supernet.costs.peak`'s convention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from supernet.costs.peak import Held, Step
from supernet.elastic.attention import QuantMatMul
from supernet.elastic.layers import QuantLayer
from supernet.elastic.stage import Stage
from supernet.elastic.wrap import ACTIVATION_CALLS, ACTIVATIONS, evaluating
from supernet.factors import Condition
from supernet.quant.quantizer import Quantizer

REAL = 32
"""Bits of a number that is not quantized."""
BATCH_NORM = nn.modules.batchnorm._BatchNorm
VIEWS: tuple[Callable[..., object], ...] = (
    *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze),
    *(torch.chunk, torch.split, torch.unbind),
)
VIEW_METHODS = (
    *("flatten", "view", "reshape", "contiguous", "transpose", "permute", "squeeze", "unsqueeze", "expand"),
    *("chunk", "split", "unbind"),
)
MOVES = (nn.MaxPool2d, nn.ZeroPad2d)
MOVE_CALLS: tuple[Callable[..., object], ...] = (operator.getitem, F.pad, F.max_pool2d)
ADDITIONS: tuple[Callable[..., object], ...] = (operator.add, operator.iadd, torch.add)
ADDITION_METHODS = ("add", "add_")


@dataclass(eq=False)
class Value:
    """A tensor in memory.

    Attributes:
        elements: of one example.
        maker: the operator that wrote it; None for the network's input.
        site: bits of the site that it lies on; 0: on none.
        origin: of what only moves values, the tensor that they came from.
        readers: operators that read it, each with the dimension that quantizes what it reads ("": none).
    """

    elements: int
    maker: Op | None = None
    site: int = 0
    origin: Value | None = None
    readers: list[tuple[Op, str]] = field(default_factory=list)

    @property
    def bits(self) -> int | str:
        """Bits of each element, or the name of the dimension that decides them."""
        if self.origin is not None and (self.origin.site or self.origin.origin):
            return self.origin.bits
        asked = list(self._asked())
        return self.site or (asked[0] if len(asked) == 1 and asked[0] else REAL)

    def _asked(self) -> Iterator[str]:
        """What quantizes the tensor for each of its readers, looking through what only moves values."""
        for op, gene in self.readers:
            yield from op.written._asked() if op.moves and op.written else [gene]


@dataclass(eq=False)
class Op:
    """One operator.

    Attributes:
        name: path of the module, or name of the node.
        path: of the innermost module around it.
        module: what it calls, if that is a module.
        adds: it adds tensors.
        moves: it only moves values.
        reads: tensors, in the order of its arguments.
        written: the tensor that it writes.
    """

    name: str
    path: str
    module: nn.Module | None = None
    adds: bool = False
    moves: bool = False
    reads: list[Value] = field(default_factory=list)
    written: Value | None = None


def flow(model: nn.Module, example: Tensor) -> list[Op]:
    """The operators of a network that was swapped (and has its sites), in order of execution.

    Raises:
        ValueError: the forward pass cannot be traced.
    """
    try:
        with evaluating(model):
            flat = fx.GraphModule(model, _Tracer().trace(model))
            run = _Run(flat)
            run.run(example)
    except Exception as error:  # a forward pass may raise anything when it is given a proxy
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{type(model).__name__} cannot be traced as a whole ({reason})") from error
    return run.ops


def steps(ops: Iterable[Op], condition: Callable[[str], Condition]) -> tuple[Step, ...]:
    """What is held while each operator runs.

    Args:
        ops: of `flow`.
        condition: under which conditions the module at a path runs.
    """
    order = {op: t for t, op in enumerate(ops)}
    values = {v for op in order for v in [*op.reads, op.written] if v is not None}
    born = {v: -1 if v.maker is None else order[v.maker] for v in values}
    dead = {v: max([born[v], *(order[op] for op, _ in v.readers)]) for v in values}
    made = []
    for op, t in order.items():
        over = op.written if any(dead[v] == t and _takes(v, op) for v in op.reads) else None
        held = [Held(v.elements, v.bits) for v in values if born[v] <= t <= dead[v] and v is not over]
        made.append(Step(op.name, tuple(sorted(held, key=str)), condition(op.path)))
    return tuple(made)


def _takes(operand: Value, op: Op) -> bool:
    """Whether an addition may write its outcome where an operand lies; choices of a dimension have at most 8 bits."""
    made, room = op.written, operand.bits
    if not op.adds or made is None or made.elements > operand.elements or isinstance(room, str):
        return False
    return isinstance(made.bits, str) or made.bits <= room


def sharing(ops: Iterable[Op]) -> list[list[str]]:
    """Names of the layers that read the same tensor, for each tensor that several layers read."""
    layers = [op for op in ops if isinstance(op.module, QuantLayer)]
    read: dict[Value, list[str]] = {}
    for op in layers:
        named = read.setdefault(op.reads[0], [])
        named += [op.name] if op.name not in named else []
    return [named for named in read.values() if len(named) > 1]


def adding(ops: Iterable[Op]) -> list[list[str]]:
    """Names of the layers whose outcomes meet in an addition, for each addition of several layers' outcomes."""
    found = []
    for op in ops:
        makers = [_maker(value) for value in op.reads] if op.adds else []
        names = [maker.name for maker in makers if maker is not None and isinstance(maker.module, QuantLayer)]
        found += [names] if len(set(names)) > 1 else []
    return found


def _maker(value: Value) -> Op | None:
    """The operator that computed a tensor, looking through what only moves values."""
    return _maker(value.origin) if value.origin is not None else value.maker


class _Tracer(fx.Tracer):
    """Everything flat but what is quantized, what is normalised, and what has no parts."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, QuantLayer | QuantMatMul | Quantizer | BATCH_NORM) or hasattr(m, "only_moves")
        plain = not any(True for _ in m.children()) and not any(True for _ in m.parameters(recurse=False))
        return kept or plain or (super().is_leaf_module(m, module_qualified_name) and not isinstance(m, Stage))

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **options: Any) -> Any:
        """A node; an optional argument of the network is none, but has its default."""
        if kind == "placeholder" and args:
            return args[0]
        return super().create_proxy(kind, target, args, *rest, **options)


class _Run(fx.Interpreter):
    """Runs a flat graph, and keeps for each node that depends on the input the tensor in memory that holds it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.value: dict[fx.Node, Value] = {}
        self.ops: list[Op] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; it is a tensor's own, a step inside the operator before it, or a view."""
        before = [self.env[source] for source in n.all_input_nodes[:1]]
        out = super().run_node(n)
        sources = [source for source in n.all_input_nodes if source in self.value]
        if n.op == "placeholder":
            self.value[n] = Value(out[0].numel())
        elif n.op == "output" or not sources or not _tensors(out):
            return out
        elif out is before[0] or self._views(n) or self._inside(n, sources):
            self.value[n] = self.value[sources[0]]
            module = self._module(n)
            if isinstance(module, Quantizer):
                self.value[n].site = module.choices[0].bits
        else:
            self._operate(n, sources, out)
        return out

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(n.target)) if n.op == "call_module" else None

    def _views(self, n: fx.Node) -> bool:
        """Whether the node gives a view of the tensor that it takes, or several."""
        if n.op == "call_method":
            return n.target in VIEW_METHODS
        if n.target is operator.getitem:
            return not isinstance(self.env[n.all_input_nodes[0]], Tensor)
        return n.target in VIEWS or isinstance(self._module(n), nn.Flatten)

    def _inside(self, n: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether the node happens inside the operator that makes its input, which nothing else reads."""
        module, value = self._module(n), self.value[sources[0]]
        fuses = isinstance(module, (*ACTIVATIONS, BATCH_NORM, Quantizer)) or (
            n.target in ACTIVATION_CALLS or (n.op == "call_method" and n.target in ("relu", "relu_"))
        )
        alone = len(sources) == 1 and len(sources[0].users) == 1 and not value.readers and not value.site
        return fuses and alone

    def _operate(self, n: fx.Node, sources: list[fx.Node], out: Any) -> None:
        module = self._module(n)
        stack = list(n.meta.get("nn_module_stack", {}))
        name = str(n.target) if module is not None else n.name
        op = Op(name, name if module is not None else (stack[-1] if stack else ""), module)
        op.adds = n.target in ADDITIONS or (n.op == "call_method" and n.target in ADDITION_METHODS)
        op.moves = n.target in MOVE_CALLS or isinstance(module, MOVES) or getattr(module, "only_moves", False)
        genes = [f"{name}.left.input", f"{name}.right.input"] if isinstance(module, QuantMatMul) else [""]
        genes = [f"{name}.input"] if isinstance(module, QuantLayer) else genes
        for k, source in enumerate(sources):
            op.reads.append(self.value[source])
            self.value[source].readers.append((op, genes[min(k, len(genes) - 1)]))
        elements = sum(t[0].numel() for t in _tensors(out))
        op.written = Value(elements, op, origin=op.reads[0] if op.moves else None)
        self.value[n] = op.written
        self.ops.append(op)


def _tensors(out: Any) -> list[Tensor]:
    """The real tensors that a node gives."""
    many = out if isinstance(out, list | tuple) else [out]
    return [t for t in many if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0]

"""Latency of every subnet as a sum of tables: which pieces a subnet runs is read off a few deployed ones, their times
off a table.

A few *landmarks* are deployed: subnets that between them have every kind of choice at every layer, and each elastic
depth once. What a piece depends on follows from whose it is: a layer's own operator on its weight's choice (how the
weight is stored), what quantizes a layer's input - an operator before it, or the clamp behind its producer - on that
input's choice, all else on depth alone. `Anatomy.counted` counts the pieces of one subnet by deploying it, to compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from torch import nn

from supernet.config import Layer, QuantConfig, SubnetConfig
from supernet.cost import Factors, Table
from supernet.elastic.attention import QuantMatMul
from supernet.elastic.layers import QuantLayer
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.graph import Deployed, Grid
from supernet.export.pieces import Piece, pieces
from supernet.export.profile import Profile
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer
from supernet.space import Indices

Owner = tuple[str, bool]
KIND = "latency"


class Writes(Protocol):
    """What is asked of a profile here."""

    def loadable(self, deployed: Deployed) -> onnx.ModelProto:
        """The file's content."""
        ...


@dataclass(frozen=True)
class Landmark:
    """One deployed subnet: its pieces by owner."""

    pieces: dict[Owner, Counter[str]]


@dataclass
class Anatomy:
    """Which pieces the subnets of one supernet run.

    Args:
        net: the supernet, calibrated.
        profile: how subnets are written.

    Attributes:
        models: a model of each piece, by key.
        names: an operator that is such a piece, by key.
        memory: bytes of weights and tensors of the largest subnet.
        landmarks: rows of the subnets that were deployed; the first is the largest.
        fewest: of the largest architecture too; inputs below 8 bits wherever there is a choice.
    """

    net: SuperNet
    profile: Writes
    models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    memory: int = 0
    landmarks: list[Indices] = field(default_factory=list)
    fewest: Indices = field(init=False)

    def __post_init__(self) -> None:
        space, layers = self.net.space, [layer for layer in self.net.layers if layer.kind != "matmul"]
        self.largest = np.asarray(space.largest().row)
        self._weights = {layer.weight: _classes(self._weight(layer)) for layer in layers}
        self._quantizers = _quantizers(self.net)
        self._inputs = {gene: _classes(self._input(gene)) for gene in self._quantizers}
        self._by_weight = self._row_of(self._weights)
        self._by_input = self._row_of(self._inputs)
        last = self.fewest = self.landmarks[-1]
        self._depths = {}
        for name in self.net.elastic_depths:
            at = space.position[name]
            for i in range(len(space.dimensions[at].choices) - 1):
                row = last.copy()
                row[at] = i
                self._depths[at, i] = self._landmark(row)

    # -- landmarks ----------------------------------------------------------------------------------------------------
    def _weight(self, layer: Layer) -> list[Any]:
        """What tells the choices of a weight apart: how codes, zero-points and scales are stored."""
        found: list[Any] = []
        for c in self._choices(layer.weight):
            width = c.bits if isinstance(c.format, Integer) else 8
            stored: Any = c.format
            if isinstance(self.profile, Profile):
                stored = min(wide for wide in self.profile.containers if wide >= width)
            shifted = not c.symmetric and width == 8  # narrower codes are centred in an int8
            found.append((stored, shifted, c.granularity if shifted or not layer.behind_norm else None))
        return found

    def _input(self, name: str) -> list[Any]:
        """What tells the choices of an input apart: whether it is taken as it is, else whether codes need a clamp."""
        quantizer = self.net.quantizers[self._quantizers[name]]
        return [_form(quantizer, k) for k in range(len(self._choices(name)))]

    def _choices(self, name: str) -> list[QuantConfig]:
        choices = self.net.space.dimensions[self.net.space.position[name]].choices
        return [c for c in choices if isinstance(c, QuantConfig)]

    def _row_of(self, classes: Mapping[str, list[int]]) -> list[Landmark]:
        """Landmarks of the largest architecture, the n-th of which has the n-th class of choices everywhere (of a class
        the choice of most bits)."""
        made = []
        for n in range(max(max(of) for of in classes.values()) + 1):
            row = self.largest.copy()
            for name, of in classes.items():
                row[self.net.space.position[name]] = len(of) - 1 - of[::-1].index(n % (max(of) + 1))
            made.append(self._landmark(row))
        return made

    def _landmark(self, row: Indices) -> Landmark:
        self.landmarks.append(row)
        found: dict[Owner, Counter[str]] = {}
        memory = 0
        for piece in self.of(row):
            self.models.setdefault(piece.key, piece.model)
            self.names.setdefault(piece.key, piece.name + (" clamp" if piece.clamp else ""))
            found.setdefault((piece.owner, piece.clamp), Counter())[piece.key] += 1
            memory += _bytes(piece)
        self.memory = max(self.memory, memory)
        return Landmark(found)

    def of(self, config: SubnetConfig | Indices) -> list[Piece]:
        """The pieces of one subnet, by deploying it."""
        deployed = deploy(self.net.materialise(config).eval(), self.net.example)
        return pieces(deployed, self.profile.loadable(deployed))

    def counted(self, config: SubnetConfig | Indices, seconds: Mapping[str, float]) -> float:
        """Seconds of one subnet, added up over its own pieces, without the call of the session."""
        return sum(seconds[piece.key] for piece in self.of(config))

    # -- the sum of tables --------------------------------------------------------------------------------------------
    def factors(self, seconds: Mapping[str, float], overhead: float = 0.0) -> Factors:
        """Seconds of every subnet.

        Args:
            seconds: of each piece, by key.
            overhead: seconds of each run, whatever runs.
        """

        def spent(landmark: Landmark, owner: Owner) -> float:
            return sum(n * seconds[k] for k, n in landmark.pieces.get(owner, Counter()).items())

        space = self.net.space
        weights = {layer.name: layer.weight for layer in self.net.layers if layer.weight in self._weights}
        inputs = {path: gene for gene, path in self._quantizers.items()}
        terms: list[tuple[tuple[int, ...], Table]] = [((), np.array(overhead))]
        every = {owner for landmark in (*self._by_weight, *self._by_input) for owner in landmark.pieces}
        for owner in sorted(every - {("", False)}):
            if owner[0] in weights and not owner[1]:
                gene, of, where = weights[owner[0]], self._weights, self._by_weight
            elif owner[0] in inputs:
                gene, of, where = inputs[owner[0]], self._inputs, self._by_input
            else:
                terms.append(self._gated(owner, (), np.array(spent(self._by_weight[0], owner))))
                continue
            classes = of[gene]
            table = np.array([spent(where[n], owner) for n in classes])
            if (table == table[0]).all():
                terms.append(self._gated(owner, (), np.array(table[0])))
            else:
                terms.append(self._gated(owner, (space.position[gene],), table))
        terms += self._others(lambda landmark: spent(landmark, ("", False)))
        return Factors(tuple(term for term in terms if term[1].any()))

    def _gated(self, owner: Owner, dims: tuple[int, ...], table: Table) -> tuple[tuple[int, ...], Table]:
        """The table, and 0 at depths at which nothing of this owner runs."""
        for at in dict.fromkeys(at for at, _ in self._depths):
            size = len(self.net.space.dimensions[at].choices)
            on = np.array([owner in self._depths[at, i].pieces for i in range(size - 1)] + [True], dtype=float)
            if not on.all():
                dims, table = (*dims, at), table[..., None] * on
        return dims, table

    def _others(self, spent: Callable[[Landmark], float]) -> list[tuple[tuple[int, ...], Table]]:
        """Pieces without an owner: those of the largest architecture, and how many fewer each depth has."""
        whole = spent(self._by_weight[0])
        terms: list[tuple[tuple[int, ...], Table]] = [((), np.array(whole))]
        for at in dict.fromkeys(at for at, _ in self._depths):
            size = len(self.net.space.dimensions[at].choices)
            less = [spent(self._depths[at, i]) - whole for i in range(size - 1)]
            terms.append(((at,), np.array([*less, 0.0])))
        return terms


def _quantizers(net: SuperNet) -> dict[str, str]:
    """Path of the quantizer of every input, by its gene; a product of activations has two inputs and no weight."""
    found: dict[str, str] = {}
    for layer in net.layers:
        module = net.model.get_submodule(layer.name)
        assert isinstance(module, QuantLayer | QuantMatMul)
        found |= {f"{layer.name}.{gene}": f"{layer.name}.{path}" for gene, path in module.genes.items()}
    return {gene: path for gene, path in found.items() if not gene.endswith(".weight")}


def _classes(forms: list[Any]) -> list[int]:
    """Number of the form of each choice; the last choice, of most bits, has form 0, the first one the last form."""
    order = list(dict.fromkeys(reversed(forms)))
    return [order.index(form) for form in forms]


def _form(quantizer: Quantizer, choice: int) -> tuple[bool, ...]:
    if quantizer.bypass and quantizer.choices[choice].bits >= quantizer.bypass:
        return ()
    grid = Grid.of(quantizer.only(choice))
    return tuple(grid.after(activation).clipped for activation in (None, "relu", "relu6"))


def _bytes(piece: Piece) -> int:
    """Bytes of a piece's weights and output."""
    (output,) = piece.model.graph.output
    elements = int(np.prod([d.dim_value or 1 for d in output.type.tensor_type.shape.dim]))
    wide = 4 if output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT else 1
    return elements * wide + sum(len(tensor.raw_data) for tensor in piece.model.graph.initializer)


def materialised(net: SuperNet, profile: Writes, config: SubnetConfig | Indices) -> onnx.ModelProto:
    """A subnet as it would be written."""
    model: nn.Module = net.materialise(config).eval()
    return profile.loadable(deploy(model, net.example))

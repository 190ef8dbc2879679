"""Bytes of activations that a runtime holds at the same time: a maximum over the steps of an inference.

The convention is the least that an integer runtime gets by with:

| a tensor between operators                                         | is held with                              |
|--------------------------------------------------------------------|-------------------------------------------|
| read by one layer only                                             | the bits of that layer's input            |
| on a site (read by several, by an addition, pooling, a stage)      | the site's bits, whatever its readers ask |
| real (a transformer's stream, normalised tokens, logits)           | 32 bits                                   |

Sub-byte codes are packed. Normalisation, activation and requantization happen inside the operator before them, and a
layer that asks a site for fewer bits requantizes while it reads: none of them has a tensor of its own. A step holds
what it reads, what it writes, and whatever a later step still reads (the shortcut across a block); only an addition
writes over what it reads. Views (flatten, transposition) are no copies. One example, no weights, no accumulators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from supernet.factors import Condition, Factors, Table, Term, bits_of, gated
from supernet.space import Indices, SearchSpace


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory.

    Attributes:
        elements: of one example.
        bits: of an element; or the name of the dimension that decides them.
    """

    elements: int
    bits: int | str


@dataclass(frozen=True, slots=True)
class Step:
    """What is held while one operator runs.

    Attributes:
        name: of the operator.
        held: tensors.
        active_if: conjunction of (dimension, allowed choices) under which it runs.
    """

    name: str
    held: tuple[Held, ...]
    active_if: Condition = ()


@dataclass(frozen=True)
class Most:
    """The largest of several sums."""

    parts: tuple[Factors, ...]

    def value(self, indices: Indices) -> Table:
        """[n] largest sums of canonical rows [n, d]."""
        return np.max([part.value(indices) for part in self.parts], axis=0)

    def linear(self, limit: float) -> tuple[Table, Table]:
        """Each sum at most the limit."""
        return np.eye(len(self.parts)), np.full(len(self.parts), limit)


def peak_activation_bytes(space: SearchSpace, steps: Sequence[Step]) -> Most:
    """The most bytes of activations held at a time; see the head of this file.

    Steps that can never be the largest are left out: a step that runs whenever they run holds as much, whatever the
    bits.
    """
    steps = [replace(step, active_if=_real(space, step.active_if)) for step in steps]
    tables = [_bytes(space, step) for step in steps]
    kept: list[int] = []
    for i in sorted(range(len(steps)), key=lambda i: len(steps[i].active_if)):
        if not any(_covers(steps[k], tables[k], steps[i], tables[i]) for k in kept):
            kept = [k for k in kept if not _covers(steps[i], tables[i], steps[k], tables[k])] + [i]
    return Most(tuple(_sum(space, steps[i], tables[i]) for i in sorted(kept)))


def _real(space: SearchSpace, condition: Condition) -> Condition:
    """A condition without what always holds."""
    return tuple(
        (n, allowed) for n, allowed in condition if set(allowed) < set(space.dimensions[space.position[n]].choices)
    )


def _bytes(space: SearchSpace, step: Step) -> dict[str, Table]:
    """Bytes that a step holds, by the dimension that decides them; those that nothing decides under ""."""
    found: dict[str, Table] = {}
    for tensor in step.held:
        fixed = isinstance(tensor.bits, int)
        bits = np.array([float(tensor.bits)]) if isinstance(tensor.bits, int) else bits_of(space, tensor.bits)
        key = "" if fixed else str(tensor.bits)
        found[key] = found.get(key, 0.0) + np.array([math.ceil(tensor.elements * b / 8) for b in bits])
    return found


def _covers(big: Step, bigger: Mapping[str, Table], small: Step, smaller: Mapping[str, Table]) -> bool:
    nothing, when = np.zeros(1), dict(small.active_if)
    least = sum(float((bigger.get(g, nothing) - smaller.get(g, nothing)).min()) for g in {*bigger, *smaller})
    return least >= 0 and all(
        set(when.get(name, ())) <= set(allowed) and name in when for name, allowed in big.active_if
    )


def _sum(space: SearchSpace, step: Step, tables: Mapping[str, Table]) -> Factors:
    terms: list[Term] = []
    for gene, table in tables.items():
        terms.append(gated(space, step, (gene,), table) if gene else gated(space, step, (), table[0]))
    return Factors(tuple(terms))

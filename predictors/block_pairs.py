"""What the weights of one block do to the loss together and not each by itself: block-local pair terms (CLADO).

Deng et al., DAC 2025, arXiv:2307.05657: options ib (layer i at b bits) have single terms g_ib = L(ib) - L(0) and pair
terms W_(ib)(jc) = L(ib, jc) - L(ib) - L(jc) + L(0). With G of diagonal 2 g and off-diagonal W, 1/2 x' G x over
indicators x is the change of a quadratic loss exactly. All pairs of a ResNet-56 at three bit-widths are 13,000 passes;
inside blocks only, BRECQ's choice (Li et al., ICLR 2021), they are some hundred.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from predictors.layer_inputs import squares
from predictors.sensitivity import (
    Loss,
    Operand,
    Table,
    Tensorwise,
    evaluated,
    first,
    float_targets,
    monotone,
    priced,
    repaired,
    sites,
    switched_on,
)
from predictors.single_changes import checked, passed, single_changes
from supernet.artefacts import progress
from supernet.config import Layer, PerChannel
from supernet.cost import Factors, gated
from supernet.elastic.supernet import SuperNet

log = logging.getLogger(__name__)
Term = tuple[tuple[int, ...], Table]


class Member(NamedTuple):
    """One weight of a block."""

    layer: Layer
    gene: str
    operand: Operand


class BlockPairs:
    """Loss changes of single choices, and of every two weights of one block at few bits.

    A block is the innermost numbered module (`layer1.0`, `blocks.3`) with two or more layers. One choice of each
    bit-width stands for all forms of it (per-channel and symmetric where there is one): a pair term is scaled by how
    much larger the error of a form is than that of its stand-in. Above the bits of `bits` pairs count nothing. G of
    each block is made positive semi-definite (its negative eigenvalues dropped), since estimates of large changes may
    fall below zero together; options of one layer never meet, so their entries are 0 before and unused after that.

    Each layer's single scores are shared out among its pairs, and the sum is repaired like single scores: running
    minimum with the bits of either layer, and nothing below 0. So the terms are ordinary tables over two genes, and
    the integer program solves them exactly.

    Args:
        bits: bit-widths whose pairs are measured.
        base: scores all single choices, in the unit of the loss; None: their loss changes.
        images: most images used, also those of a base.
        runs: choices of each tensor that are run where there is no base (`predictors.single_changes`); None: all.
        loss: (logits, labels) -> mean over a batch; None: cross-entropy.

    Raises:
        ValueError: no bits, no images, or fewer than 2 runs.
    """

    def __init__(
        self,
        bits: Sequence[int] = (2, 3, 4),
        base: Tensorwise | None = None,
        images: int = 64,
        runs: int | None = 5,
        loss: Loss | None = None,
    ) -> None:
        if not bits or images < 1:
            raise ValueError(f"pairs need bits and 1 or more images, got bits={list(bits)} and images={images}")
        self.bits, self.base, self.images = tuple(bits), base, images
        self.runs, self.loss = checked(runs), loss or F.cross_entropy

    def __call__(self, net: SuperNet, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Factors:
        """Tables of single genes, of pairs of weights and of depths, measured on images or (images, labels).

        Raises:
            ValueError: no batches, or a score that is not finite.
        """
        images, labels = first(batches, self.images, next(net.parameters()).device)
        wanted = float_targets(net, images, labels)

        def rise(exact: Tensor, changed: Tensor) -> float:
            return float(self.loss(changed.double(), wanted) - self.loss(exact.double(), wanted))

        if self.base is None:
            singles = single_changes(net, images, rise, "loss change of single choices", self.runs)
        else:
            singles = self.base.scores(net, images, labels)
        singles = {gene: repaired(gene, singles[gene], operand.quantizer) for _, gene, operand in sites(net)}
        return priced(net, Factors(tuple(self._terms(net, images, rise, singles))), images)

    def _terms(
        self, net: SuperNet, images: Tensor, rise: Callable[[Tensor, Tensor], float], singles: dict[str, Table]
    ) -> Iterator[Term]:
        """A term for each pair of weights of a block, and for each gene without one."""
        found = blocks(net)
        if not found:
            log.warning("no numbered module of this network holds two layers, so there are no pairs")
        chosen = [[stand_ins(member.operand, self.bits) for member in block] for block in found]
        total = sum(passes([len(set(c.values())) for c in block]) for block in chosen)
        paired: set[str] = set()
        with (
            torch.no_grad(),
            evaluated(net, net.space.largest(), images, floating=True) as run,
            progress("pairs of weights", total) as bar,
        ):
            exact = passed(run, images)

            def change() -> float:
                bar.advance()
                return rise(exact, passed(run, images))

            for block, forms in zip(found, chosen, strict=True):
                options = [
                    [(m.operand, k) for k in dict.fromkeys(f.values())] for m, f in zip(block, forms, strict=True)
                ]
                raw = quadratic(options, change)
                yield from _pair_terms(net, block, forms, raw, positive(raw), singles)
                paired |= {member.gene for member in block}
        for layer, gene, _ in sites(net):
            if gene not in paired:
                yield gated(net.space, layer, (gene,), singles[gene])


def blocks(net: SuperNet) -> list[list[Member]]:
    """Weights of the layers of each block, for blocks of two or more; a layer stands in the innermost such block."""
    members = [Member(layer, gene, operand) for layer, gene, operand in sites(net) if operand.argument is None]
    free, found = {member.gene: member for member in members}, []
    for path in sorted(dict.fromkeys(p for m in members for p in _numbered(m.layer.name)), key=lambda p: -p.count(".")):
        inside = [m for m in free.values() if m.layer.name.startswith(f"{path}.")]
        for gate in dict.fromkeys(m.layer.active_if for m in inside):
            block = [m for m in inside if m.layer.active_if == gate]
            if len(block) > 1:
                found.append(block)
                for member in block:
                    del free[member.gene]
    return found


def _numbered(name: str) -> list[str]:
    """Paths of the numbered modules around a layer."""
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts) - 1) if parts[k].isdigit()]


def stand_ins(operand: Operand, bits: Sequence[int]) -> dict[int, int]:
    """For each choice of those bits the choice that is measured in its place."""
    choices = operand.quantizer.choices
    usual: dict[int, int] = {}
    for number in bits:
        same = [k for k, choice in enumerate(choices) if choice.bits == number]
        if same:
            best = max(same, key=lambda k: (isinstance(choices[k].granularity, PerChannel), choices[k].symmetric, -k))
            usual |= dict.fromkeys(same, best)
    return usual


def passes(options: Sequence[int]) -> int:
    """Passes over the images for a block whose layers have so many options each."""
    return sum(options) + sum(a * b for a, b in combinations(options, 2))


def quadratic(options: Sequence[Sequence[tuple[Operand, int]]], change: Callable[[], float]) -> Table:
    """CLADO's G: twice the change of each option on the diagonal, of two layers' options what they do together.

    Args:
        options: of each layer, the operands and choices; one of each at most is in use.
        change: of the loss, with what is switched on now.
    """
    flat = [(k, *option) for k, layer in enumerate(options) for option in layer]
    found = np.zeros((len(flat), len(flat)))
    for i, (_, operand, choice) in enumerate(flat):
        with switched_on(operand.quantizer, choice):
            found[i, i] = 2 * change()
    for i, j in combinations(range(len(flat)), 2):
        if flat[i][0] != flat[j][0]:
            with ExitStack() as stack:
                for _, operand, choice in (flat[i], flat[j]):
                    stack.enter_context(switched_on(operand.quantizer, choice))
                found[i, j] = found[j, i] = change() - (found[i, i] + found[j, j]) / 2
    return found


def positive(matrix: Table) -> Table:
    """The nearest positive semi-definite matrix: without the negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values.clip(0)) @ vectors.T


def _pair_terms(
    net: SuperNet,
    block: list[Member],
    forms: list[dict[int, int]],
    raw: Table,
    fitted: Table,
    singles: dict[str, Table],
) -> Iterator[Term]:
    """A table for each pair of one block: shares of both single scores and what they do together."""
    spreads, starts = [], np.cumsum([0, *(len(set(f.values())) for f in forms)])
    added = np.diag(fitted - raw) / 2
    shares = []
    for member, form, start in zip(block, forms, starts[:-1], strict=True):
        errors = squares(member.operand.changes(member.operand.module.weight))
        at = {choice: start + k for k, choice in enumerate(dict.fromkeys(form.values()))}
        spread = np.zeros((len(errors), len(raw)))
        for choice, measured in form.items():
            spread[choice, at[measured]] = np.sqrt(errors[choice] / max(errors[measured], 1e-20))
        spreads.append(spread)
        shares.append((singles[member.gene] + spread**2 @ added) / (len(block) - 1))
    for i, j in combinations(range(len(block)), 2):
        together = spreads[i] @ fitted @ spreads[j].T
        table = shares[i][:, None] + shares[j] + together
        for axis, member in enumerate((block[i], block[j])):
            table = monotone(table, member.operand.quantizer, axis)
        table = table - min(float(table.min()), 0.0)
        yield gated(net.space, block[i].layer, (block[i].gene, block[j].gene), table)

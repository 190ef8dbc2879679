"""What all sensitivities share: scores of every choice of every tensor, made into a sum that a search can minimise.

A method says how bad each choice of each tensor is, in a unit of its own. Here its scores are repaired (more bits of
one form never count as worse), gated (a layer that is left out costs nothing) and joined by the prices of depth in the
same unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supernet.calibration.batchnorm import recalibrated
from supernet.config import Layer, SubnetConfig
from supernet.cost import Factors, gated
from supernet.elastic.attention import QuantMatMul
from supernet.elastic.supernet import SuperNet
from supernet.quant.quantizer import Quantizer
from supernet.space import SearchSpace, magnitude

Table = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]


class Tensorwise(ABC):
    """A sensitivity that scores every choice of every tensor by itself; a subnet's score is the sum.

    Scores of one tensor are repaired before they are used: from few to many bits of one form the running minimum, as
    NVIDIA ModelOpt does, and where the least of them is negative, that much is added to all.

    Leaving out blocks is priced in the same unit by way of the network's output: its relative error when blocks are
    left out in float, times (sum of the scores / relative error of the output) of the subnet at uniform 4 bits. On a
    ResNet-20 with the scores of `OutputMSE` that quotient is 10 to 13 for 2 to 5 bits alike, and with it the sum ranks
    71 subnets of all depths with a Kendall tau of 0.83 (0.46 where a stage's own output error is taken for its price).

    Args:
        images: most images used.
        numbers: further settings that must be at least 1.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, images: int, **numbers: int) -> None:
        for name, number in ({"images": images} | numbers).items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.images = images

    @abstractmethod
    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """How bad each choice of each weight and input gene is, by the gene's name, in any unit.

        Args:
            net: left as it was.
            images: [n, ...] on the device of `net`.
            labels: [n, ...], or None: see `targets`.
        """

    def __call__(self, net: SuperNet, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Factors:
        """The sensitivity of every weight, input and depth choice of `net`, measured on images or (images, labels).

        Raises:
            ValueError: no batches, or a score that is not finite.
        """
        images, labels = first(batches, self.images, next(net.parameters()).device)
        return assembled(net, self.scores(net, images, labels), images)


# -- what is scored ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor whose quantization one gene chooses: the weight of a layer, or something that it reads.

    Attributes:
        module: the quantized layer or product.
        quantizer: what quantizes the tensor.
        argument: which argument of the module the tensor is; None: its weight.
    """

    module: Any
    quantizer: Quantizer
    argument: int | None

    def of(self, arguments: tuple[Tensor, ...]) -> Tensor:
        """The tensor itself, where the module reads `arguments`."""
        return self.module.weight if self.argument is None else arguments[self.argument]

    @torch.no_grad()
    def changes(self, tensor: Tensor) -> Iterator[Tensor]:
        """What each choice adds to `tensor`, in the order of the choices."""
        for choice in range(len(self.quantizer.choices)):
            with switched_on(self.quantizer, choice):
                changed = self.quantizer(tensor) - tensor
            yield changed


def operands(module: Any) -> tuple[Operand, Operand]:
    """Both operands of a quantized module, that in the place of the weight first."""
    arguments = (1, 0) if isinstance(module, QuantMatMul) else (None, 0)
    first, second = (
        Operand(module, getattr(module, q), a) for q, a in zip(module.genes.values(), arguments, strict=True)
    )
    return first, second


def sites(net: SuperNet) -> Iterator[tuple[Layer, str, Operand]]:
    """Every tensor whose quantization a gene chooses: its layer, the gene's name, the operand."""
    for layer in net.layers:
        genes = (layer.weight, layer.input)
        for gene, operand in zip(genes, operands(net.model.get_submodule(layer.name)), strict=True):
            yield layer, gene, operand


# -- states of the network ---------------------------------------------------------------------------------------------


@contextmanager
def evaluated(net: SuperNet, config: SubnetConfig, images: Tensor, floating: bool) -> Iterator[Callable[[Tensor], Any]]:
    """A subnet in evaluation mode with BatchNorm statistics of its own, quantized or in float; gives its forward.

    That runs eagerly: a compiled network would be compiled anew for every way to switch its quantizers.
    """
    modes = [(m, m.training) for m in net.modules()]
    switched = net.floating() if floating else nullcontext()
    try:
        with net.as_subnet(config), switched, recalibrated(net.model, [images]):
            net.eval()
            yield net.model
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def switched_on(quantizer: Quantizer, choice: int) -> Iterator[None]:
    """One choice of one quantizer in use, also where all of them are off."""
    before = quantizer.enabled
    try:
        quantizer.enabled = True
        with quantizer.using(choice):
            yield
    finally:
        quantizer.enabled = before


def first(
    batches: Iterable[Tensor | tuple[Tensor, Tensor]], n: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The first n images of some batches, as one, and their labels where all of these have some.

    Raises:
        ValueError: no batches.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        x, y = (batch, None) if isinstance(batch, Tensor) else batch
        left = n - sum(map(len, images))
        images.append(x[:left])
        labels += [] if y is None else [y[:left]]
        if left <= len(x):
            break
    if not images:
        raise ValueError("a sensitivity needs at least one batch of images; got none")
    return torch.cat(images).to(device), torch.cat(labels).to(device) if len(labels) == len(images) else None


@torch.no_grad()
def targets(run: Callable[[Tensor], Any], images: Tensor, labels: Tensor | None) -> Tensor:
    """The labels, or where there are none the classes that the network `run` says itself."""
    predicted: Tensor = run(images).argmax(1) if labels is None else labels
    return predicted


def float_targets(net: SuperNet, images: Tensor, labels: Tensor | None) -> Tensor:
    """`targets` of the largest subnet in float."""
    with evaluated(net, net.space.largest(), images, floating=True) as run:
        return targets(run, images, labels)


# -- from scores to a sum ----------------------------------------------------------------------------------------------


def assembled(net: SuperNet, scores: Mapping[str, Table], images: Tensor) -> Factors:
    """Scores of every gene, repaired and gated, and the prices of depth.

    Raises:
        ValueError: a score that is not finite.
    """
    terms = [gated(net.space, x, (gene,), repaired(gene, scores[gene], o.quantizer)) for x, gene, o in sites(net)]
    return priced(net, Factors(tuple(terms)), images)


def repaired(gene: str, scores: Table, quantizer: Quantizer) -> Table:
    """Scores that are finite, never negative, and never rise with the bits of one form."""
    if not np.isfinite(scores).all():
        raise ValueError(
            f"the sensitivity of {gene} is not finite: the network or its scales hold NaN or infinity; "
            "calibrate or train it again"
        )
    falling = monotone(scores, quantizer)
    return falling - min(float(falling.min()), 0.0)


def monotone(scores: Table, quantizer: Quantizer, axis: int = 0) -> Table:
    """Scores that never rise along `axis` with the bits of one form: running minimum from few bits to many."""
    moved = np.moveaxis(scores.copy(), axis, 0)
    forms: dict[Any, list[int]] = {}
    for k, choice in enumerate(quantizer.choices):
        forms.setdefault((type(choice.format).__name__, choice.form), []).append(k)
    for members in forms.values():
        ordered = sorted(members, key=lambda k: quantizer.choices[k].bits)
        moved[ordered] = np.minimum.accumulate(moved[ordered])
    return np.moveaxis(moved, 0, axis)


@torch.no_grad()
def priced(net: SuperNet, layers: Factors, images: Tensor) -> Factors:
    """`layers` and a term for each elastic stage: the price of each depth against full depth, never rising with depth.

    See `Tensorwise` for the unit.
    """
    stages = [net.space.position[name] for name in net.elastic_depths]
    if not stages:
        return layers
    with evaluated(net, net.space.largest(), images, floating=True) as run:
        exact = run(images)
    power = (exact - exact.mean(0, keepdim=True)).square().sum().clamp_min(1e-20)

    def error(config: SubnetConfig, floating: bool) -> float:
        with evaluated(net, config, images, floating) as run:
            return float((run(images) - exact).square().sum() / power)

    largest, reference = np.array(net.space.largest().row), _uniform_near(net.space, 4)
    unit = float(layers.value(np.array([reference.row]))[0]) / max(error(reference, False), 1e-9)
    prices: list[tuple[tuple[int, ...], Table]] = []
    for at in stages:
        rows = [np.where(np.arange(len(largest)) == at, k, largest) for k in range(net.space.sizes[at])]
        errors = np.array([error(net.space.config(row), True) for row in rows[:-1]] + [0.0])
        prices.append(((at,), unit * np.minimum.accumulate(errors)))
    return layers + Factors(tuple(prices))


def _uniform_near(space: SearchSpace, bits: int) -> SubnetConfig:
    """The largest architecture at the uniform bits nearest to `bits` that weights and inputs offer."""
    nearest = []
    for kind in ("weight", "input"):
        offered = {magnitude(c) for d in space.dimensions if d.quantizes and d.name.endswith(kind) for c in d.choices}
        nearest.append(min(offered, key=lambda b: (abs(b - bits), b)))
    return space.uniform(f"w{nearest[0]}a{nearest[1]}")

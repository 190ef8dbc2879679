"""Some positions of every layer's output in the float network: what enters them, what leans on them, what moves them.

A position of an output is what one dot product for each output channel computes: one pixel of one image, one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from predictors.sensitivity import Loss, Operand, Table, evaluated, operands, targets
from supernet.elastic.attention import QuantMatMul
from supernet.elastic.supernet import SuperNet

CHUNK = 16
"""Images of one backward pass; the gradients of one image do not depend on the others."""


@dataclass(frozen=True)
class Sample:
    """Some positions of one layer's output.

    Attributes:
        inputs: what enters them: [groups, positions, inputs of one output] of a layer; both operands of a product.
        gradient: [groups, positions, outputs] of the summed loss to the output of a layer, [n, ..., m, p] to that of a
            product; None where none was asked for.
        share: of all positions, those that are here.
    """

    inputs: tuple[Tensor, ...]
    gradient: Tensor | None
    share: float


def observed(
    net: SuperNet,
    images: Tensor,
    positions: int,
    rng: np.random.Generator,
    labels: Tensor | None = None,
    loss: Loss | None = None,
) -> dict[str, Sample]:
    """About as many positions of every layer of the largest subnet in float, spread over the images.

    Args:
        net: left as it was.
        images: [n, ...].
        positions: wanted of each layer.
        rng: which.
        labels: see `predictors.sensitivity.targets`.
        loss: whose gradients are wanted, mean over a batch; None: none are.
    """
    recorders = {layer.name: _Recorder(rng) for layer in net.layers}
    with evaluated(net, net.space.largest(), images, floating=True) as run:
        wanted = None if loss is None else targets(run, images, labels)
        handles = [net.model.get_submodule(n).register_forward_hook(r.hook) for n, r in recorders.items()]
        try:
            for at in torch.arange(len(images)).split(len(images) if loss is None else CHUNK):
                for recorder in recorders.values():
                    recorder.positions = -(-positions * len(at) // len(images))
                with torch.set_grad_enabled(loss is not None):
                    part = images[at].requires_grad_(loss is not None)
                    logits = run(part)
                    if loss is not None and wanted is not None:
                        torch.autograd.grad(loss(logits, wanted[at]) * len(at), part)  # the hooks take what they want
        finally:
            for handle in handles:
                handle.remove()
    return {name: recorder.sample() for name, recorder in recorders.items()}


class _Recorder:
    """Keeps the sampled positions of one layer, of every call."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.positions = rng, 1
        self.inputs: list[tuple[Tensor, ...]] = []
        self.gradients: dict[int, Tensor] = {}
        self.looked = self.all = 0
        self.axis = 1

    def hook(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        where, call, count = chosen(module, arguments, self.positions, self.rng), len(self.inputs), len(output)
        self.inputs.append(tuple(part.detach() for part in inputs_at(module, arguments, where)))
        self.axis = 0 if isinstance(module, QuantMatMul) else 1
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        self.all += count if self.axis == 0 else output.numel() // output.shape[channels]
        self.looked += where.numel()
        if output.requires_grad:

            def keep(gradient: Tensor) -> None:
                self.gradients[call] = outputs_at(module, gradient, where)

            output.register_hook(keep)

    def sample(self) -> Sample:
        inputs = tuple(torch.cat(parts, self.axis) for parts in zip(*self.inputs, strict=True))
        ordered = [self.gradients[call] for call in sorted(self.gradients)]
        return Sample(inputs, torch.cat(ordered, self.axis) if ordered else None, self.looked / self.all)


# -- positions ---------------------------------------------------------------------------------------------------------


def chosen(module: nn.Module, arguments: tuple[Tensor, ...], positions: int, rng: np.random.Generator) -> Tensor:
    """Which positions of the output are looked at.

    Returns:
        Of a convolution [n, each] flat pixels for each image, of a linear layer [positions] rows, of a product
        [images] positions along the first axis (all positions of these).
    """
    x = arguments[0]
    if isinstance(module, QuantMatMul):
        return _few(len(x), max(1, positions // x[0, ..., 0].numel()), rng).to(x.device)
    if isinstance(module, nn.Linear):
        return _few(x[..., 0].numel(), positions, rng).to(x.device)
    assert isinstance(module, nn.Conv2d)
    left, right, top, bottom = module._reversed_padding_repeated_twice
    sides = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    settings = zip(sides, module.kernel_size, module.dilation, module.stride, strict=True)
    pixels = int(np.prod([(side - d * (k - 1) - 1) // s + 1 for side, k, d, s in settings]))
    return torch.stack([_few(pixels, -(-positions // len(x)), rng) for _ in range(len(x))]).to(x.device)


def _few(n: int, count: int, rng: np.random.Generator) -> Int[Tensor, " m"]:
    return torch.from_numpy(np.sort(rng.permutation(n)[:count]))


def inputs_at(module: nn.Module, arguments: tuple[Tensor, ...], where: Tensor) -> tuple[Tensor, ...]:
    """What enters the dot products of chosen positions: [groups, positions, inputs of one output]; a product's both."""
    if isinstance(module, QuantMatMul):
        return tuple(operand[where] for operand in arguments)
    x = arguments[0]
    if isinstance(module, nn.Linear):
        return (x.reshape(-1, x.shape[-1])[where][None],)
    assert isinstance(module, nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    columns = []
    for image, pixels in zip(F.pad(x, module._reversed_padding_repeated_twice, mode=mode), where, strict=True):
        columns.append(F.unfold(image[None], module.kernel_size, module.dilation, 0, module.stride)[0][:, pixels])
    return (torch.cat(columns, dim=1).reshape(module.groups, -1, where.numel()).transpose(1, 2),)


def outputs_at(module: nn.Module, y: Tensor, where: Tensor) -> Tensor:
    """The same positions of the output or its gradient: [groups, positions, outputs]; of a product [n, ..., m, p]."""
    if isinstance(module, QuantMatMul):
        return y[where]
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])[where][None]
    assert isinstance(module, nn.Conv2d)
    picked = y.flatten(2).gather(2, where[:, None].expand(-1, y.shape[1], -1))
    return picked.transpose(0, 1).reshape(module.groups, -1, where.numel()).transpose(1, 2)


# -- what computes them ------------------------------------------------------------------------------------------------


def output(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """What a layer (without its bias) or a product computes of sampled inputs, in float."""
    if isinstance(module, QuantMatMul):
        return inputs[0] @ inputs[1] * module.factor
    (x,) = inputs
    return x @ matrix(module.weight, len(x))


def matrix(weight: Tensor, groups: int) -> Float[Tensor, "g i o"]:
    """A weight as the matrix that sampled inputs are multiplied by."""
    return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)


@torch.no_grad()
def output_changes(operand: Operand, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """What each choice of one operand, the other one being exact, adds to the output at sampled positions."""
    module = operand.module
    for change in operand.changes(operand.of(inputs)):
        if isinstance(module, QuantMatMul):
            left, right = (change if k == operand.argument else exact for k, exact in enumerate(inputs))
            yield left @ right * module.factor
        elif operand.argument is None:
            yield inputs[0] @ matrix(change, len(inputs[0]))
        else:
            yield change @ matrix(module.weight, len(inputs[0]))


@torch.no_grad()
def relative_errors(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Table, Table]:
    """Relative output error of each choice of either operand, that in the place of the weight first."""
    exact = output(module, inputs)
    power = (exact - exact.mean(-2, keepdim=True)).square().sum().clamp_min(1e-20)
    of_weight, of_input = (
        np.array([float(change.square().sum() / power) for change in output_changes(operand, inputs)])
        for operand in operands(module)
    )
    return of_weight, of_input

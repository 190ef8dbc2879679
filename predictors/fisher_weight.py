"""How much the loss leans on the elements that each choice changes: one backward pass for each image.

The diagonal of the empirical Fisher information times the squared change of the tensor, as BRECQ and many others weigh
weights (Li et al., ICLR 2021, arXiv:2102.05426, by block outputs); for what a layer reads, the same with the
gradient to that. Errors of one tensor are taken as independent, which those of a rounded weight are nearly and those of
a clipped one are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from predictors.layer_inputs import differentiable, reading, squares, thinned, weights
from predictors.sensitivity import Loss, Table, Tensorwise, evaluated, sites, targets
from supernet.elastic.supernet import SuperNet


class FisherWeight(Tensorwise):
    """Sum over a tensor's elements of mean squared gradient times squared change.

    Gradients are those of single images, in the largest subnet in float: the square of a batch's gradient would be
    that of its mean.

    Args:
        images: most images used.
        elements: of what a layer reads of each image; the sum is scaled up to all of them.
        seed: which elements.
        loss: (logits, labels) -> mean over a batch; None: cross-entropy.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, images: int = 64, elements: int = 4096, seed: int = 0, loss: Loss | None = None) -> None:
        super().__init__(images, elements=elements)
        self.elements, self.seed, self.loss = elements, seed, loss or F.cross_entropy

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The weighted change of each choice."""
        fisher, read = self._gradients(net, images, labels)
        found = {}
        for _, gene, operand in sites(net):
            if operand.argument is None:
                tensor, lean = operand.module.weight, fisher[gene]
            else:
                tensor, lean = (torch.cat(parts) for parts in zip(*read[gene], strict=True))
            found[gene] = squares(operand.changes(tensor), lean.double() / len(images))
        return found

    def _gradients(
        self, net: SuperNet, images: Tensor, labels: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, list[tuple[Tensor, Tensor]]]]:
        """Sums of squared gradients to the weights; some elements of what is read, with theirs scaled up."""
        rng, held = np.random.default_rng(self.seed), weights(net)
        fisher: dict[str, Tensor] = {gene: torch.zeros_like(weight) for gene, weight in held.items()}
        read: dict[str, list[Any]] = {gene: [] for _, gene, operand in sites(net) if operand.argument is not None}
        with evaluated(net, net.space.largest(), images, floating=True) as run:
            wanted = targets(run, images, labels)
            with differentiable(held.values()), reading(net) as seen:
                for k in range(len(images)):
                    loss = self.loss(run(images[k : k + 1].detach().requires_grad_()), wanted[k : k + 1])
                    names = [*held, *(gene for gene, parts in seen.items() for _ in parts)]
                    tensors = [*held.values(), *(part for parts in seen.values() for part in parts)]
                    found = torch.autograd.grad(loss, tensors)
                    for gene, tensor, gradient in zip(names, tensors, found, strict=True):
                        if gene in fisher:
                            fisher[gene] += gradient.square()
                            continue
                        at = thinned(tensor, self.elements, rng)
                        square = gradient.flatten()[at].square() * (tensor.numel() / len(at))
                        read[gene].append((tensor.detach().flatten()[at], square))
                    for parts in seen.values():
                        parts.clear()
        return fisher, read

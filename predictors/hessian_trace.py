"""Mean curvature of the loss times the squared change of the tensor: HAWQ-V2.

Dong et al., NeurIPS 2020, arXiv:1911.03852: mean diagonal of the Hessian block, Tr(H) / n, times
||Q(W) - W||^2; for what a layer reads the same with the Hessian by that, mean over the images. The trace
is Hutchinson's: the mean of v' H v over Rademacher vectors v, H v by differentiating twice.

It ranks best where bits are many and worst at 2 and 3 (our own measurement on ResNet-56): an expansion to second order
holds for small changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from predictors.layer_inputs import differentiable, reading, squares, thinned, weights
from predictors.sensitivity import Loss, Table, Tensorwise, evaluated, sites, targets
from supernet.artefacts import progress
from supernet.elastic.supernet import SuperNet

CHUNK = 16
"""Images that are differentiated at once; the graph of the first derivative is kept for all probes."""


class HessianTrace(Tensorwise):
    """|Tr(H)| / n times the squared change of a tensor of n elements, H the Hessian of the mean loss by it.

    A trace may come out negative (8 of 54 did on a ResNet-56): where the network has not converged, or by the chance of
    the probes. Its amount is taken: a layer with a negative trace is not free, and 0 would send it to the fewest bits.
    One probe serves all weights at once and one all inputs: what couples two tensors has mean 0.

    Args:
        images: most images used.
        probes: Rademacher vectors for each chunk of 16 images; the paper takes about 50 for the whole.
        elements: of what a layer reads of a chunk, for the squared change.
        seed: of the probes and the elements.
        loss: (logits, labels) -> mean over a batch; None: cross-entropy.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self, images: int = 64, probes: int = 8, elements: int = 65536, seed: int = 0, loss: Loss | None = None
    ) -> None:
        super().__init__(images, probes=probes, elements=elements)
        self.probes, self.elements, self.seed, self.loss = probes, elements, seed, loss or F.cross_entropy

    def scores(self, net: SuperNet, images: Tensor, labels: Tensor | None) -> dict[str, Table]:
        """The curvature of each choice's change."""
        rng = np.random.default_rng(self.seed)
        found = {gene: np.zeros(len(operand.quantizer.choices)) for _, gene, operand in sites(net)}
        traces, read = self.traces(net, images, labels)
        for _, gene, operand in sites(net):
            if operand.argument is None:
                mean_square = squares(operand.changes(operand.module.weight)) / operand.module.weight.numel()
            else:
                whole = torch.cat([part.flatten() for part in read[gene]])
                sample = whole[thinned(whole, self.elements, rng)]
                mean_square = squares(operand.changes(sample)) / len(sample)
            found[gene] = abs(traces[gene]) * mean_square
        return found

    def traces(
        self, net: SuperNet, images: Tensor, labels: Tensor | None
    ) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """Traces of the Hessian of the mean loss by each tensor, by gene, and what the layers read.

        Of what is read, the mean over the images of the trace by what one image makes a layer read.
        """
        probe = torch.Generator(images.device).manual_seed(self.seed)
        held, sums = weights(net), {gene: 0.0 for _, gene, _ in sites(net)}
        read: dict[str, list[Tensor]] = {gene: [] for gene in sums if gene not in held}
        chunks = torch.arange(len(images)).split(CHUNK)
        with (
            evaluated(net, net.space.largest(), images, floating=True) as run,
            progress("Hessian traces", 2 * len(chunks)) as bar,
        ):
            wanted = targets(run, images, labels)
            for at in chunks:
                with differentiable(held.values()), sdpa_kernel(SDPBackend.MATH), reading(net) as seen:
                    loss = self.loss(run(images[at].requires_grad_()), wanted[at])
                    for group in (list(held.items()), [(gene, part) for gene, parts in seen.items() for part in parts]):
                        for gene, trace in self._estimates(loss, group, probe):
                            sums[gene] += trace * len(at) / len(images)
                        bar.advance()
                for gene, parts in seen.items():
                    read[gene] += [part.detach() for part in parts]
        return sums, read

    def _estimates(
        self, loss: Tensor, group: list[tuple[str, Tensor]], probe: torch.Generator
    ) -> Iterator[tuple[str, float]]:
        """Hutchinson's estimate of the trace of each tensor's own block of the Hessian of `loss`, by gene."""
        tensors = [tensor for _, tensor in group]
        slopes = torch.autograd.grad(loss, tensors, create_graph=True)
        for _ in range(self.probes if group else 0):
            signs = [torch.randint(0, 2, t.shape, generator=probe, device=t.device).to(t) * 2 - 1 for t in tensors]
            products = torch.autograd.grad(slopes, tensors, signs, retain_graph=True, materialize_grads=True)
            for (gene, _), sign, product in zip(group, signs, products, strict=True):
                yield gene, float((sign * product).sum()) / self.probes

"""What each subnet of a step is taught with, and what keeps the weights quantizable in many forms."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from supernet.interfaces import Task

UNIFORM_KURTOSIS = 1.8


def standardised(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` at mean 0 and unbiased standard deviation 1 over all elements; a constant tensor becomes zeros."""
    return (x - x.mean()) / x.std().clamp_min(torch.finfo(x.dtype).tiny)


def kurtosis(x: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Fourth standardised moment over all elements: 1.8 uniform, 3 normal, 6 Laplace (not the excess)."""
    return standardised(x).pow(4).mean()


def skewness(x: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Third standardised moment over all elements: 0 where the distribution is symmetric."""
    return standardised(x).pow(3).mean()


class WeightDistribution:
    """Pulls weights towards a flat, symmetric distribution: layer mean of c_k (kurtosis - 1.8)^2 + c_s skewness^2.

    A uniform distribution loses least when its grid changes (KURE, Shkolnik et al., NeurIPS 2020, arXiv:2002.07686);
    EQ-Net adds the skewness (ICCV 2023, arXiv:2308.07650, equations 4-6). The paper's coefficients are 1; ours are
    those of its experiments. All quantized layers but the first count, whether they run in this step or not.

    Args:
        kurtosis: c_k, at least 0.
        skewness: c_s, at least 0.
    """

    def __init__(self, kurtosis: float = 0.015, skewness: float = 1.0) -> None:
        if min(kurtosis, skewness) < 0:
            raise ValueError(f"weights of kurtosis and skewness are at least 0, got {kurtosis} and {skewness}")
        self.kurtosis, self.skewness = kurtosis, skewness

    def of(self, weight: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The penalty of one layer's weight."""
        peaked = (kurtosis(weight) - UNIFORM_KURTOSIS).square()
        return self.kurtosis * peaked + self.skewness * skewness(weight).square()

    def __call__(self, net: Any) -> Float[Tensor, ""] | None:
        """Mean penalty over the layers of a SuperNet; None where it has only one layer."""
        layers = [net.model.get_submodule(layer.name) for layer in net.layers[1:]]
        usable = [m.weight for m in layers if hasattr(m, "weight") and m.weight.numel() > 1]
        return torch.stack([self.of(w) for w in usable]).mean() if usable else None


class Plain:
    """The task's loss for every subnet.

    Args:
        distribution: penalty on the weights, or None.
    """

    def __init__(self, distribution: WeightDistribution | None = None) -> None:
        self.distribution = distribution

    def subnet_loss(
        self,
        k: int,
        logits: Float[Tensor, "n c"],
        labels: Int[Tensor, " n"],
        task: Task,
        teacher_logits: Float[Tensor, "n c"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of the k-th subnet of a step (0: first); `teacher_logits` are those of subnet k - 1, same images."""
        return task.loss(logits, labels)

    def regulariser(self, net: Any) -> Float[Tensor, ""] | None:
        """What is added once a step, or None."""
        return self.distribution(net) if self.distribution else None


class GroupProgressive(Plain):
    """Chain distillation from high to low bits: share * T^2 KL(teacher || student) + (1 - share) * task loss.

    EQ-Net (ICCV 2023, arXiv:2308.07650, section 3.3): the highest bits teach the drawn subnet, that one teaches the
    next, the last has the lowest bits. Teachers are detached, the first subnet has none. With one subnet a step it is
    the task's loss.

    Args:
        distillation: the share, 0..1.
        temperature: T > 0; both distributions are softened by it.
        distribution: penalty on the weights, or None.
    """

    def __init__(
        self, distillation: float = 0.5, temperature: float = 1.0, distribution: WeightDistribution | None = None
    ) -> None:
        super().__init__(distribution)
        if not (0 <= distillation <= 1 and temperature > 0):
            raise ValueError(
                f"distillation is a share in [0, 1] and temperature is positive, got {distillation} and {temperature}"
            )
        self.distillation, self.temperature = distillation, temperature

    def subnet_loss(
        self,
        k: int,
        logits: Float[Tensor, "n c"],
        labels: Int[Tensor, " n"],
        task: Task,
        teacher_logits: Float[Tensor, "n c"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of the k-th subnet of a step (0: first); `teacher_logits` are those of subnet k - 1, same images."""
        own = task.loss(logits, labels)
        if k == 0 or teacher_logits is None:
            return own
        guided = divergence(teacher_logits.detach(), logits, self.temperature)
        return self.distillation * guided + (1 - self.distillation) * own


def divergence(
    teacher: Float[Tensor, "n c"], student: Float[Tensor, "n c"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over examples, nats (Hinton, arXiv:1503.02531)."""
    p = F.log_softmax(teacher / temperature, dim=1)
    q = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")

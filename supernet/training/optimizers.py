"""The optimizer of learned scales and zero-points: entries that no subnet of the step used stay bit-identical.

Adam moves an entry whose gradient is zero by its momentum, about half as much as an active one (measured), which shifts
the scales of choices that were not drawn. Here value, moments and step count of an entry change only in steps that gave
it a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LazyAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, ICLR 2015) by entry: a zero gradient leaves the entry, its moments and its step count alone.

    In a group with `relative=True` (scales, which are positive) Adam runs on the logarithm: the gradient is multiplied
    by the value and the update is a factor, so `lr` is a relative step and the sign never flips. With `relative=False`
    (zero-points) it is an absolute step in codes. No weight decay.

    Args:
        params: groups with keys `params` and `relative`.
        lr: step size.
        betas, eps: as in Adam.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
    ) -> None:
        if lr < 0:
            raise ValueError(f"the learning rate of scales must be at least 0, got {lr}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "relative": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of all entries that have a gradient; groups are flattened, so its time does not grow with the
        number of layers."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if live:
                self._update(group, live)
        return loss

    def _update(self, group: dict[str, Any], live: list[Tensor]) -> None:
        for p in live:
            if not self.state[p]:
                self.state[p] = {name: torch.zeros_like(p) for name in ("mean", "square", "count")}
        grad = _joined([p.grad.reshape(-1) for p in live if p.grad is not None])
        used = grad.nonzero().view(-1)  # few of many: the choices that were drawn
        moments = ([self.state[p][name].view(-1) for p in live] for name in ("mean", "square", "count"))
        kept = [(parts, _joined(parts)) for parts in ([p.detach().view(-1) for p in live], *moments)]
        grad, (value, mean, square, count) = grad.take(used), [whole.take(used) for _, whole in kept]
        slope = grad * value if group["relative"] else grad
        fast, slow = group["betas"]
        mean = fast * mean + (1 - fast) * slope
        square = slow * square + (1 - slow) * slope.square()
        count = count + 1
        unbiased, spread = mean / (1 - _power(fast, count)), (square / (1 - _power(slow, count))).sqrt()
        move = group["lr"] * unbiased / (spread + group["eps"])
        value = value * torch.exp(-move) if group["relative"] else value - move
        for (parts, whole), fresh in zip(kept, (value, mean, square, count), strict=True):
            whole.scatter_(0, used, fresh)
            if len(parts) > 1:
                for part, now in zip(parts, whole.split([p.numel() for p in parts]), strict=True):
                    part.copy_(now)


def _joined(parts: list[Tensor]) -> Tensor:
    """[n] tensors one after the other; a single one is itself, so that writing to it is writing to its owner."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _power(base: float, exponent: Tensor) -> Tensor:
    """`base ** exponent` for a base in [0, 1) and exponents from 1 on, in a quarter of the time that `**` takes."""
    return torch.exp(exponent * math.log(base)) if base else torch.zeros_like(exponent)

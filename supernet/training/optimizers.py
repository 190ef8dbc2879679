"""The optimizer of learned scales and zero-points: entries that no subnet of the step used stay bit-identical.

Adam moves an entry whose gradient is zero by its momentum, about half as much as an active one (measured), which shifts
the scales of choices that were not drawn. Here value, moments and step count of an entry change only in steps that gave
it a gradient.
"""

from __future__ import annotations

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
        grads = [p.grad for p in live if p.grad is not None]
        value, grad = (torch.cat([t.reshape(-1) for t in ts]) for ts in (live, grads))
        mean, square, count = (
            torch.cat([self.state[p][n].reshape(-1) for p in live]) for n in ("mean", "square", "count")
        )
        used = grad != 0
        slope = grad * value if group["relative"] else grad
        fast, slow = group["betas"]
        mean = torch.where(used, fast * mean + (1 - fast) * slope, mean)
        square = torch.where(used, slow * square + (1 - slow) * slope.square(), square)
        count = count + used
        steps = count.clamp(min=1.0)
        move = group["lr"] * (mean / (1 - fast**steps)) / ((square / (1 - slow**steps)).sqrt() + group["eps"])
        moved = value * torch.exp(-move) if group["relative"] else value - move
        value = torch.where(used, moved, value)
        sizes = [p.numel() for p in live]
        for name, flat in (("mean", mean), ("square", square), ("count", count)):
            for p, part in zip(live, flat.split(sizes), strict=True):
                self.state[p][name].copy_(part.view_as(p))
        for p, part in zip(live, value.split(sizes), strict=True):
            p.copy_(part.view_as(p))

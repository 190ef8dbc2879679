"""One training step of the supernet, as a LightningModule with manual optimisation.

Each step runs the subnets that the sampler asks for on one mini-batch, calls backward for each, and updates once:
gradients add up, so memory is that of one subnet. Randomness is a function of (seed, epoch) for data and of (seed,
step) for subnets, so a resumed run repeats what the uninterrupted one would have done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from supernet.calibration.batchnorm import recalibrated
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Batch, Sampler, Settling, Task
from supernet.space import Indices
from supernet.training.optimizers import LazyAdam

TOLD = 512
"""Images of recalibrate and of select on which a sampler with feedback `select_loss` is told about."""


@dataclass(frozen=True)
class Schedule:
    """Learning rates and clipping.

    Attributes:
        optimizer: of the weights: `sgd` (Nesterov) or `adamw`.
        lr: peak learning rate of the weights; cosine to 0 after the warm-up.
        scale_lr: relative step of the scales (see LazyAdam), same schedule.
        zero_point_lr: step of the zero-points in codes, same schedule.
        weight_decay: of weights with two or more axes; scales, gains and biases have none.
        momentum: of SGD.
        warmup: share of all steps over which the rate rises linearly.
        clip: largest absolute value of a weight's gradient (0: no clipping), as in EQ-Net.
    """

    optimizer: str = "sgd"
    lr: float = 0.02
    scale_lr: float = 1e-3
    zero_point_lr: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.02
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"schedule.optimizer is sgd or adamw, got {self.optimizer!r}")
        if (
            min(self.lr, self.scale_lr, self.zero_point_lr, self.weight_decay, self.clip) < 0
            or not 0 <= self.warmup < 1
        ):
            raise ValueError(f"rates are at least 0 and warmup lies in [0, 1), got {self}")

    def factor(self, step: int, total: int) -> float:
        """Share of the peak rate at `step` of `total`: linear rise, then half a cosine."""
        rise = max(1, round(self.warmup * total))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class Epochs:
    """The task's training batches as Lightning wants them: sized, in an order that depends on (seed, epoch) only."""

    def __init__(self, module: SupernetModule) -> None:
        self.module = module

    def __len__(self) -> int:
        return self.module.task.steps_per_epoch()

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.module.current_epoch
        torch.manual_seed(self.module.seed * 1_000_003 + epoch)
        rank, world = self.module.global_rank, self.module.world
        for images, labels in self.module.task.train(np.random.default_rng([self.module.seed, 0, epoch])):
            yield images[rank::world], labels[rank::world]


class SupernetModule(pl.LightningModule):
    """The training step.

    Args:
        net: the supernet, calibrated.
        task: data and loss.
        sampler: which subnets a step runs.
        losses: object with `subnet_loss` and `regulariser` (supernet.training.losses).
        subnets: subnets for each step.
        schedule: learning rates.
        seed: of data order and subnets.
        total_steps: planned steps, for the schedule.
    """

    def __init__(
        self,
        net: SuperNet,
        task: Task,
        sampler: Sampler,
        losses: Any,
        *,
        subnets: int,
        schedule: Schedule,
        seed: int,
        total_steps: int,
    ) -> None:
        super().__init__()
        if subnets < 1:
            raise ValueError(f"a step trains at least one subnet, got subnets={subnets}")
        self.automatic_optimization = False
        self.net, self.task, self.sampler, self.losses = net, task, sampler, losses
        self.subnets, self.schedule, self.seed, self.total_steps = subnets, schedule, seed, total_steps
        self.done = 0
        self.recent: list[dict[str, float]] = []

    @property
    def world(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def setup(self, stage: str) -> None:
        """A network that was evaluated before is trained; parts set to evaluation one by one stay so."""
        if not self.net.training:
            self.net.train()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Weights: torch's SGD or AdamW. Scales and zero-points: LazyAdam."""
        bank = self.net.bank
        learned = {id(p) for p in bank.parameters()}
        others = [p for p in self.net.parameters() if id(p) not in learned and p.requires_grad]
        groups = [
            {"params": [p for p in others if p.dim() > 1], "weight_decay": self.schedule.weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        lr = self.schedule.lr
        weights: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=lr, momentum=self.schedule.momentum, nesterov=self.schedule.momentum > 0)
            if self.schedule.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=lr)
        )
        scales = LazyAdam(
            [
                {"params": [bank.scale], "relative": True, "lr": self.schedule.scale_lr},
                {"params": [bank.zero_point], "relative": False, "lr": self.schedule.zero_point_lr},
            ]
        )
        for optimizer in (weights, scales):
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return [weights, scales]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Forward and backward of each subnet asked for, then one update.

        Raises:
            ValueError: a loss or the regulariser is not finite, on any process.
        """
        images, labels = batch
        optimizers: list[Any] = self.optimizers()  # type: ignore[assignment]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        rows = self.sampler.ask(self.subnets, np.random.default_rng([self.seed, 1, self.done]))
        teacher, losses = None, []
        with self._unsynchronised():
            for k, row in enumerate(rows):
                with self.net.as_subnet(row):
                    logits = self.net(images)
                    loss = self.losses.subnet_loss(k, logits, labels, self.task, teacher)
                    self.manual_backward(loss)
                teacher = logits.detach()
                losses.append(loss.detach())
            extra = self.losses.regulariser(self.net)
            if extra is not None:
                self.manual_backward(extra)
        told = [*losses, *([] if extra is None else [extra.detach()])]
        values = self._mean_of_processes(torch.stack(told)).cpu().double().numpy()
        self._require_finite(values, rows)
        values = values[: len(rows)]
        self._average_gradients()
        self._update(optimizers)
        if self.sampler.feedback == "train_loss":
            self.sampler.tell(rows, values, self.done, self.total_steps)
        elif self.sampler.feedback == "select_loss" and (self.done + 1) % self.sampler.every == 0:
            self.sampler.tell(rows, self._select_losses(rows), self.done, self.total_steps)
        self.done += 1
        self._note(values, extra, logits, labels)

    def _update(self, optimizers: list[Any]) -> None:
        if self.schedule.clip:
            torch.nn.utils.clip_grad_value_(
                [p for g in optimizers[0].param_groups for p in g["params"]], self.schedule.clip
            )
        factor = self.schedule.factor(self.done, self.total_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()

    def _note(self, values: np.ndarray[Any, Any], extra: Tensor | None, logits: Tensor, labels: Tensor) -> None:
        figures = {f"loss_{k}": float(v) for k, v in enumerate(values)}
        figures |= {"loss": float(values.mean()), "accuracy_last": float((logits.argmax(1) == labels).float().mean())}
        if extra is not None:
            figures["regulariser"] = float(extra.detach())
        if isinstance(self.sampler, Settling):
            figures |= self.sampler.figures()
        self.recent.append(figures)
        if len(self.recent) == 20 or self.done == self.total_steps:
            mean = {f"train/{name}": float(np.mean([f[name] for f in self.recent])) for name in figures}
            if self.logger is not None:
                self.logger.log_metrics(mean | {"epoch": self.current_epoch}, step=self.done)
            self.recent.clear()

    @torch.no_grad()
    def _select_losses(self, rows: Indices) -> np.ndarray[Any, Any]:
        """[n] loss of each row on images of the select part, with BatchNorm statistics of its own."""
        mode, losses = self.training, []
        fixed = [images.to(self.device) for images in self.task.recalibrate(TOLD)]
        for row in rows:
            with self.net.as_subnet(row), recalibrated(self.net, fixed):
                self.net.eval()
                parts = [(images.to(self.device), labels.to(self.device)) for images, labels in self.task.select(TOLD)]
                sums = [float(self.task.loss(self.net(images), labels)) * len(labels) for images, labels in parts]
                losses.append(sum(sums) / sum(len(labels) for _, labels in parts))
        self.train(mode)
        return np.array(losses)

    def _require_finite(self, values: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        if not np.isfinite(values).all():
            k = int(np.flatnonzero(~np.isfinite(values))[0])
            which = f"subnet {self.net.space.config(rows[k]).id}" if k < len(rows) else "the regulariser"
            raise ValueError(
                f"the loss became {values[k]} at step {self.done} ({which}); the last checkpoint is kept: "
                "lower schedule.lr or schedule.scale_lr, or check the data, and start again"
            )

    # -- several processes --------------------------------------------------------------------------------------------
    def _unsynchronised(self) -> Any:
        """DDP's reducer takes neither several backward calls a step nor idle blocks; gradients are averaged here."""
        model: Any = getattr(self.trainer.strategy, "model", None)
        return model.no_sync() if self.world > 1 and hasattr(model, "no_sync") else nullcontext()

    def _average_gradients(self) -> None:
        if self.world == 1:
            return
        # Every process runs the same subnets, so the same parameters have gradients; the others stay without, since a
        # gradient of zeros would still let momentum and weight decay move the blocks that did not run.
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        mean = self._mean_of_processes(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _mean_of_processes(self, values: Tensor) -> Tensor:
        """Mean over all processes, the same on each of them."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def average_buffers(self) -> None:
        """Mean of the BatchNorm statistics over all processes, so that every rank saves the same file."""
        for buffer in self.net.buffers() if self.world > 1 else ():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world

    # -- checkpoints: tensors and plain Python only -------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the step, the sampler, the figures not yet logged and the space's fingerprint."""
        checkpoint["elastibit"] = {
            "done": self.done,
            "sampler": self.sampler.state_dict(),
            "recent": list(self.recent),
            "fingerprint": self.net.fingerprint,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another space; continue where the checkpoint was taken."""
        state = checkpoint["elastibit"]
        if state["fingerprint"] != self.net.fingerprint:
            raise ValueError(
                f"the checkpoint is of space {state['fingerprint']}, this run is of {self.net.fingerprint}; "
                "resume with the run's own settings"
            )
        self.done, self.recent = state["done"], list(state.get("recent", ()))
        self.sampler.load_state_dict(state["sampler"])

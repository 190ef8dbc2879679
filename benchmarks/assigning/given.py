"""What the driver writes for the tools: network, images of each seed, limits; all of it is plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.assigning.problem import IMAGES
from supernet.artefacts import load_tensors, write_json
from supernet.tasks.classification import Classification


def prepare(
    folder: Path, weights: Path, task: Classification, seeds: Sequence[int], limits: Mapping[str, float]
) -> None:
    """Write network.pt, images-<seed>.pt and limits.json.

    Args:
        folder: where to.
        weights: safetensors file of the trained float network.
        task: whose recalibration images are drawn from: what the tools see is what BatchNorm may see here, and no more.
        seeds: of the draws.
        limits: BitOps by budget.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(load_tensors(weights)[0], folder / "network.pt")
    write_json(folder / "limits.json", dict(limits))
    if all((folder / f"images-{seed}.pt").exists() for seed in seeds):
        return
    images, labels = torch.cat(list(task.recalibrate())), _labels(task)
    for seed in seeds:
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(images))[:IMAGES])
        torch.save({"images": images[chosen], "labels": labels[chosen]}, folder / f"images-{seed}.pt")


def _labels(task: Classification) -> Tensor:
    """Labels of the recalibration images, in their order."""
    origin, indices = task.indices("recalibrate")
    return torch.from_numpy(task.source.labels(origin)[indices])

"""Source of images: the small sets of torchvision, held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

SETS = ("CIFAR10", "CIFAR100", "FashionMNIST")


class TorchvisionSet:
    """CIFAR-10, CIFAR-100 or Fashion-MNIST with their official train and test parts, in official order.

    Args:
        dataset: `CIFAR10`, `CIFAR100` or `FashionMNIST`.
        root: folder that holds, or shall hold, torchvision's files.
        download: fetch them if they are not there.

    Raises:
        ValueError: another data set.
        FileNotFoundError: the files are not there or not whole.
    """

    def __init__(self, dataset: str, root: str | Path = "data", download: bool = False) -> None:
        if dataset not in SETS:
            raise ValueError(
                f"dataset must be one of {', '.join(SETS)}, got {dataset!r}; for image folders use task=image_folder"
            )
        import torchvision

        make = getattr(torchvision.datasets, dataset)
        folder = Path(root).expanduser()
        try:
            sets = {part: make(folder, train=part == "train", download=download) for part in ("train", "test")}
        except RuntimeError as error:
            way_out = "set task.source.root to where it is, or task.source.download=true"
            raise FileNotFoundError(f"{dataset} is not in {folder.absolute()} ({error}); {way_out}") from error
        self._images = {part: _channels_first(np.asarray(data.data)) for part, data in sets.items()}
        self._labels = {part: np.asarray(data.targets, dtype=np.int64) for part, data in sets.items()}
        self.class_names = tuple(sets["train"].classes)
        self.channels = self._images["train"].shape[1]

    def labels(self, part: str) -> Int64[np.ndarray, " n"]:
        """Labels of `train` or `test`."""
        return self._labels[part]

    def batches(
        self, part: str, chunks: Sequence[Int64[np.ndarray, " b"]], rng: np.random.Generator | None = None
    ) -> Iterator[UInt8[Tensor, "b c h w"]]:
        """The images at each chunk of indices; nothing is drawn from `rng`."""
        return (torch.from_numpy(self._images[part][chunk]) for chunk in chunks)


def _channels_first(images: UInt8[np.ndarray, "n h w *c"]) -> UInt8[np.ndarray, "n c h w"]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if images.ndim == 4 else images[:, None]

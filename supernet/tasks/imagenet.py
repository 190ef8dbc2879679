"""Source of images: ImageNet, which does not fit in memory and is read from its files by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from torchvision.datasets import ImageNet as Files

FOLDERS = {"train": "train", "test": "val"}


class ImageNet:
    """ILSVRC-2012 (Russakovsky et al., IJCV 2015): train part, and the official validation part as our test part.

    Training images are cut at random (8 to 100 % of the area, aspect ratio 3/4 to 4/3, resized) and mirrored with
    probability 1/2, as in Szegedy et al., CVPR 2015; all others are resized at the shorter side and cut in the middle.

    Args:
        root: folder with torchvision's layout, or with the archives from image-net.org, which torchvision then unpacks.
        size: height and width of the images in pixels.
        resize: length of the shorter side before the middle is cut out, at least `size`.
        num_workers: processes that decode; 0: this one. The images do not depend on it.

    Raises:
        FileNotFoundError: neither files nor archives are there.
    """

    channels = 3

    def __init__(self, root: str | Path, size: int = 224, resize: int = 256, num_workers: int = 4) -> None:
        if not 0 < size <= resize:
            raise ValueError(
                f"0 < size <= resize is required, got size {size}, resize {resize}; the usual pair is 224, 256"
            )
        from torchvision import datasets

        self.size, self.resize, self.num_workers = size, resize, num_workers
        folder = Path(root).expanduser()
        try:
            self._files = {part: datasets.ImageNet(folder, split=split) for part, split in FOLDERS.items()}
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(f"no ImageNet in {folder.absolute()}: {reason}; set task.source.root") from error
        self.class_names = tuple(names[0] for names in self._files["train"].classes)

    def labels(self, part: str) -> Int64[np.ndarray, " n"]:
        """Labels of `train` or `test`."""
        return np.asarray(self._files[part].targets, dtype=np.int64)

    def batches(
        self, part: str, chunks: Sequence[Int64[np.ndarray, " b"]], rng: np.random.Generator | None = None
    ) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
        """The images at each chunk of indices: cut and mirrored as `rng` says, or with no `rng` cut in the middle."""
        seeds = [None if rng is None else rng.integers(2**63, size=len(chunk)) for chunk in chunks]
        keys = [
            [(int(i), None if drawn is None else int(drawn[j])) for j, i in enumerate(chunk)]
            for chunk, drawn in zip(chunks, seeds, strict=True)
        ]
        images = _Decoded(self._files[part], self.size, self.resize)
        own = torch.Generator().manual_seed(0)  # or the loader would draw from the global one
        return iter(
            DataLoader(images, batch_sampler=keys, num_workers=self.num_workers, collate_fn=torch.stack, generator=own)
        )


class _Decoded(Dataset[UInt8[Tensor, "3 h w"]]):
    """Images by (index, seed of the random cut or None)."""

    def __init__(self, files: Files, size: int, resize: int) -> None:
        from torchvision.transforms import v2

        self.files = files
        self.middle: Any = v2.Compose([v2.PILToTensor(), v2.Resize(resize, antialias=True), v2.CenterCrop(size)])
        self.random: Any = v2.Compose(
            [v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __getitem__(self, key: tuple[int, int | None]) -> UInt8[Tensor, "3 h w"]:
        index, seed = key
        try:
            image = self.files[index][0]
        except OSError as error:
            raise ValueError(f"{self.files.samples[index][0]} is not a whole image ({error}); copy it again") from error
        if seed is None:
            return self.middle(image)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            return self.random(image)

"""Classification of images: four data parts that do not leak into each other, cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

T = TypeVar("T")
SELECT_FROM = ("train", "test", "test_stratified")


class Source(Protocol):
    """Where images come from: two parts, `train` and `test`, each in a fixed order.

    Attributes:
        channels: of every image.
        class_names: by label.
    """

    @property
    def channels(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    def labels(self, part: str) -> Int64[np.ndarray, " n"]:
        """Labels of a part, 0..len(class_names) - 1."""
        ...

    def batches(
        self, part: str, chunks: Sequence[Int64[np.ndarray, " b"]], rng: np.random.Generator | None
    ) -> Iterator[UInt8[Tensor, "b c h w"]]:
        """The images at each chunk of indices, one batch for each chunk.

        With `rng`, for training: a source that reads files may cut its images at random. Without: the same each time.
        """
        ...


Augment = Callable[[UInt8[Tensor, "n c h w"], np.random.Generator], UInt8[Tensor, "n c h w"]]


@dataclass(frozen=True)
class Batches(Generic[T]):
    """Batches that may be walked through any number of times, each time the same; `len` counts them."""

    count: int
    start: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.start()

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class _Part:
    """A data part: which part of the source it is taken from, which images, and how it came about."""

    origin: str
    indices: Int64[np.ndarray, " n"]
    how: str


Pair = tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]


class Classification:
    """Image classification with four data parts.

    | part | taken from | for |
    |---|---|---|
    | train | train, less `select` | weights |
    | recalibrate | a fixed random subset of our train part, never augmented | BatchNorm statistics, scales |
    | select | see `select_from` | choosing among subnets |
    | test | test, less `select` | the reported number |

    | select_from | select | test | use it when |
    |---|---|---|---|
    | train | a stratified `select_share` of train | all of test | weights start afresh |
    | test | the first half, in order | the second half, in order | pretrained weights have seen all of train |
    | test_stratified | a stratified half | the other half | the same, where test is ordered by class |

    Except for the halves of `test`, which keep the order of the source, the images of a part stand in a fixed random
    order, so that its first n are a fair sample.

    Images are `(pixels / 255 - mean) / std`, float32, channels first.

    Args:
        source: the images.
        mean, std: one number for each channel, of pixels in 0..1.
        name: for report and card.
        augment: changes a batch of uint8 images with a generator; None: no augmentation beside the source's own.
        batch_size: images of a training batch; the last incomplete batch of an epoch is left out.
        eval_batch_size: most images of any other batch; batches of a part differ by at most one image.
        label_smoothing: weight of the uniform distribution in the target, 0 <= label_smoothing < 1.
        select_from: see the table.
        select_share: share of each class, where `select_from` is `train`.
        recalibrate_images: size of that part, at most.
        split_seed: of every split; independent of the seed of a run.

    Raises:
        ValueError: settings that contradict each other or the images.
    """

    def __init__(
        self,
        source: Source,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "classification",
        augment: Augment | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        label_smoothing: float = 0.0,
        select_from: str = "train",
        select_share: float = 0.1,
        recalibrate_images: int = 1024,
        split_seed: int = 0,
    ) -> None:
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "recalibrate_images": recalibrate_images}
        _check_settings(source.channels, mean, std, sizes, label_smoothing)
        self.name = name
        self.source = source
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.augment = augment
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.label_smoothing = label_smoothing
        self.split_seed = split_seed
        self.select_from = select_from
        self.in_channels = source.channels
        self.n_classes = len(source.class_names)
        self._labels = {part: source.labels(part) for part in ("train", "test")}
        self._check_labels()
        self._parts = self._split(select_share, recalibrate_images)
        if not self.steps_per_epoch():
            n = len(self._parts["train"].indices)
            raise ValueError(
                f"batch_size {batch_size} exceeds the {n} images of train; set task.batch_size={n} or less"
            )

    # --- the four parts ---

    def train(self, rng: np.random.Generator) -> Iterator[Pair]:
        """One epoch of shuffled, augmented batches.

        One number is drawn from `rng`, in this call; the epoch depends on nothing else, however its batches and other
        draws from `rng` are interleaved.
        """
        return self._epoch(int(rng.integers(2**63)))

    def steps_per_epoch(self) -> int:
        """Training batches of one epoch."""
        return len(self._parts["train"].indices) // self.batch_size

    def recalibrate(self, n: int | None = None) -> list[Float[Tensor, "b c h w"]]:
        """Batches of the first `n` recalibration images (None or more than there are: all), never augmented."""
        return list(self._images("recalibrate", self._chunks("recalibrate", n)))

    def select(self, n: int | None = None) -> Batches[Pair]:
        """Batches of the first `n` images of the select part (None or more than there are: all), in a fixed order."""
        return self._pairs("select", n)

    def test(self, n: int | None = None) -> Batches[Pair]:
        """Batches of the first `n` images of the test part (None or more than there are: all), in a fixed order."""
        return self._pairs("test", n)

    def indices(self, part: str) -> tuple[str, Int64[np.ndarray, " n"]]:
        """Where the images of one of the four parts come from: `train` or `test` of the source, and indices there."""
        return self._parts[part].origin, self._parts[part].indices.copy()

    def example(self) -> Float[Tensor, "1 c h w"]:
        """One normalised image of the recalibrate part."""
        return next(self._images("recalibrate", [self._parts["recalibrate"].indices[:1]]))

    # --- what is asked of the network ---

    def loss(self, logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """Mean cross entropy in nats."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def metrics(self) -> dict[str, Metric]:
        """Fresh metrics by name; `accuracy` is the share of images whose largest logit is at their label."""
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(num_classes=self.n_classes, average="micro")}

    def describe(self) -> dict[str, Any]:
        """What report and card say of the data; plain values."""
        return {
            "name": self.name,
            "classes": self.n_classes,
            "class_names": list(self.source.class_names),
            "image_shape": list(self.example().shape[1:]),
            "mean": list(self.mean),
            "std": list(self.std),
            "images": {name: len(part.indices) for name, part in self._parts.items()},
            "parts": {name: part.how for name, part in self._parts.items()},
            "select_from": self.select_from,
            "split_seed": self.split_seed,
            "augment": repr(self.augment) if self.augment else None,
            "batch_size": self.batch_size,
            "label_smoothing": self.label_smoothing,
        }

    # --- how ---

    def _check_labels(self) -> None:
        if self.n_classes < 2:
            raise ValueError(f"classification needs two or more classes, got {list(self.source.class_names)}")
        for part, labels in self._labels.items():
            if not len(labels) or labels.min() < 0 or labels.max() >= self.n_classes:
                found = f"{labels.min()}..{labels.max()}" if len(labels) else "no image"
                raise ValueError(
                    f"labels of {part} must lie in 0..{self.n_classes - 1} (one per class name), got {found}"
                )

    def _split(self, select_share: float, recalibrate_images: int) -> dict[str, _Part]:
        split, draw = np.random.default_rng(self.split_seed).spawn(2)
        train, test = (
            _Part(part, draw.permutation(len(self._labels[part])), f"all of {part}") for part in self._labels
        )
        if self.select_from == "train":
            train, select = self._stratified("train", select_share, split)
        elif self.select_from == "test_stratified":
            test, select = self._stratified("test", 0.5, split)
        elif self.select_from == "test":
            select, test = self._halves("test")
        else:
            raise ValueError(f"select_from must be one of {', '.join(SELECT_FROM)}, got {self.select_from!r}")
        chosen = draw.permutation(train.indices)[:recalibrate_images]
        recalibrate = _Part(
            "train", chosen, f"{len(chosen)} random images of our train part, split seed {self.split_seed}"
        )
        return {"train": train, "recalibrate": recalibrate, "select": select, "test": test}

    def _stratified(self, origin: str, share: float, rng: np.random.Generator) -> tuple[_Part, _Part]:
        """The rest, and a random `share` of each class, at least one image of each."""
        if not 0 < share < 1:
            raise ValueError(f"select_share must lie between 0 and 1, got {share}; 0.1 is usual")
        labels = self._labels[origin]
        chosen: Bool[np.ndarray, " n"] = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if len(members) < 2:
                name = self.source.class_names[label]
                raise ValueError(
                    f"select takes some images of each class and leaves some, but class {name!r} has 1 in {origin}; "
                    f"add images or set task.select_from={'test' if origin == 'train' else 'train'}"
                )
            count = min(max(round(share * len(members)), 1), len(members) - 1)
            chosen[rng.choice(members, count, replace=False)] = True
        how = f"a stratified {share:.4g} of {origin}, split seed {self.split_seed}"
        rest = _Part(origin, rng.permutation(np.flatnonzero(~chosen)), f"{origin} without select")
        return rest, _Part(origin, rng.permutation(np.flatnonzero(chosen)), how)

    def _halves(self, origin: str) -> tuple[_Part, _Part]:
        """First and second half in the order of the source."""
        labels = self._labels[origin]
        half = len(labels) // 2
        lopsided = set(labels[:half].tolist()) ^ set(labels[half:].tolist())
        if lopsided:
            name = self.source.class_names[min(lopsided)]
            raise ValueError(
                f"select_from=test takes the first half of test, but class {name!r} is in one half only; "
                "set task.select_from=test_stratified"
            )
        every = np.arange(len(labels))
        why = "for choosing, as pretrained weights have seen all of train"
        first = _Part(origin, every[:half], f"{origin}[0:{half}], {why}")
        return first, _Part(origin, every[half:], f"{origin}[{half}:{len(labels)}]")

    def _chunks(self, name: str, n: int | None) -> list[Int64[np.ndarray, " b"]]:
        """The first `n` indices of a part, in batches of nearly equal size, as a mean over batches weighs all alike."""
        indices = self._parts[name].indices
        if n is not None:
            if n < 1:
                raise ValueError(
                    f"a part of the data must have 1 image or more, got {n} of {name}; null takes all {len(indices)}"
                )
            indices = indices[:n]
        return np.array_split(indices, -(-len(indices) // self.eval_batch_size))

    def _images(self, name: str, chunks: Sequence[Int64[np.ndarray, " b"]]) -> Iterator[Float[Tensor, "b c h w"]]:
        return map(self._normalised, self.source.batches(self._parts[name].origin, chunks, None))

    def _pairs(self, name: str, n: int | None) -> Batches[Pair]:
        chunks = self._chunks(name, n)
        labels = self._labels[self._parts[name].origin]
        targets = [torch.from_numpy(labels[chunk]) for chunk in chunks]
        return Batches(len(chunks), lambda: zip(self._images(name, chunks), targets, strict=True))

    def _epoch(self, seed: int) -> Iterator[Pair]:
        shuffle, read, change = np.random.default_rng(seed).spawn(3)
        part = self._parts["train"]
        steps = self.steps_per_epoch()
        chunks = np.split(shuffle.permutation(part.indices)[: steps * self.batch_size], steps)
        for chunk, images in zip(chunks, self.source.batches(part.origin, chunks, read), strict=True):
            changed = images if self.augment is None else self.augment(images, change)
            yield self._normalised(changed), torch.from_numpy(self._labels[part.origin][chunk])

    def _normalised(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def _check_settings(
    channels: int, mean: Sequence[float], std: Sequence[float], sizes: Mapping[str, int], label_smoothing: float
) -> None:
    if not channels == len(mean) == len(std):
        counts = f"{channels} channels, {len(mean)} means, {len(std)} deviations"
        raise ValueError(f"mean and std need one number for each channel, got {counts}; set task.mean and task.std")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {list(std)}; 1 leaves a channel unscaled")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 image or more, got {size}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in 0 <= x < 1, got {label_smoothing}; 0 switches it off")

"""Source of images: a folder with one folder for each class, held in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from supernet.artefacts import progress

T = TypeVar("T")

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}
LONG = 5000  # images; with fewer, a progress bar would only flash


class ImageFolder:
    """Images in `root/train/<class>/` and `root/test/<class>/` (or `val`), each decoded once, when it is asked for.

    The images of a part are in order of (file name, class), whatever the file system says: files that are named by
    their official index, as those of CIFAR-10 in our benchmarks, are so in official order.

    Args:
        root: the folder.
        channels: 3 for colour, 1 for grey; every image is converted.
        size: height and width to which each image is brought, by resizing its shorter side (bilinear) and cutting the
            longer one in the middle; None: the images have one size already.
        test_folder: name of the test part; None: `test` if there is one, else `val`.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: classes that are empty or not in both parts, images that cannot be read or differ in size.
    """

    def __init__(
        self, root: str | Path, channels: int = 3, size: int | None = None, test_folder: str | None = None
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"channels must be 3 (colour) or 1 (grey), got {channels}")
        if size is not None and size < 1:
            raise ValueError(f"size must be 1 pixel or more, got {size}; null keeps the images as they are")
        base = Path(root).expanduser()
        folders = {"train": base / "train", "test": _test_folder(base, test_folder)}
        for folder in folders.values():
            if not folder.is_dir():
                expected = "train/<class>/* and test/<class>/* (or val)"
                raise FileNotFoundError(f"{folder.absolute()} is not a folder; task.source.root must hold {expected}")
        self.channels = channels
        self.class_names = _classes(folders)
        files = {part: _files(folder, self.class_names) for part, folder in folders.items()}
        shape = _one_size(files["train"] + files["test"]) if size is None else (size, size)
        self._parts = {part: _Part(found, self.class_names, (channels, *shape)) for part, found in files.items()}

    def labels(self, part: str) -> Int64[np.ndarray, " n"]:
        """Labels of `train` or `test`."""
        return self._parts[part].labels

    def files(self, part: str) -> list[Path]:
        """Files of `train` or `test`, in the order of their indices."""
        return list(self._parts[part].files)

    def batches(
        self, part: str, chunks: Sequence[Int64[np.ndarray, " b"]], rng: np.random.Generator | None = None
    ) -> Iterator[UInt8[Tensor, "b c h w"]]:
        """The images at each chunk of indices, all decoded before the first is given; nothing is drawn from `rng`."""
        images = self._parts[part]
        if chunks:
            images.decode(np.unique(np.concatenate(chunks)))
        return (torch.from_numpy(images.pixels[chunk]) for chunk in chunks)


class _Part:
    """The files of one part and as many of their pixels as have been asked for."""

    def __init__(self, files: list[Path], classes: Sequence[str], shape: tuple[int, int, int]) -> None:
        number = {name: i for i, name in enumerate(classes)}
        self.files = files
        self.labels = np.array([number[f.parent.name] for f in files], dtype=np.int64)
        self.pixels: UInt8[np.ndarray, "n c h w"] = np.zeros((len(files), *shape), dtype=np.uint8)
        self.decoded: Bool[np.ndarray, " n"] = np.zeros(len(files), dtype=bool)

    def decode(self, indices: Int64[np.ndarray, " k"]) -> None:
        missing = indices[~self.decoded[indices]]
        for i in _watched(missing.tolist(), "decoding images"):
            self.pixels[i] = _pixels(self.files[i], self.pixels.shape[1:])
            self.decoded[i] = True


def _test_folder(base: Path, name: str | None) -> Path:
    if name is not None:
        return base / name
    return base / "val" if (base / "val").is_dir() and not (base / "test").is_dir() else base / "test"


def _classes(folders: dict[str, Path]) -> tuple[str, ...]:
    """Names of the class folders, sorted; the same in both parts."""
    names = {
        part: {f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")}
        for part, folder in folders.items()
    }
    if len(names["train"]) < 2:
        raise ValueError(
            f"{folders['train']} must hold a folder for each of two or more classes, got {sorted(names['train'])}"
        )
    if names["train"] != names["test"]:
        only = {folders[p]: sorted(names[p] - names[q])[:5] for p, q in (("train", "test"), ("test", "train"))}
        found = "; ".join(f"only in {folder}: {', '.join(classes)}" for folder, classes in only.items() if classes)
        raise ValueError(f"train and test must have the same class folders, but {found}; add or remove them")
    return tuple(sorted(names["train"]))


def _files(folder: Path, classes: Sequence[str]) -> list[Path]:
    """Image files of one part, ordered by (file name, class)."""
    found: list[Path] = []
    for name in classes:
        images = [f for f in (folder / name).iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
        if not images:
            raise ValueError(
                f"class folder {folder / name} holds no image ({', '.join(SUFFIXES)}); fill it or remove the class"
            )
        found += images
    return sorted(found, key=lambda f: (f.name, f.parent.name))


def _one_size(files: Sequence[Path]) -> tuple[int, int]:
    """Height and width of all files, read off their headers."""
    first: dict[tuple[int, int], Path] = {}
    count: Counter[tuple[int, int]] = Counter()
    for file in _watched(files, "checking image sizes"):
        with _opened(file) as image:
            first.setdefault(image.size, file)
            count[image.size] += 1
    if len(first) > 1:
        (common, n), (other, _) = count.most_common(2)
        side = min(common)
        raise ValueError(
            f"images must have one size, but {first[common]} (and {n - 1} more) is {common[0]}x{common[1]} and "
            f"{first[other]} is {other[0]}x{other[1]}; task.source.size={side} brings all to {side}x{side}"
        )
    width, height = next(iter(first))
    return height, width


def _pixels(file: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "c h w"]:
    channels, height, width = shape
    with _opened(file) as image:
        image = image.convert(MODES[channels])
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # conversion would clip silently
                raise ValueError(f"{file} has {image.mode} pixels, more than 8 bits each; convert the images to 8 bits")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not an image that Pillow can read; replace or remove it") from error
    except OSError as error:
        raise ValueError(f"{file} is not a whole image ({error}); copy it again or remove it") from error


def _watched(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a progress bar and the time left if there are many."""
    if len(items) < LONG:
        yield from items
        return
    with progress(what, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()

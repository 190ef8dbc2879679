"""What every test may ask for."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, fresh for each test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data and weights beside the checkout, or where ELASTIBIT_DATA says."""
    folder = Path(os.environ.get("ELASTIBIT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data is not beside the checkout; ELASTIBIT_DATA may name its folder")
    return folder


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Write `<folder>/<part>/<class>/<name>` with random pixels, `per_class` files for each class; gives the folder."""

    def write(
        parts: Mapping[str, int],
        classes: Sequence[str] = ("cat", "dog"),
        size: tuple[int, int] = (8, 8),
        mode: str = "RGB",
    ) -> Path:
        random = np.random.default_rng(0)
        for part, per_class in parts.items():
            for i in range(per_class * len(classes)):
                file = tmp_path / "images" / part / classes[i % len(classes)] / f"{i:05}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(file)
        return tmp_path / "images"

    return write


@pytest.fixture
def torchvision_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sets of random images in the file formats of CIFAR-10, CIFAR-100 and Fashion-MNIST; gives their root."""
    from torchvision.datasets import cifar

    random = np.random.default_rng(0)
    root = tmp_path / "torchvision"
    monkeypatch.setattr(
        cifar, "check_integrity", lambda path, md5=None: Path(path).is_file()
    )  # these are not the real files
    for folder, key, meta, names, files in (
        (
            "cifar-10-batches-py",
            "labels",
            "batches.meta",
            10,
            {f"data_batch_{i}": 40 for i in range(1, 6)} | {"test_batch": 60},
        ),
        ("cifar-100-python", "fine_labels", "meta", 100, {"train": 1200, "test": 300}),
    ):
        (root / folder).mkdir(parents=True)
        named = {("label_names" if names == 10 else "fine_label_names"): [f"class {i}" for i in range(names)]}
        (root / folder / meta).write_bytes(pickle.dumps(named))
        for file, n in files.items():
            entry = {"data": random.integers(0, 256, (n, 3072), dtype=np.uint8), key: [i % names for i in range(n)]}
            (root / folder / file).write_bytes(pickle.dumps(entry))
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 200), ("t10k", 60)):
        pixels = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes())
        labels = np.arange(n, dtype=np.uint8) % 10
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
    return root


@pytest.fixture
def imagenet_files(tmp_path: Path) -> Path:
    """A folder in torchvision's layout of ImageNet with three classes of noise in several sizes."""
    random = np.random.default_rng(0)
    root = tmp_path / "imagenet"
    wnids = {f"n0000000{i}": (f"thing {i}", "synonym") for i in range(3)}
    for part, per_class in (("train", 12), ("val", 4)):
        for wnid in wnids:
            (root / part / wnid).mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(0, 256, (40 + 3 * i, 50 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / wnid / f"{wnid}_{i}.JPEG")
    torch.save((wnids, []), root / "meta.bin")
    return root

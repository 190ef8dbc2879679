"""Image folders: order, pixels, lazy decoding, and every way in which a folder can be wrong."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from supernet.tasks.image_folder import ImageFolder

PARTS = {"train": 6, "test": 3}


def pixels(source, part):
    (images,) = source.batches(part, [np.arange(len(source.labels(part)))])
    return images


def test_order_is_by_file_name_then_class(write_images):
    """The fixture numbers files across classes, as an official index does: dog and cat take turns."""
    source = ImageFolder(write_images(PARTS, classes=("dog", "cat")))
    assert source.class_names == ("cat", "dog")
    assert [f.name for f in source.files("train")] == [f"{i:05}.png" for i in range(12)]
    assert source.labels("train").tolist() == [1, 0] * 6


def test_equal_file_names_are_ordered_by_class(write_images):
    root = write_images({"train": 1, "test": 1})
    shutil.copy(root / "train" / "cat" / "00000.png", root / "train" / "dog" / "00000.png")
    assert [f"{f.parent.name}/{f.stem}" for f in ImageFolder(root).files("train")] == [
        "cat/00000",
        "dog/00000",
        "dog/00001",
    ]


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGB", 1), ("L", 3)])
def test_pixels_are_those_of_the_files(write_images, mode, channels):
    source = ImageFolder(write_images(PARTS, size=(9, 5), mode=mode), channels=channels)
    images = pixels(source, "test")
    assert images.dtype == torch.uint8 and images.shape == (6, channels, 5, 9)
    for image, file in zip(images, source.files("test"), strict=True):
        own = np.asarray(Image.open(file).convert("RGB" if channels == 3 else "L"))
        assert np.array_equal(image.permute(1, 2, 0).squeeze(-1).numpy(), own)


def test_only_what_is_asked_for_is_decoded_and_only_once(write_images, monkeypatch):
    source = ImageFolder(write_images(PARTS))
    opened, really = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or really(file))
    first = [batch.clone() for batch in source.batches("train", [np.array([3, 1]), np.array([1])])]
    assert opened == [source.files("train")[i] for i in (1, 3)]
    (again,) = source.batches("train", [np.array([3, 1, 0])])
    assert len(opened) == 3
    assert torch.equal(again[:2], first[0])
    assert torch.equal(first[1][0], first[0][1])


def test_resizing_fits_the_shorter_side_and_cuts_the_longer_one(write_images):
    root = write_images(PARTS, size=(12, 8))
    source = ImageFolder(root, size=4)
    images = pixels(source, "train")
    assert images.shape == (12, 3, 4, 4)
    whole = Image.open(source.files("train")[0]).resize((6, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(whole)[:, 1:5])


def test_test_part_may_be_called_val_or_anything(write_images):
    root = write_images({"train": 2, "val": 3, "holdout": 4})
    assert len(ImageFolder(root).labels("test")) == 6
    assert len(ImageFolder(root, test_folder="holdout").labels("test")) == 8
    write_images({"test": 1})
    assert len(ImageFolder(root).labels("test")) == 2


def test_other_files_and_hidden_ones_are_passed_over(write_images):
    root = write_images(PARTS)
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / "cat" / "._00000.png").write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    shutil.copy(root / "train" / "cat" / "00000.png", root / "train" / "cat" / "00099.PNG")
    source = ImageFolder(root)
    assert source.class_names == ("cat", "dog")
    assert len(source.labels("train")) == 13


class TestWrongFolders:
    def refused(self, root, error=ValueError, **settings):
        with pytest.raises(error) as caught:
            ImageFolder(root, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_absent(self, tmp_path, write_images):
        assert "train/<class>/*" in self.refused(tmp_path / "nowhere", FileNotFoundError)
        root = write_images({"train": 2})
        assert f"{root / 'test'} is not a folder" in self.refused(root, FileNotFoundError)
        assert "holdout is not a folder" in self.refused(root, FileNotFoundError, test_folder="holdout")

    def test_mixed_sizes(self, write_images):
        root = write_images(PARTS)
        odd = root / "test" / "dog" / "00099.png"
        Image.new("RGB", (10, 7)).save(odd)
        message = self.refused(root)
        assert f"{odd} is 10x7" in message
        assert "(and 17 more) is 8x8" in message
        assert "task.source.size=8" in message
        assert ImageFolder(root, size=8).labels("test").tolist() == [0, 1] * 3 + [1]

    def test_empty_class(self, write_images):
        root = write_images(PARTS)
        for part in PARTS:
            (root / part / "bird").mkdir()
        assert f"class folder {root / 'train' / 'bird'} holds no image" in self.refused(root)

    def test_classes_of_one_part_only(self, write_images):
        root = write_images(PARTS)
        shutil.move(root / "test" / "dog", root / "test" / "wolf")
        message = self.refused(root)
        assert f"only in {root / 'train'}: dog; only in {root / 'test'}: wolf" in message

    def test_one_class(self, write_images):
        assert "two or more classes, got ['cat']" in self.refused(write_images(PARTS, classes=("cat",)))

    def test_unreadable(self, write_images):
        root = write_images(PARTS)
        broken = root / "train" / "cat" / "00098.jpg"
        broken.write_text("not an image")
        assert f"{broken} is not an image that Pillow can read" in self.refused(root)

    def test_cut_short(self, write_images):
        root = write_images(PARTS, size=(64, 64))
        file = root / "train" / "cat" / "00000.png"
        file.write_bytes(file.read_bytes()[:5000])
        source = ImageFolder(root)
        with pytest.raises(ValueError, match=r"00000\.png is not a whole image"):
            pixels(source, "train")

    def test_more_than_eight_bits(self, write_images):
        root = write_images(PARTS)
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "train" / "cat" / "00098.png")
        assert "00098.png has I;16 pixels, more than 8 bits" in self.refused(root)

    def test_settings(self, write_images):
        root = write_images(PARTS)
        assert "channels must be 3 (colour) or 1 (grey), got 4" in self.refused(root, channels=4)
        assert "size must be 1 pixel or more, got 0" in self.refused(root, size=0)


@pytest.mark.slow
def test_cifar10_stands_in_official_order(shared_data, tmp_path):
    """The folders that our benchmarks use, written by the data's own script."""
    subprocess.run([sys.executable, shared_data / "cifar10" / "unpack.py", tmp_path], check=True)
    source = ImageFolder(tmp_path / "jpeg")
    packed = np.load(shared_data / "cifar10" / "cifar10_jpeg.npz")
    assert source.class_names == tuple(packed["class_names"])
    for part in ("train", "test"):
        assert np.array_equal(source.labels(part), packed[f"{part}_label"])
    assert pixels(source, "test").shape == (10_000, 3, 32, 32)

"""Batched augmentation against a loop over images."""

import numpy as np
import pytest
import torch

from supernet.tasks.augment import CropFlip


def loop(images, padding, flip, rng):
    """The same, image by image and pixel by pixel, from the same draws."""
    n, _, h, w = images.shape
    top, left = rng.integers(0, 2 * padding + 1, (2, n)) if padding else np.full((2, n), padding)
    mirrored = rng.random(n) < 0.5 if flip else np.zeros(n, bool)
    out = np.zeros_like(images)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                from_y, from_x = y + top[i] - padding, (w - 1 - x if mirrored[i] else x) + left[i] - padding
                if 0 <= from_y < h and 0 <= from_x < w:
                    out[i, :, y, x] = images[i, :, from_y, from_x]
    return out


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (5, 1, 6, 11), (1, 3, 4, 4)])
def test_equals_a_loop_over_images(shape, padding, flip, rng):
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    out = CropFlip(padding, flip)(torch.from_numpy(images), np.random.default_rng(5))
    assert out.dtype == torch.uint8
    assert np.array_equal(out.numpy(), loop(images, padding, flip, np.random.default_rng(5)))


def test_every_offset_and_both_sides_occur_equally():
    """A single lit pixel shows offset and mirroring: 9 offsets x 2 sides, 18,000 images, chi-squared."""
    images = torch.zeros(18_000, 1, 5, 6, dtype=torch.uint8)
    images[:, 0, 2, 1] = 255
    out = CropFlip(1, True)(images, np.random.default_rng(0))
    where = out.flatten(1).argmax(1).numpy()
    counts = np.bincount(where, minlength=30)
    assert (counts > 0).sum() == 18
    assert (
        (counts[counts > 0] - 1000) ** 2 / 1000
    ).sum() < 41  # 99.9 % point of chi-squared with 17 degrees of freedom


def test_the_input_is_left_as_it_was(rng):
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    before = images.clone()
    CropFlip()(images, rng)
    assert torch.equal(images, before)


def test_negative_padding():
    with pytest.raises(ValueError, match="crop_padding must be 0 or more pixels, got -1"):
        CropFlip(-1)

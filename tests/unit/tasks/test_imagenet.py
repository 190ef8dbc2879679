"""ImageNet's layout on a few images: middle cuts, random cuts that follow the generator, worker processes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from supernet.tasks.imagenet import ImageNet

CHUNKS = [np.array([0, 35, 7]), np.array([12])]


def read(source, seed=None, part="train"):
    return list(source.batches(part, CHUNKS, None if seed is None else np.random.default_rng(seed)))


@pytest.fixture
def source(imagenet_files):
    return ImageNet(imagenet_files, size=24, resize=32, num_workers=0)


def test_labels_and_names(source):
    assert source.class_names == ("thing 0", "thing 1", "thing 2")
    assert source.labels("train").tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert source.labels("test").tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_other_images_are_cut_in_the_middle(source, imagenet_files):
    images = read(source)
    assert [tuple(b.shape) for b in images] == [(3, 3, 24, 24), (1, 3, 24, 24)]
    assert images[0].dtype == torch.uint8
    whole = v2.functional.pil_to_tensor(Image.open(imagenet_files / "train" / "n00000001" / "n00000001_0.JPEG"))
    h, w = whole.shape[1:]  # 40 x 50 becomes 32 x 40, of which the middle 24 x 24
    resized = v2.functional.resize(whole, [32, 32 * w // h], antialias=True)
    assert torch.equal(images[1][0], resized[:, 4:28, 8:32])


def test_random_cuts_follow_the_generator_alone(source):
    first = read(source, 1)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = read(source, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, read(source, 2), strict=True))
    torch.set_rng_state(state)
    read(source, 1)
    read(source)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12's view of fork
def test_worker_processes_change_nothing(source, imagenet_files):
    workers = ImageNet(imagenet_files, size=24, resize=32, num_workers=1)
    assert all(torch.equal(a, b) for a, b in zip(read(source, 4), read(workers, 4), strict=True))


def test_a_broken_file_is_named(source, imagenet_files):
    file = imagenet_files / "train" / "n00000000" / "n00000000_0.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"n00000000_0\.JPEG is not a whole image"):
        read(source)


def test_wrong_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ImageNet in .*; set task\.source\.root") as error:
        ImageNet(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got size 224, resize 200"):
        ImageNet(tmp_path, 224, 200)

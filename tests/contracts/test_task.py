"""Laws of every task of conf/task, each on its real data where that is bundled, else on small files in its format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from supernet.config import build
from supernet.interfaces import Task

CONF = Path(__file__).parents[2] / "conf" / "task"
TORCHVISION = {"source": {"root": ..., "download": False}, "batch_size": 16}
STAND_INS = {
    "cifar10": ("torchvision_files", TORCHVISION),
    "cifar100": ("torchvision_files", TORCHVISION),
    "fashion_mnist": ("torchvision_files", TORCHVISION),
    "image_folder": ("write_images", {"source": {"root": ...}, "batch_size": 6}),
    "imagenet": (
        "imagenet_files",
        {"source": {"root": ..., "size": 24, "resize": 32, "num_workers": 0}, "batch_size": 6, "select_share": 0.2},
    ),
}


@pytest.fixture(params=sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def task(request):
    """The task as its YAML has it, with the root of small stand-in files where the data is not bundled."""
    cfg = OmegaConf.load(request.param)
    fixture, changes = STAND_INS.get(request.param.stem, (None, {}))
    if fixture:
        made = request.getfixturevalue(fixture)
        root = made({"train": 20, "test": 10}) if callable(made) else made
        cfg = OmegaConf.merge(cfg, changes | {"source": changes["source"] | {"root": str(root)}})
    return build(cfg)


def hashes(batches):
    images = [x for batch in batches for x in (batch[0] if isinstance(batch, tuple) else batch)]
    return [x.numpy().tobytes() for x in images]


class TestTask:
    def test_it_is_a_task(self, task):
        assert isinstance(task, Task)
        assert task.n_classes >= 2 and task.name

    def test_batches_have_the_form_that_the_network_needs(self, task, rng):
        shape, example = task.example().shape[1:], task.example()
        assert example.shape[:2] == (1, task.in_channels)
        for part in (task.train(rng), task.select(), task.test()):
            for images, labels in part:
                assert images.dtype == torch.float32 and labels.dtype == torch.int64
                assert images.shape == (len(labels), *shape)
                assert labels.min() >= 0 and labels.max() < task.n_classes
        assert all(images.dtype == torch.float32 and images.shape[1:] == shape for images in task.recalibrate())

    def test_parts_share_no_image(self, task, rng):
        """By content; training images as they are before augmentation."""
        task.augment = None
        every = {part: set(hashes(getattr(task, part)())) for part in ("select", "test", "recalibrate")}
        origin, indices = task.indices("train")
        train = task.source.batches(origin, np.array_split(indices, 20), None)
        every["train"] = set(hashes((task._normalised(images), None) for images in train))
        assert not every["select"] & every["test"]
        assert not every["train"] & (every["select"] | every["test"])
        assert every["recalibrate"] <= every["train"]
        assert sum(len(every[p]) for p in ("train", "select", "test")) == sum(
            task.describe()["images"][p] for p in ("train", "select", "test")
        )

    def test_the_same_generator_gives_the_same_epoch_whatever_is_done_to_global_ones(self, task):
        epochs = []
        for disturb in (False, True, False):
            if disturb:
                torch.manual_seed(123)
                np.random.seed(123)  # noqa: NPY002 (the global generator is what must not matter)
            epochs.append(hashes(task.train(np.random.default_rng(7 if len(epochs) < 2 else 8))))
        assert epochs[0] == epochs[1]
        assert epochs[0] != epochs[2]
        assert len(epochs[0]) == task.steps_per_epoch() * task.batch_size

    def test_other_parts_are_the_same_each_time_and_n_takes_the_first(self, task):
        for part in (task.recalibrate, task.select, task.test):
            whole = hashes(part())
            assert hashes(part()) == whole
            assert hashes(part(4)) == whole[:4]

    def test_images_are_normalised(self, task):
        """Back to whole pixels 0..255 by the numbers that `describe` states."""
        facts = task.describe()
        mean, std = (torch.tensor(facts[k]).view(-1, 1, 1) for k in ("mean", "std"))
        pixels = (torch.cat(task.recalibrate()) * std + mean) * 255
        assert (pixels - pixels.round()).abs().max() < 1e-3
        assert pixels.min() > -0.01 and pixels.max() < 255.01

    def test_loss_and_metrics(self, task, rng):
        images, labels = next(iter(task.train(rng)))
        logits = torch.randn(len(images), task.n_classes, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(task.loss(logits, labels), F.cross_entropy(logits, labels))
        accuracy = task.metrics()["accuracy"]
        accuracy.update(logits, labels)
        assert accuracy.compute() == pytest.approx(float((logits.argmax(1) == labels).float().mean()))

    def test_its_description_is_plain_and_true(self, task):
        facts = task.describe()
        assert json.loads(json.dumps(facts)) == facts
        assert facts["classes"] == task.n_classes == len(facts["class_names"])
        assert facts["images"]["test"] == len(hashes(task.test()))
        assert facts["images"]["select"] == len(hashes(task.select()))
        assert facts["images"]["recalibrate"] == len(hashes(task.recalibrate()))
        assert facts["image_shape"] == list(task.example().shape[1:])

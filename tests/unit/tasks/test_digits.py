"""The bundled digits against scikit-learn's own arrays, and that a network learns them."""

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from pytest import mark, raises
from sklearn.datasets import load_digits

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.config import build
from supernet.tasks.digits import Digits

YAML = Path(__file__).parents[3] / "conf" / "task" / "digits.yaml"
EVERY = np.arange(10_000)


def test_both_parts_together_are_the_set():
    source = Digits()
    sizes = {part: len(source.labels(part)) for part in ("train", "test")}
    assert sizes == {"train": 1347, "test": 450}
    images, labels = load_digits(return_X_y=True)
    theirs = sorted((tuple(np.round(x * 255 / 16).astype(int)), y) for x, y in zip(images, labels, strict=True))
    ours = []
    for part, n in sizes.items():
        (pixels,) = source.batches(part, [EVERY[:n]])
        assert pixels.dtype == torch.uint8 and pixels.shape == (n, 1, 8, 8)
        ours += [(tuple(x.flatten().tolist()), y) for x, y in zip(pixels, source.labels(part), strict=True)]
    assert sorted(ours) == theirs


@mark.parametrize("share", [0.1, 0.25, 0.5])
def test_test_part_is_stratified_and_follows_the_seed(share):
    source, other = Digits(share), Digits(share, split_seed=1)
    counts = np.bincount(source.labels("test"))
    whole = np.bincount(load_digits().target)
    assert np.abs(counts - whole * share).max() <= 1
    assert np.array_equal(Digits(share).labels("test"), source.labels("test"))
    assert not np.array_equal(other.labels("test"), source.labels("test"))


def test_share_out_of_range():
    with raises(ValueError, match="test_share must lie between 0 and 1, got 1"):
        Digits(test_share=1)


def test_the_mean_and_deviation_of_the_configuration_are_those_of_the_images():
    cfg = OmegaConf.load(YAML)
    pixels = load_digits().images / 16
    assert cfg.mean[0] == np.round(pixels.mean(), 4)
    assert abs(cfg.std[0] - pixels.std()) < 5e-4  # 17 grey levels rounded to 256


def test_a_small_network_learns_them_in_seconds(rng):
    """More than 97 % of the test part after 10 epochs, from a fixed seed."""
    task = build(OmegaConf.load(YAML))
    torch.manual_seed(0)
    net = CifarResNet(14, n_classes=task.n_classes, in_channels=task.in_channels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10 * task.steps_per_epoch())
    for _ in range(10):
        for images, labels in task.train(rng):
            optimizer.zero_grad()
            task.loss(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    accuracy = task.metrics()["accuracy"]
    net.eval()
    with torch.no_grad():
        for images, labels in task.test():
            accuracy.update(net(images), labels)
    assert accuracy.compute() > 0.97

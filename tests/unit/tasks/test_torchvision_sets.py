"""torchvision's small sets against torchvision's own indexing, on small files in their formats."""

import numpy as np
import pytest
import torchvision

from supernet.tasks.torchvision_sets import TorchvisionSet


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_equals_torchvision(torchvision_files, name, part):
    ours = TorchvisionSet(name, torchvision_files)
    theirs = getattr(torchvision.datasets, name)(torchvision_files, train=part == "train")
    labels = ours.labels(part)
    (images,) = ours.batches(part, [np.arange(len(labels))])
    assert len(theirs) == len(labels) == len(images)
    assert ours.class_names == tuple(theirs.classes)
    assert images.shape[1] == ours.channels == (1 if name == "FashionMNIST" else 3)
    for i in (0, 7, len(labels) - 1):
        image, label = theirs[i]
        assert np.array_equal(images[i].permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(image))
        assert labels[i] == label


def test_absent_files_say_the_way_out(tmp_path):
    for name in ("CIFAR10", "FashionMNIST"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name} is not in {tmp_path}.*task.source.download=true"
        ) as error:
            TorchvisionSet(name, tmp_path)
        assert "\n" not in str(error.value)


def test_other_sets():
    with pytest.raises(ValueError, match="one of CIFAR10, CIFAR100, FashionMNIST, got 'SVHN'"):
        TorchvisionSet("SVHN")

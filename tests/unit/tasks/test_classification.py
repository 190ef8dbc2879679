"""The four parts of the data, and what is read from them, on a source whose images say who they are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from supernet.tasks.augment import CropFlip
from supernet.tasks.classification import Classification


class Numbered:
    """Images whose pixels spell their part and index; labels go round, or stand in blocks."""

    channels = 1

    def __init__(self, train=90, test=60, classes=3, blocks=False):
        self.class_names = [f"class {i}" for i in range(classes)]
        self.sizes = {"train": train, "test": test}
        self.classes, self.blocks = classes, blocks

    def labels(self, part):
        n = self.sizes[part]
        return np.arange(n) * self.classes // n if self.blocks else np.arange(n) % self.classes

    def batches(self, part, chunks, rng):
        for chunk in chunks:
            pixels = torch.zeros(len(chunk), 1, 4, 4, dtype=torch.uint8)
            pixels[:, 0, 0, 0] = torch.from_numpy(chunk % 256)
            pixels[:, 0, 0, 1] = torch.from_numpy(chunk // 256)
            pixels[:, 0, 0, 2] = part == "test"
            yield pixels


def task(source=None, **settings):
    plain = {"mean": [0.0], "std": [1.0], "batch_size": 8, "eval_batch_size": 16}
    return Classification(source or Numbered(), **plain | settings)


def who(images):
    """(part, index) of each image."""
    pixels = (images[:, 0, 0] * 255).round().long()
    return [("test" if p[2] else "train", int(p[0] + 256 * p[1])) for p in pixels]


def everyone(batches):
    return [name for batch in batches for name in who(batch[0] if isinstance(batch, tuple) else batch)]


@pytest.mark.parametrize("select_from", ["train", "test", "test_stratified"])
def test_no_image_is_in_two_parts(select_from, rng):
    t = task(select_from=select_from, batch_size=1, recalibrate_images=20)
    parts = [set(everyone(part)) for part in (t.train(rng), t.select(), t.test())]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 150
    assert set(everyone(t.recalibrate())) < parts[0]
    assert len(everyone(t.recalibrate())) == 20


def test_official_halves_in_official_order():
    t = task(select_from="test")
    assert everyone(t.select()) == [("test", i) for i in range(30)]
    assert everyone(t.test()) == [("test", i) for i in range(30, 60)]
    assert "test[0:30]" in t.describe()["parts"]["select"]
    assert t.describe()["parts"]["test"] == "test[30:60]"


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(("select_from", "sizes"), [("train", (9, 60)), ("test_stratified", (30, 30))])
def test_select_is_stratified(select_from, sizes, blocks):
    t = task(Numbered(blocks=blocks), select_from=select_from)
    for part, size in zip((t.select(), t.test()), sizes, strict=True):
        counts = np.bincount(torch.cat([labels for _, labels in part]), minlength=3)
        assert counts.tolist() == [size // 3] * 3


def test_the_first_images_are_a_fair_sample_of_a_set_that_is_ordered_by_class():
    t = task(Numbered(600, 300, blocks=True), eval_batch_size=300)
    for part in (t.select(30), t.test(30)):
        ((_, labels),) = part
        assert np.bincount(labels, minlength=3).min() >= 4


def test_labels_belong_to_their_images(rng):
    t = task()
    for part in (t.train(rng), t.select(), t.test()):
        for images, labels in part:
            assert labels.tolist() == [i % 3 for _, i in who(images)]
            assert labels.dtype == torch.int64


def test_an_epoch_shows_each_image_once_and_drops_what_does_not_fill_a_batch(rng):
    t = task(select_share=1 / 3, batch_size=8)
    batches = list(t.train(rng))
    assert len(batches) == t.steps_per_epoch() == 60 // 8
    assert all(len(images) == 8 for images, _ in batches)
    assert len(set(everyone(batches))) == 56


def test_the_first_n_images_of_a_part():
    t = task(eval_batch_size=7)
    whole = everyone(t.test())
    assert everyone(t.test(20)) == whole[:20]
    assert everyone(t.test(10_000)) == whole
    assert everyone(t.recalibrate(5)) == everyone(t.recalibrate())[:5]
    with pytest.raises(ValueError, match="1 image or more, got 0 of select"):
        t.select(0)


def test_batches_differ_by_one_image_at_most_and_can_be_walked_again():
    part = task(eval_batch_size=16).test(50)
    sizes = [len(images) for images, _ in part]
    assert len(part) == len(sizes) == 4
    assert sorted(sizes) == [12, 12, 13, 13]
    assert everyone(part) == everyone(part)


def test_equal_generators_give_equal_epochs_and_others_do_not():
    t = task(augment=CropFlip(1))

    def epoch(seed, disturb=False):
        batches = t.train(np.random.default_rng(seed))
        seen = []
        for images, _ in batches:
            if disturb:
                np.random.seed(3)  # noqa: NPY002 (the global generator is what must not matter)
                torch.manual_seed(3)
            seen.append(images)
        return torch.cat(seen)

    assert torch.equal(epoch(1), epoch(1, disturb=True))
    assert not torch.equal(epoch(1), epoch(2))


def test_epochs_of_one_generator_differ_and_take_one_draw_each(rng):
    t = task()
    first, second = t.train(rng), t.train(rng)
    again = np.random.default_rng(0)
    a, b = t.train(again), t.train(again)
    list(a)
    rng.random(100)  # draws between the batches of an epoch leave it as it is
    assert everyone(second) == everyone(b)
    assert everyone(first) != everyone(t.train(again))


def test_the_split_follows_its_own_seed():
    assert everyone(task().select()) == everyone(task().select())
    assert set(everyone(task(split_seed=1).select())) != set(everyone(task().select()))


def test_only_training_images_are_augmented(rng):
    t = task(augment=lambda images, rng: torch.full_like(images, 255))
    assert all((images == 1).all() for images, _ in t.train(rng))
    assert not any((images == 1).any() for images in [*t.recalibrate(), *(x for x, _ in t.select())])


def test_normalisation():
    class Colours(Numbered):
        channels = 3

        def batches(self, part, chunks, rng):
            yield torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(len(chunks[0]), 3, 2, 2)

    t = task(Colours(), mean=[0.5, 0.2, 0.4], std=[0.25, 0.1, 0.3])
    assert torch.allclose(t.example()[0, :, 0, 0], torch.tensor([-2.0, 0.0, 2.0]), atol=1e-6)
    assert t.example().shape == (1, 3, 2, 2)
    assert t.in_channels == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy_against_smoothed_targets(smoothing):
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    target = F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(task(label_smoothing=smoothing).loss(logits, labels), expected)


def test_accuracy_counts_images_not_classes():
    metric = task().metrics()["accuracy"]
    metric.update(F.one_hot(torch.tensor([0, 0, 0, 1]), 3).float(), torch.tensor([0, 0, 0, 2]))
    assert metric.compute() == 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.0, 0.0]}, "1 channels, 2 means, 1 deviations"),
        ({"std": [0.0]}, r"std must be positive, got \[0.0\]"),
        ({"batch_size": 0}, "batch_size must be 1 image or more, got 0"),
        ({"batch_size": 82}, "batch_size 82 exceeds the 81 images of train; set task.batch_size=81 or less"),
        ({"eval_batch_size": -1}, "eval_batch_size must be 1 image or more, got -1"),
        ({"recalibrate_images": 0}, "recalibrate_images must be 1 image or more"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie in 0 <= x < 1, got 1.0"),
        ({"select_from": "validation"}, "one of train, test, test_stratified, got 'validation'"),
        ({"select_share": 1.0}, "select_share must lie between 0 and 1, got 1.0"),
        ({"source": Numbered(classes=1)}, "two or more classes"),
        ({"source": Numbered(train=0)}, "labels of train must lie in 0..2 .*got no image"),
        ({"source": Numbered(train=3), "batch_size": 1}, "class 'class 0' has 1 in train; .* task.select_from=test"),
        ({"source": Numbered(blocks=True), "select_from": "test"}, "in one half only; set .*test_stratified"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        task(**settings)
    assert "\n" not in str(error.value)


def test_labels_out_of_range():
    source = Numbered()
    source.class_names = ["a", "b"]
    with pytest.raises(ValueError, match=r"labels of train must lie in 0..1 \(one per class name\), got 0..2"):
        task(source)

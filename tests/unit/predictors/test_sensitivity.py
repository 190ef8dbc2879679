"""What all sensitivities share: batches, repair, gates, prices of depth."""

import numpy as np
import pytest
import torch

from predictors.sensitivity import Tensorwise, first, monotone, repaired, sites
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer

CPU = torch.device("cpu")
CHOICES = [QuantConfig(Integer(b), g) for b in (4, 2, 3) for g in (PerTensor(), PerChannel())]


class Given(Tensorwise):
    """Scores that are given: of two bits 3, of any other number of bits 1."""

    def scores(self, net, images, labels):
        return {
            gene: np.where([c.bits == 2 for c in operand.quantizer.choices], 3.0, 1.0)
            for _, gene, operand in sites(net)
        }


def test_repair_works_within_each_form():
    quantizer = Quantizer(CHOICES, 2, weight=True)
    scores = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.5])
    assert monotone(scores, quantizer).tolist() == [3.0, 0.5, 3.0, 2.0, 3.0, 0.5]
    both = monotone(np.stack([scores, scores + 1]), quantizer, axis=1)
    assert both.tolist() == [[3.0, 0.5, 3.0, 2.0, 3.0, 0.5], [4.0, 1.5, 4.0, 3.0, 4.0, 1.5]]


def test_scores_below_zero_are_raised_together_and_others_stay():
    quantizer = Quantizer(CHOICES, 2, weight=True)
    assert repaired("a", np.array([-2.0, 1.0, 3.0, 2.0, 1.0, 1.5]), quantizer).tolist() == [
        0.0,
        3.0,
        5.0,
        4.0,
        3.0,
        3.5,
    ]
    assert repaired("a", np.array([2.0, 1.0, 3.0, 2.0, 2.0, 1.5]), quantizer).tolist() == [2.0, 1.0, 3.0, 2.0, 2.0, 1.5]
    with pytest.raises(ValueError, match=r"sensitivity of a\.weight is not finite"):
        repaired("a.weight", np.array([np.inf, 1, 1, 1, 1, 1]), quantizer)


def test_the_first_images_are_taken_with_their_labels_where_all_have_some():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    pairs = list(zip(x.split(4), y.split(4), strict=True))
    images, labels = first(pairs, 6, CPU)
    assert torch.equal(images, x[:6]) and torch.equal(labels, y[:6])
    assert torch.equal(first(iter(pairs), 99, CPU)[1], y)
    assert first([pairs[0], x[4:8]], 6, CPU)[1] is None and first([pairs[0], x[4:8]], 4, CPU)[1] is not None

    def endless():
        while True:
            yield x

    assert len(first(endless(), 25, CPU)[0]) == 25


def test_a_sum_counts_each_active_tensor_once_and_depth_at_the_rate_of_four_bits(net, task):
    factors = Given(images=48)(net, task.recalibrate())
    at = net.space.position["stage.depth"]
    [price] = [table for dims, table in factors.terms if dims == (at,)]
    layers, inner = len(net.layers), len(net.layers) - 2  # the first and the last one have 8 bits
    for bits, depth, tensors in (("w4a4", 2, layers), ("w2a2", 2, layers), ("w2a2", 0, layers - 2)):
        row = net.space.spread(np.array([net.space.uniform(bits).row]), np.array([at]), np.array([depth]))
        twos = 2 * (inner - (2 - depth)) if bits == "w2a2" else 0
        assert factors.value(row)[0] == pytest.approx(2 * tensors + 2 * twos + price[depth])


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        Given(images=0)
    with pytest.raises(ValueError, match="positions must be at least 1, got -1"):
        Given(images=1, positions=-1)

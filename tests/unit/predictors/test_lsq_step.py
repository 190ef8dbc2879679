"""The steps that are scored are those of the bank."""

import numpy as np
import pytest
import torch

from predictors.lsq_step import LSQStep, steps
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.formats.powers import PowersOfTwo
from supernet.quant.quantizer import Quantizer


def test_steps_of_weights_count_alpha_times_and_follow_the_bank(net, task):
    plain = LSQStep(alpha=1.0).scores(net, task.recalibrate()[0], None)
    quantizer = net.quantizers["stage.0.conv.weight_quantizer"]
    start = net.bank.spans["stage.0.conv.weight_quantizer"].start
    for k, (at, size) in enumerate(quantizer.spans):
        own = net.bank.scale.detach()[start + at : start + at + size]
        assert plain["stage.0.conv.weight"][k] == pytest.approx(float(own.mean()), rel=1e-6)
    with torch.no_grad():
        net.bank.scale.mul_(3.0)
    grown = LSQStep(alpha=2.0).scores(net, task.recalibrate()[0], None)
    assert np.allclose(grown["stage.0.conv.weight"], 6 * plain["stage.0.conv.weight"])
    assert np.allclose(grown["stage.0.conv.input"], 3 * plain["stage.0.conv.input"])


def test_steps_fall_with_the_bits_of_a_form(net, task):
    for gene, table in LSQStep().scores(net, task.recalibrate()[0], None).items():
        choices = net.space.dimensions[net.space.position[gene]].choices
        for form in {c.form for c in choices}:
            column = [table[k] for k in range(len(choices)) if choices[k].form == form]
            assert (np.diff(column) < 0).all()


def test_the_unit_is_the_mean_gap_between_levels_whatever_the_grid():
    per_channel = QuantConfig(Integer(4), PerChannel())
    choices = [QuantConfig(Integer(2), PerTensor()), QuantConfig(PowersOfTwo(3), PerTensor()), per_channel]
    made = Quantizer(choices, 2, weight=True)
    with torch.no_grad():
        made.scale.copy_(torch.tensor([0.5, 2.0, 0.1, 0.3]))
    for k, found in enumerate(steps(made).tolist()):
        with made.using(k), torch.no_grad():
            grids = made(torch.linspace(-9, 9, 4001).expand(2, -1).contiguous())
        gaps = [float(row.unique().diff().mean()) for row in grids]
        assert found == pytest.approx(np.mean(gaps), rel=1e-5)


def test_an_input_that_passes_through_has_no_step():
    made = Quantizer([QuantConfig(Integer(4)), QuantConfig(Integer(8))], bypass=8)
    assert steps(made).tolist() == [1.0, 0.0]


def test_factors_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="alpha must be positive"):
        LSQStep(alpha=0)

"""One choice at a time: against the network run so by hand, with scipy's divergence and torch's loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy

from predictors.logits_kl import LogitsKL, divergence
from predictors.loss_change import LossChange
from predictors.single_changes import anchors, between
from predictors.sqnr import SQNR
from supernet.calibration.batchnorm import recalibrated

GENES = {
    "stage.1.conv.weight": ("stage.1.conv", "weight_quantizer"),
    "group.input": ("group", "input_quantizer"),
    "head.weight": ("head", "weight_quantizer"),
}


@torch.no_grad()
def by_hand(net, images, gene, choice):
    """(float logits, logits of the float network with one choice of one quantizer on)."""
    name, kind = GENES[gene]
    quantizer = getattr(net.model.get_submodule(name), kind)
    with net.as_subnet(net.space.largest()), net.floating(), recalibrated(net, [images]):
        net.eval()
        exact = net(images)
        quantizer.enabled = True
        with quantizer.using(choice):
            changed = net(images)
        assert not torch.equal(exact, changed)
        return exact.double(), changed.double()


@pytest.fixture
def images(task):
    return task.recalibrate()[0]


def test_scores_are_those_of_the_network_run_so(net, images):
    labels = torch.arange(len(images)) % 4
    kinds = [kind(images=48, runs=None).scores(net, images, labels) for kind in (LogitsKL, SQNR, LossChange)]
    for gene in GENES:
        for choice in (0, 3):
            exact, changed = by_hand(net, images, gene, choice)
            p, q = (torch.softmax(x, 1).numpy() for x in (exact, changed))
            expected = [
                entropy(p, q, axis=1).mean(),
                float((exact - changed).square().sum() / exact.square().sum()),
                float(F.cross_entropy(changed, labels) - F.cross_entropy(exact, labels)),
            ]
            assert [found[gene][choice] for found in kinds] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_divergence_is_never_negative_and_zero_of_equals(rng):
    a, b = (torch.from_numpy(rng.standard_normal((20, 5))) for _ in range(2))
    assert divergence(a, a) == 0 < divergence(a, b) and divergence(a, a + 7.0) == pytest.approx(0, abs=1e-12)
    assert divergence(a, b) == pytest.approx(entropy(a.softmax(1).numpy(), b.softmax(1).numpy(), axis=1).mean())


def test_a_loss_of_ones_own_is_asked(net, images):
    labels = torch.rand(len(images), 4)
    found = LossChange(images=48, runs=None, loss=F.mse_loss).scores(net, images, labels)["head.weight"]
    exact, changed = by_hand(net, images, "head.weight", 1)
    assert found[1] == pytest.approx(float(F.mse_loss(changed, labels) - F.mse_loss(exact, labels)), rel=1e-4)


def test_few_runs_agree_with_all_where_they_are_made_and_rank_alike_elsewhere(net, images):
    full, few = (LogitsKL(images=48, runs=runs).scores(net, images, None) for runs in (None, 4))
    rank, same = [], 0
    for gene, table in full.items():
        same += int(np.isclose(few[gene], table, rtol=1e-6, atol=0).sum())
        if len(set(table)) > 3:
            rank.append(np.corrcoef(np.log(table + 1e-9), np.log(few[gene] + 1e-9))[0, 1])
    assert len(rank) > 3 and same >= 3 * len(rank) and min(rank) > 0.95


def test_anchors_lie_evenly_in_the_log_of_the_error_and_what_is_proportional_to_it_is_exact():
    errors = np.array([1.0, 1e-2, 1e-4, 0.5, 1e-2, 3e-3, 1e-4])
    picked = anchors(errors, 3)
    assert errors[picked].tolist() == [1e-4, 1e-2, 1.0]
    assert np.allclose(between(errors, picked, (7 * errors[picked]).tolist()), 7 * errors)
    assert len(anchors(np.array([0.0, 0.0]), 5)) == 1


@pytest.mark.parametrize("kind", [LogitsKL, SQNR, LossChange])
def test_one_run_is_refused(kind):
    with pytest.raises(ValueError, match="runs must be at least 2"):
        kind(runs=1)

"""Laws of every sensitivity of conf/sensitivity, on a network with elastic depth, products of activations and forms."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from supernet.config import build
from supernet.elastic.attention import MatMul
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet

CONF = Path(__file__).parents[2] / "conf"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Small(nn.Module):
    """Convolutions, residual blocks of two that may be left out, a product of activations, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.stage = nn.Conv2d(1, 4, 3, padding=1), Stage(Residual(), Residual(), min_depth=1)
        self.product, self.head = MatMul(0.1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stage(torch.relu(self.stem(x))).flatten(2)
        return self.head(self.product(torch.softmax(x, 1), x.transpose(1, 2)).mean(2))


IMAGES = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def batches_of(net):
    """Images and the classes that the network says itself in float, with BatchNorm statistics of these images."""
    copied = copy.deepcopy(net).eval()
    for norm in (module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.train()
        norm.momentum = 1.0
    with copied.as_subnet(copied.space.largest()), copied.floating():
        copied(IMAGES)
        labels = copied.eval()(IMAGES).argmax(1)
    assert len(set(labels.tolist())) > 1
    return [(IMAGES[:20], labels[:20]), (IMAGES[20:], labels[20:])]


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    net = SuperNet(Small(), IMAGES[:1], bits=(2, 4, 8), first_last_bits=None)
    net.calibrate([IMAGES])
    return net


@pytest.fixture(params=sorted((CONF / "sensitivity").glob("*.yaml")), ids=lambda p: p.stem, scope="module")
def sensitivity(request):
    return build(OmegaConf.to_container(OmegaConf.load(request.param)))


@pytest.fixture(scope="module")
def measured(calibrated, sensitivity):
    """(net after, net before, factors)."""
    net = copy.deepcopy(calibrated)
    net.train()
    net.model.get_submodule("stage.0").eval()  # modes may differ
    next(net.parameters()).requires_grad_(False)
    before = copy.deepcopy(net)
    with net.as_subnet(net.space.smallest()), torch.no_grad():
        active, factors = net.active, sensitivity(net, batches_of(net))
        assert net.active == active
    return net, before, factors


def test_a_sum_of_finite_numbers_that_are_never_negative(measured):
    net, _, factors = measured
    rows = np.concatenate([net.space.sample_indices(200, np.random.default_rng(0)), [net.space.smallest().row]])
    values = factors.value(rows)
    assert np.isfinite(values).all() and (values >= 0).all() and len(set(values)) > 100
    assert all(np.isfinite(table).all() for _, table in factors.terms)


def test_more_bits_of_one_form_are_never_worse(measured):
    net, _, factors = measured
    rows = net.space.sample_indices(300, np.random.default_rng(0))
    _, up = net.space.neighbours
    gene = np.random.default_rng(1).integers(len(net.space), size=len(rows))
    raised = net.space.spread(rows, gene, np.array([up[g][row[g]] for g, row in zip(gene, rows, strict=True)]))
    quantizes = np.array([d.quantizes for d in net.space.dimensions])[gene]
    assert quantizes.sum() > 200
    assert (factors.value(raised)[quantizes] <= factors.value(rows)[quantizes] + 1e-9).all()


def test_two_bits_are_worse_than_eight_for_every_kind_of_tensor(measured):
    net, _, factors = measured
    worst, best = (factors.value(np.array([net.space.uniform(bits).row]))[0] for bits in ("w2a2", "w8a8"))
    assert worst > best
    for what in ("w2a8", "w8a2"):
        assert worst >= factors.value(np.array([net.space.uniform(what).row]))[0] >= best
    row = np.array([net.space.largest().row])
    for side in ("left", "right"):
        worse = net.space.spread(row, np.array([net.space.position[f"product.{side}.input"]]), np.array([0]))
        assert factors.value(worse)[0] >= factors.value(row)[0]


def test_less_depth_is_never_better(measured):
    net, _, factors = measured
    at = net.space.position["stage.depth"]
    row = np.array([net.space.largest().row])
    shallow = net.space.spread(row, np.array([at]), np.array([0]))
    [price] = [table for dims, table in factors.terms if dims == (at,)]
    assert price[0] > 0 == price[1] and factors.value(shallow)[0] > 0


def test_genes_that_are_not_active_have_no_influence(measured):
    net, _, factors = measured
    row = np.array([net.space.smallest().row])
    disturbed = row.copy()
    for name in ("conv1.weight", "conv1.input", "conv2.weight"):
        at = net.space.position[f"stage.1.{name}"]
        disturbed[0, at] = net.space.sizes[at] - 1
    assert factors.value(row)[0] == pytest.approx(factors.value(disturbed)[0], abs=1e-12)


def test_the_net_is_left_as_it_was(measured):
    net, before, _ = measured
    held = before.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in net.state_dict().items())
    assert net.active == before.active and all(q.enabled for q in net.quantizers.values())
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_seed_decides_and_images_alone_count_as_labelled_by_the_network_itself(measured, sensitivity):
    net, _, factors = measured
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - what must not matter
    alone = sensitivity(net, [x for x, _ in batches_of(net)])
    assert [d for d, _ in alone.terms] == [d for d, _ in factors.terms]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(alone.terms, factors.terms, strict=True))


def test_no_batches_and_broken_scales_are_refused(measured, sensitivity):
    net, _, _ = measured
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(net, [])
    broken = copy.deepcopy(net)
    broken.bank.scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite"):
        sensitivity(broken, [IMAGES])

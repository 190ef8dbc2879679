"""Pair terms: exact for a quadratic loss, where a sum over layers is not; and solved by the integer program."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from predictors.block_pairs import BlockPairs, blocks, positive, quadratic, stand_ins
from predictors.fisher_out import FisherOut
from predictors.sensitivity import operands
from search.allocation import Program
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet


class Three(nn.Module):
    """The sum of three linear layers, so that a squared error is quadratic in all weights together."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 4, bias=False) for _ in range(3)])

    def forward(self, x):
        return self.parts[0](x) + self.parts[1](x) + self.parts[2](x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return torch.relu(x + self.two(torch.relu(self.one(x))))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage, self.head = Stage(Residual(), Residual(), min_depth=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.stage(x).mean((2, 3)))


def supernet(model, x, bits):
    net = SuperNet(model, x[:1], bits=bits, input_bits=(8,), granularities=["per-channel"], symmetries=[True],
                   first_last_bits=None, sites=False)  # fmt: skip
    net.calibrate([x])
    return net


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    x = torch.randn(24, 4, 5, 5)
    return supernet(Small(), x, (2, 3, 8)), x, torch.arange(24) % 3


@torch.no_grad()
def test_a_quadratic_loss_is_told_exactly_and_a_sum_over_layers_is_not():
    torch.manual_seed(0)
    x, bits = torch.randn(30, 6), (2, 3)
    net = supernet(Three(), x, bits)
    weights = [operands(part)[0] for part in net.model.parts]
    exact = sum(F.linear(x, part.weight) for part in net.model.parts)
    goal = exact + 0.1 * torch.randn(30, 4)  # not at its optimum: first derivatives take part

    def loss(outputs):
        return float((outputs - goal).double().square().sum())

    with net.floating():
        found = quadratic([[(w, 0), (w, 1)] for w in weights], lambda: loss(net.model(x)) - loss(exact))
    changed = [[w.module.weight + change for change in w.changes(w.module.weight)] for w in weights]
    misses = []
    for choices in itertools.product(range(len(bits)), repeat=3):
        true = loss(sum(F.linear(x, changed[k][c]) for k, c in enumerate(choices))) - loss(exact)
        taken = np.zeros(6)
        taken[[2 * k + c for k, c in enumerate(choices)]] = 1
        assert taken @ found @ taken / 2 == pytest.approx(true, rel=1e-4)
        misses.append(abs(taken @ np.diag(found) / 2 / true - 1))
    assert min(misses) > 0.01 and max(misses) > 0.1


@torch.no_grad()
def test_at_the_optimum_there_is_nothing_to_project():
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    net = supernet(Three(), x, (2, 8))
    weights = [operands(part)[0] for part in net.model.parts]
    with net.floating():
        exact = net.model(x)
        gram = quadratic([[(w, 0)] for w in weights], lambda: float((net.model(x) - exact).double().square().sum()))
    errors = [F.linear(x, next(w.changes(w.module.weight))).flatten().double() for w in weights]
    expected = [[float(2 * a @ b) for b in errors] for a in errors]
    assert np.allclose(gram, expected, rtol=1e-3, atol=1e-3) and np.allclose(positive(gram), gram)


def test_the_projection_is_the_nearest_matrix_without_negative_forms(rng):
    matrix = rng.standard_normal((5, 5))
    matrix += matrix.T
    fitted = positive(matrix)
    assert np.linalg.eigvalsh(fitted).min() > -1e-9 and np.allclose(positive(fitted), fitted)
    distance = np.linalg.norm(fitted - matrix)
    for _ in range(200):
        other = rng.standard_normal((5, 5))
        assert np.linalg.norm(other @ other.T - matrix) > distance
    assert distance**2 == pytest.approx((np.minimum(np.linalg.eigvalsh(matrix), 0) ** 2).sum())


def test_blocks_are_the_innermost_numbered_modules_with_two_layers(small):
    net, _, _ = small
    assert [[m.gene for m in block] for block in blocks(net)] == [
        ["stage.0.one.weight", "stage.0.two.weight"],
        ["stage.1.one.weight", "stage.1.two.weight"],
    ]
    assert stand_ins(blocks(net)[0][0].operand, (2, 4, 8)) == {0: 0, 2: 2}


def test_a_form_stands_in_for_all_of_its_bits(net):
    operand = operands(net.model.get_submodule("group"))[0]
    choices, usual = operand.quantizer.choices, stand_ins(operand, (2, 3))
    assert len(usual) == 8 and {choices[k].bits for k in usual} == {2, 3}
    for choice, measured in usual.items():
        assert choices[measured].bits == choices[choice].bits
        assert str(choices[measured].granularity) == "per-channel" and choices[measured].symmetric


def test_pairs_are_tables_of_the_loss_of_both_changes(small):
    net, x, y = small
    factors = BlockPairs(images=24, runs=None)(net, [(x, y)])
    for block in blocks(net):
        genes = tuple(net.space.position[m.gene] for m in block)
        [table] = [t for dims, t in factors.terms if dims[:2] == genes]
        table = table if table.ndim == 2 else table[..., -1]
        assert (np.diff(table, axis=0) <= 0).all() and (np.diff(table, axis=1) <= 0).all() and (table >= 0).all()
        with net.floating(), torch.no_grad():
            before = F.cross_entropy(net(x), y)
            for member in block:
                member.operand.quantizer.enabled = True
            with block[0].operand.quantizer.using(0), block[1].operand.quantizer.using(0):
                both = float(F.cross_entropy(net(x), y) - before)
        assert table[0, 0] >= both - 1e-5  # equal but for repair and projection, which only add here
    assert not any(len(dims) == 1 and dims[0] in genes for dims, _ in factors.terms)


def test_the_integer_program_equals_brute_force(small):
    net, x, y = small
    factors = BlockPairs(images=24, runs=None)(net, [(x, y)])
    rows = np.array(list(itertools.product(*(range(n) for n in net.space.sizes))))
    rows = np.unique(net.space.canonical(rows), axis=0)
    program = Program(net.space, factors, net.costs.kinds)
    values, bitops = factors.value(rows), net.costs.kinds["bitops"].value(rows)
    tight = 0
    for limit in np.quantile(bitops, [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]):
        best = program.solve({"bitops": float(limit)})
        within = values[bitops <= limit]
        assert factors.value(best[None])[0] == pytest.approx(within.min(), rel=1e-5, abs=1e-9)
        tight += within.min() > values.min()
    assert tight > 2


def test_a_base_scores_what_stands_alone(small):
    net, x, y = small
    base = FisherOut(images=24)
    factors, alone = BlockPairs(images=24, base=base)(net, [(x, y)]), base(net, [(x, y)])
    at = net.space.position["head.weight"]
    found, expected = ([t for dims, t in f.terms if dims == (at,)] for f in (factors, alone))
    assert np.array_equal(found[0], expected[0])


def test_networks_without_blocks_have_no_pairs_and_say_so(caplog):
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    net = supernet(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), x, (2, 8))
    factors = BlockPairs()(net, [x])
    assert all(len(dims) == 1 for dims, _ in factors.terms) and "there are no pairs" in caplog.text
    with pytest.raises(ValueError, match="pairs need bits"):
        BlockPairs(bits=())

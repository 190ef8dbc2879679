"""The controller against autograd, the policy against an optimum found by enumeration, and what training leaves."""

import itertools
import math

import numpy as np
import pytest
import torch

from supernet.config import PerTensor, QuantConfig
from supernet.factors import Factors
from supernet.formats.integer import Integer
from supernet.samplers.controller import Controller, entropy_price
from supernet.samplers.fliqs import Fliqs
from supernet.space import Dimension, SearchSpace

BITS = np.array([2.0, 4.0, 8.0])
LAYERS, STEPS, ROWS = 8, 600, 16


def test_entropy_costs_nothing_until_the_delay_then_half_a_cosine():
    assert entropy_price(0, 1000, 0.2, 0.5) == entropy_price(200, 1000, 0.2, 0.5) == 0
    assert entropy_price(600, 1000, 0.2, 0.5) == pytest.approx(0.25, abs=1e-15)
    assert entropy_price(1000, 1000, 0.2, 0.5) == pytest.approx(0.5, abs=1e-15)
    quarter = 0.5 * (1 - math.cos(math.pi / 4)) / 2
    assert entropy_price(400, 1000, 0.2, 0.5) == pytest.approx(quarter, abs=1e-15)


def test_steps_are_those_of_adam_on_the_loss_as_it_is_written(chain, rng):
    """Autograd and torch's Adam, on a space whose depth switches decisions off and whose inputs are tied."""
    whole, _ = chain
    space = whole.restrict({"s1.0.a.weight": lambda c: c.bits > 4}).tie([["s0.0.a.input", "s2.2.b.input"]])
    ours, m = Controller(space, 0.03, momentum=0.9), None
    logits = torch.tensor(ours.logits, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.03)
    mask = torch.tensor(ours.mask)
    for price in (0.0, 0.3, 0.3, -0.2):
        rows, rewards = ours.draw(5, rng), rng.normal(size=5)
        m = rewards.mean() if m is None else 0.9 * m + 0.1 * rewards.mean()
        logs = torch.log_softmax(logits.masked_fill(~mask, -1e9), dim=1)
        active, surprise = space.active(rows), torch.zeros(())
        for row, on, reward in zip(rows, active, rewards, strict=True):
            said = 0.0
            for d, members in enumerate(ours.members):
                awake = [i for i in members if on[i]]
                said = said + (logs[d, row[awake[0]]] if awake else 0.0)
            surprise = surprise - (reward - m) * said / len(ours.members) / len(rows)
        entropy = -(logs.exp() * logs).masked_fill(~mask, 0.0).sum(1).mean()
        adam.zero_grad()
        (surprise + price * entropy).backward()
        adam.step()
        ours.learn(rows, rewards, price)
        assert np.allclose(np.where(ours.mask, ours.logits, 0), (logits.detach() * mask).numpy(), atol=1e-7)
    assert ours.entropy == pytest.approx(ours.entropies.mean())


def test_draws_follow_the_probabilities(chain):
    space, _ = chain
    controller = Controller(space, 0.1)
    controller.logits += np.random.default_rng(3).normal(size=controller.logits.shape)
    rows = controller.draw(20_000, np.random.default_rng(0))
    on = space.active(rows)
    for d, (i, *_) in enumerate(controller.members):
        n, p = on[:, i].sum(), controller.probabilities[d]
        found = np.bincount(rows[on[:, i], i], minlength=controller.mask.shape[1]) / n
        assert (np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()
    assert np.ptp(np.bincount(controller.draw(9000, np.random.default_rng(1), uniform=True)[:, 0])) < 400


class Toy:
    """Quality -sum s 4^-b, cost sum m b^2 over 8 layers of 2, 4 or 8 bits; the optimum is enumerated."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.s, m = rng.lognormal(0, 1, LAYERS), rng.lognormal(0, 0.5, LAYERS)
        choices = tuple(QuantConfig(Integer(int(b)), PerTensor()) for b in BITS)
        self.space = SearchSpace([Dimension(f"l{i}.weight", choices) for i in range(LAYERS)])
        self.cost = Factors(tuple(((i,), m[i] * BITS**2) for i in range(LAYERS)))
        self.s /= (self.s * 4.0**-4).sum()  # uniform 4 bits: -1
        every = np.array(list(itertools.product(range(3), repeat=LAYERS)))
        inside = every[self.cost.value(every) <= 20 * m.sum()]
        best = inside[np.argmax(self.quality(inside))]
        self.best, self.target = self.quality(best[None])[0], self.cost.value(best[None])[0]

    @property
    def kinds(self):
        return {"toy": self.cost}

    def parse(self, budget):
        return budget

    def quality(self, rows):
        return -(self.s * 4.0 ** -BITS[rows]).sum(1)

    def run(self, seed, steps=STEPS, sign=1, **options):
        """(share of the optimal quality that is lost, cost off the target, entropy) of the settled row."""
        sampler = Fliqs(self.space, self, "toy", self.target, **{"beta": 5.0, "learning_rate": 0.03} | options)
        sampler.entropy *= sign
        rng = np.random.default_rng(seed)
        for step in range(steps):
            rows = sampler.ask(ROWS, rng)
            sampler.tell(rows, -self.quality(rows), step, steps)
        row, figures = sampler.settled()[None], sampler.figures()
        return self.quality(row)[0] / self.best - 1, figures["toy_of_target"] - 1, figures["entropy"]


@pytest.fixture(scope="module")
def toy():
    return Toy()


def test_it_settles_on_the_optimum(toy):
    uniform = np.ones((1, LAYERS), dtype=int)
    assert toy.quality(uniform)[0] / toy.best - 1 > 0.2  # what a stub would answer
    found = np.array([toy.run(seed) for seed in range(10)])
    good = (found[:, 0] < 0.02) & (np.abs(found[:, 1]) < 0.05) & (found[:, 2] < 0.05)
    assert good.sum() >= 8, found


def test_only_the_price_of_entropy_makes_it_settle(toy):
    for seed in range(3):
        assert toy.run(seed, entropy=0.0)[2] > 0.06
        assert toy.run(seed, sign=-1)[2] > 0.2


def test_nothing_is_learned_before_the_delay(chain, rng):
    space, costs = chain
    sampler = Fliqs(space, costs, delay=0.5)
    for step in range(10):
        rows = sampler.ask(3, rng)
        sampler.tell(rows, rng.random(3), step, 10)
        assert (sampler.controller.count > 0) == (step >= 5)


def test_options_are_checked(chain):
    space, costs = chain
    with pytest.raises(ValueError, match="delay in"):
        Fliqs(space, costs, delay=1.0)
    with pytest.raises(ValueError, match="smallest reaches"):
        Fliqs(space, costs, target=1.0)
    with pytest.raises(ValueError, match="names its kind"):
        Fliqs(space, costs, kind="joules")
    only = space.dimensions[space.position["s1.0.a.weight"]].choices[0]
    other = Fliqs(space.restrict({"s1.0.a.weight": lambda c: c == only}), costs)
    with pytest.raises(ValueError, match="logits of shape"):
        other.load_state_dict(Fliqs(space, costs).state_dict())

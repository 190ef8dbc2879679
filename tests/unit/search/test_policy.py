"""What the policies of a search are taught, and where they end."""

import numpy as np
import pytest

from search.allocation import Program
from search.policy import Policy
from supernet.factors import Factors


def sensitivity(space, rng):
    """A table for each quantized gene, worse for fewer bits."""
    terms = []
    for i, d in enumerate(space.dimensions):
        if d.quantizes:
            terms.append(((i,), rng.lognormal() * np.array([4.0**-c.bits for c in d.choices])))
    return Factors(tuple(terms))


def run(policy, objective, costs, kinds, steps, n, rng):
    for step in range(steps):
        rows = policy.ask(n, rng)
        values = np.stack([objective.value(rows), *(costs.kinds[k].value(rows) for k in kinds)], axis=1)
        policy.tell(rows, values, step, steps)


def test_each_budget_has_a_policy_that_ends_at_its_optimum(small, rng):
    space, costs = small
    space = space.pin({"s.depth": 3, "t.depth": 2})
    objective = sensitivity(space, rng)
    budgets = [{"bitops": 25_000.0}, {"bitops": 60_000.0}]
    policy = Policy(space, costs, budgets, learning_rate=0.1)
    run(policy, objective, costs, ["bitops"], 250, 48, rng)
    program = Program(space, objective, {"bitops": costs.kinds["bitops"]})
    for b, budget in enumerate(budgets):
        exact = program.solve(budget)
        assert policy.best.values[b][0, 0] == pytest.approx(objective.value(exact[None])[0])
        likeliest = policy.controllers[b].likeliest()[None]
        assert costs.kinds["bitops"].value(likeliest)[0] == pytest.approx(budget["bitops"], rel=0.25)
        assert policy.controllers[b].entropy < 0.15
    assert not np.array_equal(*(c.likeliest() for c in policy.controllers))


def test_a_draw_over_budget_is_worth_its_repaired_row_and_misses_by_its_own_cost(small, monkeypatch):
    space, costs = small
    budget = {"bitops": 20_000.0}
    policy = Policy(space, costs, [budget], delay=0.0, beta=2.0)
    told = []
    monkeypatch.setattr(policy.controllers[0], "learn", lambda *said: told.append(said))
    rng = np.random.default_rng(0)
    for step in range(2):  # the first tells the spread
        rows = policy.ask(64, rng)
        drawn, asked = policy._drawn, policy._asked
        values = np.stack([rows.sum(1) / 7.0, costs.kinds["bitops"].value(rows)], axis=1)
        policy.tell(rows, values, step, 10)
        if not step:
            spread = np.std(-asked.sum(1) / 7.0)
    over = costs.kinds["bitops"].value(drawn) > budget["bitops"]
    assert over.sum() > 5 and (~over).sum() > 5
    assert np.array_equal(asked[~over], drawn[~over]) and (costs.kinds["bitops"].value(asked) <= budget["bitops"]).all()
    ((taught, rewards, price),) = told
    missed = np.abs(1 - costs.kinds["bitops"].value(drawn) / budget["bitops"])
    assert np.array_equal(taught, drawn) and np.allclose(rewards, -asked.sum(1) / 7.0 / spread - 2.0 * missed)
    assert price == pytest.approx(0.25 * (1 - np.cos(np.pi * 0.2)))


def test_rows_of_others_teach_nothing(small, rng):
    space, costs = small
    policy = Policy(space, costs, [{"bitops": 20_000.0}], delay=0.0)
    run(policy, sensitivity(space, rng), costs, ["bitops"], 3, 16, rng)
    before = policy.controllers[0].state_dict()
    row = np.array([space.smallest().row])
    policy.tell(row, np.array([[-99.0, costs.kinds["bitops"].value(row)[0]]]), 3, 10)
    assert policy.controllers[0].state_dict() == before
    assert policy.front()[1][0, 0] == -99.0


def test_options_are_checked(small):
    space, costs = small
    with pytest.raises(ValueError, match="one or more budgets"):
        Policy(space, costs, [])
    with pytest.raises(ValueError, match="delay in"):
        Policy(space, costs, [{"bitops": 20_000.0}], delay=1.0)

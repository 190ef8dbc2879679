"""Active collection on a measured function: fewer measurements, the same after a kill, and limits that hold."""

import functools
import time

import numpy as np
import pytest

from predictors.accuracy import Ensemble
from predictors.active import WIDTH, Active, Goal, diverse, unusual
from predictors.judging import kendall_at_equal_cost
from supernet.artefacts import read_jsonl
from supernet.cost import Factors
from supernet.samplers.cost_first import CostFirst

QUICK = {"members": 3, "steps": 60, "hidden": 8}


class Fake:
    """Measures `score` of rows with the noise of 4,000 images that a subnet's id draws; counts what it measured."""

    def __init__(self, costs, score, stop_after=None, seconds=0.0):
        self.costs, self.score, self.records, self.seconds = costs, score, {}, seconds
        self.measured, self.stop_after = 0, stop_after

    def __call__(self, configs):
        for config in configs:
            if config.id not in self.records:
                if self.measured == self.stop_after:
                    raise KeyboardInterrupt
                time.sleep(self.seconds)
                self.measured += 1
                rng = np.random.default_rng(int(config.id, 16) % 2**32)
                halves = rng.binomial(2000, self.score(np.array([config.row]))[0], 2) / 2000
                self.records[config.id] = {
                    "id": config.id,
                    "row": list(config.row),
                    "score": float(halves.mean()),
                    "halves": halves.tolist(),
                    "costs": self.costs.of(config),
                }
            yield self.records[config.id]


@pytest.fixture
def problem(chain, truth):
    """(space, costs, maker of predictors, score): a sensitivity that weighs its terms wrongly."""
    space, costs = chain
    rng = np.random.default_rng(5)
    wrong = Factors(tuple((dims, table * np.exp(rng.normal(0, 1))) for dims, table in truth[0].terms))
    return space, costs, functools.partial(Ensemble, space, None, wrong, **QUICK), truth[1]


def active(problem, measurer, **options):
    space, costs, make, _ = problem
    return Active(space, costs, measurer, make, **({"batch": 16, "held": 20, "pool": 256} | options))


def near(costs):
    return costs.limit("bitops", "w4a4")


def test_it_reaches_a_tau_near_the_budget_with_fewer_measurements_than_random(problem):
    """Judged by the truth on subnets of nearly the budget's cost, none of which was measured."""
    space, costs, make, score = problem
    sampler, goal, needed = CostFirst(space, costs), 0.7, {"active": [], "random": []}
    targets = near(costs) * (1 - WIDTH * np.random.default_rng(9).random(400))
    test = sampler.at(targets, np.random.default_rng(8))
    cost = costs.kinds["bitops"].value(test)
    for seed in range(2):
        collected = active(problem, Fake(costs, score), near=[near(costs)], seed=seed)
        collected.run(20 + 12 * 16, Goal(), progress=False)
        chosen = [np.array([row for r in collected.rounds[:k] for row in r["rows"]]) for k in range(2, 13)]
        drawn = sampler.ask(12 * 16, np.random.default_rng(seed))
        for name, batches in (("active", chosen), ("random", [drawn[: 16 * k] for k in range(2, 13)])):
            for rows in batches:
                fake = Fake(costs, score)
                measured = np.array([r["score"] for r in fake(map(space.config, rows))])
                predictor = make(rng=np.random.default_rng(0))
                predictor.fit(rows, measured)
                tau, _ = kendall_at_equal_cost(score(test), predictor.predict(test)[0], cost, WIDTH)
                if tau >= goal:
                    break
            needed[name].append(len(rows))
    assert np.mean(needed["active"]) < 0.8 * np.mean(needed["random"]), needed


@pytest.mark.parametrize("killed_after", [7, 29, 50])
def test_a_killed_collection_goes_on_to_the_same_result(problem, tmp_path, killed_after):
    _, costs, _, score = problem
    whole = Fake(costs, score)
    expected = active(problem, whole, out=tmp_path / "whole.jsonl").run(70, Goal(), progress=False)
    first = Fake(costs, score, stop_after=killed_after)
    with pytest.raises(KeyboardInterrupt):  # a kill: nothing is tidied up
        active(problem, first, out=tmp_path / "cut.jsonl")._advance(70, Goal(), None, [])
    second = Fake(costs, score)
    second.records = dict(first.records)
    found = active(problem, second, out=tmp_path / "cut.jsonl").run(70, Goal(), progress=False)
    assert second.records.keys() == whole.records.keys() and len(whole.records) == 70
    assert second.measured == 70 - killed_after, "each subnet once"
    assert np.array_equal(found.learned.indices, expected.learned.indices)
    assert found.report == expected.report
    assert read_jsonl(tmp_path / "cut.jsonl") == read_jsonl(tmp_path / "whole.jsonl")


def test_what_is_held_out_is_measured_first_and_never_learned_from(problem, tmp_path):
    _, costs, _, score = problem
    fake = Fake(costs, score)
    collection = active(problem, fake, near=[near(costs)])
    found = collection.run(60, Goal(), progress=False)
    held = {collection.space.config(row).id for row in found.held.indices}
    assert set(list(fake.records)[: len(held)]) == held and len(found.held) + len(found.learned) == 60
    assert not held & {collection.space.config(row).id for row in found.learned.indices}
    assert (np.abs(found.held.costs["bitops"] / near(costs) - 1) <= 2 * WIDTH).all()


def test_other_settings_start_anew_and_keep_what_is_known(problem, tmp_path):
    _, costs, _, score = problem
    fake = Fake(costs, score)
    active(problem, fake, out=tmp_path / "c.jsonl").run(40, Goal(), progress=False)
    before = dict(fake.records)
    other = active(problem, fake, out=tmp_path / "c.jsonl", seed=1)
    assert other.rounds == [] and other.base == sorted(before)
    found = other.run(80, Goal(), progress=False)
    assert before.items() <= fake.records.items() and len(fake.records) == 80
    assert len(found.learned) + len(found.held) == 80


def test_more_pairs_and_another_goal_go_on_with_the_same_choices(problem, tmp_path):
    _, costs, _, score = problem
    fake, whole = Fake(costs, score), Fake(costs, score)
    active(problem, fake, out=tmp_path / "c.jsonl").run(20 + 2 * 16, Goal(tau=0.9999), progress=False)
    active(problem, fake, out=tmp_path / "c.jsonl", held=30).run(20 + 4 * 16, Goal(), progress=False)
    active(problem, whole).run(20 + 4 * 16, Goal(), progress=False)
    assert fake.records.keys() == whole.records.keys()


def test_it_ends_at_the_goal_at_n_and_in_time(problem):
    _, costs, _, score = problem
    easy = Fake(costs, score)
    assert active(problem, easy).run(200, Goal(tau=0.2), progress=False).report["stopped"] == "goal"
    assert len(easy.records) < 80
    assert active(problem, Fake(costs, score)).run(52, Goal(tau=0.999), progress=False).report["stopped"] == "n"
    slow = Fake(costs, score, seconds=0.01)
    stopped = active(problem, slow, held=4).run(10**6, Goal(seconds=1.5), progress=False)
    assert stopped.report["stopped"] == "time" and len(slow.records) < 150


def test_ctrl_c_keeps_what_was_measured(problem):
    _, costs, _, score = problem
    found = active(problem, Fake(costs, score, stop_after=45)).run(200, Goal(), progress=False)
    assert found.report["stopped"] == "interrupted" and len(found.learned) + len(found.held) == 45
    with pytest.raises(ValueError, match=r"too few \(interrupted.*kept"):
        active(problem, Fake(costs, score, stop_after=5)).run(200, Goal(), progress=False)


def test_a_space_that_has_no_more_to_offer_ends_it(problem):
    space, costs, make, score = problem
    fixed = {"*.weight": lambda c: c == space.dimensions[1].choices[0], "*.input": lambda c: c.bits == 4}
    narrow = space.restrict(fixed).restrict({"l[3-9].input": lambda c: c.symmetric})
    found = Active(narrow, type(costs)(narrow, costs.layers), Fake(costs, score), make, held=2, batch=4, pool=16)
    report = found.run(100, Goal(), progress=False).report
    assert report["stopped"] == "space exhausted"


@pytest.mark.parametrize(
    ("until", "limit"),
    [
        ("0.85", None),
        ("tau:1.5", None),
        ("tau:", None),
        ("rmse:0.1", None),
        (None, "10"),
        (None, "0s"),
        (None, "3 days"),
    ],
)
def test_limits_that_cannot_be_read_are_refused(until, limit):
    with pytest.raises(ValueError, match=r"until=tau:0\.85" if until else "time=10min"):
        Goal.parse(until, limit)


def test_limits_are_read():
    assert Goal.parse("tau:0.85", "10min") == Goal(0.85, 600.0)
    assert Goal.parse(None, "1.5h") == Goal(None, 5400.0) and Goal.parse("tau:.9", None) == Goal(0.9, None)


def test_a_batch_does_not_ask_twice(rng):
    rows = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [3, 3, 3, 3], [3, 3, 3, 2]])
    assert sorted(diverse(rows, np.array([1.0, 0.99, 0.5, 0.49]), 2)) == [0, 2]
    assert sorted(diverse(rows, np.ones(4), 4)) == [0, 1, 2, 3]


def test_uncertainty_is_compared_at_equal_cost():
    costs = np.repeat([1.0, 10.0], 50)
    std = np.where(costs == 1, 5.0, 1.0)
    std[[3, 70]] *= 2
    assert np.allclose(np.sort(unusual(std, costs, 2))[-2:], 2) and np.median(unusual(std, costs, 2)) == 1

"""Budgets, objectives and the archive."""

from types import SimpleNamespace

import numpy as np
import pytest

from search.problem import Archive, Problem


def make(chain, objective, budgets):
    space, costs = chain
    predictor = SimpleNamespace(predict=lambda rows: (-objective.value(rows), np.zeros(len(rows))))
    return Problem(space, costs, predictor, budgets)


def test_budgets_are_read_and_named(chain, sensitivity, rng):
    space, costs = chain
    problem = make(
        chain,
        sensitivity(space, costs.layers, rng),
        [{"bitops": "w3a3"}, {"bytes": 5e4, "bitops": "2M"}, {"bitops": "w3a3"}],
    )
    assert [b.label for b in problem.budgets] == ["w3a3", "50000-2M", "w3a3#2"]
    assert problem.budgets[1].limits == {"bytes": 5e4, "bitops": 2e6}
    assert list(problem.kinds) == ["bitops", "bytes"]
    single = make(chain, sensitivity(space, costs.layers, rng), {"bytes": "50kB"})
    assert single.budgets[0].limits == {"bytes": 5e4}


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "at least one budget"),
        ([{"bitops": 10}], "smallest reaches"),
        ([{"joules": 1}], "names its kind"),
        ([{}], "mapping"),
    ],
)
def test_bad_budgets_are_refused(chain, sensitivity, rng, budgets, message):
    space, costs = chain
    with pytest.raises(ValueError, match=message):
        make(chain, sensitivity(space, costs.layers, rng), budgets)


def test_objectives_are_minus_score_then_costs(chain, sensitivity, rng):
    space, costs = chain
    objective = sensitivity(space, costs.layers, rng)
    problem = make(chain, objective, [{"bytes": "w4a4"}, {"macs": 1e9}])
    rows = space.sample_indices(5, rng)
    expected = [objective.value(rows), costs.kinds["bytes"].value(rows), costs.kinds["macs"].value(rows)]
    assert np.array_equal(problem.objectives(rows), np.stack(expected, axis=1))


def test_the_archive_keeps_the_best_within_each_budget(chain, sensitivity, rng):
    space, costs = chain
    problem = make(
        chain, sensitivity(space, costs.layers, rng), [{"bitops": "w5a5"}, {"bitops": "w4a4", "bytes": "w5a5"}]
    )
    archive, everything = Archive(problem, keep=5), []
    for _ in range(4):
        rows = space.sample_indices(300, rng)
        rows = np.concatenate([rows, rows[:10]])
        archive.add(rows, problem.scores(rows))
        everything.append(rows)
    rows = np.unique(np.concatenate(everything), axis=0)
    for b, budget in enumerate(problem.budgets):
        inside = rows[problem.within(budget, rows)]
        best = np.sort(problem.scores(inside))[::-1][:5]
        assert len(best) and np.allclose(archive.best[b][1], best)
        assert np.array_equal(archive.top(b, 2), archive.best[b][0][:2])

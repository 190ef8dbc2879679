"""APQ's transfer: cheap architecture pairs replace quantized ones."""

import itertools

import numpy as np
import pytest

from predictors.judging import kendall
from predictors.transfer import Transfer, most_bits
from supernet.config import QuantConfig
from supernet.formats.integer import Integer
from supernet.space import Dimension, SearchSpace

QUICK = {"members": 2, "hidden": 32, "depth": 2, "epochs": 30}


@pytest.fixture
def problem():
    """(space, score of rows): eight widths that act in pairs, and bits that take away the less the more there are."""
    bits = tuple(QuantConfig(Integer(b)) for b in (2, 3, 4, 8))
    widths = [Dimension(f"l{k}.width", (1, 2, 3, 4)) for k in range(8)]
    space = SearchSpace([*widths, *[Dimension(f"l{k}.weight", bits) for k in range(8)]])
    rng = np.random.default_rng(3)
    alone, paired, loss = rng.normal(0, 0.03, (8, 4)), rng.normal(0, 0.03, (4, 4, 4)), rng.uniform(0.1, 0.3, 8)

    def score(rows):
        architecture = sum(alone[k, rows[:, k]] for k in range(8))
        architecture = architecture + sum(paired[k, rows[:, k], rows[:, k + 4]] for k in range(4))
        noise = sum(loss[k] * 4.0 ** -np.array([2, 3, 4, 8])[rows[:, 8 + k]] for k in range(8))
        return 0.7 + architecture - 4 * noise / 8

    return space, score


def test_it_needs_fewer_quantized_pairs_than_learning_from_scratch(problem):
    space, score = problem
    gains, equal = [], []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        full = space.sample_indices(300, rng)
        full[:, 8:] = 3
        quantized, held = space.sample_indices(120, rng), space.sample_indices(300, rng)

        def tau(rows, epochs, held=held, seed=seed):
            predictor = Transfer(space, rng=np.random.default_rng(seed), architecture_epochs=epochs, **QUICK)
            predictor.fit(rows, score(rows))
            return kendall(score(held), predictor.predict(held)[0])

        few = np.concatenate([full, quantized[:40]])
        transferred, scratch, thrice = tau(few, 30), tau(quantized[:40], 0), tau(quantized, 0)
        gains.append(transferred - scratch)
        equal.append(transferred - thrice)
    assert np.mean(gains) > 0.1, "forty quantized pairs: transfer must beat learning from scratch"
    assert np.mean(equal) > 0, "and be no worse than learning from scratch with three times as many"


def test_without_pairs_at_most_bits_it_still_learns(problem, rng):
    space, score = problem
    rows, held = space.sample_indices(200, rng), space.sample_indices(200, rng)
    predictor = Transfer(space, rng=rng, architecture_epochs=10, **QUICK)
    predictor.fit(rows, score(rows))
    assert not most_bits(space, rows).any()
    assert kendall(score(held), predictor.predict(held)[0]) > 0.4


def test_most_bits_looks_at_active_tensors_only(chain):
    space, _ = chain
    rows = space.sample_indices(200, np.random.default_rng(0))
    for i, d in enumerate(space.dimensions):
        if d.quantizes:
            rows[:100, i] = len(d.choices) - 1
    rows = space.canonical(rows)
    expected = [all(c.bits == 8 for c in space.config(r).values() if not isinstance(c, int)) for r in rows]
    assert most_bits(space, rows).tolist() == expected and sum(expected) >= 100
    assert any(rows[k, space.position["s.depth"]] == 0 for k in range(100))


def test_a_space_of_bits_alone_is_refused():
    bits = tuple(QuantConfig(Integer(b)) for b in (2, 4))
    space = SearchSpace([Dimension(f"{a}.{b}", bits) for a, b in itertools.product("xy", ("weight", "input"))])
    with pytest.raises(ValueError, match="only bits vary; use predictor=ensemble"):
        Transfer(space)


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"architecture_epochs": -1}, {"members": 1}])
def test_settings_out_of_range_are_refused(problem, settings):
    with pytest.raises(ValueError):
        Transfer(problem[0], **settings)

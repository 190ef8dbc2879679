"""Laws of every predictor of conf/predictor."""

import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from omegaconf import OmegaConf

from predictors.files import load_predictor, save_predictor
from supernet.config import Layer, PerChannel, PerTensor, QuantConfig, build
from supernet.cost import Costs, Factors, gated
from supernet.formats.integer import Integer
from supernet.interfaces import Predictor
from supernet.space import Dimension, SearchSpace

CONF = Path(__file__).parents[2] / "conf"
WEIGHT = tuple(QuantConfig(Integer(b), g) for b, g in itertools.product((2, 4, 8), (PerTensor(), PerChannel())))
INPUT = tuple(QuantConfig(Integer(b), PerTensor(), s) for b, s in itertools.product((2, 4, 8), (True, False)))


@pytest.fixture(scope="module")
def problem():
    """(space, costs, additive sensitivity) with an optional layer."""
    gate = (("depth", (2,)),)
    parts = [("a", 900, ()), ("b", 400, gate), ("c", 70, ())]
    layers = [Layer(n, "conv", m, 50, 4, True, False, (4, 8, 8), g) for n, m, g in parts]
    dimensions = [Dimension("depth", (1, 2))]
    for layer in layers:
        dimensions += [Dimension(layer.weight, WEIGHT, layer.active_if), Dimension(layer.input, INPUT, layer.active_if)]
    space = SearchSpace(dimensions)
    terms = [((0,), np.array([0.1, 0.0]))]
    for layer in layers:
        for gene, choices in ((layer.weight, WEIGHT), (layer.input, INPUT)):
            terms.append(gated(space, layer, (gene,), np.array([4.0**-c.bits for c in choices])))
    return space, Costs(space, layers), Factors(tuple(terms))


@pytest.mark.parametrize("path", sorted((CONF / "predictor").glob("*.yaml")), ids=lambda p: p.stem)
class TestPredictor:
    made: ClassVar = {}
    """Path -> a fitted predictor, shared by the tests: none of them changes it."""

    def fitted(self, path, problem, n=40):
        if path not in self.made:
            self.made[path] = self.make(path, problem, n)
        return self.made[path]

    def make(self, path, problem, n):
        space, costs, sensitivity = problem
        node = OmegaConf.to_container(OmegaConf.load(path)) | {"_partial_": True}
        if "hidden" in node:  # narrow and few: no law depends on it
            node |= {"hidden": min(node["hidden"], 32), "members": 2}
        predictor = build(node)(space=space, costs=costs, sensitivity=sensitivity, rng=np.random.default_rng(0))
        rows = space.sample_indices(n, np.random.default_rng(1))
        scores = 0.9 - sensitivity.value(rows) + 0.003 * np.random.default_rng(2).standard_normal(n)
        predictor.fit(rows, scores)
        return predictor, rows, scores

    def test_it_is_a_predictor_and_learns(self, path, problem):
        predictor, rows, scores = self.fitted(path, problem)
        assert isinstance(predictor, Predictor)
        mean, std = predictor.predict(rows)
        assert mean.shape == std.shape == scores.shape and mean.dtype == std.dtype == np.float64
        assert np.isfinite(mean).all() and (std >= 0).all()
        assert np.corrcoef(mean, scores)[0, 1] > 0.8

    def test_higher_is_better(self, path, problem):
        predictor, _, _ = self.fitted(path, problem)
        space = problem[0]
        mean, _ = predictor.predict(np.array([space.smallest().row, space.largest().row]))
        assert mean[1] > mean[0]

    def test_inactive_genes_have_no_influence(self, path, problem):
        predictor, _, _ = self.fitted(path, problem)
        space = problem[0]
        row = np.array([space.smallest().row])
        disturbed = row.copy()
        disturbed[0, space.position["b.weight"]] = 3
        assert np.array_equal(predictor.predict(row), predictor.predict(disturbed))

    def test_one_row_is_predicted_as_among_others(self, path, problem):
        predictor, rows, _ = self.fitted(path, problem)
        together, alone = predictor.predict(rows), [predictor.predict(row[None]) for row in rows[:5]]
        assert np.allclose([m[0] for m, _ in alone], together[0][:5], rtol=1e-5)
        assert np.allclose([s[0] for _, s in alone], together[1][:5], rtol=1e-4)

    def test_files_bring_it_back(self, path, problem, tmp_path):
        predictor, rows, _ = self.fitted(path, problem)
        save_predictor(predictor, tmp_path)
        back = load_predictor(tmp_path, problem[0], problem[1])
        assert type(back) is type(predictor) and np.array_equal(back.predict(rows), predictor.predict(rows))

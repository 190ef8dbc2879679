"""Predictors on disk."""

import json

import numpy as np
import pytest

from predictors.accuracy import fit_predictor
from predictors.additive import Additive
from predictors.encoding import described, one_hot
from predictors.files import load_predictor, save_predictor
from supernet.space import SearchSpace


def fitted(kind, chain, measured, truth, rng):
    space, costs = chain
    pairs = measured(30, rng)
    if kind == "additive":
        predictor = Additive(space, sensitivity=truth[0])
        predictor.fit(pairs.indices, pairs.scores)
        return predictor
    sensitivity = truth[0] if kind == "ensemble with sensitivity" else None
    return fit_predictor(space, pairs, costs=costs, sensitivity=sensitivity, rng=rng, members=2, steps=20)


@pytest.mark.parametrize("kind", ["additive", "ensemble", "ensemble with sensitivity"])
def test_what_was_saved_predicts_the_same(kind, chain, measured, truth, rng, tmp_path):
    predictor = fitted(kind, chain, measured, truth, rng)
    save_predictor(predictor, tmp_path, {"kendall": 0.5})
    back = load_predictor(tmp_path, *chain)
    rows = chain[0].sample_indices(20, rng)
    assert type(back) is type(predictor)
    assert np.array_equal(back.predict(rows), predictor.predict(rows))
    assert json.loads((tmp_path / "predictor.json").read_text())["report"] == {"kendall": 0.5}


def test_another_space_is_refused_by_name(chain, measured, truth, rng, tmp_path):
    space, costs = chain
    save_predictor(fitted("ensemble", chain, measured, truth, rng), tmp_path)
    other = SearchSpace(space.dimensions[:-1])
    with pytest.raises(ValueError, match=f"{space.fingerprint}.*{other.fingerprint}"):
        load_predictor(tmp_path, other, costs)


def test_broken_and_missing_files_are_named(chain, measured, truth, rng, tmp_path):
    with pytest.raises(FileNotFoundError, match="no predictor"):
        load_predictor(tmp_path, *chain)
    save_predictor(fitted("additive", chain, measured, truth, rng), tmp_path)
    path = tmp_path / "predictor.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"kind": "system"}))
    with pytest.raises(ValueError, match="not registered"):
        load_predictor(tmp_path, *chain)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_predictor(tmp_path, *chain)


def test_files_of_another_encoder_or_with_other_options_are_refused(chain, measured, truth, rng, tmp_path):
    save_predictor(fitted("ensemble", chain, measured, truth, rng), tmp_path)
    path = tmp_path / "predictor.json"
    record = json.loads(path.read_text())
    older = {key: value for key, value in record.items() if key != "encoding"}
    for changed in (
        record | {"encoding": "0123456789abcdef"},
        older,
        record | {"options": record["options"] | {"cost_features": ["bitops"]}},
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="another version of Ensemble; run `elastibit predict` again"):
            load_predictor(tmp_path, *chain)


def test_the_digest_follows_the_encoding(chain):
    space, _ = chain
    assert (
        len({described(space).digest, one_hot(space).digest, described(SearchSpace(space.dimensions[:-1])).digest}) == 3
    )
    assert described(space).digest == described(SearchSpace(space.dimensions)).digest

"""EQ-Net's predictor: its shape, its encoding, and that it learns a synthetic quality."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from predictors.cqap import CQAP
from predictors.encoding import one_hot
from predictors.judging import kendall
from supernet.config import QuantConfig
from supernet.formats.integer import Integer
from supernet.space import Dimension, SearchSpace


def test_the_default_is_the_papers_perceptron(chain):
    space, _ = chain
    predictor = CQAP(space, epochs=1)
    predictor.fit(space.sample_indices(12, np.random.default_rng(0)), np.arange(12.0))
    shapes = [tuple(predictor.tensors[f"w{k}"].shape[1:]) for k in range(1, 9)]
    # Depth: 4 choices. A weight: 7 bits, 2 granularities, 2 symmetries; an input: 7 bits, 2 symmetries.
    assert shapes == [(4 + 8 * (11 + 9), 200), *[(200, 200)] * 6, (200, 1)]


def test_the_encoding_tells_all_subnets_apart_and_shows_bits():
    choices = tuple(QuantConfig(Integer(b), symmetric=s) for b, s in itertools.product((2, 4), (True, False)))
    space = SearchSpace([Dimension("d", (1, 2)), Dimension("a.weight", choices, (("d", (2,)),))])
    rows = np.array([[0, 0], *[[1, k] for k in range(4)]])
    encoding = one_hot(space)
    found = encoding.features(encoding.read(rows)[1])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 0, 1],
        [0, 1, 0, 1, 1, 0],
        [0, 1, 0, 1, 0, 1],
    ]
    assert found.tolist() == expected


def test_it_answers_as_torch_modules_with_its_weights_do(chain, truth, rng):
    space, _ = chain
    rows = space.sample_indices(30, rng)
    predictor = CQAP(space, rng=rng, members=2, hidden=8, depth=2, epochs=3)
    predictor.fit(rows, truth[1](rows))
    encoding, outputs = one_hot(space), []
    x = encoding.features(encoding.read(rows)[1])
    for m in range(2):
        linear = [nn.Linear(*predictor.tensors[f"w{k}"].shape[1:]) for k in (1, 2, 3)]
        for k, layer in enumerate(linear, 1):
            layer.weight.data = predictor.tensors[f"w{k}"][m].T
            layer.bias.data = predictor.tensors[f"b{k}"][m, 0]
        outputs.append(nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])(x)[:, 0])
    expected = predictor.tensors["y_mean"] + predictor.tensors["y_std"] * torch.stack(outputs).mean(0)
    assert np.allclose(predictor.predict(rows)[0], expected.detach().numpy(), atol=1e-5)


def test_it_learns_to_rank(chain, truth, rng):
    space, _ = chain
    rows, held = space.sample_indices(500, rng), space.sample_indices(200, rng)
    predictor = CQAP(space, rng=rng, members=2, hidden=48, depth=3, epochs=40)
    predictor.fit(rows, truth[1](rows))
    assert kendall(truth[1](held), predictor.predict(held)[0]) > 0.5


@pytest.mark.parametrize("settings", [{"members": 1}, {"depth": 0}, {"epochs": 0}, {"unseen": 0.0}])
def test_settings_out_of_range_are_refused(chain, settings):
    with pytest.raises(ValueError):
        CQAP(chain[0], **settings)

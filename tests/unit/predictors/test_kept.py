"""A sensitivity is measured once for each method and each training, and is the same when it is read again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from predictors.kept import FILE, plain, sensitivity_of
from predictors.output_mse import OutputMSE
from supernet.run import Run

NODE = {"_target_": "predictors.output_mse.OutputMSE", "images": 16, "positions": 32, "seed": 0}


@pytest.fixture
def run(net, task, tmp_path):
    return Run(tmp_path, net, task, {}, 0)


@pytest.fixture
def calls(monkeypatch):
    made, measure = [], OutputMSE.__call__
    monkeypatch.setattr(OutputMSE, "__call__", lambda self, *a: (made.append(self.images), measure(self, *a))[1])
    return made


def equal(one, two):
    pairs = zip(one.terms, two.terms, strict=True)
    return all(a == b and np.array_equal(s, t) for (a, s), (b, t) in pairs)


def test_it_is_measured_once(run, calls, tmp_path):
    first = sensitivity_of(run, NODE, 16, out=tmp_path)
    assert equal(first, OutputMSE(16, 32)(run.net, run.task.recalibrate(16))) and calls == [16, 16]
    assert equal(first, sensitivity_of(run, NODE, 16, out=tmp_path)) and len(calls) == 2
    other = sensitivity_of(run, NODE | {"images": 8}, 16, out=tmp_path)
    assert not equal(first, other) and calls[2:] == [8]
    assert sensitivity_of(run, NODE, None, out=tmp_path) and len(calls) == 4, "other images"
    without = replace(run, task=None)
    assert equal(first, sensitivity_of(without, NODE, 16, out=tmp_path)) and len(calls) == 4
    assert "_target_" not in (tmp_path / FILE).read_text()


def test_another_training_has_another(run, calls, tmp_path):
    sensitivity_of(run, NODE, 16, out=tmp_path)
    with torch.no_grad():
        next(run.net.parameters()).mul_(1.5)
    sensitivity_of(run, NODE, 16, out=tmp_path)
    assert len(calls) == 2 and len(json.loads((tmp_path / FILE).read_text())["sensitivities"]) == 1


def test_without_images_a_predictor_has_one(run, calls, tmp_path):
    from predictors.measuring import weights_digest

    found, without = sensitivity_of(run, NODE, 16, out=tmp_path), replace(run, task=None)
    (tmp_path / FILE).unlink()
    with pytest.raises(FileNotFoundError, match="no sensitivity of its weights, and its data is not here"):
        sensitivity_of(without, NODE, 16, out=tmp_path)
    record = {"sensitivity": plain(found), "report": {"weights": weights_digest(run.net)}}
    (tmp_path / "predictor.json").write_text(json.dumps(record))
    assert equal(found, sensitivity_of(without, NODE, 16, out=tmp_path))
    (tmp_path / "predictor.json").write_text(json.dumps(record | {"report": {"weights": "others"}}))
    with pytest.raises(FileNotFoundError, match="no sensitivity"):
        sensitivity_of(without, NODE, 16, out=tmp_path)

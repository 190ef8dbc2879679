"""Laws of every engine of conf/engine: the outcomes of `tested`, each subnet once, the supernet untouched."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from predictors import measuring
from predictors.pairs import collect
from supernet.artefacts import read_jsonl
from supernet.config import build
from supernet.elastic.supernet import SuperNet

CONF = Path(__file__).parents[2] / "conf"
SETTINGS = {"workers": 2, "threads": 1, "retries": 1}
FATAL = """
import os, signal

class Fatal:
    '''A forward hook that kills its process when one subnet runs: while the marker is not there, or always.'''

    def __init__(self, row, marker, once):
        self.row, self.marker, self.once = tuple(row), marker, once

    def __call__(self, module, inputs):
        if module.active == self.row and not (self.once and os.path.exists(self.marker)):
            with open(self.marker, "a") as file:
                file.write(f"{os.getpid()}\\n")
            os.kill(os.getpid(), signal.SIGKILL)
"""


def marked(path):
    """Ray's tests take longer, and need the extra."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == "ray" else [])


@pytest.fixture(scope="module", params=[marked(path) for path in sorted((CONF / "engine").glob("*.yaml"))])
def engine(request):
    """One engine for all tests, as a run has one: its workers may stay."""
    if request.param.stem == "ray":
        pytest.importorskip("ray", reason="needs the extra elastibit[ray]")
    node = OmegaConf.to_container(OmegaConf.load(request.param))
    return build(node | {key: value for key, value in SETTINGS.items() if key in node})


@pytest.fixture(scope="module")
def images():
    """(recalibration, batches), with a smaller last batch and strides that NumPy would not keep."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 1, 8, 8, generator=rng), torch.randint(0, 10, (120,), generator=rng)
    batches = list(zip(x.split(50), y.split(50), strict=True))
    return [x[:40], x[40:80].transpose(2, 3)], batches


@pytest.fixture(scope="module")
def net(images):
    torch.manual_seed(0)
    backbone = build(OmegaConf.load(CONF / "backbone" / "digits.yaml"), n_classes=10, in_channels=1)
    net = SuperNet(backbone, images[0][0][:1], bits=(2, 4, 8))
    net.calibrate(images[0])
    return net.eval()


@pytest.fixture(scope="module")
def configs(net):
    rng = np.random.default_rng(0)
    return [net.space.largest(), net.space.smallest(), *(net.space.sample(rng) for _ in range(5))]


@pytest.fixture(scope="module", autouse=True)
def module_of_fatal(tmp_path_factory):
    """The folder of `fatal`, where workers find it as this process does."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "fatal.py").write_text(FATAL)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("fatal", None)


@pytest.fixture
def fatal(net, tmp_path):
    """Function (config, once) -> (a supernet whose subnet `config` kills the process that runs it, the marker)."""

    def make(config, once):
        deadly, marker = copy.deepcopy(net), tmp_path / "killed"
        deadly.register_forward_pre_hook(importlib.import_module("fatal").Fatal(config.row, str(marker), once))
        return deadly, marker

    return make


def task_of(images):
    return SimpleNamespace(recalibrate=lambda n=None: images[0], select=lambda n=None: images[1])


def plain(path):
    return [{key: value for key, value in record.items() if key != "measured"} for record in read_jsonl(path)]


class TestEngine:
    def test_outcomes_are_those_of_the_definition_and_the_net_stays(self, engine, net, images, configs):
        before, active = {k: v.clone() for k, v in net.state_dict().items()}, net.active
        twice = [*configs, configs[2]]
        got = list(engine(net, twice, *images))
        assert sorted(at for at, _, _ in got) == list(range(len(twice)))
        for at, right, seconds in got:
            assert (
                right.dtype == np.bool_
                and np.array_equal(right, measuring.tested(net, twice[at], *images))
                and seconds > 0
            )
        assert len({right.tobytes() for _, right, _ in got}) > 3
        assert net.active == active and not net.training
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    def test_no_subnets_are_no_results(self, engine, net, images):
        assert list(engine(net, [], *images)) == []

    def test_workers_that_stayed_measure_the_net_and_images_of_this_call(self, engine, net, images, configs):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.mul_(1.0 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
        fewer = images[0][:1], images[1][1:]
        got = {at: right for at, right, _ in engine(other, configs[2:5], *fewer)}
        assert sorted(got) == [0, 1, 2]
        for at, right in got.items():
            assert np.array_equal(right, measuring.tested(other, configs[2:5][at], *fewer))
        assert any(
            not np.array_equal(right, measuring.tested(net, configs[2:5][at], *fewer)) for at, right in got.items()
        )

    def test_a_killed_workers_subnet_is_measured_by_another(self, engine, net, images, fatal, tmp_path, request):
        if "local" in request.node.callspec.id:
            pytest.skip("has no workers")
        collect(net, task_of(images), 9, out=tmp_path / "whole.jsonl", progress=False)
        victim = net.space.config(plain(tmp_path / "whole.jsonl")[5]["row"])
        deadly, marker = fatal(victim, once=True)
        collect(deadly, task_of(images), 9, out=tmp_path / "pairs.jsonl", engine=engine, progress=False)
        pids = [int(line) for line in marker.read_text().split()]
        assert len(pids) == 1 and os.getpid() not in pids
        whole, pairs = plain(tmp_path / "whole.jsonl"), plain(tmp_path / "pairs.jsonl")
        assert len(pairs) == len(whole) == 9
        assert {r["id"]: r for r in pairs} == {r["id"]: r for r in whole}

    def test_a_measurement_that_fails_names_its_subnet_in_one_line(self, engine, net, images, configs):
        wrong = [(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))]
        with pytest.raises(RuntimeError, match=r"RuntimeError: .*channels") as caught:
            list(engine(net, configs[3:4], images[0], wrong))
        assert str(caught.value).startswith(f"subnet {configs[3].id} could not be measured: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_a_subnet_that_kills_every_worker_is_named_and_the_others_are_kept(
        self, engine, net, images, fatal, tmp_path, request
    ):
        if "local" in request.node.callspec.id:
            pytest.skip("has no workers")
        path, others = tmp_path / "pairs.jsonl", collect(net, task_of(images), 5, progress=False)
        victim = net.space.config(others.indices[2])
        deadly, marker = fatal(victim, once=False)
        with pytest.raises(
            ChildProcessError, match=rf"^subnet {victim.id} ended 2 workers: .*; what was measured is kept$"
        ):
            collect(deadly, task_of(images), 5, out=path, engine=engine, progress=False)
        assert len(set(marker.read_text().split())) == 1 + SETTINGS["retries"]
        assert sorted(r["id"] for r in plain(path)) == sorted(
            net.space.config(row).id for row in others.indices if tuple(row) != victim.row
        )

"""What is special to Ray: the extra, clusters that are not there or too small, and clusters that are not ours."""

import gc
import socket
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from predictors import measuring
from predictors.ray_engine import OnRay, _line
from supernet.backbones.cifar_resnet import CifarResNet
from supernet.config import build
from supernet.elastic.supernet import SuperNet


def test_without_the_extra_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"not installed; `pip install elastibit\[ray\]`, or take engine=processes"):
        build({"_target_": "predictors.ray_engine.OnRay"})


def test_of_rays_many_lines_the_one_that_says_it():
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tpid: 7"
    assert _line(RuntimeError(died)) == "The actor died unexpectedly before finishing this task"
    raised = (
        "\x1b[36mray::Worker.open()\x1b[39m (pid=7)\n  File ...\n\x1b[31mModuleNotFoundError: No module named 'mine'"
    )
    assert _line(RuntimeError(raised)) == "ModuleNotFoundError: No module named 'mine'"
    assert _line(RuntimeError()) == "RuntimeError"


@pytest.fixture
def cluster() -> Iterator[object]:
    """A cluster of one CPU that somebody else has started in this process."""
    ray = pytest.importorskip("ray", reason="needs the extra elastibit[ray]")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def net(task):
    """A supernet whose classes workers can import."""
    torch.manual_seed(0)
    net = SuperNet(CifarResNet(8, 4, 1, channels=(4, 4, 4)), torch.zeros(1, 1, 8, 8), bits=(2, 4, 8))
    net.calibrate(task.recalibrate())
    return net.eval()


@pytest.mark.slow
def test_a_cluster_that_is_there_is_taken_and_left_running(cluster, net, task, rng):
    configs = [net.space.sample(rng) for _ in range(3)]
    with pytest.raises(ValueError, match="takes threads=2 CPUs, the largest node of the cluster has 1"):
        list(OnRay(threads=2)(net, configs, task.recalibrate(), task.select()))
    assert cluster.is_initialized()
    engine = OnRay(workers=3)  # room for one: nobody waits for the others
    got = {at: right for at, right, _ in engine(net, configs, task.recalibrate(), task.select())}
    for at, config in enumerate(configs):
        assert np.array_equal(got[at], measuring.tested(net, config, task.recalibrate(), task.select()))
    del engine
    gc.collect()
    assert cluster.is_initialized() and cluster.get(cluster.put(7)) == 7


def test_no_cluster_at_an_address_is_one_line(net, task):
    pytest.importorskip("ray", reason="needs the extra elastibit[ray]")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        engine = OnRay(address=address)
        with pytest.raises(
            ConnectionError, match=rf"^no Ray cluster at {address}: .*; start one with `ray start --head`"
        ):
            list(engine(net, [net.space.largest()], task.recalibrate(), task.select()))
    engine = OnRay(address="head:ray")
    with pytest.raises(ValueError, match="auto or host:port, got 'head:ray'"):
        list(engine(net, [net.space.largest()], task.recalibrate(), task.select()))

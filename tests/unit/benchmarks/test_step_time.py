"""What is timed by benchmarks/step_time.py, and one small real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import step_time
from benchmarks.timing import peers, problems
from benchmarks.timing.contestants import (
    CHANNELS_LAST,
    OURS,
    PROBLEMS,
    RANDOM_DEPTH,
    Contestant,
    Problem,
    contestants,
)
from benchmarks.timing.overhead import python_time, slopes
from benchmarks.timing.peak import resident, running_peak, step_peak
from benchmarks.timing.resnet20 import ResNet20
from supernet.artefacts import read_json
from supernet.backbones.cifar_resnet import CifarResNet


class TestContestants:
    @pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda problem: problem.name)
    def test_names_are_unique_and_each_of_ours_has_a_twin_without_sites(self, problem: Problem) -> None:
        names = [c.name for c in contestants(problem, list(peers.PEERS))]
        assert len(set(names)) == len(names)
        ours = [n for n in names if n.startswith("ours.") and not n.endswith((".no_sites", ".contiguous"))]
        assert {f"{n}.no_sites" for n in ours} <= set(names)
        assert any(".depth." in n for n in names) == problem.depth

    def test_depth_is_compiled_by_parts_only(self) -> None:
        assert {c.compile for c in contestants(PROBLEMS["resnet20"]) if c.depth} == {"quantizers", "regional"}


class TestProblems:
    def test_the_plain_resnet20_is_ours(self) -> None:
        torch.manual_seed(0)
        ours, plain = CifarResNet(20).eval(), ResNet20().eval()
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(ours(x), plain(x))

    def test_the_optimizer_is_that_of_our_training(self) -> None:
        """The weights' groups differ in nothing, so both sides of a ratio do the same work."""
        from benchmarks.timing.overhead import chain
        from supernet.samplers.sandwich import Sandwich
        from supernet.training.losses import GroupProgressive
        from supernet.training.module import Schedule, SupernetModule

        net = chain(2)
        schedule = Schedule(
            lr=problems.LEARNING_RATE, momentum=problems.MOMENTUM, weight_decay=problems.WEIGHT_DECAY, clip=0.0
        )
        task: Any = None
        sampler = Sandwich(net.space, net.costs)
        module = SupernetModule(
            net, task, sampler, GroupProgressive(), subnets=1, schedule=schedule, seed=0, total_steps=1
        )
        theirs = module.configure_optimizers()[0]
        float_network = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(2)))
        own = problems.sgd(float_network.parameters())
        for a, b in zip(own.param_groups, theirs.param_groups, strict=True):
            assert [p.shape for p in a.pop("params")] == [p.shape for p in b.pop("params")]
            assert b.pop("peak") == b["lr"]
            assert a == b

    def test_the_same_seed_gives_everyone_the_same_images(self) -> None:
        problem = Problem("resnet20", 4, 8)
        (a, labels), (b, same) = (problems.batch(problem, layout, 3) for layout in ("contiguous", CHANNELS_LAST))
        assert torch.equal(a, b) and torch.equal(labels, same)
        assert b.is_contiguous(memory_format=torch.channels_last) and not b.is_contiguous()
        assert not torch.equal(a, problems.batch(problem, "contiguous", 4)[0])
        assert sum(len(x) for x in problems.calibration(problem, CHANNELS_LAST, 3, images=9)) == 12


class TestPeak:
    def test_running_sum_in_order_of_time(self) -> None:
        assert running_peak([(3, -4), (1, 4), (2, 8), (4, 2)]) == 12
        assert running_peak([]) == 0

    def test_of_a_step_is_what_it_held_at_once(self) -> None:
        old = [torch.zeros(1 << 22)]

        def step() -> None:
            old.clear()  # allocated before: its release must not hide what the step itself takes
            first = torch.ones(1 << 20)
            second = torch.ones(1 << 21)
            del first
            third = torch.ones(1 << 18)
            del second, third

        assert step_peak(step) == pytest.approx(4 * ((1 << 20) + (1 << 21)), rel=0.01)

    def test_resident_counts_each_storage_once(self) -> None:
        weight = torch.nn.Parameter(torch.zeros(100))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        weight.sum().backward()
        optimizer.step()
        assert resident([weight, weight.detach()[:50]], [optimizer]) == 2 * 400


class TestPythonTime:
    def test_slope_is_milliseconds_per_thousand_layers(self) -> None:
        assert slopes({"bind": 0.001}, {"bind": 0.003}, 400) == {"bind": pytest.approx(5.0)}

    def test_of_small_chains_has_all_parts(self) -> None:
        found = python_time(0, repeats=3, short=2, long=6)
        assert set(found) == {"bind", "draw", "update"} and np.isfinite(list(found.values())).all()


class TestOptions:
    @pytest.mark.parametrize("words", [["--models", "resnet21"], ["--rounds", "0"], ["--measure", "speed"]])
    def test_what_does_not_exist_is_refused(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            step_time.parsed(words)
        assert words[0].removeprefix("--") in capsys.readouterr().err

    def test_variants_and_peers_choose_the_contestants(self) -> None:
        options = step_time.parsed(["--variants", "fp32.eager,ours.whole*,nncf,modelopt*", "--peers", "nncf"])
        names = [c.name for c in step_time.chosen(PROBLEMS["resnet18"], options)]
        assert names == ["fp32.eager", "ours.whole", "ours.whole.no_sites", "ours.whole.contiguous", "nncf"]


class TestSteps:
    def test_a_depth_elastic_step_runs_all_blocks_unless_asked_otherwise(self) -> None:
        from benchmarks.timing.steps import Elastic

        runner = Elastic(Contestant("", OURS, "off", CHANNELS_LAST, depth=True), Problem("resnet20", 64, 8), 0)
        seen: dict[str, set[tuple[int, ...]]] = {}
        at = [runner.net.space.position[f"layer{k}.depth"] for k in (1, 2, 3)]
        bind = runner.net._bind

        def noted(row: Any) -> None:
            seen[measure].add(tuple(int(row[k]) for k in at))
            bind(row)

        runner.net._bind = noted  # type: ignore[method-assign]
        for measure in runner.measures:
            seen[measure] = set()
            for _ in range(4):
                runner.measures[measure]()
        full = {(2, 2, 2)}
        assert seen["step"] == seen["sandwich"] == full and len(seen[RANDOM_DEPTH]) > 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step_time.json"
    words = ["--models", "resnet20", "--variants", "fp32.eager,ours.off", "--rounds", "3", "--batch", "4"]
    places = ["--json", str(out), "--work", str(tmp_path), "--threads", "1", "--measure", "step,memory,start"]
    assert step_time.main([*words, *places]) == 0
    found = read_json(out)
    model = found["models"]["resnet20"]
    assert set(model["contestants"]) == {"fp32.eager", "ours.off"}
    assert not model["failed"] and not model["compiled"]
    ours, base = model["contestants"]["ours.off"], model["contestants"][model["fastest"]["step"]["fp32"]]
    assert len(ours["step"]["rounds"]) == 3 and min(ours["step"]["rounds"]) > 0
    expected = ours["step"]["value"] / base["step"]["value"]
    assert ours["step"]["ratios"]["fp32"]["value"] == pytest.approx(expected, rel=1e-3)
    assert ours["memory"]["value"] > model["preparation"]["ours.off"]["resident_bytes"] > 0
    preparation = model["preparation"]["ours.off"]
    assert preparation["to_first_step"] >= preparation["scales"] + preparation["first_step"]
    assert "not judged" in found["judged"] and {goal["met"] for goal in found["goals"]} == {None}
    assert json.dumps(found["torch"]) in json.dumps(found["provenance"]["versions"])
    assert "| ours.off |" in capsys.readouterr().out

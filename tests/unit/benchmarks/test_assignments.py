"""benchmarks/assignments.py: bootstrap, what stands for a tool, its budget in our units, table; no tool is run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import assignments as bench
from benchmarks.assigning import aimet, judge, mct, modelopt, problem
from benchmarks.assigning.bootstrap import paired
from benchmarks.assigning.chosen import chosen, imported
from benchmarks.assigning.sweep import dearest_within
from benchmarks.timing.protocol import WorkerError
from predictors import measuring
from predictors.output_mse import OutputMSE
from supernet.artefacts import read_json, write_json
from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.supernet import SuperNet
from supernet.space import magnitude

CHOSEN = sorted(bench.CHOSEN.glob("*.json"))


@pytest.fixture(scope="module")
def net() -> SuperNet:
    """The space of the benchmark's supernet."""
    torch.manual_seed(0)
    return SuperNet(CifarResNet(20), torch.randn(1, 3, 32, 32), first_last_bits=8)


@pytest.fixture(scope="module")
def small() -> SuperNet:
    """A smaller one, quickly measured."""
    torch.manual_seed(0)
    return SuperNet(CifarResNet(8, channels=(4, 8, 8)), torch.randn(1, 3, 8, 8), first_last_bits=8)


class TestBootstrap:
    def test_interval_is_that_of_scipy(self, rng: np.random.Generator) -> None:
        differences = rng.choice([-1.0, 0.0, 1.0], size=400, p=[0.1, 0.75, 0.15])
        found = paired(differences, rng, resamples=20_000)
        theirs = stats.bootstrap(
            (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert found.mean == pytest.approx(differences.mean())
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)

    def test_width_is_that_of_the_normal_law_for_many_images(self, rng: np.random.Generator) -> None:
        differences = np.repeat([-1.0, 0.0, 1.0], [300, 4200, 500])
        found = paired(differences, rng)
        half = 1.959964 * differences.std() / np.sqrt(len(differences))
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
        assert found.verdict == "win" and paired(-differences, rng).verdict == "loss"

    def test_equal_outcomes_tie_and_no_images_are_an_error(self, rng: np.random.Generator) -> None:
        assert paired(np.zeros(50), rng).plain() == {"mean": 0.0, "low": 0.0, "high": 0.0, "verdict": "tie"}
        with pytest.raises(ValueError, match="at least one image"):
            paired(np.zeros(0), rng)

    def test_several_pairs_are_compared_by_their_mean_on_each_image(self, rng: np.random.Generator) -> None:
        ours, theirs = (list(rng.random((3, 500)) < p) for p in (0.8, 0.6))
        found = judge.compared(ours, theirs)
        assert found["ours"] == pytest.approx(np.mean(ours)) and found["theirs"] == pytest.approx(np.mean(theirs))
        assert found["mean"] == pytest.approx(found["ours"] - found["theirs"]) and found["verdict"] == "win"
        one = judge.compared(ours[:1], theirs[:1])
        assert one["high"] - one["low"] > found["high"] - found["low"]


class TestSweep:
    def test_the_dearest_that_fits_is_taken(self, rng: np.random.Generator) -> None:
        for _ in range(50):
            costs, limit = rng.integers(1, 20, 6).astype(float).tolist(), float(rng.integers(1, 20))
            at, inside = dearest_within(costs, limit), [c for c in costs if c <= limit]
            assert at is None if not inside else at == costs.index(max(inside))
        assert dearest_within([3.0], 3.0 * (1 - 1e-12)) == 0, "a sum of floats is not over its limit"

    def test_cost_is_counted_as_we_count(self, net: SuperNet) -> None:
        limits = {"w3a3": net.costs.limit("bitops", "w3a3"), "w2a2": net.costs.limit("bitops", "w2a2")}
        sweep = [{"asked": b, "map": uniform(net, b)} for b in (2, 3, 4)]
        found = chosen(net, sweep, limits)
        assert {budget: (entry["asked"], entry["bitops"]) for budget, entry in found.items()} == {
            "w3a3": (3, limits["w3a3"]),
            "w2a2": (2, limits["w2a2"]),
        }


class TestBudgetsOfTheTools:
    @pytest.mark.parametrize("pair", [(2, 2), (3, 4), (8, 8)])
    def test_effective_bits_of_modelopt_are_our_bitops(self, net: SuperNet, pair: tuple[int, int]) -> None:
        average = modelopt._average(problem.ResNet20(), pair)
        weights = sum(layer.weights for layer in net.layers)
        unit = modelopt.MOST / (64 * 32**2)
        assert average * weights / unit == pytest.approx(net.costs.limit("bitops", f"w{pair[0]}a{pair[1]}"))

    def test_modelopt_allows_all_of_them_and_finds_no_format_dearer_and_better(self) -> None:
        found = [f["effective_bits"] for space in modelopt._spaces() for f in space["quantization_formats"]]
        assert min(found) > 0 and max(found) == modelopt.MOST
        for before, after in zip(problem.CHAIN, problem.CHAIN[1:], strict=False):
            assert after[0] >= before[0] and after[1] >= before[1] and after != before

    def test_mct_is_counted_as_we_count(self, net: SuperNet, rng: np.random.Generator) -> None:
        relus = ["relu", *(f"layer{s}.{b}.relu{k}" for s in (1, 2, 3) for b in (0, 1, 2) for k in (1, 2))]
        holders = [f"{relu.replace('.', '_')}_activation_holder_quantizer" for relu in relus]
        drawn = {holder: {"activations": int(rng.integers(2, 9))} for holder in holders}
        drawn["pool_activation_holder_quantizer"] = {"activations": 8}
        names = [layer.name for layer in net.layers]
        bits = {name: 8 if name in problem.FIXED else int(rng.integers(2, 9)) for name in names}
        content = drawn | {mct.node_of(name): {"weights": bits[name]} for name in names}
        cost = mct.bitops(content, {layer.name: layer.weights for layer in net.layers})
        assert cost == net.costs.of(imported(net, content))["bitops"]

    def test_mct_is_asked_again_until_its_answer_just_fits(self) -> None:
        sizes, asked = {"linear": 1000}, []

        def solve(bops: float) -> dict[str, dict[str, int]]:  # counts a quarter too much
            asked.append(bops)
            return {"linear": {"weights": int(bops / 1000 / 8 / 1.25 + 1e-9)}}

        answers = list(mct.fitted(solve, "w4a4", 640_000.0, sizes))
        assert [a["map"]["linear"]["weights"] for a in answers] == [64, 79]
        assert [a["asked"]["last"] for a in answers] == [False, True] and asked[0] == 640_000

    def test_steps_of_aimet_add_up(self, net: SuperNet) -> None:
        names = [layer.name for layer in net.layers]
        steps = [
            (20.0, [("output", "layer1.0.relu1"), ("weight", "layer1.0.conv2")], ((4, "int"), (3, "int"))),
            (18.0, [("output", "relu"), ("weight", "layer1.0.conv1")], ((5, "int"), (2, "int"))),
            (17.0, [("output", "layer1.0.relu1"), ("weight", "layer1.0.conv2")], ((2, "int"), (2, "int"))),
        ]
        rest = [("output", f"layer{s}.{b}.relu{k}") for s in (1, 2, 3) for b in (0, 1, 2) for k in (1, 2)]
        sweep = aimet.replayed([*steps, (1.0, rest, ((2, "int"), (2, "int")))], names)
        bits = [bits_of(net, entry["map"]) for entry in sweep[:3]]
        assert [b["layer1.0.conv2"] for b in bits] == [(3, 4), (3, 4), (2, 2)]
        assert [b["layer1.0.conv1"] for b in bits] == [(8, 8), (2, 5), (2, 5)]
        assert all(b["layer3.2.conv2"] == (8, 8) for b in bits)


class TestJudge:
    def test_a_subnet_is_measured_once(self, small: SuperNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = [(torch.randn(21, 3, 8, 8), torch.randint(0, 10, (21,)))]
        few, file, config = [torch.randn(4, 3, 8, 8)], tmp_path / "known.jsonl", small.space.uniform("w4a4")
        first = judge.Judge(small, few, batches, file)(config)
        assert (first == measuring.tested(small, config, few, batches)).all() and 0 < first.sum() < 21

        def never(*_: Any) -> None:
            raise LookupError("measured again")

        monkeypatch.setattr(judge, "tested", never)
        again = judge.Judge(small, few, batches, file)(config)
        assert (again == first).all() and again.dtype == bool
        with pytest.raises(LookupError):  # other images for BatchNorm: another measurement
            judge.Judge(small, [*few, *few], batches, file)(config)

    def test_best_forms_keep_the_bits_and_none_is_better(self, small: SuperNet) -> None:
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        small.calibrate([images])
        sensitivity = OutputMSE(images=8, positions=16)(small, [images])
        space, config = small.space, small.space.uniform("w3a4")
        found = judge.with_best_forms(small, config, sensitivity)
        assert {n: magnitude(c) for n, c in found.items()} == {n: magnitude(c) for n, c in config.items()}
        best, row = sensitivity.value(np.array([found.row]))[0], np.array(config.row)
        single = []  # the sensitivity adds up over genes: the best form of each gene, tried one by one
        for i, dimension in enumerate(space.dimensions):
            alike = [k for k, c in enumerate(dimension.choices) if magnitude(c) == magnitude(config[dimension.name])]
            tried = np.tile(row, (len(alike), 1))
            tried[:, i] = alike
            single.append(sensitivity.value(tried).min() - sensitivity.value(row[None])[0])
        assert best == pytest.approx(sensitivity.value(row[None])[0] + sum(single)) and min(single) < 0


class TestTools:
    def test_a_finished_answer_is_not_asked_for_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*_: Any) -> Path:
            raise AssertionError("the tool was started")

        monkeypatch.setattr(bench, "python_of", never)
        write_json(tmp_path / "mct-1.json", {"sweep": []})
        assert bench.asked("mct", tmp_path, 1, Namespace()) == {"sweep": []}

    def test_a_tool_that_fails_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench, "python_of", lambda *_: Path("/bin/false"))
        with pytest.raises(WorkerError, match="ended with code 1"):
            bench.asked("mct", tmp_path, 0, Namespace(environments=tmp_path, timeout=60.0))

    def test_making_needs_the_float_network(self, capsys: pytest.CaptureFixture[str]) -> None:
        for words, said in ((["--make"], "--weights"), (["--tools", "quark"], "modelopt-gradient")):
            with pytest.raises(SystemExit):
                bench.parsed(["--run", "x", *words])
            assert said in capsys.readouterr().err

    @pytest.mark.parametrize("file", CHOSEN, ids=[f.stem for f in CHOSEN])
    def test_stored_assignments_keep_their_limits(self, net: SuperNet, file: Path) -> None:
        tool = read_json(file)
        assert [of["seed"] for of in tool["seeds"]] == list(bench.SEEDS)
        for budget, entry in tool["seeds"][0]["budgets"].items():
            bits = bits_of(net, entry["map"])
            cost = sum(layer.macs * bits[layer.name][0] * bits[layer.name][1] for layer in net.layers)
            assert cost == pytest.approx(entry["bitops"])
            assert cost <= net.costs.limit("bitops", budget) * (1 + 1e-9)
            assert bits[net.layers[0].name] == bits[net.layers[-1].name] == (8, 8)


class TestTable:
    def test_says_who_won_and_by_how_much(self) -> None:
        line = {"mean": 0.0052, "low": 0.0021, "high": 0.0083, "verdict": "win", "ours": 0.85, "theirs": 0.8448}
        tie = line | {"mean": 0.0, "low": -0.001, "high": 0.001, "verdict": "tie"}
        comparisons = {"at_limit": line, "at_cost": tie, "bits_alone": tie}
        result = {
            "rows": [{"tool": "mct", "budget": "w3a3"} | comparisons],
            "pooled": [{"tool": "mct", "budget": "w3a3", "used": 0.992} | comparisons],
            "seeds": [0, 1, 2],
            "images": 5000,
            "failed": {"aimet": "cannot be installed"},
        }
        text = bench.table(result)
        assert "| mct | w3a3 | 99.2 % | 84.48 % |" in text and "win +0.52 [0.21, 0.83]" in text
        assert "at_limit: 1 win; at_cost: 1 tie" in text and "aimet: cannot be installed" in text


def uniform(net: SuperNet, bits: int) -> dict[str, Any]:
    """A map in the plain form, first and last layer at 8 bits."""
    inner = {layer.name: [bits, bits] for layer in net.layers}
    return inner | {net.layers[0].name: [8, 8], net.layers[-1].name: [8, 8]}


def bits_of(net: SuperNet, content: Any) -> dict[str, tuple[int, int]]:
    config = imported(net, content)
    return {x.name: (config[x.weight].bits, config[x.input].bits) for x in net.layers}  # type: ignore[union-attr]

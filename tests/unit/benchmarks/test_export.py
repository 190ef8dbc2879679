"""benchmarks/export.py: what it measures, on a tiny network and few rounds; no time is judged here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from benchmarks import export
from benchmarks.exporting import problems
from benchmarks.exporting.goals import GOALS, LATENCY, MODELS, PROFILES, why_not_judged
from benchmarks.exporting.problems import PROBLEMS, Material, Problem
from supernet.artefacts import read_json, save_tensors

TINY = Problem("tiny", 12, 3, "tiny.safetensors", images=(32, 96), accuracy=True)


def tiny(problem: Problem, weights: Path | None) -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 40, 3), nn.ReLU()]
    tail = [nn.Conv2d(40, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, problem.classes)]
    return nn.Sequential(*layers, *tail)


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--rounds", "0"], "--rounds is at least 1"),
            (["--models", "vgg"], "vgg unknown; choose from resnet20"),
            (["--data", "nowhere"], "--data nowhere is no folder"),
        ],
    )
    def test_what_makes_no_run_is_refused(
        self, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            export.parsed(arguments)
        assert reason in capsys.readouterr().err

    def test_goals_are_of_what_is_measured_and_need_forty_rounds(self) -> None:
        assert set(PROBLEMS) == set(MODELS) >= {goal.model for goal in GOALS}
        raced = {f"ours.{profile}" for profile in PROFILES} | {f"ours.packed.w{bits}" for bits in export.SIZES}
        assert {goal.contestant for goal in GOALS} <= raced
        assert why_not_judged(export.parsed([]).rounds) is None
        assert why_not_judged(39) == "39 rounds, the goals ask for 40"


class TestProblems:
    @pytest.mark.parametrize("size", [(8, 8), (7, 10)])
    def test_static_padding_computes_what_timm_pads_by_size(self, size: tuple[int, int]) -> None:
        from timm.layers import create_conv2d

        torch.manual_seed(0)
        layers = [create_conv2d(3, 4, 3, stride=2, padding="same"), create_conv2d(4, 4, 3, stride=2, padding="same")]
        model = nn.Sequential(layers[0], nn.Sequential(nn.ReLU(), layers[1])).eval()
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
            made = problems.statically_padded(model, x[:1])
            assert torch.equal(made(x), expected)
        assert [type(m) for m in made.modules() if isinstance(m, nn.Conv2d)] == [nn.Conv2d] * 2

    @torch.no_grad()
    def test_integer_weights_are_loaded_layer_by_layer(self, tmp_path: Path) -> None:
        rng = torch.Generator().manual_seed(0)
        state: dict[str, torch.Tensor] = {}
        for k, shape in enumerate([(4, 3, 3, 3), (6, 4, 1, 1)]):
            n = shape[0]
            state[f"layers.{k}.weight_q"] = torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)
            state[f"layers.{k}.weight_scale"] = 0.01 + torch.rand(n, generator=rng)
            state[f"layers.{k}.weight_zero_point"] = torch.zeros(n, dtype=torch.int32)
            state[f"layers.{k}.bias"] = torch.randn(n, generator=rng)
        save_tensors(tmp_path / "w.safetensors", state)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).eval()
        problems.dequantized(net, tmp_path / "w.safetensors")
        x = torch.randn(2, 3, 3, 3, generator=rng)
        weight = [
            state[f"layers.{k}.weight_q"].float() * state[f"layers.{k}.weight_scale"].view(-1, 1, 1, 1) for k in (0, 1)
        ]
        y = torch.einsum("nchw,kchw->nk", x, weight[0]) + state["layers.0.bias"]
        z = y @ weight[1].flatten(1).T + state["layers.1.bias"]
        torch.testing.assert_close(net(x), z[:, 1:], rtol=1e-4, atol=1e-4)

    def test_random_networks_give_several_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(problems.NETWORKS, "tiny", tiny)
        made, again = (problems.material(TINY, None, 3) for _ in range(2))
        assert not made.trained and len(made.labels.unique()) == 3 and torch.equal(made.test, again.test)


class TestRun:
    @pytest.fixture
    def material(self, monkeypatch: pytest.MonkeyPatch) -> Material:
        monkeypatch.setitem(problems.NETWORKS, "tiny", tiny)
        monkeypatch.setitem(problems.PROBLEMS, "resnet18", TINY)
        made = problems.material(TINY, None, 0)
        made.trained = True  # so that accuracies are measured
        monkeypatch.setattr(problems, "material", lambda *_: made)
        return made

    def test_a_small_run_writes_what_it_prints(
        self, material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "export.json"
        assert export.main(["--models", "resnet18", "--rounds", "3", "--json", str(out)]) == 0
        found, said = read_json(out), capsys.readouterr().out
        of = found["models"]["resnet18"]
        assert of["failed"] == {} and of["about"] == {"trained": True, "calibration": 32, "test": 96}
        timed = {name: one for name, one in of["contestants"].items() if LATENCY in one}
        assert set(timed) == {"ours.int8", "ours.int8_amx", "fp32.torch", "fp32.twin", "ort.static"}
        for name, one in timed.items():
            assert len(one[LATENCY]["rounds"]) == 3 and f"| resnet18 | {name} |" in said
            assert one["error"] < (1e-4 if name.startswith("fp32") else 0.5)
        assert timed["ort.static"][LATENCY]["ratios"]["static"]["value"] == 1.0
        assert of["facts"]["ours.int8"]["kernels"]["QLinearConv"] == 3 and of["facts"]["ours.int8"]["unfused"] == []
        assert of["accuracy"]["float"] == 1.0, "the labels are what it says"
        assert {"w8a8, sites", "w8a8, no sites", "w4a4, sites", "w4a4, no sites"} <= set(of["accuracy"])
        held = [of["sizes"][str(bits)]["ideal"] for bits in export.SIZES]
        assert held == sorted(held) and all(
            one["over_ideal"] > 1 <= one["over_nominal"] for one in of["sizes"].values()
        )
        assert {goal["model"] for goal in found["goals"]} == {"resnet18"} and "not judged" in found["judged"]
        assert all(goal["met"] is None for goal in found["goals"]) and found["goals"][0]["value"] > 0

    def test_what_cannot_be_exported_is_reported_and_the_rest_goes_on(
        self, material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        material.model = nn.Sequential(*material.model, nn.PReLU()).eval()
        out = tmp_path / "export.json"
        assert export.main(["--models", "resnet18", "--rounds", "1", "--json", str(out)]) == 1
        of = read_json(out)["models"]["resnet18"]
        assert "PReLU, which the exporter does not know" in of["failed"]["ours"]
        assert set(of["contestants"]) == {"fp32.torch", "ort.static"}
        assert "Failed and left out: resnet18, ours: ValueError" in capsys.readouterr().out

    def test_errors_are_shares_of_the_largest_logit(self, material: Material, tmp_path: Path) -> None:
        from benchmarks.exporting.rivals import float_file

        float_file(material.model, material.test[:1], tmp_path / "a.onnx")
        model = onnx.load(tmp_path / "a.onnx")
        bias = next(t for t in model.graph.initializer if list(t.dims) == [3])
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.25), bias.name))
        onnx.save(model, tmp_path / "b.onnx")
        outcome = export.Outcome(figures={"fp32.torch": {}, "ours.int8": {}})
        opened = {
            name: export.opened(tmp_path / file) for name, file in (("fp32.torch", "a.onnx"), ("ours.int8", "b.onnx"))
        }
        export.errors(opened, material, outcome)
        with torch.no_grad():
            largest = float(material.model(material.test).abs().max())
        assert outcome.figures["fp32.torch"]["error"] == [0.0]
        assert outcome.figures["ours.int8"]["error"][0] == pytest.approx(0.25 / largest, rel=1e-3)

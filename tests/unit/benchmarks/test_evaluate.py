"""benchmarks/evaluate.py: what both sides do, when the goal is judged, and one small real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import evaluate
from benchmarks.timing.contestants import CONTIGUOUS, FP32, OURS, Contestant, Problem
from supernet.artefacts import read_json

PROBLEM = Problem("resnet20", 4, 8, depth=True)
SMALL = ["--recalibration", "8", "--judged", "4", "--batch", "4", "--size", "8", "--threads", "1"]


def images(batches: int) -> list[torch.Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(batches)]


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--rounds", "0"], "--rounds is at least 1"),
            (["--batch", "300"], "--recalibration is a multiple of --batch"),
        ],
    )
    def test_what_makes_no_run_is_refused(
        self, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            evaluate.parsed(words)
        assert reason in capsys.readouterr().err

    def test_only_the_goals_own_terms_are_judged(self) -> None:
        assert evaluate.why_not_judged(evaluate.parsed([])) is None
        assert evaluate.why_not_judged(evaluate.parsed(["--rounds", "39"])) == "39 rounds, the goal asks for 40"
        assert evaluate.why_not_judged(evaluate.parsed(["--judged", "1000"])) == "judged 1000 instead of 2000"

    def test_the_goals_variant_is_raced(self) -> None:
        names = [c.name for c in evaluate.contestants()]
        assert evaluate.GOAL[0] in names and len(set(names)) == len(names)


class TestSides:
    def test_fp32_trains_on_the_first_images_and_evaluates_the_rest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.timing import fp32_steps

        seen: list[tuple[bool, bool]] = []
        made: list[fp32_steps.Plain] = []
        build = fp32_steps.Plain.__init__

        def noted(self: fp32_steps.Plain, *arguments: Any) -> None:
            build(self, *arguments)
            made.append(self)
            self.run = lambda x: seen.append((self.module.training, torch.is_grad_enabled()))

        monkeypatch.setattr(fp32_steps.Plain, "__init__", noted)
        run, _ = evaluate.float_judge(Contestant("", FP32, "off", CONTIGUOUS), PROBLEM, images(2), images(3), 0)
        run()
        assert seen == [(True, False)] * 2 + [(False, False)] * 3

    @pytest.mark.slow
    def test_ours_judges_a_fresh_subnet_at_full_depth_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from predictors import measuring

        rows: list[Any] = []
        depths: set[tuple[int, ...]] = set()
        real = measuring.tested

        def noted(net: Any, config: Any, *rest: Any) -> Any:
            rows.append(tuple(net.row(config).tolist()))
            with net.as_subnet(config):
                depths.add(tuple(stage.depth for stage in net.stages.values()))
            return real(net, config, *rest)

        monkeypatch.setattr(measuring, "tested", noted)
        run, _ = evaluate.subnet_judge(Contestant("", OURS, depth=True), PROBLEM, images(2), images(3), 0)
        outcomes = [run() for _ in range(3)]
        assert len(set(rows)) == 3 and depths == {(3, 3, 3)}
        assert [len(right) for right in outcomes] == [12, 12, 12]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "evaluate.json"
    words = ["--variants", "fp32.eager,ours.off", "--rounds", "3", *SMALL, "--profile"]
    assert evaluate.main([*words, "--work", str(tmp_path), "--json", str(out)]) == 0
    found = read_json(out)
    assert set(found["contestants"]) == {"fp32.eager", "ours.off"} and not found["failed"]
    ours, base = found["contestants"]["ours.off"], found["contestants"][found["fastest"]]
    assert len(ours["rounds"]) == 3 and ours["ratio"]["value"] == pytest.approx(ours["value"] / base["value"], rel=1e-3)
    assert found["profiles"]["fp32.eager"][0]["share"] > 0
    assert "not judged" in found["judged"] and found["goals"][0]["met"] is None
    assert "| ours.off |" in capsys.readouterr().out

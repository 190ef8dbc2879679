"""benchmarks/compile.py: counting graphs, judging, and one small real run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import compile as bench
from benchmarks.timing.contestants import PROBLEMS
from supernet.artefacts import read_json

NAME = "resnet20/ours.depth.regional"
STARTS = [
    {"cold": True, "seconds": {"to_first_step": 50.0, "scales": 2.0}, "graphs": 9, "structures": 8},
    {"cold": False, "seconds": {"to_first_step": 12.0, "scales": 1.0}, "graphs": 9, "structures": 8},
    {"cold": False, "seconds": {"to_first_step": 8.0, "scales": 1.5}, "graphs": 9, "structures": 8},
    {"cold": False, "seconds": {"to_first_step": 9.0, "scales": 1.5}, "graphs": 9, "structures": 8},
]
COUNTED = {"new_graphs": 1, "graph_breaks": 0, "stopped": "RecompileError: no", "configurations": 7, "structures": 8}
FOUND: dict[str, Any] = {NAME: {"starts": STARTS, "graphs": COUNTED, "failed": {"start": "out of luck"}}}


class TestGoals:
    def test_judge_the_medians_of_starts_and_the_counts_of_graphs(self) -> None:
        result = bench.result(FOUND, bench.parsed(["--cases", NAME]))
        met = {goal["measure"]: (goal["value"], goal["met"]) for goal in result["goals"]}
        assert met == {
            "start_cold": (50.0, True),
            "start_warm": (9.0, True),
            "scales": (1.5, True),
            "new_graphs": (1.0, False),
            "graph_breaks": (0.0, True),
        }

    def test_fewer_configurations_are_not_judged(self) -> None:
        result = bench.result(FOUND, bench.parsed(["--cases", NAME, "--configurations", "999"]))
        assert "999 configurations" in result["judged"] and {goal["met"] for goal in result["goals"]} == {None}

    def test_only_what_was_asked_for_is_a_goal(self) -> None:
        goals = bench.goals(bench.parsed(["--cases", NAME, "--parts", "start"]))
        assert {goal.measure for goal in goals} == {"start_cold", "start_warm", "scales"}

    def test_the_table_says_what_failed_and_where_recompiling_stopped_the_run(self) -> None:
        text = bench.table(FOUND)
        assert f"| {NAME} | 50.0 | 9.0 | 1.5 | 8 | 9 | 1 | 0 |" in text
        assert "out of luck" in text and "after 7 configurations: RecompileError" in text


class TestOptions:
    @pytest.mark.parametrize("words", [["--cases", "resnet20/ours.never"], ["--parts", "end"], ["--repeats", "0"]])
    def test_what_does_not_exist_is_refused(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            bench.parsed(words)
        assert words[1] in capsys.readouterr().err

    def test_every_usual_case_exists(self) -> None:
        assert [f"{p.name}/{c.name}" for p, c in map(bench.case, bench.CASES)] == list(bench.CASES)


class TestConfigurations:
    def test_three_fixed_ones_warm_up(self) -> None:
        from benchmarks.timing.overhead import chain

        net = chain(4)
        rows = [net.row(row) for row in bench.fixed_configurations(net.space)]
        assert len(rows) == 3 and len({tuple(row.tolist()) for row in rows}) == 3
        assert np.array_equal(rows[0], net.space.largest().row) and np.array_equal(rows[1], net.space.smallest().row)

    @pytest.mark.slow
    @pytest.mark.parametrize("stays", [True, False])
    def test_a_graph_that_a_configuration_makes_is_counted(self, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step that computes with a Python number of the configuration compiles anew; one that has it as data not."""
        compiled = torch.compile(lambda x, k: x * k, backend="eager", dynamic=False)

        def step(runner: Any, row: Any) -> None:
            number = int(np.sum(row))
            compiled(torch.ones(2), torch.tensor(number) if stays else number)

        monkeypatch.setattr(bench, "train", step)
        problem, contestant = bench.case("resnet20/ours.off")
        found = bench.many_configurations(replace(problem, batch=512, size=4), contestant, 0, 40)
        assert found["warm_up_graphs"] >= 1 and found["structures"] is None
        if stays:
            assert found["new_graphs"] == 0 and found["stopped"] is None and found["configurations"] == 40
        else:
            assert found["new_graphs"] >= 1 and "ecompil" in found["stopped"] and found["configurations"] < 40
        torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, name = tmp_path / "compile.json", "resnet20/ours.depth.quantizers"
    words = ["--cases", name, "--parts", "graphs", "--configurations", "5", "--size", "8", "--threads", "1"]
    assert bench.main([*words, "--work", str(tmp_path), "--json", str(out)]) == 0
    found = read_json(out)
    counted = found["cases"][name]["graphs"]
    assert counted["configurations"] == 5 and counted["stopped"] is None
    assert counted["new_graphs"] == 0 and counted["graph_breaks"] == 0 and counted["warm_up_graphs"] > 0
    assert found["cases"][name]["failed"] == {} and found["cases"][name]["starts"] == []
    assert f"| {name} |" in capsys.readouterr().out
    assert PROBLEMS["resnet20"].size == 32  # the small size was the worker's alone

"""The door `probe`, and searches that use its tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elastibit as eb
from supernet.export.legality import trials
from supernet.export.targets.ort_cpu import OrtCpu

Call = Callable[..., Any]
Small = dict[str, list[str]]
PROBE = ["target.rounds=3", "checks=2", "threads=1"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def probed(trained: Path, tmp_path_factory: pytest.TempPathFactory, call: Call) -> tuple[Path, Any]:
    """A run that was probed, and what the door said; not to be written to."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("probe") / "run"))
    answer = call("probe", f"run={run}", *PROBE)
    assert answer.code == 0, answer.err
    return run, answer


@pytest.fixture
def mine(probed: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of it, to do with as one likes."""
    return Path(shutil.copytree(probed[0], tmp_path / "mine"))


def forbidden(*_: Any) -> Any:
    raise AssertionError("nothing is left to measure")


class TestTables:
    def test_they_hold_every_piece_and_every_choice(self, probed: tuple[Path, Any]) -> None:
        run, answer = probed
        folder = run / "probe" / "ort-cpu"
        origin, *pieces = lines(folder / "latency.jsonl")
        assert origin == {"origin": OrtCpu().origin()}
        assert all(p["seconds"] >= 0 and p["call"] >= 0 for p in pieces) and any(p["seconds"] > 0 for p in pieces)
        net = eb.load(run).net
        tried = [r["key"] for r in lines(folder / "legality-int8.jsonl")[1:]]
        assert tried == [key for key, *_ in trials(net)]
        assert "in integer kernels" in answer.out and "measured whole" in answer.out

    def test_whole_subnets_stand_beside_the_sum(self, probed: tuple[Path, Any]) -> None:
        """By hand: the terms in the file, looked up, give the sums beside them, and the correction their ratio."""
        whole = json.loads((probed[0] / "probe" / "ort-cpu" / "whole-int8.json").read_text())
        ends = [row for row in whole["subnets"] if row["corrected_by"]]
        assert len(whole["subnets"]) - len(ends) == 2
        ratio = np.median([row["measured"] / row["sum"] for row in ends])
        assert whole["correction"] == pytest.approx(ratio)
        space = eb.load(probed[0]).net.space
        for row in whole["subnets"]:
            total = 0.0
            for term in whole["terms"]:
                at = tuple(row["indices"][space.position[name]] for name in term["genes"])
                total += float(np.array(term["seconds"])[at])
            assert total == pytest.approx(row["sum"]) and row["id"] == space.config(row["indices"]).id

    def test_a_second_call_measures_only_what_is_missing(
        self, mine: Path, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = mine / "probe" / "ort-cpu" / "latency.jsonl"
        before, trial = table.read_bytes(), (mine / "probe" / "ort-cpu" / "legality-int8.jsonl")
        table.write_bytes(before[:-20])  # as a kill leaves it
        asked: list[str] = []
        measure = OrtCpu.pieces

        def counted(self: OrtCpu, models: Any, memory: int) -> dict[str, float]:
            asked.extend(models)
            return measure(self, models, memory)

        monkeypatch.setattr(OrtCpu, "pieces", counted)
        monkeypatch.setattr("supernet.export.legality.verdict", forbidden)
        tried = trial.read_bytes()
        assert call("probe", f"run={mine}", *PROBE).code == 0
        assert asked == [lines_of(before)[-1]["key"]] and trial.read_bytes() == tried
        assert lines(table)[:-1] == lines_of(before)[:-1] and lines(table)[-1]["key"] == asked[0]

    def test_ctrl_c_keeps_what_is_measured_and_says_how_to_go_on(
        self, run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from supernet.export import legality

        judge, count = legality.verdict, iter(range(100))

        def stopped(*words: Any) -> Any:
            if next(count) == 5:
                raise KeyboardInterrupt
            return judge(*words)

        monkeypatch.setattr(legality, "verdict", stopped)
        answer = call("probe", f"run={run}", *PROBE)
        assert answer.code == 130 and "go on with" in answer.err
        assert len(lines(run / "probe" / "ort-cpu" / "legality-int8.jsonl")) == 6


def lines_of(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


class TestSearch:
    def test_a_latency_budget_is_kept_by_the_table_and_whole(self, mine: Path, small: Small, call: Call) -> None:
        whole = json.loads((mine / "probe" / "ort-cpu" / "whole-int8.json").read_text())
        limit = 20 * max(row["measured"] for row in whole["subnets"])  # far from what a busy machine could upset
        answer = call("search", f"run={mine}", *small["search"], f"budget.latency={limit}", "target.rounds=3")
        assert answer.code == 0, answer.err
        found = json.loads((mine / "front.json").read_text())["subnets"][0]
        assert 0 < found["seconds"] <= limit and 0 < found["costs"]["latency"] <= limit
        assert "measured whole" in answer.out and "latency: reachable" in answer.err
        assert call("report", f"run={mine}").code == 0

    def test_winners_keep_the_legal_view(self, mine: Path, small: Small, call: Call) -> None:
        table = mine / "probe" / "ort-cpu" / "legality-int8.jsonl"
        records = lines(table)
        for record in records[1:]:
            if "weight int2" in record["key"].lower() or "Integer(bits=2)" in record["key"]:
                record["integer"] = False
        table.write_text("".join(json.dumps(record) + "\n" for record in records))
        answer = call("search", f"run={mine}", *small["search"], "budget.bitops=w4a4", "legal=integer")
        assert answer.code == 0, answer.err
        front = json.loads((mine / "front.json").read_text())
        net = eb.load(mine).net
        rows = np.array([s["indices"] for s in front["subnets"]] + [p["indices"] for p in front["front"]])
        bits = {
            net.space.config(row)[layer.weight].bits
            for row in rows
            for layer in net.layers  # type: ignore[union-attr]
            if layer.weight in net.space.config(row)
        }
        assert bits == {4, 8}


class TestRefusals:
    @pytest.mark.parametrize("words", [["budget.latency=3ms"], ["budget.bitops=w4a4", "legal=integer"]], ids=" ".join)
    def test_a_run_that_was_not_probed(self, run: Path, call: Call, words: list[str]) -> None:
        answer = call("search", f"run={run}", *words)
        assert answer.code == 2 and answer.err.count("\n") == 1
        assert f"elastibit probe run={run}" in answer.err

    def test_a_limit_that_no_subnet_keeps(self, mine: Path, call: Call) -> None:
        answer = call("search", f"run={mine}", "budget.latency=1ns")
        assert answer.code == 2 and "no subnet has latency <= 1 ns; the smallest reaches" in answer.err

    def test_tables_of_another_machine(self, mine: Path, call: Call) -> None:
        table = mine / "probe" / "ort-cpu" / "latency.jsonl"
        table.write_text(table.read_text().replace('"onnxruntime": "', '"onnxruntime": "0.'))
        for verb in (["probe"], ["search", "budget.latency=3ms"]):
            answer = call(verb[0], f"run={mine}", *verb[1:])
            assert answer.code == 2 and answer.err.count("\n") == 1
            assert "was measured with onnxruntime 0." in answer.err and "fresh=true" in answer.err

    def test_no_checks(self, mine: Path, call: Call) -> None:
        answer = call("probe", f"run={mine}", "checks=0")
        assert answer.code == 2 and "checks must be at least 1" in answer.err

    def test_help(self, call: Call) -> None:
        text = call("probe", "--help").out
        assert "* ort-cpu" in text and "fresh: false" in text and "elastibit probe run=runs/a" in text
        assert "latency: null" in call("search", "--help").out


@pytest.mark.slow
def test_without_a_run_a_standard_grid_is_probed(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("probe", "target.rounds=3", "profile=packed", "threads=1")
    assert answer.code == 0, answer.err
    folder = tmp_path / "probe-grid" / "probe" / "ort-cpu"
    assert len(lines(folder / "legality-packed.jsonl")) > 400
    stored = [record["key"] for record in lines(folder / "latency.jsonl")[1:]]
    assert any("int8[" in key for key in stored) and any("int4[" in key for key in stored)

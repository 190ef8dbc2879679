"""After the search: what is known is not measured again, test is read once, and a subnet is trained alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import elastibit as eb
from predictors.measuring import measure
from supernet.export.subnets import tuned

Call = Callable[..., Any]
Flow = tuple[Path, dict[str, Any]]
Small = dict[str, list[str]]
BUDGETS = "budgets=[{bitops: w4a4}, {bitops: w8a8, bytes: 6kB}]"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def found(run: Path) -> Any:
    """front.json outside its `measured` block."""
    front = read(run / "front.json")
    front["provenance"].pop("measured")
    return front


@pytest.fixture
def done(flow: Flow, tmp_path: Path) -> Path:
    """A copy of a run that went through all doors."""
    return Path(shutil.copytree(flow[0], tmp_path / "run"))


@pytest.fixture
def moved(done: Path) -> Path:
    """The same on a machine that has not the data."""
    config = yaml.safe_load((done / "config.yaml").read_text())
    config["task"]["source"] = {"_target_": "supernet.tasks.image_folder.ImageFolder", "root": str(done / "images")}
    (done / "config.yaml").write_text(yaml.safe_dump(config))
    return done


class TestReuse:
    def test_another_budget_measures_only_what_is_new(
        self, done: Path, small: Small, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = found(done)
        with monkeypatch.context() as patched:  # neither subnets nor a sensitivity
            patched.setattr("predictors.measuring.tested", None)
            patched.setattr("predictors.output_mse.OutputMSE.__call__", None)
            assert call("search", f"run={done}", *small["search"], BUDGETS).code == 0
            assert found(done) == before
        known = len((done / "measured.jsonl").read_text().splitlines())
        assert call("search", f"run={done}", *small["search"], "budgets=[{bitops: w4a4}, {bitops: w4a2}]").code == 0
        ids = [json.loads(line)["id"] for line in (done / "measured.jsonl").read_text().splitlines()]
        assert len(ids) > known and len(set(ids)) == len(ids)

    def test_without_its_data_a_run_answers_all_the_same(self, moved: Path, small: Small, call: Call) -> None:
        before = found(moved)
        answer = call("search", f"run={moved}", *small["search"], BUDGETS)
        assert answer.code == 0, answer.err
        assert found(moved) == before, "all that the search needs is known"
        answer = call("search", f"run={moved}", *small["search"], "budget.bitops=[w4a2,w4a4]")
        assert answer.code == 0, answer.err
        for subnet in read(moved / "front.json")["subnets"]:
            assert set(subnet["controls"]) >= {"uniform", "integer_program"} and 0 <= subnet["slack"]["bitops"] < 1

    def test_a_prediction_needs_no_measurement(
        self, run: Path, small: Small, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("predictors.measuring.tested", None)
        answer = call("search", f"run={run}", *small["search"], "candidates=0", "budget.bitops=w4a4")
        assert answer.code == 0, answer.err
        assert "search found nothing better by prediction" in answer.out, (
            "the sensitivity alone ranks: the program's optimum"
        )
        assert read(run / "front.json")["subnets"][0]["measured"] is None
        assert not (run / "measured.jsonl").exists() and not list((run / "subnets").glob("*.safetensors"))


class TestTest:
    def test_winners_and_controls_are_those_of_the_front(self, flow: Flow) -> None:
        run, answers = flow
        judged, loaded = read(run / "test.json"), eb.load(run)
        for subnet, said in zip(read(run / "front.json")["subnets"], judged["subnets"], strict=True):
            again = measure(loaded.net, subnet["indices"], loaded.task.recalibrate(), loaded.task.test())
            assert said["accuracy"] == again and said["controls"].keys() == subnet["controls"].keys()
            for name, control in said["controls"].items():
                assert control["id"] == subnet["controls"][name]["id"]
                gap = control["difference"]
                assert gap["mean"] == pytest.approx(said["accuracy"] - control["accuracy"])
                assert gap["low"] <= gap["mean"] <= gap["high"]
            assert f"{said['label']}: {said['verdict']}" in answers["report"].out
            assert said["verdict"] in (run / "report.html").read_text().replace("&#x27;", "'")

    def test_test_is_read_once(self, done: Path, small: Small, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        before = read(done / "test.json")
        with monkeypatch.context() as patched:
            patched.setattr("search.judging.tested", None)
            assert call("report", f"run={done}").code == 0
        assert read(done / "test.json") == before
        assert call("search", f"run={done}", *small["search"], "budget.bitops=w4a2", "candidates=0").code == 0
        assert call("report", f"run={done}").code == 0
        assert [s["label"] for s in read(done / "test.json")["subnets"]] == ["w4a2"]


class TestFinetune:
    def test_a_subnet_is_trained_exported_and_reported(
        self, done: Path, small: Small, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subnet = read(done / "front.json")["subnets"][0]
        words = [f"run={done}", "subnet=w4a4", *small["finetune"]]
        answer = call("finetune", *words)
        assert answer.code == 0, answer.err
        folder = done / "finetuned" / subnet["id"]
        assert {f.name for f in folder.iterdir()} == {"weights.safetensors", "finetuned.json", "metrics.csv"}
        record = read(folder / "finetuned.json")
        assert record["before"] == subnet["measured"] and record["epochs"] == 1 and record["label"] == "w4a4"
        run = eb.load(done)
        with torch.no_grad():
            module = tuned(run, subnet["id"])
            right = torch.cat([module(x).argmax(1) == y for x, y in run.task.select()])
        assert record["after"] == float(right.double().mean()) != record["before"]

        monkeypatch.setattr("supernet.training.finetune.train", None)  # what is done is not repeated
        assert call("finetune", *words).code == 0 and read(folder / "finetuned.json") == record
        card = done / "export" / subnet["id"] / "card.json"
        for setting, about in (("auto", {"fine-tuned epochs": 1}), ("false", {})):
            answer = call("export", f"run={done}", "subnet=w4a4", f"finetuned={setting}", *small["export"])
            assert answer.code == 0, answer.err
            assert about.items() <= read(card)["about"].items() and ("fine-tuned" in answer.out) == bool(about)
        assert "fine-tuned epochs" not in read(card)["about"]
        assert call("report", f"run={done}", "test=false").code == 0
        assert f"{record['after']:.2%}" in (done / "report.html").read_text()

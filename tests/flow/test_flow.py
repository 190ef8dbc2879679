"""Through all doors: each reads what the one before it wrote."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import elastibit as eb
from predictors.measuring import measure
from search.front import load_front
from supernet.calibration.batchnorm import recalibrate

DOORS = ("train", "predict", "search", "export", "report")
Call = Callable[..., Any]
Flow = tuple[Path, dict[str, Any]]
Small = dict[str, list[str]]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


class TestFiles:
    def test_every_stage_left_what_it_promises(self, flow: Flow) -> None:
        run, _ = flow
        names = (
            "supernet.safetensors space.json config.yaml metrics.csv pairs.jsonl predictor.safetensors predictor.json"
        )
        for name in [*names.split(), "front.json", "report.html"]:
            assert (run / name).stat().st_size > 0, name
        for found in read(run / "front.json")["subnets"]:
            for file in (
                f"subnets/{found['id']}.json",
                f"subnets/{found['id']}.safetensors",
                f"export/{found['id']}/card.json",
            ):
                assert (run / file).is_file(), file
        assert not list(run.rglob("*.part")), "drafts of atomic writes stay behind"

    def test_every_record_says_where_it_comes_from(self, flow: Flow) -> None:
        run, _ = flow
        origins = {
            "space.json": read(run / "space.json")["provenance"],
            "predictor.json": read(run / "predictor.json")["report"]["provenance"],
            "front.json": read(run / "front.json")["provenance"],
        }
        for name, origin in origins.items():
            assert origin["seed"] == 0, name
            assert torch.__version__.startswith(origin["versions"]["torch"]), name
            assert origin["measured"]["command"], name

    def test_metrics_are_of_the_one_epoch(self, flow: Flow) -> None:
        run, _ = flow
        rows = table(run / "metrics.csv")
        assert {row["epoch"] for row in rows} == {"0"}
        assert any(row["select/w8a8"] for row in rows) and any(row["train/loss"] for row in rows)


class TestPredict:
    def test_pairs_are_measured_on_select(self, flow: Flow) -> None:
        run, _ = flow
        pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
        assert len(pairs) == 24 == len({p["id"] for p in pairs})
        loaded = eb.load(run)
        some = pairs[5]
        again = measure(loaded.net, some["row"], loaded.task.recalibrate(), loaded.task.select())
        assert again == some["score"]

    def test_the_report_is_of_pairs_that_were_held_out(self, flow: Flow) -> None:
        report = read(flow[0] / "predictor.json")["report"]
        assert report["pairs"] == len(report["points"]) == 5 and report["learned_from"] == 19
        errors = [p["predicted"] - p["measured"] for p in report["points"]]
        assert report["rmse"] == pytest.approx(float(np.sqrt(np.mean(np.square(errors)))))
        assert set(report["controls"]) == {"mean bits", "cost alone", "sensitivity"}
        assert set(report["windows"]) == {"w4a4"}  # the space has no 3 bits

    def test_more_pairs_go_on_where_the_others_ended(
        self, flow: Flow, tmp_path: Path, small: Small, call: Call
    ) -> None:
        run = Path(shutil.copytree(flow[0], tmp_path / "run"))
        before = (run / "pairs.jsonl").read_bytes()
        (run / "pairs.jsonl").write_bytes(before[:-40])  # as a kill leaves it
        words = [word for word in small["predict"] if not word.startswith("n=")]
        assert call("predict", f"run={run}", "n=26", *words).code == 0
        ids = [json.loads(line)["id"] for line in (run / "pairs.jsonl").read_text().splitlines()]
        assert len(ids) == len(set(ids)) == 26
        assert {json.loads(line)["id"] for line in before.decode().splitlines()} < set(ids)


class TestSearch:
    def test_nothing_is_over_its_budget(self, flow: Flow) -> None:
        run, _ = flow
        net = eb.load(run).net
        first, second = read(run / "front.json")["subnets"]
        assert (first["label"], second["label"]) == ("w4a4", "w8a8-6kB")
        assert net.cost(first["indices"])["bitops"] <= net.cost(net.space.uniform("w4a4"))["bitops"]
        assert net.cost(second["indices"])["bytes"] <= 6000
        assert net.cost(second["indices"]) == second["costs"]

    def test_the_winner_is_no_worse_than_what_it_was_compared_with(self, flow: Flow) -> None:
        for found in read(flow[0] / "front.json")["subnets"]:
            for control in found["controls"].values():
                assert found["measured"] >= control["measured"]

    def test_what_is_stored_is_what_was_measured(self, flow: Flow) -> None:
        """The subnet's own statistics, put into the materialised subnet, give the measured accuracy on select."""
        run, _ = flow
        loaded = eb.load(run)
        for found in load_front(run / "front.json", loaded.net.space):
            subnet = loaded.net.materialise(found.config).eval()
            own = load_file(run / "subnets" / f"{found.config.id}.safetensors")
            _, unexpected = subnet.load_state_dict(own, strict=False)
            assert not unexpected and own
            with torch.no_grad():
                right = [(subnet(x).argmax(1) == y).double() for x, y in loaded.task.select()]
            assert float(torch.cat(right).mean()) == found.measured

    def test_the_statistics_are_those_of_the_subnet_alone(self, flow: Flow) -> None:
        run, _ = flow
        loaded = eb.load(run)
        found = load_front(run / "front.json", loaded.net.space)[0]
        subnet = loaded.net.materialise(found.config)
        recalibrate(subnet, loaded.task.recalibrate())
        state = subnet.state_dict()
        own = load_file(run / "subnets" / f"{found.config.id}.safetensors")
        assert all(torch.equal(state[name], value) for name, value in own.items())
        assert {n for n in state if n.endswith("running_var")} == {n for n in own if n.endswith("running_var")}

    def test_the_layers_of_the_record_are_its_genes(self, flow: Flow) -> None:
        run, _ = flow
        found = read(run / "front.json")["subnets"][0]
        record = read(run / "subnets" / f"{found['id']}.json")
        assert (
            sum(layer["macs"] * layer["weight_bits"] * layer["input_bits"] for layer in record["layers"])
            == found["costs"]["bitops"]
        )
        for layer in record["layers"]:
            assert record["genes"][f"{layer['name']}.weight"]["format"]["bits"] == layer["weight_bits"]

    def test_the_table_names_every_budget(self, flow: Flow) -> None:
        out = flow[1]["search"].out
        assert "w4a4" in out and "w8a8-6kB" in out and "best uniform" in out

    def test_another_search_replaces_the_winners_and_repeats_itself(
        self, flow: Flow, tmp_path: Path, small: Small, call: Call
    ) -> None:
        fronts = []
        for name in ("one", "two"):
            run = Path(shutil.copytree(flow[0], tmp_path / name))
            torch.rand(7)  # whatever the global generators do in between
            assert call("search", f"run={run}", *small["search"], "budget.bitops=[w4a2,2.5M]").code == 0
            front = read(run / "front.json")
            assert {f.stem for f in (run / "subnets").iterdir()} == {s["id"] for s in front["subnets"]}
            front["provenance"].pop("measured")
            fronts.append(front)
        assert fronts[0] == fronts[1]
        assert [s["label"] for s in fronts[0]["subnets"]] == ["w4a2", "2.5M"]


class TestShortPath:
    def test_without_training_and_without_pairs(self, tmp_path: Path, small: Small, call: Call) -> None:
        run = tmp_path / "short"
        assert call("train", *small["train"], "epochs=0", f"run={run}").code == 0
        answer = call("search", f"run={run}", *small["search"], "budget.bitops=w4a4", "candidates=1")
        assert answer.code == 0, answer.err
        found = read(run / "front.json")["subnets"][0]
        assert found["predicted"]["std"] == 0 and found["measured"] is not None
        assert not (run / "pairs.jsonl").exists()
        assert call("report", f"run={run}").code == 0
        assert "The supernet was calibrated and not trained." in (run / "report.html").read_text()


class TestDemo:
    def test_it_goes_the_whole_way_and_replaces_an_earlier_one(self, tmp_path: Path, small: Small, call: Call) -> None:
        run = tmp_path / "demo, the second"
        old = run / "export" / "0123456789" / "card.json"
        old.parent.mkdir(parents=True)
        for file in (old, run / "demo.json", run / "pairs.jsonl"):
            file.write_text("{}")

        def listed(verb: str, *words: str) -> str:
            own = [word for word in [*small[verb], *words] if not word.startswith("threads=")]
            return f"{verb}=[{','.join(repr(word) for word in own)}]"

        search = listed("search", "budget.bitops=[w4a2,w4a4]", "candidates=1")
        stages = [listed("train", "epochs=1"), listed("predict", "n=10"), search]
        answer = call("demo", f"run='{run}'", *stages, "threads=1", "seed=3")
        assert answer.code == 0, answer.err
        assert [line.split()[2] for line in answer.out.splitlines() if line.startswith("[")] == list(DOORS)
        assert not old.exists()
        assert len(list((run / "export").iterdir())) == len({s["id"] for s in read(run / "front.json")["subnets"]})
        assert read(run / "space.json")["provenance"]["seed"] == read(run / "front.json")["provenance"]["seed"] == 3
        assert str(run / "report.html") in answer.out.splitlines()[-1] and (run / "report.html").is_file()


class TestSweep:
    def test_jobs_read_one_run_and_write_apart(self, run: Path, small: Small, call: Call) -> None:
        answer = call(
            "search", f"run={run}", *small["search"], "candidates=1", "generations=1", "-m", "budget.bitops=w4a4,w8a8"
        )
        assert answer.code == 0, answer.err
        assert not (run / "front.json").exists()
        labels = [read(run / job / "front.json")["subnets"][0]["label"] for job in ("0", "1")]
        assert labels == ["w4a4", "w8a8"]


class TestResume:
    def test_a_run_killed_after_an_epoch_ends_like_one_that_was_not(
        self, tmp_path: Path, small: Small, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from supernet.training.module import SupernetModule

        assert call("train", *small["train"], "epochs=2", f"run={tmp_path / 'straight'}").code == 0
        step = SupernetModule.training_step

        def killed(self: SupernetModule, batch: Any, batch_idx: int) -> None:
            if self.current_epoch == 1 and batch_idx == 3:
                raise KeyboardInterrupt
            step(self, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(SupernetModule, "training_step", killed)
            assert call("train", *small["train"], "epochs=2", f"run={tmp_path / 'resumed'}").code == 130
        assert read(tmp_path / "resumed" / "space.json")["epochs"] == 0
        with monkeypatch.context() as patched:  # what `compile=auto` chose at the start is kept
            patched.setattr("supernet.elastic.compiling.choose", None)
            assert call("train", f"run={tmp_path / 'resumed'}", "resume=true").code == 0
        kept = [OmegaConf.load(tmp_path / name / "config.yaml").compile for name in ("straight", "resumed")]
        assert kept == ["off", "off"]
        one, two = (load_file(tmp_path / name / "supernet.safetensors") for name in ("straight", "resumed"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        spaces = [read(tmp_path / name / "space.json") for name in ("straight", "resumed")]
        for space in spaces:
            space["provenance"].pop("measured")
        assert spaces[0] == spaces[1]
        tables = [table(tmp_path / name / "metrics.csv") for name in ("straight", "resumed")]
        assert tables[0] == tables[1]

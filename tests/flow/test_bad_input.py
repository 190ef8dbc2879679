"""What users do wrong is one line that says what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import elastibit as eb
from supernet.run import save

Call = Callable[..., Any]
Small = dict[str, list[str]]


def refused(answer: Any, *parts: str) -> str:
    """The one line of a refusal, which holds all `parts`."""
    lines = [line for line in answer.err.splitlines() if line.startswith("elastibit: ")]
    assert answer.code == 2, answer.err
    assert len(lines) == 1 and "Traceback" not in answer.err, answer.err
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestSettings:
    @pytest.mark.parametrize("verb", ["train", "predict", "probe", "search", "finetune", "export", "report", "demo"])
    def test_an_unknown_override(self, verb: str, tmp_path: Path, call: Call) -> None:
        refused(call(verb, f"run={tmp_path / 'a'}", "sede=3"), "sede", "did you mean seed", f"elastibit {verb} --help")
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize(
        ("verb", "word"),
        [
            *(
                (verb, word)
                for verb in ("predict", "search", "export", "report")
                for word in ("task=digits", "backbone=timm")
            ),
            ("search", "backbone.depth=20"),
            ("search", "task.batch_size=4"),
            ("predict", "epochs=3"),
        ],
    )
    def test_what_training_fixed(self, verb: str, word: str, run: Path, call: Call) -> None:
        before = files(run)
        refused(call(verb, f"run={run}", word), word.split("=")[0], "fixed by `elastibit train`")
        assert files(run) == before

    def test_other_settings_for_a_resumed_run(self, run: Path, call: Call) -> None:
        refused(call("train", f"run={run}", "resume=true", "epochs=9"), "keeps the settings", "epochs=9")

    def test_a_run_is_not_overwritten_unasked(self, run: Path, call: Call, small: Small) -> None:
        before = files(run)
        refused(
            call("train", *small["train"], f"run={run}"), "already holds a supernet", "resume=true", "overwrite=true"
        )
        assert files(run) == before

    def test_debug_shows_where(self, tmp_path: Path, call: Call) -> None:
        answer = call("predict", f"run={tmp_path / 'none'}", "--debug")
        assert answer.code == 2
        assert "Traceback" in answer.err and "in load" in answer.err
        assert answer.err.splitlines()[-1].startswith("elastibit: ")


class TestBudgets:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["budget.bitops=1k"], ["no subnet has bitops <= 1 kBitOps", "the smallest reaches"]),
            (["budget.bytes=3B", "budget.bitops=w8a8"], ["bytes <= 3 B", "the nearest has", "kB", "times the limit"]),
            (["budget.accuracy=88"], ["a share between 0 and 1", "got 88"]),
            (["budget.bitops=w8a8", "tie=[shortcut]"], ["tie is a list of shortcuts", "got 'shortcut'"]),
            (["budget.bitops=w8a8", "pin=[nothing:8]"], ["pin 'nothing': 8 pins nothing"]),
            (["budget=w3a3"], ["names its kind", "budget.bitops=w4a4", "'w3a3'"]),
            (["budgets=[w3a3]"], ["names its kind", "budgets=[{bitops: w4a4}]"]),
            (["budget.energy=3"], ["budget.energy"]),
            (["budgets=[{energy: 3}]"], ["energy", "bitops, bitops_first_last_8, bitops_inner, bytes, macs"]),
            ([], ["neither was given", "budget.bitops=[w3a3,w4a4]"]),
            (["budget.bitops=w4a4", "budgets=[{bytes: 6kB}]"], ["both were given"]),
            (
                ["budget.bitops=[w4a4,w8a8]", "budget.bytes=[1kB,2kB,3kB]"],
                ["budget.bitops has 2", "budget.bytes has 3"],
            ),
            (["budget.bitops=w5a5"], ["5-bit", "[2, 4, 8]"]),
            (["budget.bytes=3s"], ["number with SI prefix in B", "'3s'"]),
            (["budget.bitops=w4a4", "rank_by=oracle"], ["auto, run, additive", "'oracle'"]),
            (["budget.bitops=w4a4", "rank_by=run"], ["no predictor", "elastibit predict"]),
            (["budget.bitops=w4a4", "candidates=-1"], ["candidates", "at least 0", "-1"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_are_refused_before_anything_is_written(
        self, words: list[str], parts: list[str], run: Path, call: Call
    ) -> None:
        before = files(run)
        refused(call("search", f"run={run}", *words), *parts)
        assert files(run) == before

    def test_the_nearest_reachable_value_is_one(self, run: Path, call: Call) -> None:
        line = refused(call("search", f"run={run}", "budget.bitops=1k"), "the smallest reaches")
        net = eb.load(run).net
        smallest = net.cost(net.space.smallest())["bitops"]
        assert f"{smallest / 1e3:.4g} kBitOps" in line


class TestRuns:
    @pytest.mark.parametrize("verb", ["predict", "probe", "search", "finetune", "export", "report"])
    def test_a_folder_that_is_none(self, verb: str, tmp_path: Path, call: Call) -> None:
        words = ["budget.bitops=w4a4"] if verb == "search" else []
        refused(call(verb, f"run={tmp_path / 'none'}", *words), "not a run directory", "space.json")
        assert files(tmp_path) == {}

    def test_weights_of_another_space(self, run: Path, tmp_path: Path, call: Call) -> None:
        mine = json.loads((run / "space.json").read_text())["fingerprint"]
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 10))
        other = eb.SuperNet(model, torch.zeros(1, 1, 8, 8))
        save(other, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "supernet.safetensors", run / "supernet.safetensors")
        refused(call("predict", f"run={run}"), mine, other.fingerprint)

    def test_files_of_another_space(self, run: Path, call: Call) -> None:
        mine = json.loads((run / "space.json").read_text())["fingerprint"]
        record = {"fingerprint": "0123456789abcdef", "id": "x", "row": [], "score": 0.0, "halves": [0, 0], "costs": {}}
        (run / "pairs.jsonl").write_text(json.dumps(record | {"weights": "", "images": {}}) + "\n")
        refused(call("predict", f"run={run}"), "0123456789abcdef", mine)
        (run / "front.json").write_text(json.dumps({"fingerprint": "0123456789abcdef"}))
        refused(call("report", f"run={run}"), "0123456789abcdef", mine)
        assert not (run / "report.html").exists()

    def test_a_predictor_of_other_weights(self, flow: Any, trained: Path, tmp_path: Path, call: Call) -> None:
        run = Path(shutil.copytree(flow[0], tmp_path / "run"))
        record = json.loads((run / "predictor.json").read_text())
        learned = record["report"]["weights"]
        record["report"]["weights"] = "f" * 16
        (run / "predictor.json").write_text(json.dumps(record))
        before = files(run)
        refused(call("search", f"run={run}", "budget.bitops=w4a4"), "f" * 16, learned, "rank_by=additive")
        assert files(run) == before

    @pytest.mark.parametrize("name", ["supernet.safetensors", "space.json", "config.yaml"])
    def test_a_truncated_file(self, name: str, run: Path, call: Call) -> None:
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[: len(whole) // 2] + (b": [" if name == "config.yaml" else b""))
        refused(call("predict", f"run={run}"), name)

    def test_a_truncated_checkpoint(self, run: Path, call: Call) -> None:
        checkpoint = run / "checkpoints" / "last.ckpt"
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
        before = files(run)
        refused(call("train", f"run={run}", "resume=true"), "last.ckpt cannot be read", "delete it")
        assert (run / "supernet.safetensors").exists() and files(run).keys() == before.keys()

    def test_a_broken_line_of_pairs(self, run: Path, call: Call) -> None:
        (run / "pairs.jsonl").write_text('{"id": "a"\n{"id": "b"}\n')
        refused(call("predict", f"run={run}"), "pairs.jsonl: line 1", "delete that line")

    def test_a_hostile_config(self, run: Path, tmp_path: Path, call: Call) -> None:
        proof = tmp_path / "owned"
        for target in ("os.system", "supernet.config.importlib.import_module", "supernet.desk.os.system"):
            config = yaml.safe_load((run / "config.yaml").read_text())
            config["task"] = {"_target_": target, "command": f"touch {proof}"}
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            refused(call("predict", f"run={run}"), target)
        (run / "config.yaml").write_text(f"task: !!python/object/apply:os.system ['touch {proof}']\n")
        for verb in ("predict", "report"):
            answer = call(verb, f"run={run}")
            assert answer.code == 2 and "Traceback" not in answer.err
        assert not proof.exists()

    def test_a_factory_that_the_run_names_is_not_called_unasked(self, run: Path, call: Call) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["backbone"] = {"_target_": "supernet.backbones.python.from_factory", "factory": "os:getcwd"}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        for words in (["predict"], ["train", "resume=true"]):
            refused(call(*words, f"run={run}"), "os:getcwd", "trust=[os:getcwd]")


class TestDataAndModels:
    def image_folder(self, root: Path) -> list[str]:
        return ["task=image_folder", f"task.source.root={root}", "task.batch_size=4", "threads=1"]

    def test_images_of_mixed_sizes(
        self, write_images: Callable[..., Path], tmp_path: Path, call: Call, small: Small
    ) -> None:
        root = write_images({"train": 8, "test": 4})
        odd = next((root / "train").rglob("*.png"))
        Image.new("RGB", (9, 7)).save(odd)
        answer = call(
            "train", "backbone.depth=8", "backbone.min_depth=null", *self.image_folder(root), f"run={tmp_path / 'a'}"
        )
        refused(answer, odd.name, "size")
        assert files(tmp_path / "a") == {}

    def test_an_empty_class(self, write_images: Callable[..., Path], tmp_path: Path, call: Call) -> None:
        root = write_images({"train": 8, "test": 4})
        (root / "train" / "emu").mkdir()
        refused(call("train", *self.image_folder(root), f"run={tmp_path / 'a'}"), "emu")
        assert files(tmp_path / "a") == {}

    def test_a_model_with_nothing_to_quantize(
        self, tmp_path: Path, call: Call, small: Small, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "bare.py").write_text("from torch import nn\ndef make():\n    return nn.Flatten()\n")
        monkeypatch.chdir(tmp_path)
        words = ["task=digits", "backbone=python", "backbone.factory=bare:make", "threads=1", f"run={tmp_path / 'a'}"]
        refused(call("train", *words), "Flatten has nothing to quantize", "nn.Conv2d or nn.Linear")
        assert files(tmp_path / "a") == {}

    def test_a_loss_that_is_no_number(self, tmp_path: Path, call: Call, small: Small) -> None:
        words = [*small["train"], "epochs=1", "schedule.lr=1e12", "schedule.clip=0", "schedule.warmup=0"]
        answer = call("train", *words, f"run={tmp_path / 'a'}")
        refused(answer, "the loss became", "at step", "lower schedule.lr")
        assert json.loads((tmp_path / "a" / "space.json").read_text())["epochs"] == 0
        assert not list((tmp_path / "a").rglob("*.part"))

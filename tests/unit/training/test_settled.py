"""What training leaves of a sampler that ends at one subnet."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supernet.artefacts import load_tensors, read_json
from supernet.elastic.supernet import SuperNet
from supernet.export.subnets import chosen
from supernet.samplers.fliqs import Fliqs
from supernet.training.fit import train
from supernet.training.losses import Plain


def run(net: SuperNet, task: Any, out: Path, resume: bool = False) -> Fliqs:
    sampler = Fliqs(net.space, net.costs, target="w4a4", learning_rate=0.5, delay=0.0)
    options: dict[str, Any] = {"subnets": 1, "validation": (), "seed": 1, "resume": resume}
    train(net, task, out=out, epochs=4, sampler=sampler, losses=Plain(), **options)
    return sampler


def test_the_settled_subnet_is_written_as_export_reads_it(net: SuperNet, spots: Any, tmp_path: Path) -> None:
    sampler = run(net, spots(), tmp_path)
    found = read_json(tmp_path / "settled.json")
    config = net.space.config(sampler.settled())
    assert found["id"] == config.id and found["genes"] == config.plain()
    assert found["costs"]["bitops"] / net.cost(net.space.uniform("w4a4"))["bitops"] == pytest.approx(
        found["figures"]["bitops_of_target"]
    )
    assert found["figures"]["entropy"] == sampler.controller.entropy
    files = SimpleNamespace(path=tmp_path, net=net, task=None)
    (record,) = chosen(files, str(tmp_path / "settled.json"))  # type: ignore[arg-type]
    assert record["indices"] == list(config.row)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["train/entropy"]) > 0 and float(last["train/bitops_of_target"]) > 0


def test_resumed_it_settles_on_the_same(net: SuperNet, another: Any, spots: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(net, spots(), one)
    with pytest.raises(RuntimeError, match="killed"):
        run(another(), spots(fail_at=(2, 1)), two)
    assert not (two / "settled.json").exists()
    run(another(), spots(), two, resume=True)
    assert read_json(one / "settled.json") == read_json(two / "settled.json")
    left, right = (load_tensors(out / "supernet.safetensors")[0] for out in (one, two))
    assert all((left[name] == right[name]).all() for name in left)

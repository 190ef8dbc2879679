"""benchmarks/gpu.py: all its parts on a small network on the CPU, and what a short time leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.timing import autocast, device
from supernet.artefacts import read_json

TRY = ["--device", "cpu", "--tiny"]


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "gpu.json"
    code = gpu.main([*TRY, *words, "--json", str(out)])
    return code, read_json(out)


class TestRun:
    def test_takes_every_figure(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, found = run(tmp_path, "--variants", "bf16.eager,ours.off")
        assert code == 0 and not found["failed"] and not found["skipped"]
        assert found["rounds"] == gpu.TINY.rounds and set(found["profiles"]) == {"bf16.eager", "ours.off"}
        ours, base = found["variants"]["ours.off"], found["variants"]["bf16.eager"]
        ratio = ours["step"]["value"] / base["step"]["value"]
        assert ours["step"]["ratio"]["value"] == pytest.approx(ratio) and ours["sandwich"]["value"] > 0
        assert ours["images_per_second"] == pytest.approx(gpu.TINY.batch / ours["step"]["value"])
        assert ours["memory"]["value"] > base["memory"]["value"] > 0
        share = found["operations"] / base["step"]["value"] / 1e12 / found["ceilings"]["tflops"]
        assert base["share_of_product"] == pytest.approx(share)
        assert "tiny" in found["judged"] and {goal["met"] for goal in found["goals"]} == {None}
        assert "| ours.off |" in capsys.readouterr().out

    def test_what_there_is_no_time_for_is_skipped_and_listed(self, tmp_path: Path) -> None:
        code, found = run(tmp_path, "--variants", "bf16.eager,ours.off", "--minutes", "0")
        assert code == 1 and found["variants"] == {}
        assert found["skipped"] == ["ceilings", "bf16.eager", "ours.off", "rounds"]

    def test_a_part_that_fails_costs_no_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr(autocast, "our_side", broken)
        code, found = run(tmp_path, "--variants", "bf16.eager,ours.off")
        assert code == 0 and found["failed"] == {"ours.off": "RuntimeError: out of memory"}
        assert found["rounds"] == gpu.TINY.rounds and set(found["variants"]) == {"bf16.eager"}

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    # Torch keeps this warning about what it does itself from users by a hook that a filter of errors does not reach.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_counts_graphs_and_bytes_of_what_is_compiled(self, tmp_path: Path) -> None:
        _, found = run(tmp_path, "--variants", "bf16.compiled,ours.whole,ours.regional", "--minutes", "14")
        assert not found["failed"]
        assert [found["variants"][name]["new_graphs"]["value"] for name in ("ours.whole", "ours.regional")] == [0, 0]
        assert set(found["bytes"]) == {"bf16.compiled", "ours.whole"}
        assert found["bytes"]["ours.whole"] > found["bytes"]["bf16.compiled"] > 0
        assert {goal["value"] is None for goal in found["goals"]} == {False}

    def test_leaves_the_settings_as_they_were(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
        before = torch.backends.cudnn.benchmark
        with gpu.settings():
            assert torch.backends.cudnn.benchmark and gpu.os.environ["TORCHINDUCTOR_CACHE_DIR"] != "mine"
        assert torch.backends.cudnn.benchmark == before and gpu.os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


class TestOptions:
    def test_without_the_device_one_line_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 2
        said = capsys.readouterr().err
        assert "CUDA" in said and said.count("\n") == 1 and not (tmp_path / "gpu.json").exists()

    def test_the_processor_is_for_trying_out_only(self) -> None:
        with pytest.raises(SystemExit) as caught:
            gpu.parsed(["--device", "cpu"])
        assert caught.value.code == 2


class TestDevice:
    def test_operations_are_those_of_forward_and_backward(self) -> None:
        """A linear layer needs 2 n m operations for each image forward, and as many for each of its two gradients."""
        x = torch.randn(4, 5, requires_grad=True)
        layer = torch.nn.Linear(5, 3, bias=False)

        def train(_: int) -> torch.Tensor:
            loss = layer(x).sum()
            loss.backward()
            return loss

        one = autocast.Side(layer, [torch.optim.SGD(layer.parameters(), lr=0.1)], (x, x), train)
        assert device.operations(one) == 3 * 2 * 4 * 5 * 3
        assert layer.weight.grad is None

    def test_a_step_of_ours_draws_a_configuration_for_each_subnet(self) -> None:
        one = autocast.side("ours.off", gpu.TINY, "cpu", 0)
        net, bound = one.module, []
        bind = net._bind
        net._bind = lambda row: (bound.append(tuple(row.tolist())), bind(row))  # type: ignore[assignment]
        one.step()
        assert len(bound) == 1
        bound.clear()
        one.step(4)
        assert len(bound) == len(set(bound)) == 4

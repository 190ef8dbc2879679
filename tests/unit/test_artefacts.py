"""Files survive a kill at any byte, say what is wrong in one line, and equal content gives equal bytes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from supernet import artefacts
from supernet.artefacts import (
    append_jsonl,
    command,
    load_tensors,
    progress,
    provenance,
    read_json,
    read_jsonl,
    save_tensors,
    write_bytes,
    write_json,
    write_text,
)

RECORDS = [{"id": "a", "accuracy": 0.5}, {"id": "bé", "bits": [2, 3]}, {"id": "c", "note": "line\nend"}]
TENSORS = {
    "float": torch.tensor([[1.5, -0.0], [float("inf"), 2**-149]]),
    "transposed": torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
    "half": torch.tensor([1.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 3, dtype=torch.uint8),
}


class TestWholeFiles:
    def test_json_comes_back_with_numbers_in_place_of_numpy(self, tmp_path: Path) -> None:
        write_json(
            tmp_path / "new" / "a.json", {"x": np.float32(0.5), "y": np.arange(3), "z": tmp_path / "é", "n": None}
        )
        assert read_json(tmp_path / "new" / "a.json") == {
            "x": 0.5,
            "y": [0, 1, 2],
            "z": (tmp_path / "é").as_posix(),
            "n": None,
        }

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        write_text(path, "old")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "new and longer")
        assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "old")]

    def test_a_reader_never_sees_a_part(self, tmp_path: Path) -> None:
        path = tmp_path / "a.bin"
        sizes = [10, 3_000_000]
        script = f"""
            from supernet.artefacts import write_bytes
            while True:
                for size in {sizes}:
                    write_bytes({str(path)!r}, bytes(size))
        """
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
        try:
            until = time.monotonic() + 10
            while not path.exists() and time.monotonic() < until:
                time.sleep(0.01)
            seen = {len(path.read_bytes()) for _ in range(100)}
        finally:
            writer.kill()  # in the middle of something
            writer.wait()
        assert seen <= set(sizes)
        assert path.stat().st_size in sizes

    def test_files_are_readable_for_whom_the_umask_allows(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            write_bytes(tmp_path / "a", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), [1.0, float("-inf")]], ids=str)
    def test_numbers_that_json_does_not_have_are_refused(self, tmp_path: Path, value: object) -> None:
        with pytest.raises(ValueError, match=r"a\.json: .*None"):
            write_json(tmp_path / "a.json", {"x": value})
        assert not list(tmp_path.iterdir())

    def test_values_without_json_form_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="set has no JSON form"):
            write_json(tmp_path / "a.json", {"x": {1}})

    def test_cut_json_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"x": [1, 2')
        with pytest.raises(ValueError, match=r"a\.json is not valid JSON .* run its stage again") as caught:
            read_json(tmp_path / "a.json")
        assert "\n" not in str(caught.value)


class TestLines:
    def test_a_kill_at_any_byte_loses_at_most_the_last_record(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = tmp_path / "whole.jsonl"
        ends = [0]
        for record in RECORDS:
            append_jsonl(whole, record)
            ends.append(whole.stat().st_size)
        content = whole.read_bytes()
        for cut in range(len(content) + 1):
            path = tmp_path / "cut.jsonl"
            path.write_bytes(content[:cut])
            complete = sum(end <= cut for end in ends[1:])
            caplog.clear()
            assert read_jsonl(path) == RECORDS[:complete]
            assert ("incomplete" in caplog.text) == (cut not in ends)
            append_jsonl(path, {"id": "new"})
            assert read_jsonl(path) == [*RECORDS[:complete], {"id": "new"}]

    def test_a_long_incomplete_line_is_cut_off_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        for kept in (b"", b'{"id": 1}\n'):
            path.write_bytes(kept + b'{"x": "' + b"y" * 10_000)
            append_jsonl(path, {"id": 2})
            assert path.read_bytes() == kept + b'{"id": 2}\n'

    @pytest.mark.parametrize("broken", [b'{"id": ', b"", b"[1]", b"\xff", b'{"a": 1}{"b": 2}'], ids=repr)
    def test_a_broken_line_in_the_middle_is_named(self, tmp_path: Path, broken: bytes) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(b'{"id": 1}\n' + broken + b'\n{"id": 3}\n')
        with pytest.raises(ValueError, match=r"pairs\.jsonl: line 2 .*delete that line") as caught:
            read_jsonl(path)
        assert "\n" not in str(caught.value)

    def test_a_record_that_cannot_be_written_leaves_the_file_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        append_jsonl(path, {"x": 1})
        with pytest.raises(ValueError, match="None"):
            append_jsonl(path, {"x": float("nan")})
        assert read_jsonl(path) == [{"x": 1}]


class TestTensors:
    def test_every_bit_comes_back(self, tmp_path: Path) -> None:
        save_tensors(tmp_path / "a.safetensors", TENSORS, {"fingerprint": "12ab", "bits": [2, 8]})
        tensors, metadata = load_tensors(tmp_path / "a.safetensors")
        assert metadata == {"fingerprint": "12ab", "bits": [2, 8]}
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
        assert torch.signbit(tensors["float"][0, 1])

    def test_equal_content_gives_equal_bytes(self, tmp_path: Path) -> None:
        names = list(TENSORS)
        for order in (names, names[::-1], names[2:] + names[:2]):
            save_tensors(tmp_path / f"{order[0]}", {n: TENSORS[n] for n in order}, {n: n for n in names})
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1

    def test_shared_memory_and_gradients_are_stored_as_values(self, tmp_path: Path) -> None:
        weight = torch.nn.Parameter(torch.ones(4))
        save_tensors(tmp_path / "a", {"a": weight, "b": weight, "c": weight[1:3]})
        tensors, metadata = load_tensors(tmp_path / "a")
        assert metadata == {}
        assert [tensors[name].tolist() for name in "abc"] == [[1.0] * 4, [1.0] * 4, [1.0] * 2]
        assert not tensors["a"].requires_grad

    def test_files_of_others_can_be_read(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2)}, tmp_path / "a", {"format": "pt"})
        assert load_tensors(tmp_path / "a")[1] == {}

    def test_a_truncated_file_is_one_line_at_any_length(self, tmp_path: Path) -> None:
        save_tensors(tmp_path / "whole", TENSORS, {"a": 1})
        content = (tmp_path / "whole").read_bytes()
        path = tmp_path / "cut.safetensors"
        for length in [0, 1, 7, 8, 9, 50, len(content) // 2, len(content) - 1]:
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"cut\.safetensors is truncated or .* run its stage again") as caught:
                load_tensors(path)
            assert "\n" not in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no tensor file at .*a\.safetensors"):
            load_tensors(tmp_path / "a.safetensors")


class TestProvenance:
    def test_what_equal_runs_share_stands_outside_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = provenance(3)
        monkeypatch.setattr(sys, "argv", ["elsewhere", "resume=true"])
        second = provenance(3)
        assert first.pop("measured")["command"] != second.pop("measured")["command"]
        assert first == second
        assert first["seed"] == 3
        assert first["versions"]["torch"] == torch.__version__.split("+")[0]
        assert first["versions"]["numpy"] == np.__version__

    def test_what_was_measured(self) -> None:
        measured = provenance(None)["measured"]
        assert measured["threads"] == torch.get_num_threads()
        assert measured["cpu"]
        assert measured["date"].endswith("+00:00")
        assert os.uname().nodename not in json.dumps(measured["cpu"])

    def test_command_shows_no_folders_of_the_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home = tmp_path / "home" / "ada"
        (home / "project").mkdir(parents=True)
        monkeypatch.chdir(home / "project")
        monkeypatch.setenv("HOME", str(home))
        argv = [
            "/opt/venv/bin/elastibit",
            "search",
            f"run={home}/project/runs/a",
            "budget.bitops=[w3a3,2.5M]",
            f"data={home}/images",
            "files=[/data/one.npz,/data/two.npz]",
            "rate=1/3",
            f"here={home}/project",
        ]
        assert command(argv) == (
            "elastibit search run=runs/a 'budget.bitops=[w3a3,2.5M]' 'data=~/images'"
            " 'files=[.../one.npz,.../two.npz]' rate=1/3 here=."
        )

    def test_command_of_a_module(self) -> None:
        root = Path(artefacts.__file__).parent
        assert command([str(root / "__main__.py"), "a=1"]) == "python -m supernet a=1"
        assert command([str(root / "export" / "__main__.py")]) == "python -m supernet.export"

    def test_command_of_an_interpreter(self) -> None:
        assert command([""]) == "python"


class TestProgress:
    def test_lines_are_rare_and_hold_an_estimate(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = 0.0
        monkeypatch.setattr(artefacts.time, "monotonic", lambda: now)
        with progress("collect", 60) as bar:
            for step in range(60):
                now += 0.5
                bar.advance(note=f"best {step}" if step % 2 == 0 else None)
        assert capsys.readouterr().err.splitlines() == [
            "collect 20/60, 0:10, 0:20 left, best 18",
            "collect 40/60, 0:20, 0:10 left, best 38",
            "collect 60/60, 0:30, best 58",
        ]

    def test_what_a_resumed_part_finds_done_shortens_no_estimate_for_long(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = 0.0
        monkeypatch.setattr(artefacts.time, "monotonic", lambda: now)
        with progress("measuring", 1000) as bar:
            bar.advance(900)
            for _ in range(60):
                now += 2.0
                bar.advance()
        assert capsys.readouterr().err.splitlines()[-1] == "measuring 960/1000, 2:00, 1:20 left"

    def test_short_parts_are_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("blink") as bar:
            bar.advance(5)
        assert capsys.readouterr() == ("", "")

    def test_a_terminal_gets_a_bar_with_the_note_also_inside_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("TERM", "xterm")
        with progress("outer", 2) as outer:
            with progress("inner", 3) as inner:
                inner.advance(3, note="best [w3a3] 91.2")
            assert len(artefacts._on_screen[0].tasks) == 1
            outer.advance()
        assert not artefacts._on_screen
        shown = screen.getvalue()
        assert "3/3" in shown
        assert "1/2" in shown
        assert "best [w3a3] 91.2" in shown

    def test_an_error_inside_comes_out(self) -> None:
        with pytest.raises(ValueError, match="inside"), progress("x", 2):
            raise ValueError("inside")


def test_import_takes_no_torch() -> None:
    script = "import supernet.artefacts, sys; assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)

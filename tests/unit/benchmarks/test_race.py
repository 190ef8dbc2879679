"""Worker processes, their rounds, and the peers' environments."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.timing import peers
from benchmarks.timing.contestants import (
    STEP,
)
from benchmarks.timing.protocol import Answer, Worker, WorkerError
from benchmarks.timing.race import Terms, rounds

ROOT = Path(__file__).resolve().parents[3]


FAKE = """
import os, sys, time
from benchmarks.timing.protocol import serve
def build():
    print("a library says something")
    os.system("echo and a program that it runs too")
    if sys.argv[1] == "broken":
        raise ValueError("no such\\n   variant")
    state = []
    def step():
        print("more noise")
        state.append(0)
        return {"seconds": float(len(state)), "loss": 0.5}
    def fail():
        raise RuntimeError("out of luck")
    def die():
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)
    def sleep():
        time.sleep(60)
    return {"who": "fake"}, {
        "step": step, "fail": fail, "die": die, "sleep": sleep, "nan": lambda: {"seconds": 1.0, "loss": float("nan")}
    }
sys.exit(serve(build))
"""


class TestProtocol:
    def fake(self, tmp_path: Path, *words: str) -> Worker:
        program = tmp_path / "fake.py"
        program.write_text(FAKE)
        command = [sys.executable, str(program), *(words or ("whole",))]
        return Worker(command, {"PYTHONPATH": str(ROOT)}, tmp_path / "logs" / "fake.log")

    def test_one_line_asks_and_one_line_answers(self, tmp_path: Path) -> None:
        with self.fake(tmp_path) as worker:
            assert worker.ready(60) == {"ready": True, "who": "fake"}
            assert [worker.ask("step", 60)["seconds"] for _ in range(3)] == [1.0, 2.0, 3.0]
        assert worker.process.returncode == 0
        log = worker.log.read_text()
        assert "a library says something" in log and "and a program" in log

    @pytest.mark.parametrize(
        ("word", "reason"),
        [
            ("fail", "RuntimeError: out of luck"),
            ("unknown", "KeyError: 'unknown'"),
            ("die", "ended with code 7: last words"),
            ("nan", "loss of 'nan' became nan"),
        ],
    )
    def test_a_failure_is_one_line_that_says_why(self, tmp_path: Path, word: str, reason: str) -> None:
        with self.fake(tmp_path) as worker:
            worker.ready(60)
            with pytest.raises(WorkerError) as caught:
                worker.ask(word, 60)
        assert reason in str(caught.value) and "\n" not in str(caught.value)

    def test_a_worker_that_cannot_be_built_says_so(self, tmp_path: Path) -> None:
        with (
            self.fake(tmp_path, "broken") as worker,
            pytest.raises(WorkerError, match=r"^ValueError: no such variant$"),
        ):
            worker.ready(60)
        assert worker.process.returncode == 1

    def test_a_worker_that_has_ended_is_noticed(self, tmp_path: Path) -> None:
        with self.fake(tmp_path) as worker:
            worker.ready(60)
            worker.process.kill()
            worker.process.wait()
            with pytest.raises(WorkerError, match="ended with code -9"):
                worker.ask("step", 60)

    def test_silence_is_not_waited_for_for_ever(self, tmp_path: Path) -> None:
        with self.fake(tmp_path) as worker:
            worker.ready(60)
            start = time.monotonic()
            with pytest.raises(WorkerError, match="no answer within 0 s"):
                worker.ask("sleep", 0.2)
            assert time.monotonic() - start < 30
            worker.process.kill()


class Scripted:
    """A worker that answers from memory and writes down who was asked when; it fails on the n-th word."""

    def __init__(self, name: str, asked: list[tuple[str, str]], fails_at: int | None = None) -> None:
        self.name, self.asked, self.fails_at, self.count = name, asked, fails_at, 0

    def ask(self, word: str, timeout: float) -> Answer:
        self.count += 1
        if self.count == self.fails_at:
            raise WorkerError("it broke")
        self.asked.append((self.name, word))
        return {"seconds": float(self.count)}


def terms(tmp_path: Path, **changes: Any) -> Terms:
    usual = {"rounds": 6, "seed": 0, "threads": 1, "measures": (STEP,), "work": tmp_path, "cache": tmp_path}
    return Terms(**usual | changes)


class TestRounds:
    def run(self, tmp_path: Path, fails_at: int | None = None, **changes: Any) -> Any:
        asked: list[tuple[str, str]] = []
        workers = {name: Scripted(name, asked, fails_at if name == "b" else None) for name in ("a", "b", "c")}
        measures: dict[str, Sequence[str]] = {"a": ("step",), "b": ("step", "sandwich"), "c": ("step",)}
        return rounds(workers, measures, terms(tmp_path, **changes)), asked

    def test_everyone_is_asked_once_in_each_round_in_changing_order(self, tmp_path: Path) -> None:
        (times, failed), asked = self.run(tmp_path)
        each = {("a", "step"), ("b", "step"), ("b", "sandwich"), ("c", "step")}
        order = [tuple(asked[4 * k : 4 * k + 4]) for k in range(6)]
        assert all(set(of) == each for of in order) and len(set(order)) > 1
        assert {name: {m: len(v) for m, v in of.items()} for name, of in times.items()} == {
            "a": {"step": 6},
            "b": {"step": 6, "sandwich": 6},
            "c": {"step": 6},
        }
        assert not failed

    def test_the_seed_fixes_the_order(self, tmp_path: Path) -> None:
        assert self.run(tmp_path)[1] == self.run(tmp_path)[1]
        assert self.run(tmp_path)[1] != self.run(tmp_path, seed=1)[1]

    def test_one_that_fails_is_left_out_and_the_others_go_on(self, tmp_path: Path) -> None:
        (times, failed), asked = self.run(tmp_path, fails_at=5)
        assert failed == {"b": "it broke"} and set(times) == {"a", "c"}
        assert asked.count(("a", "step")) == asked.count(("c", "step")) == 6


class TestPeers:
    def test_their_workers_need_nothing_of_ours(self) -> None:
        """With our packages hidden, as in an environment that holds a peer only."""
        hidden = "for name in ('supernet', 'elastibit', 'search', 'predictors', 'conf'): sys.modules[name] = None"
        needed = "from benchmarks import step_time; from benchmarks.timing import worker, peer_steps, fp32_steps"
        code = f"import sys\n{hidden}\n{needed}"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def test_have_the_torch_of_this_process(self) -> None:
        wanted = peers.requirements("nncf")
        assert f"torch=={torch.__version__.partition('+')[0]}" in wanted and "nncf==3.4.0" in wanted

    def test_an_environment_is_made_once_and_again_when_it_should_hold_something_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[list[str]] = []

        def run(command: list[str], **_: Any) -> Any:
            ran.append(command)
            (tmp_path / "nncf").mkdir(exist_ok=True)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(peers.subprocess, "run", run)
        python = peers.python_of("nncf", tmp_path)
        assert python == tmp_path / "nncf" / "bin" / "python"
        assert ran[0][1:] == ["-m", "venv", str(tmp_path / "nncf")] and "nncf==3.4.0" in ran[1]
        assert peers.python_of("nncf", tmp_path) == python and len(ran) == 2
        monkeypatch.setitem(peers.PEERS, "nncf", ("nncf==3.4.1",))
        peers.python_of("nncf", tmp_path)
        assert "nncf==3.4.1" in ran[3]

    def test_one_that_cannot_be_installed_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(command: list[str], stdout: Any, **_: Any) -> Any:
            stdout.write("ERROR: No matching distribution\n")
            stdout.flush()
            return subprocess.CompletedProcess(command, 1)

        monkeypatch.setattr(peers.subprocess, "run", run)
        with pytest.raises(WorkerError, match="No matching distribution"):
            peers.python_of("brevitas", tmp_path)
        assert not (tmp_path / "brevitas" / "requirements.txt").exists()

"""A collection or a search that is stopped from outside: what it knew is kept, and it goes on to the same result."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supernet.artefacts import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["n=80", "predictor.steps=50", "predictor.members=2", "threads=1"]
PATIENCE = 600.0
"""Seconds: not how long it takes, but when to give up on a machine that does other things too."""


def records(path: Path) -> dict[str, dict[str, Any]]:
    read = read_jsonl(path)
    assert len({r["id"] for r in read}) == len(read), "measured twice"
    return {r["id"]: {key: value for key, value in r.items() if key != "measured"} for r in read}


def running(mark: str) -> list[int]:
    """Processes that have `mark` in their environment: a command and whatever it has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def listening() -> None:
    """A shell that starts the tests in its background has them ignore Ctrl-C, and their children with them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory, call: Callable[..., Any]) -> Path:
    """The pairs of a collection that nobody stopped."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("whole") / "run"))
    assert call("predict", f"run={run}", *SMALL).code == 0
    return run / "pairs.jsonl"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize("engine", ["local", "processes", "ray"])
def test_a_stopped_collection_leaves_nobody_behind_and_goes_on_to_the_same_pairs(
    engine: str, stop: signal.Signals, run: Path, whole: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    if engine == "ray":
        pytest.importorskip("ray", reason="needs the extra elastibit[ray]")
    words = [f"run={run}", *SMALL, f"engine={engine}", *(["engine.workers=2"] if engine != "local" else [])]
    mark, pairs = f"ELASTIBIT_TEST={tmp_path}", run / "pairs.jsonl"
    environment = dict([*os.environ.items(), tuple(mark.split("=", 1))])
    log = tmp_path / "stderr"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "predictors", *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=file, start_new_session=True, preexec_fn=listening
        )
    when = int(np.random.default_rng().integers(1, 25))  # at whatever byte that is
    until(lambda: process.poll() is not None or (pairs.exists() and pairs.read_bytes().count(b"\n") >= when), "pairs")
    assert process.poll() is None, f"it ended by itself: {log.read_text()}"
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does: to everyone in the foreground
    else:
        process.kill()
    code = process.wait(PATIENCE)
    until(lambda: not running(mark), "processes that were left behind")
    known = records(pairs)
    assert when <= len(known) < 80
    if stop == signal.SIGINT:
        last = log.read_text().splitlines()[-1]
        assert code == 130 and "Traceback" not in log.read_text()
        assert last.startswith("elastibit: interrupted; what is complete is on disk, go on with: python -m predictors")
    answer = call("predict", *words)
    assert answer.code == 0, answer.err
    assert records(pairs) == records(whole) and len(records(whole)) == 80
    assert records(pairs).items() >= known.items()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", ["evolving", "measuring"])
def test_a_killed_search_goes_on_to_the_same_front(
    when: str, run: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    words = ["budget.bitops=[w2a4,w4a4]", "generations=30", "candidates=5", "threads=1"]
    assert call("search", f"run={whole}", *words).code == 0
    state, measured = run / "search.state.json", run / "measured.jsonl"
    command = [sys.executable, "-m", "search", f"run={run}", *words]
    with (tmp_path / "stderr").open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file)
    lines = 1 + int(np.random.default_rng().integers(8))
    reached = {
        "evolving": state.exists,
        "measuring": lambda: measured.exists() and measured.read_bytes().count(b"\n") >= lines,
    }[when]
    until(lambda: process.poll() is not None or reached(), when)
    assert process.poll() is None, f"it ended by itself: {(tmp_path / 'stderr').read_text()}"
    process.kill()
    process.wait(PATIENCE)
    assert not (run / "front.json").exists()
    answer = call("search", f"run={run}", *words)
    assert answer.code == 0, answer.err
    assert read_json(run / "front.json")["subnets"] == read_json(whole / "front.json")["subnets"]
    assert records(measured) == records(whole / "measured.jsonl")


def test_the_ray_engine_without_ray_is_refused_before_any_work(
    run: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    before = sorted(run.rglob("*"))
    for verb, words in (("predict", []), ("search", ["budget.bitops=w4a4"])):
        answer = call(verb, f"run={run}", "engine=ray", *words)
        lines = answer.err.splitlines()
        assert answer.code == 2 and len(lines) == 1 and "`pip install elastibit[ray]`" in lines[0], answer.err
    assert sorted(run.rglob("*")) == before

"""One small run through all doors, in this process, shared by the tests that read its files."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import elastibit

SMALL = {
    "train": [
        "experiment=digits",
        "backbone.channels=[4,8,8]",
        "task.batch_size=128",
        "space.weight_bits=[2,4,8]",
        "space.input_bits=[2,4,8]",
        "subnets=2",
        "validation=[w2a2,w8a8]",
        "validation_images=128",
        "calibration_images=64",
        "threads=1",
    ],
    "predict": ["n=24", "predictor.steps=100", "predictor.members=3", "threads=1"],
    "search": ["candidates=2", "generations=4", "population=24", "threads=1"],
    "finetune": ["epochs=1", "schedule.lr=0.02", "threads=1"],
    "export": ["threads=1"],
    "report": [],
}
"""Settings under which each door takes seconds."""


@dataclass(frozen=True)
class Answer:
    """What a door gave back: exit code, and what it printed on standard output and standard error."""

    code: int
    out: str
    err: str


def door(*words: str) -> Answer:
    """Call the command `elastibit` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = elastibit.main(list(words))
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def call() -> Callable[..., Answer]:
    """The command `elastibit`, in this process."""
    return door


@pytest.fixture(scope="session")
def small() -> dict[str, list[str]]:
    """Settings under which each door takes seconds, by verb."""
    return SMALL


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after one epoch; not to be written to."""
    run = tmp_path_factory.mktemp("flow") / "trained"
    answer = door("train", *SMALL["train"], "epochs=1", f"run={run}")
    assert answer.code == 0, answer.err
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to do with as one likes."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def flow(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Answer]]:
    """A run that went through all doors, and what each of them said; not to be written to."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("flow") / "whole"))
    budgets = ["budgets=[{bitops: w4a4}, {bitops: w8a8, bytes: 6kB}]"]
    answers = {}
    for verb in ("predict", "search", "export", "report"):
        answers[verb] = door(verb, f"run={run}", *SMALL[verb], *(budgets if verb == "search" else []))
        assert answers[verb].code == 0, f"{verb}: {answers[verb].err}"
    return run, answers

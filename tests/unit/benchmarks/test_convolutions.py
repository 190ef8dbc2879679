"""Both ways of a convolution that are timed are the same layer, and the table says which one training takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import convolutions
from benchmarks.convolutions import CASES, FIRST, PATCHES, Case, layer, sides
from supernet.elastic.patches import is_faster

SMALL = [
    Case("an image's", FIRST, 4, 3, 8, 8, 3, 2),
    Case("touching", PATCHES, 4, 3, 8, 8, 4, 4),
    Case("few positions", PATCHES, 2, 8, 4, 32, 3, 2),
    Case("many positions", PATCHES, 2, 8, 6, 8, 3),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.layer)
def test_both_sides_give_the_same(case: Case) -> None:
    plain, other = (run() for run in sides(case, 0, lambda function: function))
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    assert plain.shape == (case.n, case.k, *plain.shape[2:])


def test_the_file_and_the_table_hold_every_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convolutions, "CASES", SMALL)
    monkeypatch.setattr("supernet.elastic.regions.compiled", lambda function: function)
    monkeypatch.setattr("supernet.memory.keep_freed", lambda: True)  # it would change the process of all tests
    threads = torch.get_num_threads()
    try:
        assert convolutions.main(["--rounds", "3", "--json", str(tmp_path / "c.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    cases = json.loads((tmp_path / "c.json").read_text())["cases"]
    assert [case["chosen"] for case in cases] == [True, True, True, False]
    assert all(case["ratio"]["low"] <= case["ratio"]["middle"] <= case["ratio"]["high"] for case in cases)
    out = capsys.readouterr().out
    assert all(case.layer in out for case in SMALL)


def test_the_rule_is_judged_on_both_of_its_sides() -> None:
    assert len({case.layer for case in CASES}) == len(CASES)
    chosen = [is_faster(*layer(case, 0)) for case in CASES if case.way == PATCHES]
    assert any(chosen) and not all(chosen)


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        convolutions.parsed(["--rounds", "0"])
    assert error.value.code == 2
    assert "--rounds is at least 1, got 0" in capsys.readouterr().err

"""Tables of measurements: resumable from any byte, and only for what they were measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from supernet.export.table import Table

HERE = {"target": "t", "onnxruntime": "1.0", "processor": "P"}


def filled(path: Path) -> bytes:
    table = Table(path, HERE)
    for i in range(3):
        table.add(f"k{i}", seconds=0.5 * i)
    return path.read_bytes()


def test_what_is_there_is_not_missing(tmp_path: Path) -> None:
    filled(tmp_path / "t.jsonl")
    table = Table(tmp_path / "t.jsonl", HERE)
    assert table.missing(dict.fromkeys(["k0", "k7", "k2"])) == ["k7"]
    assert table.records["k2"]["seconds"] == 1.0


def test_a_kill_at_any_byte_loses_at_most_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    whole = filled(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    near = {end + step for end in (0, *ends) for step in (-1, 0, 1)}
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends)
        table = Table(path, HERE)
        assert list(table.records) == [f"k{i}" for i in range(max(complete - 1, 0))]
        if cut in near:  # going on costs a write to the disk each time
            for key in table.missing(dict.fromkeys(["k0", "k1", "k2"])):
                table.add(key, seconds=0.5 * int(key[1]))
            assert path.read_bytes() == whole


@pytest.mark.parametrize(("name", "value"), [("processor", "Q"), ("onnxruntime", "1.1")])
def test_another_machine_or_version_is_refused_with_the_way_out(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "t.jsonl"
    filled(path)
    other = HERE | {name: value}
    with pytest.raises(
        ValueError, match=f"was measured with {name} {HERE[name]}, here is {name} {value}; .*fresh=true"
    ):
        Table(path, other)
    table = Table(path, other, fresh=True)
    assert not table.records
    table.add("k", seconds=1.0)
    assert list(Table(path, other).records) == ["k"]


def test_lines_that_are_no_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(filled(path) + b'{"seconds": 1}\n')
    with pytest.raises(ValueError, match="line 5 has no key"):
        Table(path, HERE)
    path.write_text('{"key": "k0"}\n')
    with pytest.raises(ValueError, match="does not begin with its origin"):
        Table(path, HERE)

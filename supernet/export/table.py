"""A table of measurements: lines appended one by one, behind a first line that says what they hold for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supernet.artefacts import append_jsonl, read_jsonl


class Table:
    """Records by key, in a file that is safe against a kill at any byte; what is in it is not measured again.

    Args:
        path: the file; it is made by the first record.
        origin: what the measurements hold for: versions, processor, threads.
        fresh: throw away what there is.
        again: the command that measures anew, for the message.

    Raises:
        ValueError: the file is of another origin (names the difference), or broken.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any], fresh: bool = False, again: str = "fresh=true") -> None:
        self.path, self.origin = path, dict(origin)
        self.records: dict[str, dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        lines = read_jsonl(path) if path.is_file() else []
        if lines:
            self._check(lines[0].get("origin"), again)
        self._begun = bool(lines)
        for number, line in enumerate(lines[1:], 2):
            if not isinstance(line.get("key"), str):
                raise ValueError(f"{path}: line {number} has no key; delete that line, the others are kept")
            self.records[line["key"]] = line

    def _check(self, found: Any, again: str) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} does not begin with its origin; measure anew with {again}")
        other = [name for name in self.origin | found if found.get(name) != self.origin.get(name)]
        if other:
            theirs = ", ".join(f"{name} {found.get(name)}" for name in other)
            ours = ", ".join(f"{name} {self.origin.get(name)}" for name in other)
            raise ValueError(f"{self.path} was measured with {theirs}, here is {ours}; measure anew with {again}")

    def add(self, key: str, **fields: Any) -> None:
        """One record, on the disk when this returns."""
        if not self._begun:
            append_jsonl(self.path, {"origin": self.origin})
            self._begun = True
        self.records[key] = {"key": key} | fields
        append_jsonl(self.path, self.records[key])

    def missing(self, keys: Mapping[str, Any]) -> list[str]:
        """Those of `keys` that have no record."""
        return [key for key in keys if key not in self.records]

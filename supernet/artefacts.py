"""Files between the stages (atomic, plain, safe against a kill at any byte), their origin, and progress of long parts.

Everything here may be imported from everywhere and imports nothing of the house. The import takes no torch along.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from torch import Tensor

log = logging.getLogger(__name__)

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""
LATELY = 60.0
"""Seconds that the time left is reckoned from."""

_DISTRIBUTIONS = ("elastibit", "torch", "numpy", "onnx", "onnxruntime", "timm", "pytorch-lightning")
_METADATA_KEY = "elastibit"
_WAY_OUT = "restore it, or delete it and run its stage again"


class VerificationError(RuntimeError):
    """A written file does not compute what it was made from; the front desk shows the message whole, exit code 1."""


# -- whole files ------------------------------------------------------------------------------------------------------


def write_bytes(path: Path | str, content: bytes) -> None:
    """Replace the file at `path` by `content`, or leave it as it was: a reader never sees a part.

    The bytes go into a hidden file of the same folder (a rename is atomic only within one file system), are forced to
    the disk, and take the final name in one step. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write `text` in UTF-8, atomically (see `write_bytes`)."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NumPy scalars and arrays become numbers and lists, paths become text.

    Raises:
        ValueError: a number is not finite (JSON has no word for it); names the file.
        TypeError: a value has no JSON form.
    """
    write_text(path, _dumps(value, path, indent=2) + "\n")


def read_json(path: Path | str) -> Any:
    """The value stored in a JSON file; ValueError in one line where the file is cut short or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path} is not valid JSON ({error}); {_WAY_OUT}") from error


# -- lines, appended --------------------------------------------------------------------------------------------------


def append_jsonl(path: Path | str, record: Mapping[str, Any]) -> None:
    """Add one record as one line and force it to the disk; for one writer at a time.

    A record counts once its line end is written. What an earlier process left behind without one is cut off first.
    """
    path = Path(path)
    line = _dumps(record, path).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _cut_tail(file, path)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """All complete records of a file written by `append_jsonl`.

    A last line without its end is what a kill leaves; it is dropped with a logged warning, and the next append removes
    it from the file.

    Raises:
        ValueError: any other line that is not a JSON object; names the file and the line (counted from 1).
    """
    *lines, tail = Path(path).read_bytes().split(b"\n")
    if tail:
        log.warning("%s: dropped the incomplete last line (%d bytes), left by an interrupted run", path, len(tail))
    return [_record(line, path, number) for number, line in enumerate(lines, 1)]


def _record(line: bytes, path: Path | str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is broken ({error}); delete that line, the others are kept") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{path}: line {number} holds a {kind}, not a record; delete that line, the others are kept")
    return record


def _cut_tail(file: IO[bytes], path: Path) -> None:
    """Truncate to the last line end, reading backwards so that a long file costs nothing."""
    end = size = file.seek(0, io.SEEK_END)
    while end:
        start = max(end - 4096, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        log.warning("%s: cut off %d bytes of an incomplete last line, left by an interrupted run", path, size - end)
        file.truncate(end)


def _dumps(value: Any, path: Path | str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"cannot write {path}: {error}; store None where there is no number") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


# -- tensors ----------------------------------------------------------------------------------------------------------


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors as safetensors, atomically; equal content gives equal bytes.

    Tensors that share memory are stored once each. `metadata` is any JSON value by name; it travels as one JSON text,
    since safetensors writes several entries in random order.
    """
    from safetensors.torch import save

    own = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    write_bytes(path, save(own, {_METADATA_KEY: _dumps(metadata or {}, path)}))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file written by `save_tensors`; any other safetensors file has empty metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no tensor file at {path}; run the stage that writes it, or correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY, "{}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(text)  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); {_WAY_OUT}") from error


# -- where a file comes from ------------------------------------------------------------------------------------------


def provenance(seed: int | None) -> dict[str, Any]:
    """What made a file: seed and versions, which equal runs share, and a `measured` block, which they need not share.

    The command stands in the `measured` block too: a resumed run has another one and must give equal files elsewhere.
    """
    return {
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "measured": {
            "command": command(sys.argv),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cpu": cpu(),
            "threads": _threads(),
        },
    }


def command(argv: list[str]) -> str:
    """The command line as one would type it again, without the machine's folders.

    The program is reduced to its name; paths below the current folder become relative, those below the home folder
    start with `~`, of all others only the last part is kept.
    """
    program = Path(argv[0])
    words = [program.name or "python"]
    if program.name == "__main__.py":
        packages = [folder.name for folder in program.parents if (folder / "__init__.py").is_file()]
        words = ["python", "-m", ".".join(reversed(packages)) or program.parent.name]
    return shlex.join(words + [_shorten(word) for word in argv[1:]])


def _shorten(word: str) -> str:
    here, home = str(Path.cwd()), str(Path.home())
    word = re.sub(rf"(?<![^\s=,\[\"']){re.escape(here)}(/|$)", lambda hit: "" if hit[1] else ".", word)
    word = re.sub(rf"(?<![^\s=,\[\"']){re.escape(home)}(?=/|$)", "~", word)
    return re.sub(r"(?<![^\s=,\[\"'])(?:/[^\s/,\]\"']+)*/([^\s/,\]\"']+)/?", r".../\1", word)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name as its maker gives it; the host's name is nobody's business."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _threads() -> int:
    torch = sys.modules.get("torch")  # asked only where it is loaded already: this file costs no import of torch
    return torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


# -- progress ---------------------------------------------------------------------------------------------------------


class Progress(Protocol):
    """How far a long part is; see `progress`."""

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more steps are done; `note` says how it stands (the best so far), None keeps the last note."""
        ...


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Progress]:
    """Show the steps of a long part: done of `total`, time passed, time left, and a free note.

    On standard error: on a terminal a bar; elsewhere one line every `LINE_EVERY` seconds and one at the end of what
    took at least that long. Without `total` there is no estimate.
    """
    if _on_screen or sys.stderr.isatty():
        with _bar(description, total) as bar:
            yield bar
    else:
        lines = _Lines(description, total)
        yield lines
        lines.close()


class _Bar:
    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update

    def advance(self, n: int = 1, note: str | None = None) -> None:
        self._update(advance=n, **({} if note is None else {"note": note}))


_on_screen: list[RichProgress] = []
"""The display, while there is one: two would draw over each other, so an inner part adds its bar to the outer's."""


@contextlib.contextmanager
def _bar(description: str, total: int | None) -> Iterator[_Bar]:
    with _display() as display:
        task = display.add_task(description, total=total, note="")
        try:
            yield _Bar(functools.partial(display.update, task))
        finally:
            display.refresh()
            if display.task_ids[0] != task:
                display.remove_task(task)  # an inner part may come back many times


@contextlib.contextmanager
def _display() -> Iterator[RichProgress]:
    from rich import progress as rich
    from rich.console import Console

    if _on_screen:
        yield _on_screen[0]
        return
    columns = [
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}", markup=False),
    ]
    with rich.Progress(*columns, console=Console(stderr=True)) as display:
        _on_screen.append(display)
        try:
            yield display
        finally:
            _on_screen.clear()


class _Lines:
    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total = description, total
        self.done, self.said, self.note = 0, 0, ""
        self.start = self.last = time.monotonic()
        self.recent = collections.deque([(self.start, 0)])

    def advance(self, n: int = 1, note: str | None = None) -> None:
        self.done += n
        self.note = self.note if note is None else note
        if (now := time.monotonic()) - self.last >= LINE_EVERY:
            self._say()
        if now - self.recent[-1][0] >= 1:
            self.recent.append((now, self.done))

    def close(self) -> None:
        """The last line, for what was long enough to be waited for."""
        if self.done > self.said and time.monotonic() - self.start >= LINE_EVERY:
            self._say()

    def _say(self) -> None:
        self.last, self.said = time.monotonic(), self.done
        passed = self.last - self.start
        parts = [f"{self.description} {self.done}" + (f"/{self.total}" if self.total else ""), _clock(passed)]
        if self.total and 0 < self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) * self._pace())} left")
        print(", ".join([*parts, self.note] if self.note else parts), file=sys.stderr, flush=True)

    def _pace(self) -> float:
        """Seconds a step, lately: what a resumed part finds done already took no time and says nothing of the rest."""
        while len(self.recent) > 1 and self.recent[1][0] <= self.last - LATELY:
            self.recent.popleft()
        then, done = self.recent[0]
        return (self.last - then) / max(self.done - done, 1)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

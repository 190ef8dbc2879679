"""One line asks, one line answers: how the driver and a worker process talk.

The worker says one JSON line when it is ready, then one for every word that it reads. A line with `error` is its last.
Only the standard library is needed, since workers also live in environments that hold a peer and nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

Answer = dict[str, Any]
Commands = Mapping[str, Callable[[], Answer]]


class WorkerError(RuntimeError):
    """A worker failed, went silent or ended; the message is one line that says why."""


# -- the worker's side ------------------------------------------------------------------------------------------------
def serve(build: Callable[[], tuple[Answer, Commands]]) -> int:
    """Build, say so, then run one command for each word on standard input until it ends; the exit code.

    Args:
        build: gives the facts to report when ready, and the commands by their word.
    """
    with _own_line() as say:
        try:
            facts, commands = build()
            say({"ready": True} | facts)
            for line in sys.stdin:
                say(commands[line.strip()]())
        except Exception as error:
            import traceback

            traceback.print_exc()  # to the log; the driver's table has room for one line
            say({"error": _one_line(error)})
            return 1
    return 0


@contextlib.contextmanager
def _own_line() -> Iterator[Callable[[Answer], None]]:
    """A line to the driver that nobody else writes to: what libraries print on standard output goes to the log."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield lambda answer: print(json.dumps(answer), file=out, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- the driver's side ------------------------------------------------------------------------------------------------
class Worker:
    """A started worker process, which gets ready by itself; leaving the context ends it.

    Args:
        command: program and arguments.
        environment: its variables.
        log: file for its standard error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(environment),
                text=True,
            )

    def ready(self, timeout: float) -> Answer:
        """Wait until it is ready; the facts that it reports.

        Raises:
            WorkerError: it failed, ended, or needed more than `timeout` seconds.
        """
        return self._answer(timeout)

    def ask(self, word: str, timeout: float) -> Answer:
        """Say `word` and wait for the answer.

        Raises:
            WorkerError: it failed, ended, needed more than `timeout` seconds, or answers a loss that is not finite.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(self._why_it_ended()) from None
        answer = self._answer(timeout)
        if not math.isfinite(answer.get("loss", 0.0)):
            raise WorkerError(f"the loss of {word!r} became {answer['loss']}: its time says nothing")
        return answer

    def _answer(self, timeout: float) -> Answer:
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout)[0]:
            raise WorkerError(f"no answer within {timeout:.0f} s; see {self.log.name}")
        line = out.readline()
        if not line:
            raise WorkerError(self._why_it_ended())
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _why_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return f"closed its line without ending; see {self.log.name}"
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended with code {code}" + (f": {said[-1][:200]}" if said else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: no more words are coming; a worker that does not listen is killed."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it had not read any more
                    pipe.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

"""All figures that need a GPU, in one run of at most --minutes: what an elastic step costs beside a plain bf16 step.

    python benchmarks/gpu.py [--minutes 8]

ResNet-18, 224 px, batch 256, channels_last, bf16 autocast around the forward pass, random images and labels; both sides
with the same loss and SGD, ours with LazyAdam for its scales beside it and a new random configuration in every step.
Variants are interleaved in a shuffled order, the device is waited for before and after what is timed, and a ratio is
the median of one side over the median of the other in the same rounds with a bootstrap 95 % interval.

Ceilings: a large bf16 product, and a large copy that reads and writes. Operations are those of the float network's
forward and backward pass (torch.utils.flop_counter); bytes are what inductor counts that the kernels of a program read
and write, which is known only where one graph runs once in a step (compiled whole). Each part starts only if the time
that it needs is left; what was skipped is listed. The file is written after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing.autocast import VARIANTS, Setting, Side, side
from benchmarks.timing.contestants import MEMORY, SANDWICH, STEP, SUBNETS
from benchmarks.timing.device import ceilings, counting_bytes, kernels, new_graphs, operations, peak, seconds_of
from benchmarks.timing.goals import Goal, fastest, judge
from benchmarks.timing.intervals import median_interval, ratio_interval
from benchmarks.timing.result import plain
from benchmarks.timing.table import goal_table
from supernet.artefacts import command, provenance, write_json

RESULT = Path(__file__).resolve().parent / "results" / "gpu.json"
USUAL = "bf16.*,ours.whole,ours.regional*"
FLOAT, NEW = ("bf16.*",), "new_graphs"
AFTERWARDS = 40
"""Seconds that memory and profiles need after the rounds."""

FULL = Setting()
TINY = Setting("resnet8", 8, 4, 10, rounds=3, steps=1, configurations=4, product=64, copied=1 << 16, patience=0.0)


def goals(setting: Setting) -> list[Goal]:
    """The goals of this machine; the first two are the issue's own for it."""
    ours = ("ours.whole", "ours.regional")
    return [
        *(Goal("one-subnet step, bf16, channels_last", setting.model, n, STEP, 1.15, FLOAT) for n in ours),
        *(Goal("sandwich step", setting.model, n, SANDWICH, 1.05, FLOAT) for n in ours),
        *(Goal("peak memory of a step", setting.model, n, MEMORY, 1.3, ("bf16.compiled",)) for n in ours),
        *(Goal(f"new graphs over {setting.configurations} configurations", setting.model, n, NEW, 0) for n in ours),
    ]


class Run:
    """All parts in order, as far as the time reaches; what was found is written after each of them."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting, self.options, self.device = setting, options, options.device
        self.end = time.monotonic() + 60 * options.minutes
        self.sides: dict[str, Side] = {}
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.facts: dict[str, Any] = {"ceilings": None, "operations": None, "bytes": {}, "profiles": {}, "seconds": {}}
        self.skipped: list[str] = []
        self.failed: dict[str, str] = {}

    def all(self) -> None:
        """Take every figure."""
        self.part("ceilings", 15, lambda: self.facts.update(ceilings=ceilings(self.setting, self.device)))
        names = [n for n in VARIANTS if any(fnmatch(n, pattern) for pattern in self.options.variants.split(","))]
        for name in names:  # what remains is needed to race what is there already
            needed = {"bf16.eager": 30, "ours.regional.no_sites": 260}.get(name, 200)
            self.part(name, needed, partial(self.prepare, name))
        if "bf16.eager" in self.sides:
            self.part("operations", 20, lambda: self.facts.update(operations=operations(self.sides["bf16.eager"])))
        compiled = [n for n in self.sides if n.startswith("ours") and n in {goal.contestant for goal in goals(FULL)}]
        for name in compiled:  # before the rounds, which draw configurations too
            count = partial(new_graphs, self.sides[name], self.setting.configurations)
            self.part(f"graphs of {name}", 90, partial(self.note, name, NEW, count))
        self.part("rounds", 30, self.race)
        for name, one in self.sides.items():
            self.part(f"memory of {name}", 10, partial(self.note, name, MEMORY, partial(peak, one, self.device)))
        for name in self.sides:
            self.part(f"profile of {name}", 10, partial(self.profile, name))

    def part(self, name: str, needed: float, run: Callable[[], Any]) -> None:
        """Run one part if `needed` seconds are left; a failure is noted and the others go on."""
        if self.end - time.monotonic() <= needed * self.setting.patience:
            self.skipped.append(name)
            return
        start = time.monotonic()
        try:
            run()
        except Exception as error:  # one part's failure must not cost the other figures: GPUs are rare
            self.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.facts["seconds"][name] = round(time.monotonic() - start, 1)
        print(f"{name}: {self.failed.get(name, 'done')} ({self.facts['seconds'][name]} s)", file=sys.stderr)
        write_json(self.options.json, self.result())

    def prepare(self, name: str) -> None:
        """Build one variant; what its first step took, and the bytes that its kernels move."""
        with counting_bytes() as count:
            self.sides[name] = side(name, self.setting, self.device, self.options.seed)
            if VARIANTS[name][0] == "whole" and count():
                self.facts["bytes"][name] = count()
        self.figures[name] = {}

    def note(self, name: str, measure: str, run: Callable[[], float]) -> None:
        """Keep one figure of a variant."""
        self.figures[name][measure] = [run()]

    def profile(self, name: str) -> None:
        """Keep where the time of a variant's step goes."""
        self.facts["profiles"][name] = kernels(self.sides[name], self.device)

    def race(self) -> None:
        """Rounds of one step and one sandwich step of each variant, until they are enough or time is short."""
        work = [(name, measure) for name in self.sides for measure in (STEP, SANDWICH)]
        times: dict[tuple[str, str], list[float]] = {entry: [] for entry in work}
        rng = np.random.default_rng([self.options.seed, 2])
        for name, measure in work:
            self._timed(name, measure)
        for _ in range(self.setting.rounds):
            if self.end - time.monotonic() <= AFTERWARDS * self.setting.patience:
                break
            for k in rng.permutation(len(work)):
                times[work[k]].append(self._timed(*work[k]))
        for (name, measure), values in times.items():
            if values:
                self.figures[name][measure] = values
        self.facts["rounds"] = min(map(len, times.values()), default=0)

    def _timed(self, name: str, measure: str) -> float:
        one = self.sides[name]
        if measure == STEP:
            return seconds_of(one.step, self.device, self.setting.steps)
        return seconds_of(partial(one.step, SUBNETS), self.device)

    def result(self) -> dict[str, Any]:
        """What the JSON file holds."""
        seed, reason = self.options.seed, self.why_not_judged()
        verdicts = [judge(goal, {self.setting.model: self.figures}, seed).plain() for goal in goals(self.setting)]
        return {
            "command": command(sys.argv),
            "torch": torch.__version__,
            "device": description(self.device),
            "seed": seed,
            "setting": asdict(self.setting),
            "judged": f"not judged: {reason}" if reason else "judged",
            "goals": [v if reason is None else v | {"met": None} for v in verdicts],
            "variants": {name: self.described(name) for name in self.figures},
            **self.facts,
            "skipped": self.skipped,
            "failed": self.failed,
            "provenance": provenance(seed),
        }

    def why_not_judged(self) -> str | None:
        """What keeps the run from being judged by the goals' own terms; None where nothing does."""
        if self.setting != FULL:
            return "a tiny run to try things out"
        rounds = self.facts.get("rounds", 0)
        return None if rounds >= FULL.rounds else f"{rounds} rounds, the goals ask for {FULL.rounds}"

    def described(self, name: str) -> dict[str, Any]:
        """A variant's figures with intervals, its ratio to the fastest float step, images/s, shares of the ceilings."""
        seed, figures = self.options.seed, self.figures
        out: dict[str, Any] = {"preparation": self.sides[name].seconds}
        for measure, values in figures[name].items():
            out[measure] = plain(median_interval(values, seed))
            base = fastest(figures, FLOAT, measure)
            if base is not None and measure in (STEP, SANDWICH):
                out[measure]["ratio"] = {"against": base} | plain(ratio_interval(values, figures[base][measure], seed))
        if STEP in out:
            seconds, limits = out[STEP]["value"], self.facts["ceilings"]
            out["images_per_second"] = self.setting.batch / seconds
            if limits and self.facts["operations"]:
                out["share_of_product"] = self.facts["operations"] / seconds / 1e12 / limits["tflops"]
            if limits and name in self.facts["bytes"]:
                out["share_of_copy"] = self.facts["bytes"][name] / seconds / 1e9 / limits["gbytes"]
        return out


def description(device: str) -> str:
    """The device's name; the processor's stands in the provenance."""
    if torch.device(device).type != "cuda":
        return device
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def table(found: Mapping[str, Any]) -> str:
    """One line for each variant; below it the ceilings, and what was skipped or failed."""
    lines = ["| variant | step (ms) | ratio | images/s | sandwich ratio | peak (MB) | of product | of copy |"]
    lines.append("|---" * 8 + "|")
    for name, of in found["variants"].items():
        step, sandwich = of.get(STEP), of.get(SANDWICH)
        cells = [
            name,
            f"{1e3 * step['value']:.1f}" if step else "-",
            _ratio(step),
            f"{of['images_per_second']:.0f}" if step else "-",
            _ratio(sandwich),
            f"{of[MEMORY]['value'] / 1e6:.0f}" if MEMORY in of else "-",
            *(f"{100 * of[s]:.1f} %" if s in of else "-" for s in ("share_of_product", "share_of_copy")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if found["ceilings"]:
        limits = found["ceilings"]
        lines.append(f"\nCeilings: {limits['tflops']:.3g} TFLOP/s, {limits['gbytes']:.4g} GB/s.")
    lines += [f"\nSkipped, no time was left: {', '.join(found['skipped'])}."] if found["skipped"] else []
    return "\n".join(lines + [f"\nFailed: {name}: {why}" for name, why in found["failed"].items()])


def _ratio(measured: Mapping[str, Any] | None) -> str:
    if not measured or "ratio" not in measured:
        return "-"
    ratio = measured["ratio"]
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="all of it ends by then; default %(default)s")
    add(
        "--variants", default=USUAL, metavar="A,B,...", help=f"shell patterns of {', '.join(VARIANTS)}; default {USUAL}"
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    add("--tiny", action="store_true", help="a small network and few rounds, to try the script out")
    add("--seed", type=int, default=0, help="of data, weights, configurations and order; default %(default)s")
    add("--json", type=Path, default=RESULT, help="result file; default benchmarks/results/gpu.json")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is there to try the script out; add --tiny")
    return options


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Inside, an empty compile cache, and convolutions by the fastest algorithm for both sides."""
    before, variable = torch.backends.cudnn.benchmark, "TORCHINDUCTOR_CACHE_DIR"
    kept = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as cache:
        torch.backends.cudnn.benchmark, os.environ[variable] = True, cache
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before
            os.environ.pop(variable)
            if kept is not None:
                os.environ[variable] = kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the figures, write the file, print the tables; 1 if nothing could be timed, 2 without the device."""
    options = parsed(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a CUDA device and torch finds none; run it where there is one, "
            "or try it out with --device cpu --tiny",
            file=sys.stderr,
        )
        return 2
    run = Run(TINY if options.tiny else FULL, options)
    with settings():
        run.all()
    found = run.result()
    write_json(options.json, found)
    print(table(found), goal_table(found["goals"]), sep="\n\n")
    print(f"\nGoals: {found['judged']}. All figures are in {options.json.name}.")
    return 0 if any(STEP in of for of in run.figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

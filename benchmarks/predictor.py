"""How well the predictors rank subnets of a trained supernet, overall and at equal cost; and how fast ours scores.

    python benchmarks/predictor.py RUN [--predictors ensemble,cqap] [--train 1000] [--seeds 5]

RUN is a run directory with pairs.jsonl (`elastibit predict run=RUN`, or `benchmarks/supernet_resnet20.py`). For each
seed, `--train` pairs flat over bins of log BitOps are learned from, and all others are judged on: Kendall's tau over
all of them, in the windows w3a3 and w4a4 +-5 %, and at equal cost. Beside it the tau that the two halves of the images
allow (split half, Spearman-Brown), the share of it, and what has to be beaten: cost alone, mean bits and the additive
sensitivity. A spread is the standard deviation over the seeds.

Speed: rows per second of `Ensemble.predict` and of the three bare batched matrix products of its perceptrons (same
members, inputs, widths and rows, float32, in the same chunks and in one piece, whichever is faster), taken in turn in
one process; the share is the median of the ratios of the turns.

Prints both and writes benchmarks/results/predictor.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from predictors.accuracy import Ensemble
    from predictors.pairs import Pairs
    from supernet.cost import Factors
    from supernet.run import Run

RESULT = Path(__file__).resolve().parent / "results" / "predictor.json"
WINDOWS, BINS, FEWEST = ("w3a3", "w4a4"), 16, 150
GOALS = {"kendall": 0.90, "share": 0.9, "speed": 0.7}
Table = NDArray[np.float64]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, help="run directory with pairs.jsonl")
    add("--predictors", default="ensemble,cqap", help="options of conf/predictor, separated by commas")
    add("--sensitivity", default="output_mse", help="option of conf/sensitivity")
    add("--images", type=int, default=1000, help="images that the sensitivity is given; default %(default)s")
    add("--train", type=int, default=1000, help="pairs to learn from; default %(default)s")
    add("--seeds", type=int, default=5, help="number of splits; default %(default)s")
    add("--rows", type=int, default=20_000, help="rows scored at once; default %(default)s")
    add("--turns", type=int, default=15, help="turns of the speed test; default %(default)s")
    add("--threads", type=int, default=2)
    add("--json", type=Path, default=RESULT, help="file to write")
    options = parser.parse_args(arguments)
    for name in ("images", "train", "seeds", "rows", "turns", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    return options


def flat(costs: Table, count: int, rng: np.random.Generator, bins: int = BINS) -> NDArray[np.int64]:
    """Positions of `count` of the costs [n], as equally many of each bin of log cost as there are.

    Bins that hold too few give all they have, and the others the rest.
    """
    edges = np.geomspace(costs.min(), costs.max() * (1 + 1e-9), bins + 1)
    members = [rng.permutation(np.flatnonzero((costs >= a) & (costs < b))) for a, b in itertools.pairwise(edges)]
    turns = np.concatenate([np.arange(len(m)) + rng.random(len(m)) for m in members])
    return np.sort(np.concatenate(members)[np.argsort(turns)[:count]])


# -- how well ----------------------------------------------------------------------------------------------------------
def judged(
    make: Callable[..., Any],
    pairs: Pairs,
    at: NDArray[np.int64],
    sensitivity: Factors,
    around: Mapping[str, float],
    seed: int,
) -> dict[str, Any]:
    """The report of one predictor that learned from the pairs `at`, on all others."""
    from predictors.judging import report

    learned, held = pairs.take(at), pairs.take(np.setdiff1d(np.arange(len(pairs)), at))
    predictor = make(rng=np.random.default_rng(seed))
    start = time.perf_counter()
    predictor.fit(learned.indices, learned.scores)
    seconds = time.perf_counter() - start
    others = {"sensitivity": -sensitivity.value(held.indices)}
    found = report(predictor, held, predictor.space, around=around, others=others)
    return {"seed": seed, "learned_from": len(learned), **found, "measured": {"fit_seconds": seconds}}


def summary(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each figure; None where a seed has none."""

    def spread(get: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float] | None:
        values = [get(r) for r in reports]
        if any(v is None for v in values):
            return None
        known = [float(v) for v in values if v is not None]
        return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else 0.0}

    plain = ("kendall", "ceiling", "kendall_equal_cost", "ceiling_equal_cost", "rmse", "within_1_std", "within_2_std")
    found: dict[str, Any] = {name: spread(lambda r, name=name: r[name]) for name in plain}
    found["controls"] = {
        control: {
            tau: spread(lambda r, c=control, t=tau: r["controls"][c][t]) for tau in ("kendall", "kendall_equal_cost")
        }
        for control in reports[0]["controls"]
    }
    found["windows"] = {
        window: {
            **{
                name: spread(lambda r, w=window, n=name: r["windows"][w][n])
                for name in ("pairs", "kendall", "ceiling", "share_of_ceiling")
            },
            "controls": {
                c: spread(lambda r, w=window, c=c: r["windows"][w]["controls"][c])
                for c in reports[0]["windows"][window]["controls"]
            },
        }
        for window in reports[0]["windows"]
    }
    return found


def ranked(run: Run, pairs: Pairs, sensitivity: Factors, options: argparse.Namespace) -> dict[str, Any]:
    """Reports of every predictor and seed, and their summary."""
    from omegaconf import OmegaConf

    from predictors.judging import landmarks
    from supernet.artefacts import progress
    from supernet.config import build

    folder, around = (
        Path(__file__).resolve().parent.parent / "conf" / "predictor",
        landmarks(run.net.costs, bits=WINDOWS),
    )
    names, found = options.predictors.split(","), {}
    with progress("learning", len(names) * options.seeds) as bar:
        for name in names:
            node = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
            assert isinstance(node, dict)
            maker = build(node | {"_partial_": True})
            reports = []
            for seed in range(options.seeds):
                at = flat(pairs.costs["bitops"], options.train, np.random.default_rng(seed))

                def make(rng: np.random.Generator, maker: Any = maker) -> Any:
                    return maker(space=run.net.space, costs=run.net.costs, sensitivity=sensitivity, rng=rng)

                reports.append(judged(make, pairs, at, sensitivity, around, seed))
                bar.advance(note=f"{name} {reports[-1]['kendall']:.3f}")
            found[name] = {"summary": summary(reports), "reports": reports}
    return found


# -- how fast ----------------------------------------------------------------------------------------------------------
def products(predictor: Ensemble, rows: int, chunk: int) -> Callable[[], None]:
    """The bare batched matrix products of an ensemble's perceptrons over so many rows, in chunks."""
    import torch

    weights = [predictor.tensors[f"w{k}"] for k in (1, 2, 3)]
    inputs = torch.randn(rows, weights[0].shape[1])

    @torch.no_grad()
    def run() -> None:
        for x in inputs.split(chunk):
            hidden = x.expand(len(weights[0]), -1, -1)
            for w in weights:
                hidden = torch.bmm(hidden, w)

    return run


def speed(predictor: Ensemble, rows: int, turns: int, seed: int = 0) -> dict[str, Any]:
    """Rows per second of `predict` and of its bare products, taken in turn; medians, and the median ratio."""
    from predictors.accuracy import CHUNK

    indices = predictor.space.sample_indices(rows, np.random.default_rng(seed))
    contestants = {
        "predict": lambda: predictor.predict(indices),
        "products": products(predictor, rows, rows),
        "products in chunks": products(predictor, rows, CHUNK),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(turns):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    bare = min(("products", "products in chunks"), key=lambda name: statistics.median(seconds[name]))
    shares = [b / p for b, p in zip(seconds[bare], seconds["predict"], strict=True)]
    members, inputs, hidden = predictor.tensors["w1"].shape
    return {
        "size": {"members": members, "inputs": inputs, "hidden": [hidden, hidden], "rows": rows, "dtype": "float32"},
        "rows_per_second": {name: rows / statistics.median(times) for name, times in seconds.items()},
        "bare": bare,
        "share": statistics.median(shares),
        "share_quartiles": list(np.quantile(shares, [0.25, 0.75])) if turns > 1 else None,
    }


# -- the table ---------------------------------------------------------------------------------------------------------
def table(found: Mapping[str, Any]) -> str:
    """What was found, as text."""

    def number(value: Mapping[str, float] | None) -> str:
        return "-" if value is None else f"{value['mean']:.3f} ±{value['std']:.3f}"

    titles = ["", "all", "at equal cost"]
    windows = list(next(iter(found["predictors"].values()))["summary"]["windows"])
    lines = [[*titles, *(text for w in windows for text in (f"{w} ±5 %", "share"))]]
    for name, one in found["predictors"].items():
        s = one["summary"]
        inside = [number(s["windows"][w][key]) for w in windows for key in ("kendall", "share_of_ceiling")]
        lines.append([name, number(s["kendall"]), number(s["kendall_equal_cost"]), *inside])
    s = next(iter(found["predictors"].values()))["summary"]
    for name, control in s["controls"].items():
        inside = [text for w in windows for text in (number(s["windows"][w]["controls"][name]), "")]
        lines.append([name, number(control["kendall"]), number(control["kendall_equal_cost"]), *inside])
    most = [text for w in windows for text in (number(s["windows"][w]["ceiling"]), "")]
    lines.append(["measurements allow", number(s["ceiling"]), number(s["ceiling_equal_cost"]), *most])
    counts = [text for w in windows for text in (f"{s['windows'][w]['pairs']['mean']:.0f}", "")]
    lines.append(["held-out pairs", str(found["held_out"]), "", *counts])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    fast, size = found["speed"], found["speed"]["size"]
    rate = fast["rows_per_second"]
    return (
        f"{text}\n\n{size['members']} members of {size['inputs']}-{size['hidden'][0]}-{size['hidden'][1]}-1, "
        f"{size['rows']} rows: predict {rate['predict']:,.0f} rows/s, bare products {rate[fast['bare']]:,.0f} rows/s, "
        f"share {fast['share']:.0%}"
    )


def met(found: Mapping[str, Any]) -> dict[str, bool | None]:
    """Which goals the ensemble meets; None where a figure is missing or a window holds fewer than 150 pairs."""
    s = found["predictors"]["ensemble"]["summary"] if "ensemble" in found["predictors"] else None
    goals: dict[str, bool | None] = {"speed": found["speed"]["share"] >= GOALS["speed"]}
    goals["kendall"] = None if s is None or s["kendall"] is None else s["kendall"]["mean"] >= GOALS["kendall"]
    for window in WINDOWS:
        figures = s["windows"].get(window) if s else None
        known = figures and figures["share_of_ceiling"] and figures["pairs"]["mean"] >= FEWEST
        goals[window] = figures["share_of_ceiling"]["mean"] >= GOALS["share"] if known else None
    return goals


def result(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON holds them."""
    import torch
    from omegaconf import OmegaConf

    from predictors.accuracy import fit_predictor
    from predictors.pairs import Pairs
    from supernet.artefacts import provenance
    from supernet.config import build
    from supernet.run import digest, load

    torch.set_num_threads(options.threads)
    run = load(options.run)
    assert run.task is not None
    pairs = Pairs.from_file(options.run / "pairs.jsonl", run.net.space)
    if len(pairs) <= options.train:
        raise ValueError(f"{len(pairs)} pairs leave none to judge on after {options.train}; lower --train")
    node = Path(__file__).resolve().parent.parent / "conf" / "sensitivity" / f"{options.sensitivity}.yaml"
    sensitivity = build(OmegaConf.load(node))(run.net, run.task.recalibrate(options.images))
    found = ranked(run, pairs, sensitivity, options)
    few = pairs.take(np.arange(min(len(pairs), 200)))
    ours = fit_predictor(run.net.space, few, sensitivity=sensitivity, steps=20)
    answer = {
        "pairs": len(pairs),
        "held_out": len(pairs) - options.train,
        "train": options.train,
        "seeds": options.seeds,
        "sensitivity": options.sensitivity,
        "sha256": digest(options.run),
        "predictors": found,
        "speed": {**speed(ours, options.rows, options.turns), "threads": options.threads},
        "provenance": provenance(None),
    }
    return answer | {"goals": GOALS, "met": met(answer)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    from supernet.artefacts import write_json

    options = parsed(arguments)
    found = result(options)
    print(table(found))
    print(
        "goals met: " + ", ".join(f"{k} {'-' if v is None else 'yes' if v else 'no'}" for k, v in found["met"].items())
    )
    write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

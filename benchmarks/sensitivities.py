"""Which sensitivity ranks subnets as their measured accuracy does, and what each costs, on a trained supernet.

    python benchmarks/sensitivities.py RUN [--only output_mse,logits_kl] [--around w3a3,w4a4] [--window 0.05]

RUN is a run directory with pairs.jsonl (`elastibit predict run=RUN`). Every sensitivity of conf/sensitivity is measured
on the recalibration images, without labels, as the doors do it; minus its sum over a subnet is what it predicts.

Printed, and written to benchmarks/results/sensitivities.json: Spearman's rho with a bootstrap 95 % interval and
Kendall's tau over all pairs; tau at equal cost (`predictors.judging.kendall_at_equal_cost`, of every two subnets whose
costs differ by at most the window); rho and tau of the subnets within the window around some budgets; seconds. Beside
them what needs no sensitivity (mean bits, the cost itself) and the tau that the measurements allow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from predictors.pairs import Pairs
    from supernet.run import Run

RESULT = Path(__file__).resolve().parent / "results" / "sensitivities.json"
RESAMPLES = 1000
FEWEST = 8
"""Pairs in a window below which no figure is given for it."""

Table = NDArray[np.float64]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory with pairs.jsonl")
    parser.add_argument("--only", default="", help="some of conf/sensitivity, separated by commas; default: all")
    parser.add_argument(
        "--around", default="w3a3,w4a4", help="budgets around which subnets are looked at by themselves"
    )
    parser.add_argument("--window", type=float, default=0.05, help="largest relative difference of equal costs")
    parser.add_argument("--kind", default="bitops", help="of cost")
    parser.add_argument("--images", type=int, default=64, help="most images that a sensitivity uses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", type=Path, default=RESULT, help="file to write")
    return parser.parse_args(arguments)


def nodes(only: str, images: int) -> dict[str, dict[str, Any]]:
    """Settings of the sensitivities of conf/sensitivity by name, with so many images.

    Raises:
        ValueError: a name that is not there.
    """
    from omegaconf import OmegaConf

    import conf

    folder = Path(str(conf.__file__)).parent / "sensitivity"
    loaded = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(folder.glob("*.yaml"))}
    found = {name: node for name, node in loaded.items() if isinstance(node, dict)}
    wanted = [name for name in only.split(",") if name] or list(found)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(f"no sensitivity {unknown[0]!r}; there are {', '.join(found)}")
    return {name: {str(key): value for key, value in found[name].items()} | {"images": images} for name in wanted}


def measured(run: Run, pairs: Pairs, options: argparse.Namespace) -> tuple[dict[str, Table], dict[str, float]]:
    """What each sensitivity predicts of the pairs (higher is better), and the seconds that it took."""
    from supernet.config import build

    assert run.task is not None
    batches = list(run.task.recalibrate(options.images))
    predicted, seconds = {}, {}
    for name, node in nodes(options.only, options.images).items():
        sensitivity, start = build(node), time.monotonic()
        predicted[name] = -sensitivity(run.net, batches).value(pairs.indices)
        seconds[name] = time.monotonic() - start
    return predicted, seconds


def figures(predicted: Table, pairs: Pairs, limits: Mapping[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """How well one prediction ranks the pairs."""
    from predictors.judging import kendall, kendall_at_equal_cost

    costs, window = pairs.costs[options.kind], options.window
    equal, count = kendall_at_equal_cost(pairs.scores, predicted, costs, window)
    near = {name: np.abs(np.log(costs / limit)) <= np.log1p(window) for name, limit in limits.items()}
    return {
        "spearman": spearman(pairs.scores, predicted),
        "spearman_interval": interval(pairs.scores, predicted, options.seed),
        "kendall": kendall(pairs.scores, predicted),
        "kendall_equal_cost": equal,
        "comparisons_equal_cost": count,
        "around": {
            name: {
                "pairs": int(at.sum()),
                "spearman": spearman(pairs.scores[at], predicted[at]) if at.sum() >= FEWEST else None,
                "kendall": kendall(pairs.scores[at], predicted[at]) if at.sum() >= FEWEST else None,
            }
            for name, at in near.items()
        },
    }


def spearman(scores: Table, predicted: Table) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    from scipy.stats import rankdata

    if len(scores) < 2 or len(set(scores)) < 2 or len(set(predicted)) < 2:
        return None
    return float(np.corrcoef(rankdata(scores), rankdata(predicted))[0, 1])


def interval(scores: Table, predicted: Table, seed: int) -> list[float] | None:
    """Bootstrap 95 % interval of Spearman's rank correlation, over the pairs."""
    rng, n = np.random.default_rng(seed), len(scores)
    drawn = [spearman(scores[at], predicted[at]) for at in rng.integers(n, size=(RESAMPLES, n))]
    known = [value for value in drawn if value is not None]
    return [float(v) for v in np.quantile(known, [0.025, 0.975])] if known else None


def result(options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    import torch

    from predictors.judging import ceiling, controls
    from predictors.measuring import weights_digest
    from predictors.pairs import Pairs
    from supernet.artefacts import provenance
    from supernet.run import load

    torch.set_num_threads(options.threads)
    run = load(options.run)
    pairs = Pairs.from_file(run.path / "pairs.jsonl", run.net.space)
    kind = options.kind
    limits = {name: run.net.costs.limit(kind, name) for name in options.around.split(",") if name}
    predicted, seconds = measured(run, pairs, options)
    references = controls(run.net.space, pairs, kind)
    return {
        "pairs": len(pairs),
        "accuracy": [float(v) for v in np.quantile(pairs.scores, [0, 0.5, 1])],
        **{name: getattr(options, name) for name in ("kind", "window", "images", "threads")},
        "weights": weights_digest(run.net),
        "ceiling_equal_cost": ceiling(pairs.halves, pairs.costs[kind], options.window),
        "sensitivities": {
            name: figures(values, pairs, limits, options) | {"measured": {"seconds": round(seconds[name], 2)}}
            for name, values in predicted.items()
        },
        "controls": {name: figures(values, pairs, limits, options) for name, values in references.items()},
        "provenance": provenance(options.seed),
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as a table, the best at equal cost first."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = {**found["sensitivities"], **found["controls"]}
    around = list(next(iter(rows.values()))["around"])
    heads = ["", "Spearman", "Kendall", "tau, equal cost", *(f"rho, tau at {name}" for name in around), "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, of in sorted(rows.items(), key=lambda row: -(row[1]["kendall_equal_cost"] or -1)):
        low, high = of["spearman_interval"] or (None, None)
        cells = [f"{number(of['spearman'])} [{number(low)}, {number(high)}]", number(of["kendall"])]
        cells.append(number(of["kendall_equal_cost"]))
        cells += [f"{number(w['spearman'])}, {number(w['kendall'])} ({w['pairs']})" for w in of["around"].values()]
        cells.append(f"{of['measured']['seconds']:.1f}" if "measured" in of else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    allowed = number(found["ceiling_equal_cost"])
    return "\n".join([*lines, f"\n{found['pairs']} pairs; at equal cost the measurements allow a tau of {allowed}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file, print the table."""
    from supernet.artefacts import write_json

    options = parsed(arguments)
    found = result(options)
    write_json(options.json, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

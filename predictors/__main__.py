"""Door `predict`: measured subnets, and a predictor that learns from them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from predictors.active import Goal
    from predictors.pairs import Pairs
    from supernet.interfaces import Predictor
    from supernet.run import Run

FEWEST = 10
"""Held-out pairs below which a window is not shown."""


def main(cfg: DictConfig) -> None:
    """Measure and learn as `cfg` (conf/predict.yaml) says; write pairs.jsonl, predictor.safetensors, predictor.json."""
    import numpy as np
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from predictors.files import save_predictor
    from predictors.judging import landmarks, report
    from predictors.kept import sensitivity_of
    from predictors.measuring import weights_digest
    from predictors.pairs import collect
    from supernet.artefacts import provenance
    from supernet.config import build
    from supernet.run import load

    out = Path(HydraConfig.get().runtime.output_dir)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    seed, trusted = int(cfg.seed), tuple(cfg.trust)
    if not 0 < cfg.held_out < 1:
        raise ValueError(f"held_out is a share in (0, 1), got {cfg.held_out}; 0.2 is usual")
    engine = build(settings["engine"], trusted=trusted)
    goal = wanted(cfg.until, cfg.time, cfg.near)
    run = load(cfg.run, trusted=trusted)
    assert run.task is not None  # a run without one is refused by load
    net = run.net
    net.compile(str(cfg.compile), passes="evaluation")
    sensitivity = sensitivity_of(run, settings["sensitivity"], cfg.recalibrate_images, out=out, trusted=trusted)
    make = build(settings["predictor"] | {"_partial_": True}, trusted=trusted)
    make = functools.partial(make, space=net.space, costs=net.costs, sensitivity=sensitivity)
    around = landmarks(net.costs) | {str(text): net.costs.limit("bitops", text) for text in cfg.near or ()}
    images = {"recalibrate_images": cfg.recalibrate_images, "select_images": cfg.select_images}
    measured_on = images | {"engine": engine, "out": out / "pairs.jsonl"}
    if goal is None:
        sampler = build(settings["sampler"], trusted=trusted, space=net.space, costs=net.costs)
        pairs = collect(net, run.task, int(cfg.n), rng=np.random.default_rng(seed), sampler=sampler, **measured_on)
        (learned, held), how = pairs.split(np.random.default_rng(seed), float(cfg.held_out)), dict[str, Any]()
    else:
        targets = [around[str(text)] for text in cfg.near or ()]
        pairs, (learned, held), how = chosen(run, settings, goal, make, targets, measured_on)
    judged = fitted(make, learned, seed)
    others = {"sensitivity": -sensitivity.value(held.indices)}
    figures = report(judged, held, net.space, around=around, others=others) | how
    figures |= {"learned_from": len(learned), "points": points(judged, held), "weights": weights_digest(net)}
    save_predictor(fitted(make, pairs, seed), out, figures | {"provenance": provenance(seed)})
    show(figures)
    print(f"learned: {out / 'predictor.safetensors'}")


def chosen(
    run: Run, settings: Mapping[Any, Any], goal: Goal, make: Callable[..., Any], near: list[float], on: dict[str, Any]
) -> tuple[Pairs, tuple[Pairs, Pairs], dict[str, Any]]:
    """Active collection: all pairs, those to learn from and to judge on, and what is said of it.

    Args:
        run: with its task.
        settings: of the door.
        goal: when to end.
        make: makes a predictor when called with rng.
        near: BitOps around which subnets are chosen; none: anywhere.
        on: options of the `Measurer`.
    """
    from predictors.active import Active
    from predictors.measuring import Measurer
    from predictors.pairs import Pairs

    assert run.task is not None
    net, measurer = run.net, Measurer(run.net, run.task, **on)
    collected = Active(
        net.space,
        net.costs,
        measurer,
        make,
        near=near,
        batch=int(settings["batch"]),
        held=max(2, round(settings["held_out"] * settings["n"])),
        seed=int(settings["seed"]),
        settings={name: settings[name] for name in ("predictor", "sensitivity")},
        out=on["out"].with_name("collection.jsonl"),
    ).run(int(settings["n"]), goal)
    pairs = Pairs.of(list(measurer.records.values()), net.fingerprint)
    return pairs, (collected.learned, collected.held), {"collection": collected.report}


def wanted(until: str | None, limit: str | None, near: Sequence[str] | None) -> Goal | None:
    """When an active collection ends; None: pairs are drawn beforehand, none is chosen.

    Raises:
        ValueError: unreadable limits, or costs to choose near without any.
    """
    from predictors.active import Goal

    if until is None and limit is None:
        if near:
            raise ValueError(
                f"near={list(near)} says where to choose, which needs until=tau:0.85 or time=10min beside it"
            )
        return None
    return Goal.parse(until, limit)


def fitted(make: Callable[..., Any], pairs: Pairs, seed: int) -> Any:
    """What `make` makes, after it has learned from `pairs`."""
    import numpy as np

    predictor = make(rng=np.random.default_rng(seed))
    predictor.fit(pairs.indices, pairs.scores)
    return predictor


def points(predictor: Predictor, pairs: Pairs) -> list[dict[str, float]]:
    """Predicted and measured score of each pair, with its BitOps, as JSON holds them."""
    mean, std = predictor.predict(pairs.indices)
    columns = {"predicted": mean, "std": std, "measured": pairs.scores, "bitops": pairs.costs["bitops"]}
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def show(figures: dict[str, Any]) -> None:
    """Print how well held-out pairs are predicted, beside what a predictor has to beat."""
    from rich.console import Console
    from rich.table import Table

    title = f"{figures['pairs']} held-out pairs, learned from {figures['learned_from']}"
    table = Table(
        "", "Kendall tau", "at equal cost", "RMSE", "within 1 std", "within 2 std", title=title, title_justify="left"
    )
    rest = [f"{figures['rmse']:.2%}", f"{figures['within_1_std']:.0%}", f"{figures['within_2_std']:.0%}"]
    table.add_row("predictor", tau(figures["kendall"]), tau(figures["kendall_equal_cost"]), *rest)
    for name, control in figures["controls"].items():
        table.add_row(name, tau(control["kendall"]), tau(control["kendall_equal_cost"]))
    if figures["ceiling_equal_cost"] is not None:
        table.add_row("what the measurements allow", tau(figures["ceiling"]), tau(figures["ceiling_equal_cost"]))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    windows = {name: found for name, found in figures["windows"].items() if found["pairs"] >= FEWEST}
    if windows:
        console.print(near(windows, list(figures["controls"])))


def near(windows: dict[str, Any], names: list[str]) -> Table:
    """Kendall's tau among the held-out pairs of about one cost, for each cost that a search usually asks for."""
    from rich.table import Table

    table = Table("costs within 5 %", "pairs", "Kendall tau", "measurements allow", "share", *names)
    for name, found in windows.items():
        share = "-" if found["share_of_ceiling"] is None else f"{found['share_of_ceiling']:.0%}"
        controls = [tau(found["controls"][control]) for control in names]
        table.add_row(name, str(found["pairs"]), tau(found["kendall"]), tau(found["ceiling"]), share, *controls)
    return table


def tau(value: float | None) -> str:
    """As the tables show it."""
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(desk("predict", main))

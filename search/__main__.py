"""Door `search`: budgets, what to rank by, one search for all of them, and the winners' files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from search.front import Candidate, Front
    from supernet.config import SubnetConfig
    from supernet.elastic.supernet import SuperNet
    from supernet.interfaces import Predictor
    from supernet.run import Run
    from supernet.space import SearchSpace

Budget = dict[str, str | float]
RANKINGS = ("auto", "run", "additive")


def main(cfg: DictConfig) -> None:
    """Search as `cfg` (conf/search.yaml) says and write front.json and subnets/."""
    import numpy as np
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from predictors.additive import Additive
    from predictors.kept import sensitivity_of
    from search.problem import read
    from search.run import check, search
    from supernet.config import build
    from supernet.run import load

    out, trusted = Path(HydraConfig.get().runtime.output_dir), tuple(cfg.trust)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    budgets = budgets_of(settings["budget"], settings["budgets"])
    check(int(cfg.candidates), int(cfg.generations), int(cfg.population))
    engine = build(settings["engine"], trusted=trusted)
    run = load(cfg.run, trusted=trusted, needs_data=False)
    space, seconds = searched(run, budgets, settings, trusted)
    for budget in budgets:
        read(run.net.costs.view(space or run.net.space), budget)  # before anything is measured
    learned = predictor_of(run, str(cfg.rank_by))
    run.net.compile(str(cfg.compile), passes="evaluation")
    sensitivity = sensitivity_of(run, settings["sensitivity"], cfg.recalibrate_images, out=out, trusted=trusted)
    front = search(
        run.net,
        learned or Additive(run.net.space, sensitivity=sensitivity),
        budgets,
        np.random.default_rng(int(cfg.seed)),
        space=space,
        task=run.task,
        candidates=int(cfg.candidates),
        generations=int(cfg.generations),
        population=int(cfg.population),
        sensitivity=sensitivity,
        algorithm=build(settings["algorithm"], trusted=trusted),
        recalibrate_images=cfg.recalibrate_images,
        select_images=cfg.select_images,
        seconds=seconds,
        engine=engine,
        random_search=bool(cfg.random_search),
        out=out,
        reuse=sorted(run.path.glob("*.jsonl")),
    )
    save(run, front, out, settings)
    show(front)
    print(f"found: {out / 'front.json'}")


def searched(
    run: Run, budgets: Sequence[Budget], settings: Mapping[Any, Any], trusted: Sequence[str]
) -> tuple[SearchSpace | None, Callable[[SubnetConfig], float] | None]:
    """The view that is searched (None: all of the space), and how a subnet is timed (None: no limit asks for it)."""
    from search.views import constrained, pins

    space, seconds = probed(run, budgets, settings, trusted)
    if settings["tie"] or settings["pin"]:
        space = constrained(run.net, settings["tie"], pins(settings["pin"]), space)
    return space, seconds


def probed(
    run: Run, budgets: Sequence[Budget], settings: Mapping[Any, Any], trusted: Sequence[str]
) -> tuple[SearchSpace | None, Callable[[SubnetConfig], float] | None]:
    """What the run's probe says: the legal part of the space, and how to time a subnet; None where nothing asks.

    Under a budget of latency the run's net is given that kind of cost.

    Raises:
        FileNotFoundError: the run was not probed.
        ValueError: it was probed on another machine, or another space.
    """
    from supernet.config import build
    from supernet.export.latency import KIND
    from supernet.export.tables import Tables, timer

    level, timed = settings["legal"], any(KIND in budget for budget in budgets)
    if level is None and not timed:
        return None, None
    target, profile = (build(settings[name], trusted=trusted) for name in ("target", "profile"))
    tables = Tables(run.path, target, str(settings["profile"]["name"]))
    space = None if level is None else tables.view(run.net, str(level))
    if not timed:
        return space, None
    run.net.costs.kinds[KIND] = tables.factors(run.net)
    return space, timer(run.net, tables, profile)


def budgets_of(budget: Any, budgets: Any) -> list[Budget]:
    """The budgets of the settings `budget` (kind -> limit or list of limits) or `budgets` (list of mappings).

    Lists of equal length make as many budgets, limit by limit; a single limit applies to all of them.

    Raises:
        ValueError: none or both are given, a limit without a kind, or lists of different lengths.
    """
    named = isinstance(budget, Mapping) and isinstance(budgets, list) and all(isinstance(b, Mapping) for b in budgets)
    if not named:
        got = budgets if isinstance(budget, Mapping) else budget
        raise ValueError(f"a budget names its kind, e.g. budget.bitops=w4a4 or budgets=[{{bitops: w4a4}}]; got {got!r}")
    given = {kind: limit for kind, limit in budget.items() if limit is not None}
    if bool(given) == bool(budgets):
        said = "both were" if budgets else "neither was"
        raise ValueError(f"give budget.<kind>=... or budgets=[...], {said} given; e.g. budget.bitops=[w3a3,w4a4]")
    if budgets:
        return [dict(b) for b in budgets]
    lengths = {kind: len(limit) for kind, limit in given.items() if isinstance(limit, list)}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        said = ", ".join(f"budget.{kind} has {n}" for kind, n in lengths.items())
        raise ValueError(f"lists of limits need one length, but {said}; a single limit applies to all budgets")
    many = max(lengths.values(), default=1)
    columns = [limit if isinstance(limit, list) else [limit] * many for limit in given.values()]
    return [dict(zip(given, limits, strict=True)) for limits in zip(*columns, strict=True)]


def predictor_of(run: Run, name: str) -> Predictor | None:
    """The run's own predictor; None where the sensitivity alone ranks.

    Args:
        run: the run, which may hold a predictor.
        name: `run`: that one; `additive`: None; `auto`: the run's if there is one.

    Raises:
        ValueError: another name, or a predictor of other weights or of another space.
        FileNotFoundError: the run has none.
    """
    from predictors.files import load_predictor
    from predictors.measuring import weights_digest
    from supernet.artefacts import read_json

    if name not in RANKINGS:
        raise ValueError(f"rank_by is one of {', '.join(RANKINGS)}, got {name!r}")
    file = run.path / "predictor.json"
    if name == "additive" or (name == "auto" and not file.exists()):
        return None
    predictor = load_predictor(run.path, run.net.space, run.net.costs)
    learned, present = read_json(file)["report"].get("weights"), weights_digest(run.net)
    if learned != present:
        raise ValueError(
            f"{file} was learned on weights {learned}, the run has {present}; delete pairs.jsonl and predictor.*, "
            f"then `elastibit predict run={run.path}`, or set rank_by=additive"
        )
    return predictor


def save(run: Run, front: Front, out: Path, settings: Mapping[Any, Any]) -> None:
    """Write the winners' files and, last, front.json with the settings that made it."""
    from search.front import save_front

    batches = None
    if run.task is not None and int(settings["candidates"]) > 0:
        batches = run.task.recalibrate(settings["recalibrate_images"])
    save_subnets(run.net, front, out / "subnets", batches)
    kept = {str(key): value for key, value in settings.items() if key not in ("run", "threads", "trust", "engine")}
    save_front(out / "front.json", front, seed=int(settings["seed"]), settings=kept)


def save_subnets(net: SuperNet, front: Front, folder: Path, batches: Sequence[Tensor] | None) -> None:
    """Write <id>.json and <id>.safetensors of each winner, and remove those of an earlier search.

    The tensors are the subnet's own BatchNorm statistics on the images that it was measured with, under the names that
    they have in `net.materialise(config)`; so what is exported is what was measured. Without batches (None) there are
    no tensors, and export makes them.
    """
    from supernet.artefacts import save_tensors, write_json
    from supernet.calibration.batchnorm import norms, recalibrate

    for found in {f.config.id: f for f in front}.values():
        origin = {"fingerprint": net.fingerprint, "id": found.config.id}
        layers = [asdict(layer) for layer in net.layer_costs(found.config)]
        labels = [f.label for f in front if f.config.id == found.config.id]
        if batches is not None:
            subnet = net.materialise(found.config)
            recalibrate(subnet, batches)
            paths = {id(module): path for path, module in subnet.named_modules()}
            buffers = {f"{paths[id(m)]}.{name}": b for m in norms(subnet) for name, b in m.named_buffers(recurse=False)}
            save_tensors(folder / f"{found.config.id}.safetensors", buffers, origin)
        write_json(folder / f"{found.config.id}.json", origin | found.plain() | {"labels": labels, "layers": layers})
    endings = (".json",) if batches is None else (".json", ".safetensors")
    kept = {f"{found.config.id}{ending}" for found in front for ending in endings}
    for file in [f for f in folder.glob("*") if f.suffix in (".json", ".safetensors") and f.name not in kept]:
        file.unlink()


def show(front: Front) -> None:
    """Print a row for each budget: the winner, what it costs, and what it has to beat within the same limits."""
    from rich.console import Console
    from rich.table import Table

    from search.words import CONTROLS
    from supernet.config import si
    from supernet.cost import UNITS

    table = Table(title="accuracy on select", title_justify="left")
    for heading in ("budget", "predicted", "measured", "costs", *(words for words, _ in CONTROLS.values())):
        table.add_column(heading, justify="left" if heading in ("budget", "costs") else "right", no_wrap=True)
    for found in front:
        mean, std = found.predicted
        predicted = f"{mean:.1%} ± {std:.1%}" if std else "-"  # an additive sensitivity ranks, and says no more
        costs = [f"{si(found.costs[kind], UNITS[kind])} ({1 - spare:.0%})" for kind, spare in found.slack.items()]
        if found.seconds is not None:
            costs.append(f"{si(found.seconds, 's')} measured whole")
        controls = [accuracy(found.controls.get(name)) for name in CONTROLS]
        table.add_row(found.label, predicted, accuracy(found), "\n".join(costs), *controls)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for found in front:
        print(f"{found.label}: {found.verdict}")


def accuracy(candidate: Candidate | None) -> str:
    """Measured accuracy in percent, or that there is none."""
    return "-" if candidate is None or candidate.measured is None else f"{candidate.measured:.1%}"


if __name__ == "__main__":
    sys.exit(desk("search", main))

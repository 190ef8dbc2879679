"""A space that is measured whole: 4,096 subnets of a small net trained on digits, and fronts of 400 measurements."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.keeping import front_of, keys
from supernet.artefacts import progress, provenance, read_json, write_json
from supernet.elastic.supernet import SuperNet
from supernet.space import Indices, SearchSpace

Table = NDArray[np.float64]
BITS, LAYERS, EPOCHS, SEED = (2, 3, 4, 8), 6, 12, 0
FIRST, ROUND, MOST = 60, 34, 400
RUNGS = 24


def network() -> tuple[SuperNet, Any]:
    """A residual net of six elastic layers between a first and a last at 8 bits, and its task."""
    import torch
    from omegaconf import OmegaConf

    from supernet.backbones.cifar_resnet import CifarResNet
    from supernet.config import build

    conf = Path(__file__).resolve().parents[2] / "conf" / "task" / "digits.yaml"
    task = build(OmegaConf.to_container(OmegaConf.load(conf)))
    torch.manual_seed(SEED)
    model = CifarResNet(8, channels=(4, 8, 8), n_classes=task.n_classes, in_channels=task.in_channels)
    form: dict[str, Any] = {"granularities": ("per-tensor",), "symmetries": (True,)}
    net = SuperNet(model, task.example(), weight_bits=BITS, input_bits=BITS, first_last_bits=8, **form)
    return net, task


def every(net: SuperNet) -> tuple[SearchSpace, Indices]:
    """The view in which a layer's weight and input have the same bits, and all of its rows."""
    layers = list(net.layers[1:-1])
    space = net.space.tie([[each.weight, each.input] for each in layers])
    row = np.array(space.uniform("w8a8").row, dtype=np.int64)
    rows = np.tile(row, (len(BITS) ** LAYERS, 1))
    for k, choice in enumerate(np.array(list(itertools.product(range(len(BITS)), repeat=LAYERS))).T):
        for name in (layers[k].weight, layers[k].input):
            rows[:, space.position[name]] = choice
    return space, space.canonical(rows)


def measured(file: Path) -> tuple[SuperNet, SearchSpace, Indices, Table]:
    """Net, view, all rows and their accuracies on select, from the file or trained and measured now."""
    from predictors.measuring import measure
    from supernet.samplers.uniform import Uniform
    from supernet.training.fit import train
    from supernet.training.losses import Plain
    from supernet.training.module import Schedule

    net, task = network()
    space, rows = every(net)
    if file.exists() and (kept := read_json(file))["fingerprint"] == space.fingerprint:
        return net, space, rows, np.array(kept["right"]) / kept["images"]
    work = file.with_suffix(".work")
    net.calibrate(task.recalibrate())
    options: dict[str, Any] = {"losses": Plain(), "validation": (), "schedule": Schedule(lr=0.1), "seed": SEED}
    train(net, task, out=work, epochs=EPOCHS, sampler=Uniform(space), **options)
    shutil.rmtree(work)
    net.eval()
    images, batches = list(task.recalibrate(128)), list(task.select())
    count, right = sum(len(labels) for _, labels in batches), []
    with progress("measuring", len(rows)) as bar:
        for row in rows:
            right.append(round(measure(net, row, images, batches) * count))
            bar.advance()
    about = {"bits": BITS, "layers": [each.name for each in net.layers[1:-1]], "epochs": EPOCHS, "seed": SEED}
    order = (
        "right[i]: of `images`, by the subnet whose layers have the bits of digit k of i in base 4, first layer first"
    )
    write_json(
        file,
        {"fingerprint": space.fingerprint, "images": count, "order": order, **about, "right": right}
        | {"provenance": provenance(SEED)},
    )
    return net, space, rows, np.array(right) / count


def hypervolume(accuracy: Table, cost: Table, reference: tuple[float, float]) -> float:
    """Area between the points and the reference (least accuracy, largest log cost)."""
    area, level = 0.0, reference[0]
    order = np.argsort(cost)
    for a, c in zip(accuracy[order], cost[order], strict=True):
        if a > level:
            area += (a - level) * (reference[1] - c)
            level = a
    return area


def fronts(file: Path, seeds: int) -> dict[str, Any]:
    """Share of the true front's hypervolume that rounds of predicting, searching and measuring find, for each seed."""
    net, space, rows, accuracy = measured(file)
    cost = np.log(net.costs.kinds["bitops"].value(rows))
    reference = (float(accuracy.min()), float(cost.max()))
    whole = hypervolume(accuracy, cost, reference)
    known = dict(zip(keys(rows), range(len(rows)), strict=True))
    runs = []
    for seed in range(seeds):
        at = found(net, space, rows, accuracy, known, np.random.default_rng(seed))
        blind = np.random.default_rng(seed).choice(len(rows), len(at), replace=False)
        shares = [hypervolume(accuracy[i], cost[i], reference) / whole for i in (at, blind)]
        runs.append({"seed": seed, "measurements": len(at), "share": shares[0], "share_of_random": shares[1]})
    size = len(front_of(rows, np.stack([-accuracy, cost], axis=1))[0])
    return {"subnets": len(rows), "true_front": size, "hypervolume": whole, "runs": runs}


def found(
    net: SuperNet, space: SearchSpace, rows: Indices, accuracy: Table, known: dict[bytes, int], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Positions of the at most MOST subnets that are measured: first uniform bits and a draw flat over cost, then, in
    rounds, what NSGA-II finds best within a ladder of budgets by a predictor that learned what is measured so far."""
    from predictors.accuracy import Ensemble
    from search.evolution import NSGA2
    from search.evolving import evolve
    from search.problem import Archive, Problem
    from supernet.samplers.cost_first import CostFirst

    costs = net.costs.view(space)
    uniform = [np.array(space.uniform(f"w{b}a{b}").row, dtype=np.int64) for b in BITS]
    drawn = CostFirst(space, costs).ask(FIRST, rng)
    at = list(dict.fromkeys(known[key] for key in keys(np.concatenate([np.array(uniform), drawn]))))
    low, high = costs.reachable("bitops")
    while len(at) < MOST:
        predictor = Ensemble(space, costs, rng=rng, members=4, steps=200)
        predictor.fit(rows[at], accuracy[at])
        ladder = np.geomspace(low, high, RUNGS + 1)[1:] * (1 + 1e-9)
        problem = Problem(space, costs, predictor, [{"bitops": float(limit)} for limit in ladder])
        archive = Archive(problem, keep=MOST)
        made = NSGA2(space, costs, problem.targets, rows[at[:1]], 60)
        evolve(problem, made, archive, 12, 60, rng, progress=False)
        fresh: list[int] = []
        for rank in range(MOST):
            for b in range(len(problem.budgets)):
                best = archive.top(b, rank + 1)[rank:]
                if len(best) and (one := known[keys(best)[0]]) not in at and one not in fresh:
                    fresh.append(one)
        if not fresh:
            break
        at += fresh[: min(ROUND, MOST - len(at))]
    return np.array(at)

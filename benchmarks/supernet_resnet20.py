"""A trained ResNet-20 supernet of CIFAR-10 and 2,000 measured subnets: what the other benchmarks start from.

    python benchmarks/supernet_resnet20.py --data DATA [--work runs/supernet_resnet20] [--publish]

DATA holds `cifar10/unpack.py` (writes the JPEG folder) and `pretrained/cifar10_jpeg_resnet20.safetensors` (88.78 % in
float on the 10,000 JPEG test images). The weights have seen the whole training part, so select = test[0:5000] and
test = test[5000:10000]. Four stages, each of which goes on where it was killed:

1. train: 10 epochs, three subnets a step (`elastibit train experiment=cifar10_resnet20`).
2. pairs: 13 of 20 are spread over log BitOps, as `elastibit predict` draws them; the rest lies within 5 % of the
   BitOps of w3a3 and of w4a4, where a predictor is judged at equal cost. 1,000 images for each subnet's BatchNorm
   statistics, 2,000 of select for its accuracy. Any first part of the plan has the same mixture.
3. best: the 200 that lead their neighbours in cost, measured again on all images of both parts.
4. predict: the default predictor learns from all pairs.

Images and weights are expected (and put) under `data/`, so that the run says nothing of this machine. `--publish`
copies the run to benchmarks/results/supernet_resnet20/ and writes what it is to supernet_resnet20.json beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import elastibit as eb
from supernet.artefacts import progress, provenance, read_json, read_jsonl, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES, WEIGHTS = Path("data/cifar10_jpeg"), Path("data/cifar10_jpeg_resnet20.safetensors")
WINDOWS = ("w3a3", "w4a4")
NEAR = 0.05
"""Half width of a window, relative to its BitOps."""
FLAT_OF, OF = 13, 20
"""Of so many pairs, so many are spread over log cost."""
RECALIBRATE, SELECT = 1000, 2000
"""Images that each subnet is measured on."""
PUBLISHED = (
    *("supernet.safetensors", "space.json", "config.yaml", "metrics.csv", "pairs.jsonl", "best.jsonl"),
    *("sensitivity.json", "predictor.safetensors", "predictor.json"),
)


def train(run: Path, epochs: int, seed: int) -> None:
    """Train, or go on; ends the benchmark with the door's exit code if it failed."""
    words = ["train", f"run={run}", "resume=true"]
    if not (run / "checkpoints" / "last.ckpt").exists():
        settings = ["schedule.lr=0.01", "subnets=3", "validation=[w2a2,w3a3,w4a4,w8a8]", f"epochs={epochs}"]
        data = [f"task.source.root={IMAGES / 'jpeg'}", f"backbone.weights={WEIGHTS}"]
        words = [
            "train",
            "experiment=cifar10_resnet20",
            *data,
            *settings,
            f"seed={seed}",
            "overwrite=true",
            f"run={run}",
        ]
    elif read_json(run / "space.json")["epochs"] >= epochs:
        return
    if code := eb.main(words):
        sys.exit(code)


def planned(net: Any, n: int, seed: int) -> Iterator[Any]:
    """n distinct subnets, flat ones and those of the windows in turn."""
    from predictors.pairs import plan
    from supernet.samplers.cost_first import CostFirst

    flat = plan(net, -(-n * FLAT_OF // OF), np.random.default_rng(seed))
    near, rng = CostFirst(net.space, net.costs), np.random.default_rng([seed, 1])
    limits = [net.costs.limit("bitops", bits) for bits in WINDOWS]
    seen: set[str] = set()
    for k in range(n):
        if k * FLAT_OF // OF != (k + 1) * FLAT_OF // OF:
            config = flat[k * FLAT_OF // OF]
        else:
            target = limits[k % len(limits)] * rng.uniform(1 - NEAR, 1 + NEAR, 1)
            config = net.space.config(near.at(target, rng)[0])
        if config.id not in seen:
            seen.add(config.id)
            yield config


def collect(run: Path, n: int, seed: int, compiled: str) -> None:
    """Measure what is missing of the plan."""
    from predictors.measuring import Measurer

    opened = eb.load(run)
    opened.net.compile(compiled, passes="evaluation")
    measurer = Measurer(
        opened.net, opened.task, recalibrate_images=RECALIBRATE, select_images=SELECT, out=run / "pairs.jsonl"
    )
    configs = list(planned(opened.net, n, seed))
    with progress("measuring subnets", len(configs)) as bar:
        for record in measurer(configs):
            bar.advance(note=f"{record['score']:.1%}")


def leaders(run: Path, n: int) -> list[list[int]]:
    """Rows of the n pairs that most of their 40 neighbours in cost do not beat, best first."""
    records = sorted(read_jsonl(run / "pairs.jsonl"), key=lambda r: float(r["costs"]["bitops"]))
    scores = np.array([r["score"] for r in records])
    beaten = np.zeros(len(records))
    for k in range(len(records)):
        first = max(0, min(k - 20, len(records) - 41))
        beaten[k] = (scores[first : first + 41] > scores[k]).mean()
    order = np.lexsort((-scores, beaten))[:n]
    return [records[k]["row"] for k in order]


def best(run: Path, n: int, compiled: str) -> None:
    """Measure the leaders again, on all images of both parts."""
    from predictors.measuring import Measurer

    opened = eb.load(run)
    opened.net.compile(compiled, passes="evaluation")
    measurer = Measurer(opened.net, opened.task, out=run / "best.jsonl")
    configs = [opened.net.space.config(row) for row in leaders(run, n)]
    with progress("measuring the best again", len(configs)) as bar:
        for record in measurer(configs):
            bar.advance(note=f"{record['score']:.1%}")


def predict(run: Path, seed: int) -> None:
    """Learn from the pairs that there are; ends the benchmark with the door's exit code if it failed."""
    none_more = "n=8"  # the landmarks, which every plan begins with
    images = [f"recalibrate_images={RECALIBRATE}", f"select_images={SELECT}"]
    if code := eb.main(["predict", f"run={run}", none_more, *images, f"seed={seed}"]):
        sys.exit(code)


def publish(run: Path, seed: int) -> None:
    """Copy the run to the results, each record with all kinds of cost that there are now, and write what it is."""
    from supernet.run import digest

    folder = RESULTS / "supernet_resnet20"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    costs = eb.load(run, needs_data=False).net.costs
    for name in ("pairs.jsonl", "best.jsonl"):
        if (run / name).exists():
            lines = [json.dumps(r | {"costs": costs.of(r["row"])}) for r in read_jsonl(run / name)]
            write_text(folder / name, "".join(f"{line}\n" for line in lines))
    counts = {name: len(read_jsonl(run / name)) for name in ("pairs.jsonl", "best.jsonl") if (run / name).exists()}
    seconds = sum(r["measured"]["seconds"] for r in read_jsonl(run / "pairs.jsonl"))
    result = {
        "command": shlex.join(["python", "benchmarks/supernet_resnet20.py", "--data", "DATA", "--publish"]),
        "sha256": digest(run),
        "epochs": read_json(run / "space.json")["epochs"],
        "records": counts,
        "images": {"recalibrate": RECALIBRATE, "select": SELECT},
        "provenance": provenance(seed),
        "measured": {"seconds": {"pairs": seconds}},
    }
    write_json(RESULTS / "supernet_resnet20.json", result)


def unpack(data: Path) -> None:
    """Put images and float weights under data/, if they are not there."""
    if not (IMAGES / "jpeg").exists():
        IMAGES.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(data / "cifar10" / "unpack.py"), str(IMAGES)], check=True)
    if not WEIGHTS.exists():
        shutil.copyfile(data / "pretrained" / WEIGHTS.name, WEIGHTS)


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/supernet_resnet20"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--best", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default="regional", dest="compiled")
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    unpack(options.data)
    train(options.work, options.epochs, options.seed)
    collect(options.work, options.pairs, options.seed, options.compiled)
    best(options.work, options.best, options.compiled)
    predict(options.work, options.seed)
    if options.publish:
        publish(options.work, options.seed)


if __name__ == "__main__":
    main()

"""The main job on real data: one search for four budgets in a trained ResNet-20 supernet, four exported files.

    python benchmarks/cifar10_resnet20.py --data DATA [--work runs/cifar10_resnet20]

Starts from the supernet, the pairs and the predictor of benchmarks/results/supernet_resnet20 (made by
supernet_resnet20.py, which says what DATA holds). Pairs, search and re-evaluation see the first half of the test part
only, the table is measured on the second. Every stage goes through the doors, and a stage that is complete is not run
again; a run that was killed goes on where it stopped.

Writes benchmarks/results/cifar10_resnet20.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import elastibit as eb
from benchmarks.supernet_resnet20 import RESULTS, ROOT, unpack
from supernet.artefacts import provenance, read_json, read_jsonl, write_json, write_text

RESULT, START = RESULTS / "cifar10_resnet20.json", RESULTS / "supernet_resnet20"
BUDGETS = ("w2a2", "w3a3", "w4a4", "w6a6")
MEASURED_ON = ("compile=regional",)
KINDS = {
    "searched": "searched",
    "uniform": "best uniform",
    "integer_program": "integer program",
    "random_search": "random search",
    "best_measured": "best of the pairs",
}


def door(*words: str) -> float:
    """Run one door in this process; seconds it took. Ends the benchmark with the door's exit code if it failed."""
    start = time.monotonic()
    code = eb.main(list(words))
    if code:
        sys.exit(code)
    return time.monotonic() - start


def stages(run: Path, seed: int) -> dict[str, float]:
    """Search and export, each only where its files are not there yet; seconds by stage."""
    seconds = {}
    if not (run / "front.json").exists():
        budgets = f"budget.bitops=[{','.join(BUDGETS)}]"
        seconds["search"] = door("search", f"run={run}", budgets, f"seed={seed}", *MEASURED_ON)
        shutil.copyfile(run / "measured.jsonl", START / "measured.jsonl")  # the same search there answers in seconds
    if not all((run / "export" / s["id"] / "card.json").exists() for s in read_json(run / "front.json")["subnets"]):
        seconds["export"] = door("export", f"run={run}", "subnet=all", "profile=int8")
    return seconds


def judged(run: Path) -> dict[str, Any]:
    """Accuracy on test of the float network, and of winner and controls at each budget, each subnet measured once."""
    from predictors.measuring import measure

    opened = eb.load(run)
    net, task = opened.net, opened.task
    recalibration, batches = list(task.recalibrate()), list(task.test())
    figures: dict[str, Any] = {
        "float_weights": float_accuracy(opened.config, task),
        "images": sum(len(y) for _, y in batches),
    }
    known: dict[str, float] = {}
    rows = []
    for subnet in read_json(run / "front.json")["subnets"]:
        row = {"budget": subnet["label"], "limit": subnet["budget"]["bitops"], "id": subnet["id"]}
        best = {"best_measured": best_measured(run, net, subnet["budget"]["bitops"])}
        for kind, candidate in {"searched": subnet, **subnet["controls"], **best}.items():
            if candidate["id"] not in known:
                known[candidate["id"]] = measure(net, candidate["indices"], recalibration, batches)
            keep = {cost: candidate["costs"][cost] for cost in ("bitops", "bytes")} | {"select": candidate["measured"]}
            row[kind] = keep | {"id": candidate["id"], "test": known[candidate["id"]]}
        card = read_json(run / "export" / subnet["id"] / "card.json")
        row["export"] = {part: card[part] for part in ("profile", "file", "costs", "verification", "measured")}
        rows.append(row)
    return figures | {"rows": rows, "predictor": read_json(run / "predictor.json").get("report")}


def best_measured(run: Path, net: Any, limit: float) -> dict[str, Any]:
    """The measured subnet of highest score within a limit of BitOps, as front.json describes a control.

    Of those that were measured again on all images, where there are any: the best of hundreds of scores on few images
    owes some of it to luck.
    """
    again = read_jsonl(run / "best.jsonl") if (run / "best.jsonl").exists() else []
    within = limit * (1 + 1e-12)
    records = again if any(r["costs"]["bitops"] <= within for r in again) else read_jsonl(run / "pairs.jsonl")
    inside = [r for r in records if r["costs"]["bitops"] <= within]
    best = max(inside, key=lambda r: (r["score"], r["id"]))
    row = {"id": best["id"], "indices": best["row"], "costs": net.costs.of(best["row"])}
    return row | {"measured": best["score"]}


def float_accuracy(config: dict[str, Any], task: Any) -> float:
    """Accuracy on test of the float network that training started from."""
    import torch

    from supernet.config import build

    model = build(config["backbone"], n_classes=task.n_classes, in_channels=task.in_channels).eval()
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).float() for images, labels in task.test()]
    return float(torch.cat(right).mean())


def table(result: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        f"| budget (BitOps) | {' | '.join(KINDS.values())} | exported file |",
        "|---" * (len(KINDS) + 2) + "|",
    ]
    for row in result["rows"]:
        cells = [f"{row['budget']} ({row['limit'] / 1e9:.3f} G)"]
        for kind in KINDS:
            known = f"{100 * row[kind]['test']:.2f} % at {row[kind]['bitops'] / 1e9:.3f} G" if kind in row else "-"
            cells.append(known)
        lines.append("| " + " | ".join([*cells, exported(row["export"])]) + " |")
    lines += [
        "",
        f"Accuracy on {result['images']} test images; the float network that training started from has "
        f"{100 * result['float_weights']:.2f} %. {result['epochs']} epochs, {result['pairs']} pairs, "
        f"seed {result['seed']}, {result['provenance']['measured']['cpu']}.",
        "`python benchmarks/cifar10_resnet20.py --data DATA`; figures in benchmarks/results/cifar10_resnet20.json",
    ]
    return "\n".join(lines)


def exported(card: dict[str, Any]) -> str:
    """What the table says of a file: accuracy in the runtime, agreement, size, speed against float."""
    figures = card["verification"]
    return (
        f"{100 * figures['accuracy']['file']:.2f} %, same label {100 * figures['agreement']:.2f} %, "
        f"{figures['bytes']['file'] / 1e3:.0f} kB, {card['measured']['latency']['speedup']:.1f}x"
    )


def main() -> None:
    """Run what is missing, judge, write JSON and table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_resnet20"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unpack(options.data)
    run = options.work
    if not (run / "space.json").exists():
        shutil.copytree(START, run)
    before = read_json(RESULT)["measured"]["seconds"] if RESULT.exists() else {}
    seconds = before | stages(run, options.seed)
    made = read_json(RESULTS / "supernet_resnet20.json")
    result = judged(run) | {
        "seed": options.seed,
        "epochs": made["epochs"],
        "pairs": made["records"]["pairs.jsonl"],
        "provenance": provenance(options.seed),
        "measured": {"seconds": seconds},
    }
    write_json(RESULT, result)
    text = (ROOT / "README.md").read_text()
    marks = "<!-- benchmark:cifar10_resnet20 -->", "<!-- /benchmark:cifar10_resnet20 -->"
    block = f"{marks[0]}\n{table(result)}\n{marks[1]}"
    write_text(ROOT / "README.md", re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: block, text, flags=re.DOTALL))
    print(table(result))


if __name__ == "__main__":
    main()

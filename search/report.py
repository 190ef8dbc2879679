"""Door `report`: everything that a run's files say, as one HTML file that needs no network.

The door measures one thing, once: winners and controls on test (search/judging.py). The page itself is made of files
only: no data, no weights, no torch. What a stage has not written yet is said, with the command that writes it.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import figures, page
from search.sections import test_section, tuning_section
from search.words import CONTROLS
from supernet.artefacts import read_json, write_text
from supernet.config import si
from supernet.desk import desk

if TYPE_CHECKING:
    from omegaconf import DictConfig

Record = dict[str, Any]
CARDS = ("card.json", "failed.json")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
UNITS = {"bytes": "B", "macs": "MACs", "latency": "s"}


def main(cfg: DictConfig) -> None:
    """Write report.html of the run that `cfg` (conf/report.yaml) names."""
    from hydra.core.hydra_config import HydraConfig

    out = Path(HydraConfig.get().runtime.output_dir)
    judged = on_test(cfg, out / "test.json")
    for found in judged["subnets"] if judged else []:
        print(f"{found['label']}: {found['verdict']}")
    path = write_report(cfg.run, out / "report.html", title=cfg.title, judged=judged)
    print(f"report: {path}")


def on_test(cfg: DictConfig, file: Path) -> Record | None:
    """What test says of the winners; None where there are none, or where nothing is known and nothing can be measured.

    Raises:
        FileNotFoundError: not a run directory.
        ValueError: a file is broken, or belongs to another space than the run.
    """
    files = read(Path(cfg.run))
    if files.front is None or cfg.test is False:
        return None
    import torch

    from search.judging import judge, key_of
    from supernet.run import digest, load

    known = read_json(file) if file.is_file() else {}
    if known.get("key") == key_of(files.front, digest(files.path), cfg.images):
        return dict(known)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    run = load(files.path, trusted=tuple(cfg.trust), needs_data=False)
    return None if run.task is None else dict(judge(run, files.front, file, images=cfg.images, seed=int(cfg.seed)))


def write_report(
    run: Path | str, path: Path | str, title: str | None = None, judged: Mapping[str, Any] | None = None
) -> Path:
    """Write the report of a run directory to `path`, and return it.

    Args:
        run: the run directory.
        path: the HTML file.
        title: heading; None: the run's name.
        judged: what test says of the winners (`search.judging.judge`).

    Raises:
        FileNotFoundError: not a run directory.
        ValueError: a file is broken, or belongs to another space than the run.
    """
    from plotly.offline import get_plotlyjs

    files = read(Path(run))
    name = title or files.path.resolve().name
    task = files.config.get("task")
    data = task["name"] if isinstance(task, dict) and "name" in task else "a task of your own"
    epochs = files.space["epochs"]
    trained = f"trained for {epochs} epoch{'' if epochs == 1 else 's'}" if epochs else "calibrated, not trained"
    subtitle = f"elastibit report: {data}, {trained}"
    sections = [
        ("front", "What was found", found_section(files)),
        ("test", "Did the search pay?", test_section(judged, files.front is not None, files.shown)),
        ("tuning", "Fine-tuning", tuning_section(files.tuned, files.shown)),
        ("bits", "Bits of every layer", bits_section(files)),
        ("export", "Exported files", export_section(files)),
        ("predictor", "How well subnets are predicted", predictor_section(files)),
        ("training", "Training", training_section(files)),
        ("origin", "Where this comes from", origin_section(files)),
    ]
    footer = "Accuracy is on select, the part that subnets are chosen with, unless a column says test."
    write_text(path, page.page(name, subtitle, get_plotlyjs(), summary(files), sections, footer))
    return Path(path)


@dataclass(frozen=True)
class Files:
    """What a run directory holds; None or empty where a stage has not run.

    Attributes:
        path: the directory.
        space: space.json.
        config: config.yaml.
        metrics: rows of metrics.csv.
        predictor: predictor.json.
        front: front.json.
        subnets: subnets/<id>.json by id.
        cards: export/<id>/card.json by id (with several profiles by id/profile), or failed.json where the file did not
            compute the same.
        tuned: finetuned/<id>/finetuned.json.
    """

    path: Path
    space: Record
    config: Record
    metrics: list[dict[str, str]] = field(default_factory=list)
    predictor: Record | None = None
    front: Record | None = None
    subnets: dict[str, Record] = field(default_factory=dict)
    cards: dict[str, Record] = field(default_factory=dict)
    tuned: list[Record] = field(default_factory=list)

    @property
    def shown(self) -> str:
        """The run as a command line names it, without the machine's folders."""
        return self.path.name if self.path.is_absolute() else self.path.as_posix()


def read(path: Path) -> Files:
    """The files of the run directory `path`; see `write_report` for what is refused."""
    if not (path / "space.json").is_file():
        raise FileNotFoundError(f"{path} is not a run directory: space.json is missing; train it first")
    space = read_json(path / "space.json")

    def own(file: Path) -> Record:
        record = read_json(file)
        if record.get("fingerprint", space["fingerprint"]) != space["fingerprint"]:
            made, wanted = record["fingerprint"], space["fingerprint"]
            raise ValueError(f"{file} is of space {made}, the run of {wanted}; make it again in this run")
        return dict(record)

    def optional(name: str) -> Record | None:
        return own(path / name) if (path / name).is_file() else None

    return Files(
        path,
        space,
        _config(path / "config.yaml"),
        _rows(path / "metrics.csv"),
        optional("predictor.json"),
        optional("front.json"),
        {file.stem: own(file) for file in sorted((path / "subnets").glob("*.json"))},
        _cards(path / "export", own),
        [own(file) for file in sorted((path / "finetuned").glob("*/finetuned.json"))],
    )


def _cards(folder: Path, own: Callable[[Path], Record]) -> dict[str, Record]:
    """Cards by the folder that they lie in: an id, or id/profile where several profiles were exported."""
    files = [file for name in CARDS for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}/{name}"))]
    return {file.parent.relative_to(folder).as_posix(): own(file) for file in files}


def _config(file: Path) -> Record:
    if not file.is_file():
        return {}
    import yaml

    try:
        return dict(yaml.safe_load(file.read_text()) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a YAML mapping ({str(error).splitlines()[0]}); restore it") from error


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


# -- sections ----------------------------------------------------------------------------------------------------------


def summary(files: Files) -> str:
    """The run in a few figures."""
    import math

    audit, dimensions = files.space["audit"], files.space["dimensions"]
    digits = sum(math.log10(len(d["choices"])) for d in dimensions)
    shown = [
        ("layers", str(audit["layers"])),
        ("MACs", si(audit["macs"])),
        ("MACs in quantized layers", f"{audit['covered']:.1%}"),
        ("choices to make", str(len(dimensions))),
        ("subnets, at most", "10" + f"{digits:.0f}".translate(SUPERSCRIPTS)),
    ]
    if files.front:
        shown.append(("budgets searched", str(len(files.front["subnets"]))))
    return page.facts(shown)


def found_section(files: Files) -> str:
    """The winners beside what they have to beat, as a plot for each kind of cost and as a table."""
    if not files.front:
        return page.missing("No search yet.", f"elastibit search run={files.shown} budget.bitops=[w3a3,w4a4]")
    subnets = files.front["subnets"]
    parts = [
        page.text(
            "Each budget is a hard limit. What the winner has to beat had the same limits: the best uniform bits, the "
            "integer program, and the best of as many random subnets as the search has measured."
        )
    ]
    if files.front["interrupted"]:
        parts.append(page.text("The search was stopped by hand before its end."))
    unscaled = not all(0 <= s["predicted"]["mean"] <= 1 and s["predicted"]["std"] for s in subnets)
    for kind in dict.fromkeys(kind for s in subnets for kind in s["budget"]):
        limited = [s for s in subnets if kind in s["budget"]]
        points = [] if unscaled else files.front["front"]
        parts.append(figures.html(figures.front(limited, kind, _unit(kind), points), f"plot-front-{kind}"))
    controls = [label for label, _ in CONTROLS.values()]
    head = ("budget", "measured", "predicted", *controls, "BitOps", "bytes", "of the limit", "verdict on select")
    return "".join([*parts, page.table(head, map(_found_row, subnets))])


def _found_row(found: Record) -> Sequence[str]:
    controls = [_percent(found["controls"].get(name, {}).get("measured")) for name in CONTROLS]
    predicted = found["predicted"]
    said = f"{predicted['mean']:.2%} ± {predicted['std']:.2%}" if predicted["std"] else "rank only"
    spent = ", ".join(f"{1 - spare:.1%}" for spare in found["slack"].values())
    costs = si(found["costs"]["bitops"]), si(found["costs"]["bytes"], "B")
    return found["label"], _percent(found["measured"]), said, *controls, *costs, spent, found.get("verdict", "")


def bits_section(files: Files) -> str:
    """A map of bits: a row for each chosen subnet, a column for each layer."""
    if not files.front or not files.subnets:
        return page.missing("No subnet was chosen yet.", f"elastibit search run={files.shown} budget.bitops=w4a4")
    chosen = [
        files.subnets[s["id"]] | {"label": s["label"]} for s in files.front["subnets"] if s["id"] in files.subnets
    ]
    genes = [d["name"] for d in files.space["dimensions"]]
    ends = (".weight", ".right.input")  # of layers, and of products of two activations
    names = [gene.removesuffix(end) for gene in genes for end in ends if gene.endswith(end)]
    words = "Blue is many bits, red is few; an empty field is a layer that the subnet leaves out."
    return page.text(words) + figures.html(figures.layer_bits(chosen, names), "plot-bits")


def predictor_section(files: Files) -> str:
    """Held-out pairs, and figures beside what a predictor has to beat."""
    if not files.predictor or "points" not in files.predictor["report"]:
        words = "No predictor was learned; a search without one ranks by the additive sensitivity."
        return page.missing(words, f"elastibit predict run={files.shown}")
    report = files.predictor["report"]
    held, total = report["pairs"], report["pairs"] + report["learned_from"]
    words = (
        f"{held} of {total} subnets were held out. Kendall's tau says how well they are ordered (1: perfectly); at "
        f"equal cost, only subnets whose {report['cost']} differ by at most {report['window']:.0%} are compared. The "
        "bars are one standard deviation."
    )
    compared = f"at equal cost ({report['pairs_equal_cost']} comparisons)"
    rows = [("predictor", _number(report["kendall"]), _number(report["kendall_equal_cost"]))]
    rows += [(name, _number(c["kendall"]), _number(c["kendall_equal_cost"])) for name, c in report["controls"].items()]
    allowed = _number(report.get("ceiling")), _number(report["ceiling_equal_cost"])
    rows.append(("what the measurements allow", *allowed))
    shown = [
        ("Kendall tau", _number(report["kendall"])),
        ("RMSE", f"{report['rmse']:.2%}"),
        ("within 1 std (0.68 is right)", f"{report['within_1_std']:.2f}"),
        ("within 2 std (0.95 is right)", f"{report['within_2_std']:.2f}"),
    ]
    plot = figures.html(figures.predicted(report["points"]), "plot-predictor")
    return page.text(words) + page.facts(shown) + plot + page.table(("", "Kendall tau", compared), rows)


def training_section(files: Files) -> str:
    """Loss and the accuracy of uniform subnets over the steps."""
    if not files.metrics:
        words = "The supernet was calibrated and not trained."
        return page.missing(words, f"elastibit train run={files.shown} overwrite=true epochs=5")
    parts = [
        page.text(
            "Accuracy of uniform subnets on some images of select after each epoch; loss is the mean of 20 steps."
        )
    ]
    parts.append(figures.html(figures.curves(files.metrics, "select/", "accuracy (%)", 100.0), "plot-accuracy"))
    parts.append(figures.html(figures.curves(files.metrics, "train/loss", "loss"), "plot-loss"))
    return "".join(parts)


def export_section(files: Files) -> str:
    """A row for each exported file: does it compute the same, how accurate, how large, how fast; and what failed."""
    if not files.cards:
        return page.missing("Nothing was exported yet.", f"elastibit export run={files.shown}")
    words = (
        "Each file was run in onnxruntime beside the network that it was made from, on test images. Equal predictions "
        "are those of file and network; times are for one image and one thread."
    )
    head = ("subnet", "file", "verdict", "test accuracy", "equal predictions", "bytes", "of float", "time", "of float")
    labels = {s["id"]: s["label"] for s in files.front["subnets"]} if files.front else {}
    old = {name: f"{card['about'].get('budget', name)}, of an earlier search" for name, card in files.cards.items()}
    ids = {name: name.partition("/")[0] for name in files.cards}
    order = sorted(files.cards, key=lambda name: [*labels, *ids.values()].index(ids[name]))
    rows = [_card_row(labels.get(ids[name], old[name]), files.cards[name]) for name in order]
    failed = [line for card in files.cards.values() for line in card["verification"]["failures"]]
    return "".join([page.text(words), page.table(head, rows), *map(page.text, failed)])


def _card_row(label: str, card: Record) -> Sequence[str | page.Verdict]:
    proof, speed = card["verification"], card["measured"].get("latency")
    size, whole = proof["bytes"]["file"], proof["bytes"]["float"]
    verdict = page.Verdict("computes the same" if proof["passed"] else "differs", proof["passed"])
    accuracy = f"{proof['accuracy']['file']:.2%} of {proof['images']}"
    sizes = si(size, "B"), f"{size / whole:.0%}"
    times = (f"{speed['file_ms']:.3g} ms", f"{speed['file_ms'] / speed['float_ms']:.0%}") if speed else ("-", "-")
    return label, card["profile"], verdict, accuracy, f"{proof['agreement']:.2%}", *sizes, *times


def origin_section(files: Files) -> str:
    """Command, date, machine and seed of every file, and the versions."""
    made: dict[str, Record] = {"space.json": files.space.get("provenance", {})}
    if files.predictor:
        made["predictor.json"] = files.predictor["report"].get("provenance", {})
    if files.front:
        made["front.json"] = files.front["provenance"]
    made |= {f"finetuned/{record['id']}": record["provenance"] for record in files.tuned}
    head = ("file", "command", "date", "seed", "processor")
    rows = []
    for name, origin in made.items():
        measured = origin.get("measured", {})
        rows.append(
            (
                name,
                measured.get("command", ""),
                measured.get("date", ""),
                str(origin.get("seed")),
                measured.get("cpu", ""),
            )
        )
    versions = made["space.json"].get("versions", {})
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return page.text(f"Space {files.space['fingerprint']}; {said}.") + page.table(head, rows)


def _unit(kind: str) -> str:
    return UNITS.get(kind, "BitOps")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(desk("report", main))

"""One subnet as a folder: the file, and the card that says what it is, what it costs and how it was proved."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from supernet.artefacts import VerificationError, provenance, read_json, write_bytes, write_json, write_text
from supernet.config import build, si
from supernet.export.suite import Suite
from supernet.export.verify import require
from supernet.interfaces import Batch, Exporter

CONF = Path(__file__).resolve().parents[2] / "conf" / "profile"
FILE, CARD, TEXT, FAILED = "model.onnx", "card.json", "card.md", "failed.json"
PROFILES = "profiles.json"


def export(
    subnet: nn.Module,
    example: Float[Tensor, "1 ..."],
    out: Path | str,
    profile: str | Exporter | Suite = "int8",
    batches: Iterable[Batch] = (),
    *,
    meta: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Write `out/model.onnx` (the suffix is the profile's), prove it, and describe it in `out/card.json` and `card.md`.

    Nothing is put into `out` before the proof has succeeded; files of an earlier export are then replaced one by one,
    the card last.

    Args:
        subnet: what `SuperNet.materialise` returns, with the BatchNorm statistics to export.
        example: one input.
        out: the folder.
        profile: name of a file of conf/profile, or an Exporter; with `all` or a Suite see `every`.
        batches: test images and labels to verify with; walked through once by each profile.
        meta: what the card is to say of model, data and subnet, by name.
        seed: of the run, for the record.

    Returns:
        The card.

    Raises:
        ValueError: a subnet that cannot be exported, an unknown profile, no batches.
        VerificationError: the file does not compute what the subnet does; all figures are in `out/failed.json` then.
    """
    out = Path(out)
    exporter = named(profile) if isinstance(profile, str) else profile
    if isinstance(exporter, Suite):
        return every(subnet, example, out, exporter, batches, meta=meta, seed=seed)
    name = profile if isinstance(profile, str) else getattr(exporter, "name", type(exporter).__name__)
    with tempfile.TemporaryDirectory() as draft:
        file = exporter.export(subnet, example, Path(draft) / FILE)
        figures = exporter.verify(file, subnet, batches)
        return _keep(file, {"profile": name, "about": dict(meta or {}), "seed": seed}, figures, out)


def _keep(file: Path, words: Mapping[str, Any], figures: dict[str, Any], out: Path) -> dict[str, Any]:
    """Describe a written file by a card, and put it and what lies beside it into `out` if its proof succeeded."""
    if file.suffix == ".onnx":
        stamp(file, figures, words["about"], words["seed"])
    contents = {path.name: path.read_bytes() for path in sorted(file.parent.iterdir())}
    written = [_described(name, content) for name, content in contents.items()]
    card = {
        "profile": words["profile"],
        "file": next(row for row in written if row["name"] == file.name),
        "beside": [row for row in written if row["name"] != file.name],
        "about": words["about"],
        **figures,
        "provenance": provenance(words["seed"]),
    }
    if not figures["verification"]["passed"]:
        write_json(out / FAILED, card)
        require(figures["verification"])
    before = _files(out / CARD)
    for name, content in contents.items():
        write_bytes(out / name, content)
    write_text(out / TEXT, text(card))
    write_json(out / CARD, card)
    for name in {FAILED, *before} - contents.keys():
        (out / name).unlink(missing_ok=True)
    return card


def every(
    subnet: nn.Module,
    example: Float[Tensor, "1 ..."],
    out: Path,
    suite: Suite,
    batches: Iterable[Batch],
    *,
    meta: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Each profile of a suite that the subnet can have, in `out/<profile>/`; `out/profiles.json` lists them.

    Args: as `export`.

    Returns:
        `cards` by profile, and `skipped`: why the subnet, or this installation, cannot have the others.

    Raises:
        ValueError: an unknown profile, no batches, or no profile at all that the subnet can have.
        VerificationError: files of some profiles do not compute what the subnet does; those of the others are written.
    """
    batches = list(batches) if iter(batches) is batches else batches
    cards: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    failures: dict[str, str] = {}
    paths = {name: _option(name) for name in suite.profiles}
    for name, path in paths.items():
        with tempfile.TemporaryDirectory() as draft:
            try:
                exporter: Exporter = _built(path)
                file = exporter.export(subnet, example, Path(draft) / FILE)
            except ValueError as error:
                skipped[name] = str(error)
                continue
            except VerificationError as error:  # the runtime that is installed does not load it
                failures[name] = str(error)
                continue
            words = {"profile": name, "about": dict(meta or {}), "seed": seed}
            try:
                cards[name] = _keep(file, words, exporter.verify(file, subnet, batches), out / name)
            except VerificationError as error:
                failures[name] = str(error)
    if not cards and not failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"the subnet can have none of the profiles {', '.join(suite.profiles)} ({reasons})")
    write_json(out / PROFILES, {"written": list(cards), "skipped": skipped, "failed": list(failures)})
    if failures:
        raise VerificationError("\n".join(f"{name}: {reason}" for name, reason in failures.items()))
    return {"cards": cards, "skipped": skipped}


def stamp(file: Path, figures: dict[str, Any], meta: Mapping[str, Any], seed: int | None) -> None:
    """Give an ONNX file what its card says, in its metadata: all but what was measured in time, and long descriptions.

    The graph stays as it was proved; `figures` learn how many bytes the file has now.
    """
    import onnx

    model, proof = onnx.load(file), figures["verification"]
    about = {name: value for name, value in meta.items() if not isinstance(value, Mapping | list)}
    measured = {name: proof[name] for name in ("images", "accuracy", "agreement")}
    origin = provenance(seed)
    words = {
        "about": about,
        "verification": measured,
        "provenance": {name: origin[name] for name in ("seed", "versions")},
    }
    for name, value in words.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"elastibit.{name}", json.dumps(value, separators=(",", ":"), default=str)
    write_bytes(file, model.SerializeToString())
    proof["bytes"]["file"] = file.stat().st_size


def _described(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _files(path: Path) -> list[str]:
    """Names of the files that an earlier card describes; a card that cannot be read describes none."""
    try:
        card = read_json(path)
        return [Path(row["name"]).name for row in (card["file"], *card.get("beside", ()))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def named(profile: str) -> Exporter | Suite:
    """The exporter, or exporters, that conf/profile/<name>.yaml describes.

    Raises:
        ValueError: there is no such file, or what it needs is not installed.
    """
    return _built(_option(profile))


def _option(profile: str) -> Path:
    path = CONF / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONF.glob("*.yaml")))
        raise ValueError(f"no export profile {profile!r}; choose one of {known}")
    return path


def _built(path: Path) -> Any:
    from omegaconf import OmegaConf

    return build(OmegaConf.load(path))


# -- the card as text --------------------------------------------------------------------------------------------------
def text(card: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    parts = [_head(card), _measured(card), _costs(card["costs"]), _layers(card["layers"]), _origin(card["provenance"])]
    return "\n\n".join(parts) + "\n"


def _head(card: Mapping[str, Any]) -> str:
    about = [(name, value) for name, value in card["about"].items() if not isinstance(value, Mapping | list)]
    rows = [*about, ("profile", card["profile"]), ("sha256", card["file"]["sha256"])]
    title = f"# {card['about'].get('name', 'Exported subnet')}"
    return "\n".join([title, "", *(f"- {name}: {value}" for name, value in rows if name != "name")])


def _measured(card: Mapping[str, Any]) -> str:
    proof = card["verification"]
    accuracy = proof["accuracy"]
    off = max((row["most_off"] for row in proof["operators"]), default=0.0)
    rows = [
        ("accuracy of the file", f"{accuracy['file']:.2%} of {proof['images']} test images"),
        ("accuracy of the deployed network (reference)", f"{accuracy['deployed']:.2%}"),
        ("accuracy of the trained subnet", f"{accuracy['subnet']:.2%}"),
        ("file and reference predict the same", f"{proof['agreement']:.2%} (needed: {proof['agreement_needed']:.1%})"),
        *_default(proof),
        ("largest difference of an operator, in codes", f"{off:.3g}"),
        *_bytes(proof["bytes"]),
        *_latency(card["measured"].get("latency")),
        ("kernels", ", ".join(f"{count} {kind}" for kind, count in proof["kernels"].items())),
    ]
    table = ["## Measured", "", "| what | figure |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join([*table, "", *_lint(proof.get("lint", ()))])


def _default(proof: Mapping[str, Any]) -> list[tuple[str, str]]:
    if proof.get("default_agreement") is None:
        return []
    figures = f"{proof['default_agreement']:.2%}, accuracy {proof['accuracy']['file_default']:.2%}"
    return [("the same, where onnxruntime's accuracy level is not set to 0", figures)]


def _bytes(size: Mapping[str, int]) -> list[tuple[str, str]]:
    rows = [("size", f"{si(size['file'], 'B')}; in float32 {si(size['float'], 'B')}")]
    if "ideal" in size:
        over = ", ".join(f"{size['bare'] / size[which]:.3f} of {which}" for which in ("ideal", "nominal"))
        rows.append(("size without metadata", f"{si(size['bare'], 'B')}: {over} (the cost model's prediction)"))
    return rows


def _latency(speed: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not speed:
        return []
    times = f"{speed['file_ms']:.3g} ms; in float32 {speed['float_ms']:.3g} ms ({speed['speedup']:.2f} times as fast)"
    if "file_default_ms" in speed:
        times = f"{times}; with the runtime's defaults {speed['file_default_ms']:.3g} ms"
    return [(f"time for one image, one thread, median of {speed['rounds']}", times)]


def _lint(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """One line for each reason to compute in float."""
    nodes: dict[str, list[str]] = {}
    for row in rows:
        nodes.setdefault(row["why"], []).append(row["node"])
    lines = [f"- {why}: {', '.join(names)}" for why, names in nodes.items()]
    return ["Computed in float:", "", *lines] if lines else ["Computed in float: nothing."]


def _costs(costs: Mapping[str, float]) -> str:
    rows = [
        ("BitOps, all layers at their true bits", si(costs["bitops"])),
        ("BitOps, first and last layer counted at 8 bits", si(costs["bitops_first_last_8"])),
        ("BitOps, first and last layer left out", si(costs["bitops_inner"])),
        ("bytes at true bits: codes, scales, zero-points, biases", si(costs["bytes"], "B")),
        ("multiply-accumulates", si(costs["macs"])),
    ]
    return "\n".join(["## Costs", "", "| cost | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _layers(rows: list[Mapping[str, Any]]) -> str:
    lines = ["| layer | weight | input bits | stored bits | scales | MACs |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["name"], row["weight"], row["input_bits"], row["stored_bits"], row["scales"], si(row["macs"])]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(["## Layers", "", *lines])


def _origin(origin: Mapping[str, Any]) -> str:
    measured = origin["measured"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    rows = [f"- command: `{measured['command']}`", f"- date: {measured['date']}", f"- processor: {measured['cpu']}"]
    return "\n".join(["## Origin", "", *rows, f"- seed: {origin['seed']}", f"- versions: {versions}"])

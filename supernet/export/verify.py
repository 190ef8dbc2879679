"""Proof that a written file computes the deployed network: operator by operator on codes, and whole on images.

Two questions, two rulers. (a) Each operator of the file, cut out, gets the reference's own input codes: at most one
output code off, at least 99.9 % of them equal. (b) The whole file sees images: the prediction of the reference for at
least 99.9 % of them at 8 bits and 99.5 % below, and its accuracy within 0.1 points. (b) cannot be stricter: where two
orders of evaluation put a value on different sides of a tie, a network of few bits carries the step on.

Where float kernels stand between codes (layer normalisation, softmax), even one right evaluation differs from the next
in last bits. There the reference is evaluated once more with such differences (`Deployed.jittered`), and the file may
disagree with it twice as often as that control does, if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.artefacts import VerificationError
from supernet.elastic.wrap import evaluating
from supernet.export.graph import Deployed, Op
from supernet.export.operators import Layer
from supernet.export.runtime import Parts, counts, requantizes, run, session, unfused
from supernet.interfaces import Batch

CODES_OFF = 1.0
CODES_EQUAL = 0.999
REAL_OFF = 1e-4
"""Of the largest value: for outputs that are no codes."""

EQUAL_AT_8_BITS, EQUAL_BELOW = 0.999, 0.995
ACCURACY_OFF = 0.001
OPERATOR_IMAGES = 32
CONTROLS = 2


def verify(
    model: onnx.ModelProto, deployed: Deployed, batches: Iterable[Batch], subnet: nn.Module | None = None
) -> dict[str, Any]:
    """Compare a written model with its deployed network, in onnxruntime on one thread.

    Args:
        model: as loaded from the file.
        deployed: the reference.
        batches: images and labels; the first images also feed the operators.
        subnet: the trained module, to say how far deployment itself has moved it.

    Returns:
        `passed`, `failures` (one line each), `operators` (a row for each), `kernels` (how often each kind runs),
        `unfused` (nodes that compute in float), and what `compare` gives.

    Raises:
        ValueError: no batches.
        VerificationError: the reference gives the same output for every image, so that agreement would prove nothing.
    """
    made, kernels = session(model)
    files = {"file": made} | ({"file_default": session(model, exact=False)[0]} if requantizes(kernels) else {})
    logits, labels, images = outputs(files, deployed, batches, subnet)
    whole = compare(logits, labels, narrowest(deployed))
    rows = operators(model, deployed, images[:OPERATOR_IMAGES])
    bad = [f"operator {row['name']}: {row['verdict']}" for row in rows if row["verdict"] != "ok"]
    failures = [*whole.pop("failures"), *bad]
    passed = {"passed": not failures, "failures": failures}
    return passed | whole | {"kernels": counts(kernels), "unfused": unfused(kernels), "operators": rows}


def require(report: Mapping[str, Any]) -> None:
    """Raise VerificationError, with a table of all operators, if a report of `verify` did not pass."""
    if not report["passed"]:
        lines = [*report["failures"], "", *table(report["operators"])]
        raise VerificationError("\n  ".join(["the written file does not compute the deployed network:", *lines]))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each operator, and a head."""
    width = max((len(row["name"]) for row in rows), default=8)
    lines = [f"{'operator':{width}}  {'kernel':24}  {'values':>9}  {'most off':>8}  {'equal %':>8}  verdict"]
    for row in rows:
        figures = f"{row['values']:9}  {row['most_off']:8.3g}  {100 * row['equal']:8.4f}"
        lines.append(f"{row['name']:{width}}  {row['kernel']:24}  {figures}  {row['verdict']}")
    return lines


def narrowest(deployed: Deployed) -> int:
    """Fewest bits of any weight or activation."""
    activations = [op.grid.bits for op in deployed.operators() if op.grid is not None]
    return min(activations + [op.choice.bits for op in deployed.operators() if isinstance(op, Layer)])


# -- (a) operators -----------------------------------------------------------------------------------------------------
Engine = Callable[[onnx.ModelProto, Mapping[str, Tensor]], tuple[NDArray[np.float64], str]]
"""Runs a part of a file on the reference's codes (or real numbers) by name; gives output and main kernel."""


def in_onnxruntime(part: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], str]:
    """The engine of files for onnxruntime."""
    made, kernels = session(part)
    return run(made, inputs), _main(kernels)


@torch.no_grad()
def operators(
    model: onnx.ModelProto,
    deployed: Deployed,
    images: Float[Tensor, "n ..."],
    engine: Engine = in_onnxruntime,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """One row for each operator of the file, run alone on the reference's codes for `images`.

    `exact` allows no difference at all; else see the head of this file.

    Where an input or the output of the reference is constant, equality would prove nothing; the operator gets random
    codes of its inputs' grids instead, and the row says so (`constant`).
    """
    kept, parts = deployed.tensors(images), Parts(model)
    return [_operator(parts, deployed, op, kept, engine, exact) for op in deployed.operators()]


def _operator(
    parts: Parts, deployed: Deployed, op: Op, kept: Mapping[str, Tensor], engine: Engine, exact: bool
) -> dict[str, Any]:
    inputs = {name: kept[name] for name in op.inputs}
    expected = kept[op.name]
    constant = any(bool((t == t.flatten()[0]).all()) for t in (*inputs.values(), expected))
    if constant:
        inputs = {name: _any(deployed, name, value) for name, value in inputs.items()}
        expected = op([inputs[n] for n in op.inputs], [deployed.grids[n] for n in op.inputs])
    output, kernel = engine(parts.cut(list(inputs), op.name), inputs)
    off = np.abs(output - expected.double().cpu().numpy())
    bits = op.choice.bits if isinstance(op, Layer) else None
    about = {"name": op.name, "kind": op.kind, "kernel": kernel, "weight_bits": bits, "constant": constant}
    return about | {"values": expected.numel()} | _difference(off, expected, op.grid is not None, exact)


def _any(deployed: Deployed, name: str, value: Tensor) -> Tensor:
    """Random codes on a tensor's grid, or random numbers."""
    grid, generator = deployed.grids[name], torch.Generator().manual_seed(0)
    if grid is None:
        return torch.randn(value.shape, generator=generator)
    return torch.randint(grid.low, grid.high + 1, value.shape, generator=generator).float()


def _main(kernels: list[tuple[str, str]]) -> str:
    """The kernel that does the work: the first that is no conversion, if there is one."""
    helpers = (
        "QuantizeLinear",
        "DequantizeLinear",
        "Clip",
        "Transpose",
        "Cast",
        "ReorderInput",
        "ReorderOutput",
        "Pad",
    )
    return next((kind for kind, _ in kernels if kind not in (*helpers, "Identity")), kernels[-1][0])


def _difference(off: NDArray[np.float64], expected: Tensor, codes: bool, exact: bool) -> dict[str, Any]:
    scale, allowed, what = 1.0, 0.0 if exact else CODES_OFF, "codes"
    if not codes:
        scale, allowed, what = max(float(expected.abs().max()), 1e-30), REAL_OFF, "of the largest value"
    most, equal = float(off.max()) / scale, float((off <= (0.0 if codes else REAL_OFF * scale)).mean())
    verdict = "ok"
    if most > allowed:
        verdict = f"{most:.3g} {what} off, allowed is {allowed:g}"
    elif equal < CODES_EQUAL:
        verdict = f"{100 * equal:.2f} % equal, at least {100 * CODES_EQUAL:g} % must be"
    return {"most_off": most, "equal": equal, "verdict": verdict}


# -- (b) the whole file ------------------------------------------------------------------------------------------------
@torch.no_grad()
def outputs(
    files: Mapping[str, Any],
    deployed: Deployed,
    batches: Iterable[Batch],
    subnet: nn.Module | None,
    others: Mapping[str, nn.Module] | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Logits by who computed them, labels, and the images of the first batch.

    Args:
        files: sessions, by name.
        deployed, batches, subnet: see `verify`.
        others: more networks on the same images, by name.
    """
    logits: dict[str, list[Tensor]] = {**{name: [] for name in files}, "deployed": []}
    labels: list[Tensor] = []
    first, rng = torch.empty(0), torch.Generator().manual_seed(0)
    for images, target in batches:
        first = first if labels else images
        for name, made in files.items():
            logits[name].append(torch.from_numpy(run(made, {deployed.source: images})))
        for name, network in {"deployed": deployed, **(others or {})}.items():
            logits.setdefault(name, []).append(network(images).double())
        for k in range(CONTROLS if deployed.coupled else 0):
            logits.setdefault(f"control {k}", []).append(deployed.jittered(images, rng).double())
        if subnet is not None:
            with evaluating(subnet):
                logits.setdefault("subnet", []).append(subnet(images).double())
        labels.append(target)
    if not labels:
        raise ValueError("verification needs a batch of (images, labels), got none; raise the number of test images")
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels), first


def compare(logits: Mapping[str, Float[Tensor, "n k"]], labels: Int[Tensor, " n"], bits: int) -> dict[str, Any]:
    """Predictions of the file beside those of the reference.

    Args:
        logits: of `file` and `deployed`, of `subnet` and `file_default` if they are to be reported, and of controls
            (`control <k>`), if any.
        labels: the classes.
        bits: fewest bits in the network; decides how many predictions must be equal.

    Returns:
        `failures`, `images`, `accuracy` by name, `agreement` (share of equal predictions) and `agreement_needed`,
        `control_agreement` of the worst control, `subnet_agreement` of the trained module, `default_agreement` of the
        file in a session with onnxruntime's defaults where that computes something else (see `runtime.session`),
        `sqnr_db` of the logits (None: equal), every one of the `disagreements` with its margin, beside the
        `median_margin`.
    """
    reference, file, n = logits["deployed"], logits["file"], len(labels)
    if bool((reference == reference[0]).all()):
        raise VerificationError(
            f"the deployed network gives the same output for all {n} images, so that agreement would prove nothing; "
            "recalibrate its BatchNorm, or use more bits or more images"
        )
    top = {name: values.argmax(1) for name, values in logits.items()}
    controls = [name for name in top if name.startswith("control")]
    accuracy = {name: float((top[name] == labels).double().mean()) for name in top if name not in controls}
    equal = {name: float((choice == top["deployed"]).double().mean()) for name, choice in top.items()}
    control = min((equal[name] for name in controls), default=None)
    slack = 0.0 if control is None else 2 * (1 - control)
    needed = EQUAL_AT_8_BITS if bits >= 8 else EQUAL_BELOW
    needed = needed if control is None else min(needed, 1 - slack)
    noise = float((file - reference).pow(2).sum())
    best = reference.topk(min(2, reference.shape[1])).values
    return {
        "failures": _failures(accuracy, equal["file"], needed, n, slack),
        "images": n,
        "bits": bits,
        "accuracy": accuracy,
        "agreement": equal["file"],
        "agreement_needed": needed,
        "control_agreement": control,
        "subnet_agreement": equal.get("subnet"),
        "default_agreement": equal.get("file_default"),
        "sqnr_db": 10 * float(torch.log10(reference.pow(2).sum() / noise)) if noise else None,
        "median_margin": float((best[:, 0] - best[:, -1]).median()),
        "disagreements": _disagreements(reference, top, labels),
    }


def _failures(accuracy: Mapping[str, float], equal: float, needed: float, n: int, slack: float) -> list[str]:
    failures = []
    if equal < needed:
        failures.append(f"equal predictions: {100 * equal:.2f} % of {n} images, at least {100 * needed:g} % must be")
    allowed = max(ACCURACY_OFF, 1 / n, slack)  # in a small test part one image weighs more than 0.1 points
    if abs(accuracy["file"] - accuracy["deployed"]) > allowed + 1e-12:
        found = f"{100 * accuracy['file']:.2f} % in the file, {100 * accuracy['deployed']:.2f} % deployed"
        failures.append(f"accuracy: {found}, at most {100 * allowed:.2g} points apart are allowed")
    return failures


def _disagreements(reference: Tensor, top: Mapping[str, Tensor], labels: Tensor) -> list[dict[str, Any]]:
    """Margin: the reference's logit of its own class less that of the file's class."""
    rows = []
    for i in (top["file"] != top["deployed"]).nonzero().flatten().tolist():
        ours, theirs = int(top["deployed"][i]), int(top["file"][i])
        margin = float(reference[i, ours] - reference[i, theirs])
        rows.append({"image": i, "label": int(labels[i]), "deployed": ours, "file": theirs, "margin": margin})
    return rows

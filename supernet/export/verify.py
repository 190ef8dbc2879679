"""Proof that a written file computes the deployed network: operator by operator on codes, and whole on images.

Two questions with two rulers. (a) Each operator of the file, cut out, gets the reference's own input codes: at most one output code off, at least 99.9 % equal. (b) The
whole file sees images: the same prediction as the reference for at least 99.9 % of them at 8 bits, 99.5 % below, and the accuracy within 0.1 points. (b)
cannot be stricter: where two orders of evaluation put a value on different sides of a tie, a network of few bits carries the step on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.artefacts import VerificationError
from supernet.export.graph import Deployed, Op
from supernet.export.operators import Layer
from supernet.export.runtime import Parts, counts, run, session, unfused
from supernet.interfaces import Batch

CODES_OFF = 1.0
CODES_EQUAL = 0.999
REAL_OFF = 1e-4
TOP1_EQUAL = {8: 0.999, 0: 0.995}
ACCURACY_OFF = 0.001
OPERATOR_IMAGES = 32


def verify(
    model: onnx.ModelProto, deployed: Deployed, batches: Iterable[Batch], subnet: nn.Module | None = None
) -> dict[str, Any]:
    """Compare a written model with its deployed network.

    Args:
        model: as loaded from the file.
        deployed: the reference.
        batches: images and labels; the first batch also feeds the operators.
        subnet: the trained module, to say how far deployment itself moved it.

    Returns:
        `passed`, `failures` (one line each), `operators` (rows), `accuracy`, `equal_top1`, `disagreements`, `kernels`, `unfused`, ...

    Raises:
        ValueError: no batches.
        VerificationError: the reference gives the same output for every image, so that agreement would prove nothing.
    """
    logits, labels, images = _outputs(model, deployed, batches, subnet)
    whole = _whole(logits, labels, _narrowest(deployed))
    rows = operators(model, deployed, images[:OPERATOR_IMAGES])
    _, kernels = session(model)
    bad = [f"operator {row['name']}: {row['verdict']}" for row in rows if row["verdict"] != "ok"]
    failures = whole.pop("failures") + bad
    return (
        {"passed": not failures, "failures": failures}
        | whole
        | {"operators": rows, "kernels": counts(kernels), "unfused": unfused(kernels)}
    )


def require(report: dict[str, Any]) -> None:
    """Raise VerificationError with a table of all operators if a report of `verify` did not pass."""
    if not report["passed"]:
        raise VerificationError(
            "the written file does not compute the deployed network:\n  "
            + "\n  ".join([*report["failures"], "", *table(report["operators"])])
        )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each operator."""
    width = max(len(row["name"]) for row in rows)
    head = f"{'operator':{width}}  {'kernel':26} {'values':>9} {'largest off':>11} {'equal %':>9}  verdict"
    return [
        head,
        *(
            f"{r['name']:{width}}  {r['kernel']:26} {r['values']:9} {r['most_off']:11.3g} {100 * r['equal']:9.4f}  {r['verdict']}"
            for r in rows
        ),
    ]


# -- (a) operators -------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def operators(model: onnx.ModelProto, deployed: Deployed, images: Tensor) -> list[dict[str, Any]]:
    """One row for each operator of the file, run alone on the reference's codes for `images`."""
    kept, parts = deployed.tensors(images), Parts(model)
    return [_operator(parts, deployed, op, kept) for op in deployed.operators()]


def _operator(parts: Parts, deployed: Deployed, op: Op, kept: dict[str, Tensor]) -> dict[str, Any]:
    inputs = {name: kept[name] for name in dict.fromkeys(op.inputs)}
    expected = kept[op.name]
    constant = bool((expected == expected.flatten()[0]).all())
    if constant:  # equal constants prove nothing: any codes of the input's grid will do instead
        inputs = {name: _any_codes(deployed, name, value) for name, value in inputs.items()}
        expected = op([inputs[n] for n in op.inputs], [deployed.grids[n] for n in op.inputs])
    made, kernels = session(parts.cut(list(inputs), op.name))
    got = run(made, inputs)
    row = {
        "name": op.name,
        "kind": op.kind,
        "kernel": _main(kernels),
        "weight_bits": op.bits if isinstance(op, Layer) else None,
        "values": expected.numel(),
    }
    return row | _difference(got, expected.double().cpu().numpy(), op.grid is not None) | {"constant": constant}


def _any_codes(deployed: Deployed, name: str, value: Tensor) -> Tensor:
    grid = deployed.grids[name]
    generator = torch.Generator().manual_seed(0)
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
        "Identity",
    )
    return next((kind for kind, _ in kernels if kind not in helpers), kernels[-1][0])


def _difference(got: NDArray[np.float64], expected: NDArray[np.float64], codes: bool) -> dict[str, Any]:
    off = np.abs(got - expected)
    if not codes:
        off = off / max(float(np.abs(expected).max()), 1e-30)
    most, equal = float(off.max()), float((off <= (0 if codes else REAL_OFF)).mean())
    if most > (CODES_OFF if codes else REAL_OFF):
        verdict = f"{most:.3g} {'codes' if codes else 'of the largest value'} off, allowed is {CODES_OFF if codes else REAL_OFF:g}"
    elif equal < CODES_EQUAL:
        verdict = f"{100 * equal:.2f} % of the codes equal, at least {100 * CODES_EQUAL:g} % must be"
    else:
        verdict = "ok"
    return {"most_off": most, "equal": equal, "verdict": verdict}


# -- (b) the whole file --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def _outputs(
    model: onnx.ModelProto, deployed: Deployed, batches: Iterable[Batch], subnet: nn.Module | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Logits by who computed them, labels, and the images of the first batch."""
    made, _ = session(model)
    subnet = subnet.eval() if subnet is not None else None
    logits: dict[str, list[Tensor]] = {"file": [], "deployed": [], **({"subnet": []} if subnet is not None else {})}
    labels, first = [], None
    for images, target in batches:
        first = images if first is None else first
        logits["file"].append(torch.from_numpy(run(made, {deployed.source: images})))
        logits["deployed"].append(deployed(images).double())
        if subnet is not None:
            logits["subnet"].append(subnet(images).double())
        labels.append(target)
    if first is None:
        raise ValueError(
            "verification needs at least one batch of (images, labels), got none; raise the number of test images above 0"
        )
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels), first


def _whole(logits: dict[str, Tensor], labels: Tensor, bits: int) -> dict[str, Any]:
    reference, file = logits["deployed"], logits["file"]
    n = len(labels)
    if bool((reference == reference[0]).all()):
        raise VerificationError(
            f"the deployed network gives the same output for all {n} images, so that agreement would prove nothing; recalibrate its BatchNorm, use more bits "
            "or more images"
        )
    top = {name: values.argmax(1) for name, values in logits.items()}
    accuracy = {name: float((choice == labels).double().mean()) for name, choice in top.items()}
    equal = float((top["file"] == top["deployed"]).double().mean())
    least = TOP1_EQUAL[8 if bits >= 8 else 0]
    apart = abs(accuracy["file"] - accuracy["deployed"])
    allowed = max(ACCURACY_OFF, 1 / n)  # one image weighs more than 0.1 points in a small test part
    failures = []
    if equal < least:
        failures.append(
            f"equal predictions: {100 * equal:.3f} % of {n} images, at least {100 * least:g} % must be at {bits} bits"
        )
    if apart > allowed + 1e-12:
        failures.append(
            f"accuracy: {100 * accuracy['file']:.2f} % in the file, {100 * accuracy['deployed']:.2f} % deployed, {100 * allowed:.2g} points allowed"
        )
    noise = float((file - reference).pow(2).sum())
    return {
        "failures": failures,
        "images": n,
        "accuracy": accuracy,
        "equal_top1": equal,
        "equal_top1_needed": least,
        "sqnr_db": 10 * float(torch.log10(reference.pow(2).sum() / noise)) if noise else None,
        "disagreements": _disagreements(reference, top, labels),
        "median_margin": float(_margins(reference).median()),
        "subnet_equal_top1": float((top["subnet"] == top["deployed"]).double().mean()) if "subnet" in top else None,
    }


def _margins(logits: Tensor) -> Tensor:
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    return best[:, 0] - best[:, -1]


def _disagreements(reference: Tensor, top: dict[str, Tensor], labels: Tensor) -> list[dict[str, Any]]:
    """Every image that file and reference tell apart; margin: the reference's logit of its own class less that of the file's class."""
    rows = []
    for i in torch.nonzero(top["file"] != top["deployed"]).flatten().tolist():
        ours, theirs = int(top["deployed"][i]), int(top["file"][i])
        rows.append(
            {
                "image": i,
                "label": int(labels[i]),
                "deployed": ours,
                "file": theirs,
                "margin": float(reference[i, ours] - reference[i, theirs]),
            }
        )
    return rows


def _narrowest(deployed: Deployed) -> int:
    """Fewest bits of any weight or activation."""
    return min(
        [layer.bits for layer in deployed.layers] + [op.grid.bits for op in deployed.operators() if op.grid is not None]
    )

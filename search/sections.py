"""Sections of a report that say whether the search paid: on test beside the controls, and after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search import page
from search.words import CONTROLS

Record = Mapping[str, Any]


def test_section(judged: Record | None, searched: bool, shown: str) -> str:
    """Winner and controls on test, with the interval of each difference and the verdict.

    Args:
        judged: test.json; None where the present winners were not judged.
        searched: whether there are winners.
        shown: the run as a command line names it.
    """
    if judged is None:
        if not searched:
            return page.missing("No search yet.", f"elastibit search run={shown} budget.bitops=[w3a3,w4a4]")
        return page.missing(
            "The winners were not measured on test, or the search was made again.", f"elastibit report run={shown}"
        )
    words = (
        f"Measured once on {judged['images']} test images, each subnet within the same limits. In brackets: winner "
        f"minus control in points, and the {judged['confidence']:.0%} interval of a paired bootstrap "
        f"({judged['resamples']:,} resamples of the images). Where an interval does not lie above 0, the search has "
        "not beaten that control."
    )
    head = ("budget", "searched", *(label for label, _ in CONTROLS.values()), "verdict")
    return page.text(words) + page.table(head, map(_row, judged["subnets"]))


def _row(judged: Record) -> Sequence[str | page.Verdict]:
    cells = []
    for name in CONTROLS:
        control = judged["controls"].get(name)
        cells.append("-" if control is None else _beside(control, control["id"] == judged["id"]))
    verdict = page.Verdict(judged["verdict"], judged["use"] == "winner")
    return judged["label"], f"{judged['accuracy']:.2%}", *cells, verdict


def _beside(control: Record, itself: bool) -> str:
    if itself:
        return f"{control['accuracy']:.2%} (the same subnet)"
    mean, low, high = (100 * control["difference"][key] for key in ("mean", "low", "high"))
    return f"{control['accuracy']:.2%} ({mean:+.2f}; {low:+.2f} to {high:+.2f})"


def tuning_section(tuned: Sequence[Record], shown: str) -> str:
    """Accuracy of subnets before and after they were trained alone."""
    if not tuned:
        return page.missing("No subnet was trained alone.", f"elastibit finetune run={shown} subnet=all epochs=5")
    head = ("budget", "subnet", "epochs", "before", "after", "gain in points")
    rows = [
        (
            str(r["label"]),
            str(r["id"]),
            str(r["epochs"]),
            f"{r['before']:.2%}",
            f"{r['after']:.2%}",
            f"{100 * (r['after'] - r['before']):+.2f}",
        )
        for r in tuned
    ]
    words = "Each subnet was trained alone from the supernet's weights; export takes the fine-tuned weights."
    return page.text(words) + page.table(head, rows)

"""What files and people call the controls; nothing but words, so that a report needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

CONTROLS = {
    "uniform": ("best uniform", "it needed no search"),
    "integer_program": ("integer program", "it needed no search"),
    "random_search": ("random search", "it needed no predictor"),
}
"""Controls by the name that files give them, the simplest first: what they are called, and what they do without."""


def said(name: str) -> str:
    """A control by name, as a sentence has it."""
    return {"uniform": "the best uniform bits", "integer_program": "the integer program's subnet"}.get(
        name, f"{CONTROLS[name][0]}'s subnet"
    )


def same(identity: str, controls: Mapping[str, str]) -> str | None:
    """The first of some controls, name -> subnet id, that is the subnet with this id."""
    return next((name for name in CONTROLS if controls.get(name) == identity), None)

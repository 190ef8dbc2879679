"""Ties and pins as users write them: which layers share their bits, and which have no choice.

| tie              | layers that share                                                      | what they share       |
|------------------|------------------------------------------------------------------------|-----------------------|
| `shortcuts`      | convolutions that read the same tensor (a block's first, its shortcut) | weights; inputs       |
| `qkv`            | linear layers that read the same tensor                                | weights; inputs       |
| `residual`       | layers whose outcomes are added to each other                          | weights; inputs       |
| `weights_inputs` | each layer with itself                                                 | weight with input     |
| `[a.*, b.*, ..]` | layers, or dimensions, whose name matches one of these patterns        | weights; inputs       |

Partners are read off the traced network, not off names. What overlaps becomes one group. The four words tie what has
the same choices (a layer with pinned bits, or one that reads a site, may have others than its partner); patterns demand
it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from supernet.config import Choice, QuantConfig
from supernet.elastic.flow import Op, adding, flow, sharing
from supernet.elastic.supernet import SuperNet
from supernet.space import SearchSpace, magnitude

Tie = str | Sequence[str]
ENDS = {"w": ".weight", "a": ".input"}


def constrained(
    net: SuperNet, tie: Iterable[Tie] = (), pin: Mapping[str, str | int] | None = None, space: SearchSpace | None = None
) -> SearchSpace:
    """A view of the net's space with ties and pins; see the head of this file.

    Args:
        net: the supernet.
        tie: words, or groups of patterns.
        pin: pattern of layers or dimensions -> choice: `8` (bits, or the depth of a stage), `w8`, `a4`, `w4a8`, or a
            choice as it is printed, `int8-per-channel-symmetric`, or its beginning, `int8-per-channel`.
        space: a view to start from; None: all of it.

    Raises:
        ValueError: a word that there is not, a pattern that matches nothing, a choice that cannot be read or is not
            offered, or nothing that could be tied.
    """
    view = space or net.space
    for pattern, choice in (pin or {}).items():
        view = view.restrict(dict(_pinned(net, pattern, choice)))
    groups: list[list[str]] = []
    ops: list[Op] = []
    for wanted in tie:
        if isinstance(wanted, str) and wanted in WORDS and not ops and wanted != "weights_inputs":
            ops = flow(net.model, net.example)
        groups += _named(net, ops, wanted) if isinstance(wanted, str) else _matched(net, wanted)
    return view.tie(_merged(groups)) if groups else view


def pins(setting: Sequence[str] | Mapping[str, str | int]) -> dict[str, str | int]:
    """Pattern -> choice, from a mapping or from `pattern:choice` each.

    Raises:
        ValueError: an entry that is not of this form, or a pattern that comes twice.
    """
    if isinstance(setting, Mapping):
        return dict(setting)
    found: dict[str, str | int] = {}
    for entry in setting:
        pattern, colon, choice = str(entry).rpartition(":")
        if not (colon and pattern and choice) or pattern in found:
            raise ValueError(f"pin is a list of pattern:choice, each pattern once, e.g. [layer4.*:w8]; got {entry!r}")
        found[pattern] = choice
    return found


# -- pins -------------------------------------------------------------------------------------------------------------
def _pinned(net: SuperNet, pattern: str, choice: str | int) -> Iterable[tuple[str, Callable[[Choice], bool]]]:
    """(dimension, rule) of everything that a pin is about."""
    text = str(choice).strip()
    if isinstance(choice, bool) or not re.fullmatch(r"\d+|(w\d+)?(a\d+)?|[a-z]\w*( |-|$).*", text) or not text:
        raise ValueError(f"a pin is 8, w8, a4, w4a8 or e.g. int8-per-channel-symmetric, got {choice!r} for {pattern!r}")
    names = fnmatch.filter(net.space.position, pattern) or fnmatch.filter(net.space.position, f"{pattern}.*")
    found = list[tuple[str, Callable[[Choice], bool]]]()
    for name in names:
        quantizes = net.space.dimensions[net.space.position[name]].quantizes
        bits = _bits(text, name)
        if bits is not None and (quantizes or name.rpartition(".")[2] == pattern.rpartition(".")[2]):
            found.append((name, lambda c, bits=bits: magnitude(c) == bits))  # type: ignore[misc]
        elif quantizes and not re.fullmatch(r"\d+|(w\d+)?(a\d+)?", text):
            found.append((name, lambda c: _prints(c, text)))
    if not found:
        raise ValueError(
            f"pin {pattern!r}: {choice} pins nothing; no layer or dimension of that name has such a choice"
        )
    return found


def _bits(text: str, name: str) -> int | None:
    """The number that a pin gives a dimension; None where it is not about it."""
    if text.isdigit():
        return int(text)
    match = re.fullmatch(r"(?:w(\d+))?(?:a(\d+))?", text)
    given = dict(zip(ENDS.values(), match.groups(), strict=True)) if match else {}
    return next((int(bits) for end, bits in given.items() if bits and name.endswith(end)), None)


def _prints(choice: Choice, text: str) -> bool:
    """Whether a choice is printed so, or its print begins so."""
    printed, wanted = f"{str(choice).replace(' ', '-')}-", text.replace(" ", "-")
    return isinstance(choice, QuantConfig) and printed.startswith(f"{wanted}-")


# -- ties -------------------------------------------------------------------------------------------------------------
def _kind(net: SuperNet, groups: Iterable[Sequence[str]], kind: str) -> list[list[str]]:
    kinds = {layer.name: layer.kind for layer in net.layers}
    return [[name for name in group if kinds[name] == kind] for group in groups]


WORDS: dict[str, Callable[[SuperNet, Sequence[Op]], list[list[str]]]] = {
    "shortcuts": lambda net, ops: _kind(net, sharing(ops), "conv"),
    "qkv": lambda net, ops: _kind(net, sharing(ops), "linear"),
    "residual": lambda net, ops: adding(ops),
    "weights_inputs": lambda net, ops: [],
}


def _named(net: SuperNet, ops: Sequence[Op], word: str) -> list[list[str]]:
    """Groups of dimensions of a word, as far as they have the same choices."""
    if word not in WORDS:
        raise ValueError(f"tie is a list of {', '.join(WORDS)} and of groups of patterns, e.g. [[a*,b*]]; got {word!r}")
    if word == "weights_inputs":
        candidates = [[layer.weight, layer.input] for layer in net.layers]
    else:
        candidates = [[f"{layer}{end}" for layer in group] for group in WORDS[word](net, ops) for end in ENDS.values()]
    found = []
    for names in candidates:
        alike: dict[tuple[Choice, ...], list[str]] = {}
        for name in names:
            alike.setdefault(net.space.dimensions[net.space.position[name]].choices, []).append(name)
        found += [group for group in alike.values() if len(group) > 1]
    if not any(len(net.space.dimensions[net.space.position[group[0]]].choices) > 1 for group in found):
        raise ValueError(f"tie {word!r} finds nothing to tie in this network: {_reason(net, word)}")
    return found


def _reason(net: SuperNet, word: str) -> str:
    if word != "weights_inputs":
        return "no such partners with a choice, or none that have the same choices"
    inner = net.layers[len(net.layers) // 2]
    counts = [len(net.space.dimensions[net.space.position[name]].choices) for name in (inner.weight, inner.input)]
    return (
        f"weights and inputs have different choices ({inner.name}: {counts[0]} and {counts[1]}); train with "
        "granularities=[per-tensor] and one of symmetries, or tie the layers' weights and inputs apart"
    )


def _matched(net: SuperNet, patterns: Sequence[str]) -> list[list[str]]:
    """Groups of dimensions: those that match, or the weights and the inputs of the layers that match."""
    dimensions = [name for p in patterns for name in fnmatch.filter(net.space.position, p)]
    layers = [layer.name for p in patterns for layer in net.layers if fnmatch.fnmatch(layer.name, p)]
    if layers and not dimensions:
        return [[f"{name}{end}" for name in dict.fromkeys(layers)] for end in ENDS.values()]
    return [list(dict.fromkeys(dimensions)) or list(patterns)]


def _merged(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups of which those that share a member have become one."""
    merged: list[list[str]] = []
    for group in groups:
        joined = list(group)
        for other in [m for m in merged if set(m) & set(group)]:
            merged.remove(other)
            joined = [*other, *(name for name in joined if name not in other)]
        merged.append(joined)
    return merged

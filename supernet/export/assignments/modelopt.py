"""NVIDIA ModelOpt: the quantizer configuration of `mtq.quantize`, and what `mtq.auto_quantize` found.

A configuration is an ordered list of entries; a later one overrides an earlier one for the quantizers that it matches:

| entry                                                    | does to the quantizers that match            |
|----------------------------------------------------------|----------------------------------------------|
| `{"quantizer_name": pattern, "cfg": {...}}`              | on, with these attributes and no others      |
| `{"quantizer_name": pattern, "enable": false}`           | off; attributes stay                         |
| `{"quantizer_name": pattern, "enable": true}`            | on; attributes stay                          |
| any of these with `"parent_class": "nn.Conv2d"`          | the same, in modules of that class only      |
| older mapping `{pattern: {"num_bits": ..., "axis": ..}}` | as a list in the order of its keys; `default` = `*` |

What no entry matches is on, at 8 bits, weights per channel. Checked against ModelOpt 0.47 (tests/golden/bit_maps.json).
Its integers are symmetric; a subnet with zero-points can only be written loosely.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from supernet.config import PerChannel, PerTensor, Stated, SubnetConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import WAY_OUT, Names, few
from supernet.export.assignments.tensors import quantized, whole

CLASSES = {"nn.Conv2d": "conv", "nn.Linear": "linear"}
UNTOLD: dict[str, dict[str, Any]] = {"weight": {"num_bits": 8, "axis": 0}, "input": {"num_bits": 8, "axis": None}}
RECIPE = ".quant_recipe"
ATTRIBUTES = ("num_bits", "axis", "enable", "cfg", "block_sizes")


@dataclass
class _State:
    """One quantizer of theirs; as here before any entry."""

    attributes: Mapping[str, Any]
    on: bool = True


class ModelOpt:
    """Configurations of ModelOpt and the result of its automatic search."""

    def recognises(self, content: Any) -> bool:
        """Whether it has `quant_cfg`, is a list of entries, or comes out of `auto_quantize`: state, best or recipe."""
        if isinstance(content, Mapping):
            found = any(key in content for key in ("quant_cfg", "recipe", "best"))
            return found or any(str(key).endswith(RECIPE) for key in content) or _legacy(content)
        listed = isinstance(content, list) and bool(content)
        return listed and all(
            isinstance(entry, Mapping) and ("quantizer_name" in entry or len(entry) == 1) for entry in content
        )

    def read(self, content: Any, names: Names) -> dict[str, Stated]:
        """What it says, by our dimension; quantizers that are off say nothing.

        Raises:
            ValueError: names that fit no layer, formats that are not integer, blocks.
        """
        if isinstance(content, Mapping) and (recipe := _recipe(content)) is not None:
            return self._read_recipe(recipe, names)
        if isinstance(content, Mapping):
            content = content.get("quant_cfg", content)
        states = {f"{layer}.{what}": _State(UNTOLD[what]) for layer in names.kinds for what in UNTOLD}
        strange = []
        for entry in _entries(content):
            hits, known = _matched(entry, names)
            strange += [] if known else [entry["quantizer_name"]]
            for name in hits:
                state = states[name]
                state.on = bool(entry.get("enable", True))
                state.attributes = state.attributes if entry.get("cfg") is None else entry["cfg"]
        if strange:
            raise ValueError(f"no layer here is called {few(strange)}; there are {few(names.kinds)}: {WAY_OUT}")
        return {name: _stated(name, state.attributes) for name, state in states.items() if state.on}

    def _read_recipe(self, recipe: Mapping[str, Any], names: Names) -> dict[str, Stated]:
        """A recipe of its own for each layer; it is written as if for a whole network."""
        said: dict[str, Stated] = {}
        for theirs, ours in names.layers(recipe).items():
            content = _plain(recipe[theirs])
            whole_network = self.read(content, names) if content.get("quant_cfg") else {}
            said |= {n: whole_network[n] for n in (f"{ours}.weight", f"{ours}.input") if n in whole_network}
        return said

    def write(self, net: SuperNet, config: SubnetConfig, loose: bool = False) -> dict[str, Any]:
        """A configuration for `mtq.quantize`: everything off, then weight and input of each layer that runs.

        Raises:
            ValueError: number formats that are not integer; zero-points, unless `loose` drops them.
        """
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        shifted = []
        for layer, weight, data in quantized(net, config, "ModelOpt"):
            for what, choice in (("weight", weight), ("input", data)):
                axis = 0 if isinstance(choice.granularity, PerChannel) else None
                entry = {"num_bits": choice.bits, "axis": axis}
                entries.append({"quantizer_name": f"{layer.name}.{what}_quantizer", "cfg": entry})
                shifted += [] if choice.symmetric else [f"{layer.name}.{what}"]
        if shifted and not loose:
            raise ValueError(
                f"ModelOpt's integers have no zero-point, this subnet has {len(shifted)}: {few(shifted)}; "
                "loose=true writes them as symmetric"
            )
        return {"quant_cfg": entries, "algorithm": "max"}

    def beside(self, subnet: nn.Module, net: SuperNet) -> dict[str, bytes]:
        """No further file."""
        return {}


def _legacy(content: Mapping[Any, Any]) -> bool:
    """Whether it is a bare mapping pattern -> attributes."""
    return bool(content) and all(
        isinstance(value, Mapping) and (str(key).startswith("nn.") or any(a in value for a in ATTRIBUTES))
        for key, value in content.items()
    )


def _recipe(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Recipe by layer of a search's state, of its best, or as it is.

    Layers that the search has grouped (query, key, value) have one recipe, under the name of the group's first.
    """
    groups = {str(name): stats.get("module_names", ()) for name, stats in content.get("candidate_stats", {}).items()}
    for key in ("best", "recipe"):
        content = content.get(key, content)
    if not any(str(key).endswith(RECIPE) for key in content):
        return None
    found: dict[str, Any] = {}
    for name, recipe in content.items():
        members = [str(member) for member in groups.get(name, ())]
        found |= dict.fromkeys(members or [name.removesuffix(RECIPE)], recipe)
    return found


def _plain(recipe: Any) -> Mapping[str, Any]:
    """A recipe as a mapping; ModelOpt's own object holds it as a pydantic model `config`."""
    config = getattr(recipe, "config", recipe)
    made = config.model_dump() if hasattr(config, "model_dump") else config
    if not isinstance(made, Mapping):
        raise ValueError(
            f"a recipe is a quantizer configuration, got {made!r}; give what mtq.get_auto_quantize_config returns"
        )
    return made


def _entries(quant_cfg: Any) -> Iterator[dict[str, Any]]:
    """Entries in order, older forms brought into the form of today."""
    if isinstance(quant_cfg, Mapping):
        quant_cfg = [{key: value} for key, value in quant_cfg.items()]
    for entry in quant_cfg:
        if "quantizer_name" in entry:
            yield dict(entry)
            continue
        for key, value in entry.items():
            scoped = key.startswith("nn.")
            inner = value.items() if scoped else [("*" if key == "default" else key, value)]
            for pattern, attributes in inner:
                kept = {name: a for name, a in attributes.items() if name != "enable"} or None
                made = {"quantizer_name": pattern, "cfg": kept, "parent_class": key if scoped else None}
                yield made | ({"enable": attributes["enable"]} if "enable" in attributes else {})


def _matched(entry: Mapping[str, Any], names: Names) -> tuple[list[str], bool]:
    """Our dimensions that an entry is about, and whether its name is one that we understand.

    A pattern may match nothing. A name without wildcards that turns the weight of a layer on has to be a layer here;
    quantizers of other modules, and of outputs, are no choices of a subnet.
    """
    pattern, parent = str(entry["quantizer_name"]), entry.get("parent_class")
    quantizers = {
        f"{layer}.{what}_quantizer": f"{layer}.{what}" for layer in names.kinds for what in ("weight", "input")
    }
    hits = [name for quantizer, name in quantizers.items() if fnmatch.fnmatch(quantizer, pattern)]
    known = True
    if not hits and not any(sign in pattern for sign in "*?["):
        layer, what = names.layer(pattern), pattern.rpartition(".")[2].removesuffix("_quantizer")
        if layer is not None and what in ("weight", "input"):
            hits = [layer if layer in quantizers.values() else f"{layer}.{what}"]
        known = bool(hits) or what != "weight" or not entry.get("enable", True) or pattern in names.renamed
    if parent is not None:
        hits = [name for name in hits if names.kinds[name.rpartition(".")[0]] == CLASSES.get(str(parent))]
    return hits, known


def _stated(name: str, attributes: Any) -> Stated:
    """What the attributes of one quantizer say; their defaults are 8 bits, per tensor."""
    if isinstance(attributes, Sequence):
        raise ValueError(
            f"{name} is quantized {len(attributes)} times in a row by the map; a layer here is quantized once"
        )
    bits, axis = attributes.get("num_bits") or 8, attributes.get("axis")
    if not isinstance(bits, int):
        raise ValueError(f"{name} has a floating-point format {bits!r} in the map; layers here have integers")
    if attributes.get("block_sizes"):
        raise ValueError(
            f"{name} shares scales in blocks {attributes['block_sizes']} in the map; "
            "here they are per tensor or per channel"
        )
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    if axis not in (None, 0) or (axis == 0 and name.endswith(".input")):
        raise ValueError(
            f"{name} has scales along axis {axis} in the map; here weights may along axis 0, inputs may not"
        )
    granularity = PerTensor() if axis is None else PerChannel()
    return Stated(whole(bits, name), granularity, not attributes.get("bias"))

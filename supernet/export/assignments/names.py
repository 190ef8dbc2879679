"""Whose name is whose: every rule by which a foreign name is matched to a layer of ours stands here.

| rule                                            | written                                   | meant             |
|-------------------------------------------------|-------------------------------------------|-------------------|
| as it is                                        | `layer1.0.conv1`                          | `layer1.0.conv1`  |
| prefixes of wrappers fall off                   | `module.conv1`, `_orig_mod.conv1`         | `conv1`           |
| what is said of the layer falls off             | `conv1.weight`, `conv1.weight_quantizer`  | `conv1`           |
| a node or tensor of an ONNX file lies in a path | `/layer1/layer1.0/conv1/Conv_output_0`    | `layer1.0.conv1`  |
| torch.fx writes dots as underscores             | `layer1_0_conv1`                          | `layer1.0.conv1`  |
| a folded BatchNorm leaves its name behind       | `layer1_0_conv1_bn`                       | `layer1.0.conv1`  |

The first spelling that is a layer of ours wins, before underscores are considered. A name that fits no layer, or two,
is an error; the way out is to say what it means, `names={"theirs": "ours"}`, or to leave it out,
`names={"theirs": None}`.

Some tools name the tensor that a module writes, not the layer that reads it. Such names are looked up from the layer
backwards: through what only moves values, to the module that made them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import fx, nn

from supernet.config import Stated
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import flatten
from supernet.export.lower import is_free, is_move
from supernet.quant.quantizer import Quantizer

PREFIXES = ("module.", "_orig_mod.", "model.")
SUFFIXES = (
    ".weight_quantizer",
    ".input_quantizer",
    ".quant_recipe",
    ".weight",
    "_activation_holder_quantizer",
    "_bn",
)
WAY_OUT = (
    'say what they mean with names={"theirs": "ours"}, or {"theirs": None} to leave them out '
    "(names=[theirs:ours,theirs:] on the command line)"
)


class Names:
    """The layers of one supernet, found by the names that others give them.

    Args:
        net: the supernet.
        renamed: what the rules cannot know: foreign name -> layer of ours, or dimension of ours where one tensor is
            meant (`conv1.input`), or None: leave it out.

    Raises:
        ValueError: `renamed` names what the network does not have.
    """

    def __init__(self, net: SuperNet, renamed: Mapping[str, str | None] | None = None) -> None:
        self.net, self.renamed = net, dict(renamed or {})
        self.kinds = {layer.name: layer.kind for layer in net.layers}
        self._underscored: dict[str, list[str]] = {}
        for name in self.kinds:
            self._underscored.setdefault(underscored(name), []).append(name)
        strange = [ours for ours in self.renamed.values() if ours not in (None, *self.kinds, *net.space.position)]
        if strange:
            raise ValueError(f"names= points to {few(strange)}, which is no layer here; there are {few(self.kinds)}")

    def layer(self, foreign: str) -> str | None:
        """Our layer that a foreign name means; None where it means none, or is to be left out.

        Raises:
            ValueError: it fits two layers.
        """
        if foreign in self.renamed:
            return self.renamed[foreign]
        spelled = spellings(foreign)
        exact = next((name for name in spelled if name in self.kinds), None)
        if exact is not None:
            return exact
        found = next((hit for name in spelled if (hit := self._underscored.get(underscored(name)))), [])
        if len(found) > 1:
            raise ValueError(f"{foreign} may mean {' or '.join(found)}; {WAY_OUT}")
        return found[0] if found else None

    def layers(self, foreign: Iterable[str]) -> dict[str, str]:
        """Our layer for each foreign name, without those that are to be left out.

        Raises:
            ValueError: names that fit no layer, or two that fit the same one.
        """
        meant = {name: self.layer(name) for name in foreign}
        strange = [name for name, ours in meant.items() if ours is None and name not in self.renamed]
        if strange:
            raise ValueError(f"no layer here is called {few(strange)}; there are {few(self.kinds)}: {WAY_OUT}")
        found = {name: ours for name, ours in meant.items() if ours is not None}
        parts = [f"{name} = {ours}" for name, ours in found.items() if ours not in self.kinds]
        if parts:
            raise ValueError(f"names= gives a tensor where a layer is meant: {few(parts)}; name the layer")
        twice = [name for name, ours in found.items() if list(found.values()).count(ours) > 1]
        if twice:
            raise ValueError(f"several names mean one layer: {few(f'{n} = {found[n]}' for n in twice)}; {WAY_OUT}")
        return found

    def inputs(self, tensors: Mapping[str, Stated]) -> dict[str, Stated]:
        """What is said of the inputs of our layers, where tensors are named after the module that writes them.

        Tensors that no layer of ours reads are passed over: residual sums, logits.
        """
        said: dict[str, Stated] = {}
        for name, stated in tensors.items():
            ours = self.renamed.get(name)
            if ours is not None:
                said[f"{ours}.input" if ours in self.kinds else ours] = stated
        known: dict[str, Stated] = {}
        for name, stated in ((n, s) for n, s in tensors.items() if n not in self.renamed):
            for spelled in spellings(name):
                known.setdefault(spelled, stated)
                known.setdefault(underscored(spelled), stated)
        for layer, writers in self._writers.items():
            found = next((known[key] for w in writers for key in (w, underscored(w)) if key in known), None)
            if found is not None:
                said.setdefault(f"{layer}.input", found)
        return said

    @functools.cached_property
    def _writers(self) -> dict[str, list[str]]:
        """For each layer the names of what its input may be called after, the nearest first."""
        with self.net.as_subnet(self.net.space.largest()):
            flat = flatten(self.net.model)
        found: dict[str, list[str]] = {}
        for node in flat.graph.nodes:
            if node.op == "call_module" and node.target in self.kinds:
                found.setdefault(str(node.target), list(_writers(node, flat)))
        return found


def _writers(node: fx.Node, flat: fx.GraphModule) -> Iterator[str]:
    """Names of the modules, back to the one that computes the tensor, whose output a node reads.

    A BatchNorm is folded into the layer before it by most tools; its output then bears either name.
    """
    source = next(iter(node.all_input_nodes), None)
    while source is not None:
        module = flat.get_submodule(str(source.target)) if source.op == "call_module" else None
        if not isinstance(module, Quantizer):
            yield str(source.target) if module is not None else source.name
            if isinstance(getattr(module, "act", None), nn.Module):  # timm's BatchNormAct2d
                yield f"{source.target}.act"
        through = isinstance(module, Quantizer) or type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
        if not (through or is_free(source, module) or is_move(source, module)):
            return
        source = next(iter(source.all_input_nodes), None)


def spellings(foreign: str) -> list[str]:
    """Paths of modules that a foreign name may stand for, the name itself first."""
    found = [foreign]
    if foreign.startswith("/"):
        found.append(onnx_path(foreign))
    for name in found:
        shorter = [name.removeprefix(prefix) for prefix in PREFIXES] + [name.removesuffix(s) for s in SUFFIXES]
        found += [other for other in shorter if other and other not in found]
    return found


def onnx_path(name: str) -> str:
    """`/layer1/layer1.0/conv1/Conv_output_0` -> `layer1.0.conv1`: inside a Sequential, its own name is said again."""
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        path = path[:-1] if path and part.startswith(f"{path[-1]}.") else path
        path.append(part)
    return ".".join(path)


def underscored(name: str) -> str:
    """A module's path as torch.fx names its node."""
    return re.sub(r"\W", "_", name)


def few(names: Iterable[object], most: int = 6) -> str:
    """The first names, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")

"""Sony MCT (Model Compression Toolkit): the bits of its mixed-precision search, by node.

`info.mixed_precision_cfg` holds indices of candidates and no names, so MCT alone does not say which layer has what.
Two small forms are read; docs/bit-maps.md shows how to write them down from what MCT returns.

    {"conv1_bn": {"weights": 4}, "relu_activation_holder_quantizer": {"activations": 8}}
    {"mixed_precision_cfg": [0, 1], "candidates": {"conv1_bn": [{"weights": 8}, {"weights": 4}], "fc": [...]}}

`weights` are those of the node; `activations` what it *writes*, as MCT means it; `inputs` what it reads, for maps by
hand. In the second form the candidates stand in the order of MCT's configurable nodes. Scales are not said; 32 bits are
floating point, and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supernet.config import Stated
from supernet.export.assignments.names import Names
from supernet.export.assignments.tensors import whole

KEYS = ("weights", "activations", "inputs")
FLOAT = (None, 32)
SEARCHED = "mixed_precision_cfg"


class Mct:
    """Bits by node of MCT."""

    def recognises(self, content: Any) -> bool:
        """Whether it has `mixed_precision_cfg`, or maps names to `weights`, `activations`, `inputs`."""
        if not isinstance(content, Mapping) or not content:
            return False
        return SEARCHED in content or all(
            isinstance(value, Mapping) and bool(value) and set(value) <= set(KEYS) for value in content.values()
        )

    def read(self, content: Mapping[str, Any], names: Names) -> dict[str, Stated]:
        """What it says, by our dimension.

        Raises:
            ValueError: weights that fit no layer here, indices that do not fit the candidates.
        """
        nodes = _picked(content) if SEARCHED in content else content
        stated = {
            key: {name: Stated(whole(node[key], name)) for name, node in nodes.items() if node.get(key) not in FLOAT}
            for key in KEYS
        }
        said = {f"{ours}.weight": stated["weights"][theirs] for theirs, ours in names.layers(stated["weights"]).items()}
        read = {f"{ours}.input": stated["inputs"][theirs] for theirs, ours in names.layers(stated["inputs"]).items()}
        return said | names.inputs(stated["activations"]) | read


def _picked(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The candidate of each node that the search has picked."""
    indices, candidates = content[SEARCHED], content.get("candidates")
    if not isinstance(candidates, Mapping) or len(candidates) != len(indices):
        got = len(candidates) if isinstance(candidates, Mapping) else "none"
        raise ValueError(
            f"{SEARCHED} has {len(indices)} indices and needs as many lists of candidates, by name, in the order of "
            f"MCT's configurable nodes; got {got}"
        )
    outside = [name for (name, some), i in zip(candidates.items(), indices, strict=True) if not 0 <= i < len(some)]
    if outside:
        raise ValueError(f"{SEARCHED} points beyond the candidates of {', '.join(outside)}; write down all of them")
    return {name: some[i] for (name, some), i in zip(candidates.items(), indices, strict=True)}

"""The subnet for torch alone: a program of torch.export with integer weight codes, loadable without this package.

    program = torch.export.load("model.pt2").module()
    logits = program(images)                    # any number of images

It is the trained subnet, fake quantization and BatchNorm included, and not the deployed network: nothing is folded or
rounded anew, so that its outputs equal those of the subnet bit for bit.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from supernet.artefacts import write_bytes
from supernet.elastic.layers import QuantLayer
from supernet.elastic.wrap import evaluating
from supernet.export.deploy import deploy
from supernet.export.fold import check
from supernet.export.profile import costs, layers, sizes
from supernet.export.verify import compare, narrowest
from supernet.interfaces import Batch
from supernet.quant.quantizer import Quantizer

TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""What torch notes of each node's origin: lines and paths of the machine that traced it."""


@dataclass(frozen=True)
class Program:
    """An Exporter (`supernet.interfaces`) of torch.export programs, `model.pt2`.

    Args:
        name: for cards.
    """

    name: str = "torch"

    def export(self, model: nn.Module, example: Float[Tensor, "1 ..."], path: Path) -> Path:
        """Write a materialised subnet; the file appears whole or not at all.

        Raises:
            ValueError: the subnet cannot be deployed (its costs would be unknown) or torch.export refuses it.
        """
        deploy(model, example)
        images = torch.cat([example[:1]] * 2)  # torch.export takes a batch of one for a constant
        try:
            with torch.no_grad():
                made = torch.export.export(frozen(model), (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
        except Exception as error:  # torch.export raises what it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"torch.export refuses the subnet ({reason}); choose another profile") from error
        for node in made.graph.nodes:
            for trace in TRACES:
                node.meta.pop(trace, None)
        content = io.BytesIO()
        torch.export.save(made, content)
        path = path.with_suffix(".pt2")
        write_bytes(path, content.getvalue())
        return path

    def verify(self, path: Path, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """Run a written program beside the subnet that it was made of; it passes where all logits are equal.

        Returns:
            `layers`, `costs`, `verification` (see `supernet.export.verify.compare`; the reference `deployed` is the
            subnet itself; no operators) and `measured` (nothing).
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError("a file is verified on batches of (images, labels), got none; give at least one batch")
        deployed, program = deploy(model, first[0]), torch.export.load(path).module()
        found, expected, labels = [], [], []
        with evaluating(model), torch.no_grad():
            for images, target in itertools.chain([first], batches):
                found.append(program(images).double())
                expected.append(model(images).double())
                labels.append(target)
        logits = {"file": torch.cat(found), "deployed": torch.cat(expected), "subnet": torch.cat(expected)}
        proof = compare(logits, torch.cat(labels), narrowest(deployed))
        off = (logits["file"] - logits["subnet"]).abs().flatten(1).amax(1)
        if off.any():
            most = f"{int((off > 0).sum())} of {len(off)} images have other logits, up to {float(off.max()):.3g} off"
            proof["failures"].append(f"{most}; none may differ")
        stored = dict.fromkeys((row["name"] for row in layers(deployed, (8,))), 8)
        proof["bytes"] = sizes(path.stat().st_size, path.stat().st_size, deployed, stored)
        passed = {"passed": not proof["failures"], "kernels": {}, "unfused": [], "operators": []}
        return {
            "layers": layers(deployed, (8,)),
            "costs": costs(deployed),
            "verification": passed | proof,
            "measured": {},
        }


class Codes(nn.Module):
    """In the place of a weight's quantizer: value = (code - zero) scale, for the codes that took the weight's place."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, codes: Tensor) -> Tensor:
        """Weights of integer (or, for grids that are not, real) codes."""
        return (codes.float() - self.zero) * self.scale


class Rounding(nn.Module):
    """In the place of an activation's quantizer: its arithmetic with constants."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """(clamp(round(x / s) + z, lo, hi) - z) s."""
        return (torch.clamp(torch.round(x / self.scale) + self.zero, self.low, self.high) - self.zero) * self.scale


@torch.no_grad()
def frozen(subnet: nn.Module) -> nn.Module:
    """A copy that computes the same with weights held as int8 codes and nothing that learns."""
    made = copy.deepcopy(subnet).eval()
    for name, module in list(made.named_modules()):
        if isinstance(module, QuantLayer):
            quantizer = module.weight_quantizer
            check(quantizer, f"the weight of {name}")
            codes, (scale, zero, _, _) = quantizer.encode(module.weight), quantizer.parameters_of(module.weight)
            whole = bool((codes == codes.round()).all())
            del module.weight
            module.register_buffer("weight", codes.to(torch.int8) if whole else codes)
            module.weight_quantizer = Codes(scale.clone(), zero.clone())  # type: ignore[assignment]
    for name, module in list(made.named_modules()):
        if isinstance(module, Quantizer):
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, _rounding(module, name))
    return made


def _rounding(quantizer: Quantizer, name: str) -> nn.Module:
    if int(quantizer.row[4]):  # a site before it has quantized the tensor already
        return nn.Identity()
    check(quantizer, name)
    scale, zero, low, high = quantizer.parameters_of(torch.zeros(1))
    return Rounding(scale.clone(), zero.clone(), float(low), float(high))

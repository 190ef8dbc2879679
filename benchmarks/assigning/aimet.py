"""Qualcomm AIMET's automatic mixed precision; runs in its own environment.

Greedy: phase 1 measures how much each quantizer group costs at each candidate, phase 2 lowers one after the other and
measures. Both measure the signal-to-noise ratio of the logits, which AIMET provides; with no limit on the loss the
whole list of phase 2 comes back, from most to fewest BitOps. First and last layer are left out of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.assigning.problem import BATCH, BITS, CHAIN, FIXED, Batches, Entry, Sweep, layers

SAMPLES = 128
"""Images of one measurement, AIMET's default."""


def assign(net: nn.Module, batches: Batches, limits: Mapping[str, float], known: Sweep) -> Iterator[Entry]:
    """Its list of phase 2, each entry as one assignment.

    Args:
        net: the float network.
        batches: images, and labels, which are not asked for.
        limits: BitOps by budget; its own list is much finer.
    """
    from aimet_torch import QuantizationSimModel  # type: ignore[import-not-found]
    from aimet_torch.amp.mixed_precision_algo import EvalCallbackFactory  # type: ignore[import-not-found]
    from aimet_torch.batch_norm_fold import fold_all_batch_norms  # type: ignore[import-not-found]
    from aimet_torch.common.amp.utils import AMPSearchAlgo  # type: ignore[import-not-found]
    from aimet_torch.common.defs import CallbackFunc, QuantizationDataType  # type: ignore[import-not-found]
    from aimet_torch.mixed_precision import choose_mixed_precision  # type: ignore[import-not-found]

    images = torch.cat([x for x, _ in batches])
    fold_all_batch_norms(net, tuple(images[:1].shape))
    sim = QuantizationSimModel(net, images[:1], default_param_bw=BITS[-1], default_output_bw=BITS[-1])
    leave_out(sim.model)
    kind = QuantizationDataType.int
    loader: Any = DataLoader(images, batch_size=BATCH)  # type: ignore[arg-type]  # a tensor has length and items
    measure = EvalCallbackFactory(loader).sqnr(SAMPLES)

    def forward(model: nn.Module, _: Any) -> None:
        with torch.no_grad():
            for x in images.split(BATCH):
                model(x)

    sim.compute_encodings(forward, None)
    with tempfile.TemporaryDirectory() as folder:
        steps = choose_mixed_precision(
            sim,
            images[:1],
            [((a, kind), (w, kind)) for w, a in reversed(CHAIN)],
            measure,
            measure,
            None,
            folder,
            True,
            CallbackFunc(forward),
            use_all_amp_candidates=True,
            amp_search_algo=AMPSearchAlgo.BruteForce,
        )
    found = [(float(score), group.to_list(), candidate) for _, score, group, candidate in steps]
    yield from replayed(found, list(layers(net)))


def leave_out(model: Any) -> None:
    """No quantizers at first and last layer, nor at the logits: they are at 8 bits in every assignment here."""
    for name in FIXED:
        wrapped = model.get_submodule(name)
        wrapped.param_quantizers["weight"] = None
        wrapped.input_quantizers[0] = None
    model.get_submodule("linear").output_quantizers[0] = None
    model.get_submodule("pool").output_quantizers[0] = None


def replayed(steps: list[tuple[float, list[tuple[str, str]], Any]], names: list[str]) -> Sweep:
    """Assignments from the steps of phase 2, each on top of those before it; in the form of AIMET's encodings 0.6.1."""
    weights = {name: BITS[-1] for name in names if name not in FIXED}
    tensors = {_placed(name, kind): BITS[-1] for _, group, _ in steps for kind, name in group if kind != "weight"}
    found: Sweep = []
    for score, group, candidate in steps:
        for kind, name in group:
            if kind == "weight":
                weights[name] = candidate[1][0]
            else:
                tensors[_placed(name, kind)] = candidate[0][0]
        activations: dict[str, Any] = {}
        for (path, side), bits in tensors.items():
            activations.setdefault(path, {})[side] = {"0": {"bitwidth": bits, "dtype": "int"}}
        params = {f"{path}.weight": [{"bitwidth": bits, "dtype": "int"}] for path, bits in weights.items()}
        content = {"version": "0.6.1", "param_encodings": params, "activation_encodings": activations}
        found.append({"asked": {"step": len(found), "sqnr": score}, "map": content})
    return found


def _placed(name: str, kind: str) -> tuple[str, str]:
    """Module and side of a quantizer; those of inputs bear their number behind the module."""
    return name.partition("_input_quantizer_idx_")[0], kind

"""NVIDIA ModelOpt's `auto_quantize`, called as its documentation says; runs in its own environment.

Its budget is `effective_bits`, an average over weights. Formats may state their own effective bits, for each part of
the network apart: stated as weight bits x input bits x uses of each weight, the average is BitOps, so it is given the
very budget that the others get. It is scored once, then solved for many values of its budget.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.assigning.problem import CHAIN, FIXED, FIXED_BITS, RESOLUTION, Batches, Entry, Sweep, layers, uses

MOST = 16.0
"""Effective bits that ModelOpt allows; those of 8 x 8 bits at the largest resolution."""
STEPS = 240
"""Values of the budget, evenly in its logarithm from the smallest to the largest that can be reached."""


def assign(net: nn.Module, batches: Batches, limits: Mapping[str, float], known: Sweep, method: str) -> Iterator[Entry]:
    """Its assignments at all values of its budget, each once.

    Args:
        net: the float network.
        batches: images and labels.
        limits: BitOps by budget; its own sweep is much finer.
        known: an unfinished sweep, which is solved again from new scores.
        method: `gradient` or `kl_div`, ModelOpt's two ways to score.
    """
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]

    low, high = (_average(net, pair) for pair in (CHAIN[0], CHAIN[-1]))
    _, state = mtq.auto_quantize(
        net,
        constraints={"effective_bits": (low + high) / 2},
        quantization_formats=[_format(CHAIN[0], 1)],  # of layers that no entry below is about: there are none
        data_loader=batches,
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method=method,
        module_search_spaces=_spaces(),
    )
    seen = set()
    for asked in torch.logspace(math.log10(low), math.log10(high), STEPS).tolist():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = json.loads(json.dumps(mtq.get_auto_quantize_config(state, {"effective_bits": asked})))
        if (key := json.dumps(config)) not in seen:
            seen.add(key)
            yield {"asked": {"effective_bits": asked}, "map": config}


def _spaces() -> list[dict[str, Any]]:
    """Formats by part of the network; none may stay in float."""
    spaces = [(f"{stage}.*", CHAIN, side**2) for stage, side in RESOLUTION.items()]
    spaces += [(name, ((FIXED_BITS, FIXED_BITS),), uses(name)) for name in FIXED]
    return [
        {
            "module_name_patterns": [pattern],
            "quantization_formats": [_format(pair, used) for pair in pairs],
            "allow_no_quant": False,
        }
        for pattern, pairs, used in spaces
    ]


def _format(pair: tuple[int, int], used: int) -> dict[str, Any]:
    weight, data = pair
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weight, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": data, "axis": None}},
        ],
        "algorithm": "max",
        "effective_bits": effective(pair, used),
    }


def effective(pair: tuple[int, int], used: int) -> float:
    """BitOps of one weight, in a unit in which the dearest is what ModelOpt allows."""
    return MOST * pair[0] * pair[1] * used / (FIXED_BITS**2 * RESOLUTION["layer1"] ** 2)


def _average(net: nn.Module, pair: tuple[int, int]) -> float:
    """Its budget at which all layers that may vary have one format."""
    kinds = layers(net)
    given = {name: (FIXED_BITS, FIXED_BITS) if name in FIXED else pair for name in kinds}
    sizes = {name: module.weight.numel() for name, module in kinds.items()}
    total = sum(sizes[name] * effective(given[name], uses(name)) for name in kinds)
    return total / sum(sizes.values())

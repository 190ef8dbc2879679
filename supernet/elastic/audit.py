"""What a wrapped network must fulfil: nothing is silently left in float, and what may be left out keeps shapes."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from supernet.elastic.stage import Stage
from supernet.elastic.wrap import Found, evaluating

COVERED = 0.99


def multiplications(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one example by the innermost module that spends them ("" for the model itself), whatever the operator."""
    batch = example.shape[0]
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        model(example)
    inclusive = {path: sum(ops.values()) // 2 // batch for path, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    total = {path.removeprefix(root).lstrip("."): count for path, count in inclusive.items() if path != "Global"}
    own = dict(total)
    for path, count in total.items():
        if path:
            parent = path.rpartition(".")[0]
            while parent and parent not in total:
                parent = parent.rpartition(".")[0]
            own[parent] = own.get(parent, 0) - count
    return {path: count for path, count in own.items() if count > 0}


def coverage(found: Sequence[Found], spent: dict[str, int], allow: Sequence[str]) -> dict[str, Any]:
    """Coverage of the MACs by swapped layers; fails closed."""
    quantized = {f.name for f in found}
    left = {path or "(the model itself)": count for path, count in spent.items() if path not in quantized}
    total = sum(spent.values())
    missing = {
        path: count for path, count in left.items() if not any(fnmatch.fnmatch(path, pattern) for pattern in allow)
    }
    covered = 1 - sum(missing.values()) / total
    if covered < COVERED:
        worst = sorted(missing.items(), key=lambda item: -item[1])[:5]
        listed = ", ".join(f"{path} ({100 * count / total:.1f} %)" for path, count in worst)
        raise ValueError(
            f"only {100 * covered:.1f} % of the MACs lie in nn.Conv2d and nn.Linear "
            f"(at least {100 * COVERED:.0f} % must); float stay {listed}: "
            "allow them with allow=[pattern, ...] if that is meant"
        )
    share = 1 - sum(left.values()) / total
    return {"macs": total, "covered": share, "left_in_float": left}


def check_stages(model: nn.Module, example: Tensor) -> None:
    """Blocks that may be left out must keep the shape of their input."""
    problems: list[str] = []

    def hook(name: str) -> Any:
        def check(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs[0].shape != output.shape:
                problems.append(f"{name} turns {tuple(inputs[0].shape[1:])} into {tuple(output.shape[1:])}")

        return check

    blocks = [
        (f"{path}.{child}", block)
        for path, stage in model.named_modules()
        if isinstance(stage, Stage)
        for child, block in list(stage.named_children())[stage.min_depth :]
    ]
    handles = [block.register_forward_hook(hook(name)) for name, block in blocks]
    with evaluating(model):
        model(example)
    for handle in handles:
        handle.remove()
    if problems:
        raise ValueError(
            f"a block that may be left out must keep the shape of its input, but {'; '.join(problems)}: raise min_depth"
        )

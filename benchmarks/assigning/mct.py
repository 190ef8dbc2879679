"""Sony MCT's mixed-precision search under a budget of BitOps; runs in its own environment.

The target's capabilities are ours: weights of every layer and outputs of every ReLU, which is what layers read, may
have each number of bits; all else is at 8 bits. MCT warns that its own count of BitOps may be wrong where a tensor is
read twice, as at every residual block, so each limit is asked for again, corrected by what the answer costs by our
count, until the answer is just within it or `ATTEMPTS` are used up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.assigning.problem import BITS, FIXED, FIXED_BITS, Batches, Entry, Sweep, layers, uses

ATTEMPTS = 4
TIGHT, MARGIN = 0.97, 0.995
"""Answers from 97 % of the limit on are taken; a little less than what is missing is asked for: costs have steps."""
BLOCKS = 3
"""Of each stage."""


def assign(net: nn.Module, batches: Batches, limits: Mapping[str, float], known: Sweep) -> Iterator[Entry]:
    """Its assignment for each limit.

    Args:
        net: the float network.
        batches: images, and labels, which MCT does not ask for.
        limits: BitOps by budget.
        known: assignments that it has given before.
    """
    import model_compression_toolkit as toolkit  # type: ignore[import-not-found]
    from model_compression_toolkit.core import (  # type: ignore[import-not-found]
        BitWidthConfig,
        CoreConfig,
        MixedPrecisionQuantizationConfig,
        ResourceUtilization,
    )
    from model_compression_toolkit.core.common.network_editors import NodeNameFilter  # type: ignore[import-not-found]

    def images() -> Iterator[list[Tensor]]:
        yield from ([x] for x, _ in batches)

    known_scores: dict[Any, float] = {}

    def solve(bops: float) -> dict[str, dict[str, int]]:
        widths = BitWidthConfig()
        fixed = [NodeNameFilter(node) for node in map(node_of, FIXED)]
        widths.set_manual_weights_bit_width(fixed, FIXED_BITS, "weight")
        with remembering(known_scores):
            quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
                net,
                images,
                target_resource_utilization=ResourceUtilization(bops=bops),
                core_config=CoreConfig(
                    mixed_precision_config=MixedPrecisionQuantizationConfig(), bit_width_config=widths
                ),
                target_platform_capabilities=capabilities(),
            )
        return nodes(quantized)

    sizes = {name: module.weight.numel() for name, module in layers(net).items()}
    done = {entry["asked"]["budget"] for entry in known if entry["asked"]["last"]}
    for budget, limit in limits.items():
        if budget not in done:
            yield from fitted(solve, budget, limit, sizes)


def fitted(
    solve: Callable[[float], dict[str, dict[str, int]]], budget: str, limit: float, sizes: Mapping[str, int]
) -> Iterator[Entry]:
    """Answers for one limit, each asked for with what the one before taught."""
    asked = limit
    for attempt in range(ATTEMPTS):
        content = solve(asked)
        cost = bitops(content, sizes)
        last = attempt == ATTEMPTS - 1 or TIGHT * limit <= cost <= limit
        yield {"asked": {"bops": asked, "budget": budget, "last": last}, "map": content}
        if last:
            return
        asked *= MARGIN * limit / cost


def bitops(content: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int]) -> float:
    """Of an assignment, as we count: uses of each weight x its bits x bits of what the layer reads."""

    def read(name: str) -> int:
        writer = reads(name)
        return content[f"{writer}_activation_holder_quantizer"]["activations"] if writer else FIXED_BITS

    return sum(
        size * uses(name) * content[node_of(name)]["weights"] * read(name.replace(".", "_"))
        for name, size in sizes.items()
    )


def node_of(name: str) -> str:
    """MCT's node of a layer: BatchNorm is folded into convolutions."""
    return name if name == "linear" else f"{name.replace('.', '_')}_bn"


def reads(node: str) -> str | None:
    """The ReLU, as MCT names nodes, that a layer of the ResNet-20 reads; None for those at 8 bits, first and last."""
    if node in FIXED:
        return None
    stage, block, layer = node.split("_")
    if layer == "conv2":
        return f"{stage}_{block}_relu1"
    before = (int(stage[-1]) - 1) * BLOCKS + int(block) - 1
    return f"layer{before // BLOCKS + 1}_{before % BLOCKS}_relu2" if before >= 0 else "relu"


@contextlib.contextmanager
def remembering(known: dict[Any, float]) -> Iterator[None]:
    """Lets MCT reuse the sensitivities of one budget for the next; it would measure the same again."""
    from model_compression_toolkit.core.common.mixed_precision.sensitivity_eval import (  # type: ignore[import-not-found]
        sensitivity_evaluation,
    )

    kind = sensitivity_evaluation.SensitivityEvaluation
    measure = kind.compute_metric

    def remembered(self: Any, mp_a_cfg: dict[str, int | None], mp_w_cfg: dict[str, int | None]) -> float:
        key = tuple(sorted(mp_a_cfg.items())), tuple(sorted(mp_w_cfg.items()))
        if key not in known:
            known[key] = measure(self, mp_a_cfg=mp_a_cfg, mp_w_cfg=mp_w_cfg)
        return known[key]

    kind.compute_metric = remembered
    try:
        yield
    finally:
        kind.compute_metric = measure


def nodes(quantized: nn.Module) -> dict[str, dict[str, int]]:
    """Bits by node, as docs/bit-maps.md writes them down."""
    found: dict[str, dict[str, int]] = {}
    for name, module in quantized.named_modules():
        if hasattr(module, "weights_quantizers"):
            found[name] = {"weights": int(module.weights_quantizers["weight"].num_bits)}
        if hasattr(module, "activation_holder_quantizer"):
            found[name] = {"activations": int(module.activation_holder_quantizer.num_bits)}
    return found


def capabilities() -> Any:
    """A target that runs any of the bits, otherwise as MCT's default."""
    from model_compression_toolkit.target_platform_capabilities.constants import (  # type: ignore[import-not-found]
        KERNEL_ATTR,
        WEIGHTS_N_BITS,
    )
    from model_compression_toolkit.target_platform_capabilities.schema import (  # type: ignore[import-not-found]
        mct_current_schema as schema,
    )
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0.tpc import (  # type: ignore[import-not-found]
        generate_tpc,
        get_op_quantization_configs,
    )

    base, _, default = get_op_quantization_configs()
    base, default = (c.clone_and_edit(supported_input_activation_n_bits=BITS) for c in (base, default))
    kernels = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: bits}}) for bits in BITS[::-1]]
    written = schema.QuantizationConfigOptions(
        quantization_configurations=tuple(default.clone_and_edit(activation_n_bits=bits) for bits in BITS[::-1]),
        base_config=default,
    )
    usual = generate_tpc(default_config=default, base_config=base, mixed_precision_cfg_list=kernels, name="any_bits")
    relu = schema.OperatorSetNames.RELU
    sets = tuple(
        schema.OperatorsSet(name=relu, qc_options=written) if known.name == relu else known
        for known in usual.operator_set
    )
    return usual.model_copy(update={"operator_set": sets})

"""Sony MCT's mixed-precision search under a budget of BitOps; runs in its own environment.

The target's capabilities are ours: weights of every layer and outputs of every ReLU, which is what layers read, may
have each number of bits; all else is at 8 bits. MCT is given the limits as they are and answers with one assignment for
each. It warns that its own count of BitOps may be wrong where a tensor is read twice, as at every residual block; an
answer that is over the limit by our count is asked for again with as much less, until it fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.assigning.problem import BITS, FIXED_BITS, Batches, Entry, Sweep


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
    done = {entry["asked"]["budget"] for entry in known}
    for budget, limit in ((name, limit) for name, limit in limits.items() if name not in done):
        widths = BitWidthConfig()
        fixed = [NodeNameFilter(name) for name in ("conv1_bn", "linear")]
        widths.set_manual_weights_bit_width(fixed, FIXED_BITS, "weight")
        core = CoreConfig(mixed_precision_config=MixedPrecisionQuantizationConfig(), bit_width_config=widths)
        with remembering(known_scores):
            quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
                net,
                images,
                target_resource_utilization=ResourceUtilization(bops=limit),
                core_config=core,
                target_platform_capabilities=capabilities(),
            )
        yield {"asked": {"bops": limit, "budget": budget}, "score": None, "map": nodes(quantized)}


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

"""The SuperNet: any torch model whose layers are quantized in many ways at once, and the subnets inside it."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from supernet.config import (
    Choice,
    Granularity,
    Layer,
    LayerCost,
    NumberFormat,
    PerChannel,
    PerTensor,
    QuantConfig,
    SubnetConfig,
    build,
    plain,
)
from supernet.cost import Costs
from supernet.elastic.layers import QuantLayer
from supernet.elastic.stage import Stage
from supernet.elastic.wrap import Found, discover, evaluating, multiplications, place_sites, swap
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer
from supernet.quant.ste import compile_quantizers
from supernet.space import Dimension, Indices, SearchSpace

COVERED = 0.99
SITE = QuantConfig(Integer(8), PerTensor(), symmetric=False)
SAMPLES_PER_BATCH = 1 << 16


class SuperNet(nn.Module):
    """One set of weights, elastic in bits, granularity and symmetry of every layer and in the depth of its stages.

    Args:
        model: any module made of nn.Conv2d and nn.Linear (a copy is wrapped), or `timm/<name>`.
        example: one input [1, ...] to trace and count with.
        bits: bit-widths of weights and inputs, each 2..8.
        weight_bits, input_bits: where they differ from `bits`.
        granularities: of weights; inputs are quantized per tensor.
        symmetries: of weights and of inputs, True = symmetric.
        first_last_bits: bits of the first and last layer (None: as elastic as the others).
        formats: further number formats for weights beside the integers; symmetric.
        sites: whether tensors between operators are quantized too (8 bits), as runtimes need it.
        allow: shell patterns of modules that may stay in float; what is uncovered beyond 1 % of the MACs is an error
            otherwise.
        model_options: passed to timm where `model` is a name.

    Raises:
        ValueError: nothing to quantize, layers left in float, a model that cannot be traced, or choices that make no
            space.
    """

    def __init__(
        self,
        model: nn.Module | str,
        example: Tensor,
        *,
        bits: Iterable[int] = range(2, 9),
        weight_bits: Iterable[int] | None = None,
        input_bits: Iterable[int] | None = None,
        granularities: Sequence[Granularity | str] = (PerTensor(), PerChannel()),
        symmetries: Sequence[bool] = (True, False),
        first_last_bits: int | None = 8,
        formats: Sequence[NumberFormat] = (),
        sites: bool = True,
        allow: Sequence[str] = (),
        **model_options: Any,
    ) -> None:
        super().__init__()
        model = _timm(model, **model_options) if isinstance(model, str) else copy.deepcopy(model)
        sharing = [_granularity(g) for g in granularities]
        bits = tuple(bits)
        weight_bits, input_bits = sorted(set(weight_bits or bits)), sorted(set(input_bits or bits))
        self.example, self.has_sites, self.compiled = example, sites, "off"
        self.options = {
            "weight_bits": weight_bits,
            "input_bits": input_bits,
            "granularities": [str(g) for g in sharing],
            "symmetries": list(symmetries),
            "first_last_bits": first_last_bits,
            "sites": sites,
            "allow": list(allow),
            "formats": [plain(f) for f in formats],
        }
        found = discover(model, example)
        self._coverage = _audit(found, multiplications(model, example), allow)
        _check_stages(model, example)
        others = tuple(QuantConfig(f, g) for f in formats for g in sharing)
        free = (_choices(weight_bits, sharing, symmetries) + others, _choices(input_bits, (PerTensor(),), symmetries))
        edge, pin = (() if first_last_bits is None else (found[0].name, found[-1].name)), (first_last_bits or 8,)
        pinned = (_choices(pin, sharing, symmetries), _choices(pin, (PerTensor(),), symmetries))
        for layer in found:
            swap(model, layer.name, *(pinned if layer.name in edge else free))
        self.model: nn.Module = place_sites(model, SITE, example) if sites else model
        self._run: tuple[Any] = (self.model,)  # in a tuple, so that it is not registered a second time
        self.stages = {name: m for name, m in self.model.named_modules() if isinstance(m, Stage)}
        self.layers = tuple(Layer(**vars(f), active_if=self._condition(f.name)) for f in found)
        self.space = SearchSpace(self._dimensions())
        self.costs = Costs(self.space, self.layers)
        self.quantizers = {name: m for name, m in self.model.named_modules() if isinstance(m, Quantizer)}
        self._elastic = self._sites()
        self._bind(np.asarray(self.space.largest().row))

    # -- the space ----------------------------------------------------------------------------------------------------
    def _condition(self, name: str) -> tuple[tuple[str, tuple[Choice, ...]], ...]:
        """Depths at which the module at path `name` runs, for each stage around it."""
        conditions = []
        for path, stage in self.stages.items():
            inside = name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else None
            for dimension in stage.dimensions(path) if inside else []:
                block = [child for child, _ in stage.named_children()].index(inside.partition(".")[0]) if inside else 0
                conditions.append(
                    (dimension.name, tuple(c for c in dimension.choices if isinstance(c, int) and c > block))
                )
        return tuple(conditions)

    def _dimensions(self) -> list[Dimension]:
        dimensions = [
            Dimension(d.name, d.choices, self._condition(path))
            for path, stage in self.stages.items()
            for d in stage.dimensions(path)
        ]
        for layer in self.layers:
            module = self.model.get_submodule(layer.name)
            assert isinstance(module, QuantLayer)
            conditions = self._condition(layer.name)
            dimensions += [Dimension(d.name, d.choices, conditions) for d in module.dimensions(layer.name)]
        return dimensions

    def _sites(self) -> list[tuple[int, Quantizer]]:
        """(position of its dimension, quantizer) of everything whose choice varies."""
        named = [
            (f"{layer.name}.{what}", f"{layer.name}.{what}_quantizer")
            for layer in self.layers
            for what in ("weight", "input")
        ]
        return [(self.space.position[gene], self.quantizers[path]) for gene, path in named]

    @property
    def fingerprint(self) -> str:
        """The space's fingerprint."""
        return self.space.fingerprint

    def row(self, config: SubnetConfig | Sequence[int] | Indices) -> Indices:
        """The canonical index row [d] of a configuration or row; ValueError for a configuration of another space."""
        if isinstance(config, SubnetConfig) and config.dimensions != self.space.dimensions:
            raise ValueError(
                f"subnet {config.id} is of another space; take configurations from net.space or a view of it"
            )
        return self.space.canonical(np.asarray(config.row if isinstance(config, SubnetConfig) else config))[0]

    # -- one subnet ---------------------------------------------------------------------------------------------------
    def _bind(self, row: Indices) -> None:
        """Bind one fresh int64 table, a row for each elastic site, and set the depths."""
        table = torch.tensor(
            [q.fields(int(row[at])) for at, q in self._elastic], device=self._elastic[0][1].scale.device
        )
        for (_, quantizer), fields in zip(self._elastic, table.unbind(), strict=True):
            quantizer.bind(fields)
        for path, stage in self.stages.items():
            at = self.space.position.get(f"{path}.depth")
            if at is not None:
                depth = self.space.dimensions[at].choices[int(row[at])]
                assert isinstance(depth, int)
                stage.depth = depth
        self.active = tuple(int(i) for i in row)

    @contextmanager
    def as_subnet(self, config: SubnetConfig | Sequence[int] | Indices) -> Iterator[SuperNet]:
        """Inside, the supernet computes as this subnet; afterwards as before, also after an error.

        Backward may be called inside or after the context.
        """
        before = self.active
        self._bind(self.row(config))
        try:
            yield self
        finally:
            self._bind(np.asarray(before))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the active subnet. A compiled graph serves training only: evaluation has other shapes and modes."""
        return (self._run[0] if torch.is_grad_enabled() else self.model)(x)

    @contextmanager
    def floating(self) -> Iterator[SuperNet]:
        """Inside, nothing is quantized: the float reference at the active depth."""
        before = [(quantizer, quantizer.enabled) for quantizer in self.quantizers.values()]
        try:
            for quantizer, _ in before:
                quantizer.enabled = False
            yield self
        finally:
            for quantizer, enabled in before:
                quantizer.enabled = enabled

    def compile(self, mode: str = "regional") -> None:
        """Compile for speed: `off`; `regional`: the quantizers' functions; `whole`: the network as one graph.

        Raises:
            ValueError: `whole` for a space with elastic depth: it would compile once per depth and then fall back
                silently.
        """
        if mode not in ("off", "regional", "whole"):
            raise ValueError(f"compile is off, regional or whole, got {mode!r}")
        elastic = [name for name in self.space.position if name.endswith(".depth") and name[:-6] in self.stages]
        if mode == "whole" and elastic:
            raise ValueError(
                f"compile=whole needs a space without architecture dimensions, this one has {', '.join(elastic)}; "
                "use compile=regional"
            )
        compile_quantizers(mode == "regional")
        self._run = (torch.compile(self.model, fullgraph=True) if mode == "whole" else self.model,)
        self.compiled = mode

    # -- scales and copies --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor | tuple[Tensor, Any]]) -> None:
        """Set the scales of every choice of every site, from one float pass over batches [n, ...] or (inputs, labels).

        Raises:
            ValueError: no batches, or a batch with values that are not finite.
        """
        samples: dict[str, list[Tensor]] = {name: [] for name, q in self.quantizers.items() if not q.weight}
        handles = [self.quantizers[name].register_forward_pre_hook(_catch(kept)) for name, kept in samples.items()]
        count = 0
        try:
            with self.as_subnet(self.space.largest()), self.floating(), evaluating(self):
                for item in batches:
                    batch = item if isinstance(item, Tensor) else item[0]
                    if not torch.isfinite(batch).all():
                        raise ValueError(
                            "calibration images must be finite, but a batch holds NaN or infinity; "
                            "check the data and its normalisation"
                        )
                    self.model(batch)
                    count += 1
        finally:
            for handle in handles:
                handle.remove()
        if not count:
            raise ValueError("calibration needs at least one batch of images; got none")
        for name, quantizer in self.quantizers.items():
            if quantizer.weight:
                weight = self.model.get_submodule(name.rpartition(".")[0]).weight
                assert isinstance(weight, Tensor)
                quantizer.start(weight)
            else:
                quantizer.start(torch.cat(samples[name]))
        self._bind(np.asarray(self.active))

    def materialise(self, config: SubnetConfig | Sequence[int] | Indices) -> nn.Module:
        """The subnet as a plain module with its own weights: same outputs, one choice at each quantizer, no blocks that
        do not run."""
        row = self.row(config)
        model = copy.deepcopy(self.model)
        for layer in self.layers:
            module = model.get_submodule(layer.name)
            assert isinstance(module, QuantLayer)
            module.fix(int(row[self.space.position[layer.weight]]), int(row[self.space.position[layer.input]]))
        for path, stage in reversed(self.stages.items()):  # inner ones first, while they can be reached
            at = self.space.position.get(f"{path}.depth")
            depth = self.space.dimensions[at].choices[int(row[at])] if at is not None else len(stage)
            assert isinstance(depth, int)
            parent, _, child = path.rpartition(".")
            setattr(
                model.get_submodule(parent), child, nn.Sequential(*list(model.get_submodule(path).children())[:depth])
            )
        return model

    # -- figures ------------------------------------------------------------------------------------------------------
    def cost(self, config: SubnetConfig | Sequence[int] | Indices) -> dict[str, float]:
        """Every cost of one subnet: bitops, bitops_first_last_8, bitops_inner, bytes, macs."""
        return self.costs.of(self.row(config))

    def layer_costs(self, config: SubnetConfig | Sequence[int] | Indices) -> list[LayerCost]:
        """One row for each layer that runs, in order of execution."""
        subnet = self.space.config(self.row(config))
        rows = []
        for layer in self.layers:
            if layer.weight in subnet:
                weight, data = subnet[layer.weight], subnet[layer.input]
                assert isinstance(weight, QuantConfig) and isinstance(data, QuantConfig)
                rows.append(
                    LayerCost(layer.name, layer.kind, layer.macs, layer.weights, weight.bits, data.bits, layer.shape)
                )
        return rows

    def audit(self) -> dict[str, Any]:
        """MACs covered by quantized layers (share and count), what is left in float, number of sites."""
        fixed = [name for name, q in self.quantizers.items() if not q.weight and ".input_quantizer" not in f".{name}"]
        return self._coverage | {"layers": len(self.layers), "sites": len(fixed)}


def _timm(name: str, **options: Any) -> nn.Module:
    family, _, rest = name.partition("/")
    if family != "timm" or not rest:
        raise ValueError(f"a model is given as a module or as timm/<name>, got {name!r}")
    return build({"_target_": "supernet.backbones.timm_models.timm_model", "name": rest}, **options)


def _granularity(value: Granularity | str) -> Granularity:
    known: dict[str, Granularity] = {str(g): g for g in (PerTensor(), PerChannel())}
    if isinstance(value, str) and value not in known:
        raise ValueError(f"granularity is one of {', '.join(known)}, got {value!r}")
    return known[value] if isinstance(value, str) else value


def _choices(
    bits: Iterable[int], granularities: Sequence[Granularity], symmetries: Sequence[bool]
) -> tuple[QuantConfig, ...]:
    made = tuple(
        QuantConfig(Integer(int(b)), g, s) for b in sorted(set(bits)) for g in granularities for s in symmetries
    )
    if not made:
        raise ValueError("a space needs one or more of each: bits, granularities and symmetries; one of them is empty")
    return made


def _catch(kept: list[Tensor]) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_BATCH)
        while math.gcd(step, flat.numel()) > 1:  # else only some columns of the images would be met
            step += 1
        kept.append(torch.cat([flat[::step], flat.min()[None], flat.max()[None]]))

    return hook


def _audit(found: Sequence[Found], spent: dict[str, int], allow: Sequence[str]) -> dict[str, Any]:
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


def _check_stages(model: nn.Module, example: Tensor) -> None:
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

"""The SuperNet: any torch model whose layers are quantized in many ways at once, and the subnets inside it."""

from __future__ import annotations

import copy
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
from supernet.elastic.attention import write_out
from supernet.elastic.audit import check_stages, coverage, multiplications
from supernet.elastic.flow import flow, steps
from supernet.elastic.regions import Regions, compiled
from supernet.elastic.sampling import Sample, batch_statistics
from supernet.elastic.stage import Stage
from supernet.elastic.wrap import QUANTIZED, discover, evaluating, place_sites, swap
from supernet.formats.integer import Integer
from supernet.quant.bank import Bank
from supernet.quant.quantizer import Quantizer
from supernet.space import Dimension, Indices, SearchSpace

SITE = QuantConfig(Integer(8), PerTensor(), symmetric=False)
MODES = ("off", "quantizers", "regional", "whole")


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
            otherwise. Attention that one of them names is left as it is, with its products in float.
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
        found = discover(model := write_out(model, allow), example)
        self._coverage = coverage(found, multiplications(model, example), allow)
        check_stages(model, example)
        others = tuple(QuantConfig(f, g) for f in formats for g in sharing)
        free = (_choices(weight_bits, sharing, symmetries) + others, _choices(input_bits, (PerTensor(),), symmetries))
        edge, pin = (() if first_last_bits is None else (found[0].name, found[-1].name)), (first_last_bits or 8,)
        pinned = (_choices(pin, sharing, symmetries), _choices(pin, (PerTensor(),), symmetries))
        for layer in found:
            swap(model, layer.name, *(pinned if layer.name in edge else free))
        self.model: nn.Module = place_sites(model, SITE, example) if sites else model
        self.stages = {name: m for name, m in self.model.named_modules() if isinstance(m, Stage)}
        self.layers = tuple(Layer(**vars(f), active_if=self._condition(f.name)) for f in found)
        self.space = SearchSpace(self._dimensions())
        held = steps(flow(self.model, example), self._condition) if sites else ()
        self.costs = Costs(self.space, self.layers, held)
        self.quantizers = {name: m for name, m in self.model.named_modules() if isinstance(m, Quantizer)}
        self._attach()
        self._bind(np.asarray(self.space.largest().row))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files are not compiled: a compiled network computes with the modules that it was made from."""
        return self.__dict__ | {"_run": None, "compiled": "off" if self.compiled == "off" else "quantizers"}

    def _attach(self) -> None:
        """The bank of all scales, which of its quantizers vary with which dimension, and nothing compiled yet."""
        self.bank = Bank(self.quantizers)
        genes, names = self._genes(), list(self.quantizers)
        self._elastic, self._at = [names.index(name) for name in genes], list(genes.values())
        self._run: tuple[Any] | None = None  # in a tuple, so that it is not registered a second time
        self._evaluates, self._shapes = False, dict[bool, torch.Size]()
        self._norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

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
            assert isinstance(module, QUANTIZED)
            conditions = self._condition(layer.name)
            dimensions += [Dimension(d.name, d.choices, conditions) for d in module.dimensions(layer.name)]
        return dimensions

    def _genes(self) -> dict[str, int]:
        """Position of the dimension of every quantizer whose choice varies, by the quantizer's name."""
        modules: dict[str, Any] = {layer.name: self.model.get_submodule(layer.name) for layer in self.layers}
        return {
            f"{path}.{quantizer}": self.space.position[f"{path}.{gene}"]
            for path, module in modules.items()
            for gene, quantizer in module.genes.items()
        }

    @property
    def elastic_depths(self) -> list[str]:
        """Names of the depth dimensions."""
        return [f"{path}.depth" for path in self.stages if f"{path}.depth" in self.space.position]

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
        """Bind a choice to every quantizer, by one fresh table, and set the depths."""
        choices = np.zeros(len(self.quantizers), dtype=np.int64)
        choices[self._elastic] = row[self._at]
        self.bank.bind(choices)
        self._set_depths(row)

    def _set_depths(self, row: Indices) -> None:
        for path, stage in self.stages.items():
            at = self.space.position.get(f"{path}.depth")
            if at is not None:
                depth = self.space.dimensions[at].choices[int(row[at])]
                assert isinstance(depth, int)
                stage.depth = depth
        self.active = tuple(row.tolist())

    def _apply(self, fn: Any, recurse: bool = True) -> SuperNet:
        """What was bound moves along."""
        super()._apply(fn, recurse)
        self._bind(np.asarray(self.active))
        return self

    @contextmanager
    def as_subnet(self, config: SubnetConfig | Sequence[int] | Indices) -> Iterator[SuperNet]:
        """Inside, the supernet computes as this subnet; afterwards as before, also after an error.

        Backward may be called inside or after the context.
        """
        before = np.asarray(self.active), self.bank.bound
        self._bind(self.row(config))
        try:
            yield self
        finally:
            self.bank.rebind(before[1])
            self._set_depths(before[0])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the active subnet, by the compiled network where `compile` has provided one for this pass."""
        with self.bank.selected():
            if self._run is None or torch.is_grad_enabled() == self._evaluates:
                return self.model(x)
            counting = any(norm.training for norm in self._norms)  # other graphs, and perhaps another shape
            if self._shapes.setdefault(counting, x.shape) != x.shape:
                return self.model(x)
            return self._run[0](x)

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

    @property
    def passes(self) -> str:
        """The passes that `compile` was asked for: training or evaluation."""
        return "evaluation" if self._evaluates else "training"

    def compile(self, mode: str = "regional", passes: str = "training") -> None:
        """Compile for speed; the first pass afterwards takes the time.

        A compiled network serves batches of the first shape that it meets; others (the last batch of an epoch) and the
        other kind of pass run eagerly, with the quantizers' compiled functions, so that nothing is compiled twice.

        Args:
            mode: `off`; `quantizers`: their functions alone; `regional`: blocks, each structure once; `whole`: the
                network as one graph.
            passes: `training` (with gradients) or `evaluation` (without).

        Raises:
            ValueError: an unknown mode; `whole` for a space with elastic depth, which would compile once per depth and
                then fall back silently; `regional` for a model that cannot be traced.
        """
        if mode not in MODES:
            raise ValueError(f"compile is {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
        if passes not in ("training", "evaluation"):
            raise ValueError(f"passes is training or evaluation, got {passes!r}")
        if mode == "whole" and self.elastic_depths:
            depths = ", ".join(self.elastic_depths)
            raise ValueError(
                f"compile=whole needs a space without architecture dimensions, this one has {depths}; "
                "use compile=regional"
            )
        run: Any = Regions(self.model) if mode == "regional" else compiled(self.model) if mode == "whole" else None
        for quantizer in self.quantizers.values():
            quantizer.fuse = mode != "off"
        self._run, self._shapes = None if run is None else (run,), dict[bool, torch.Size]()
        self._evaluates, self.compiled = passes == "evaluation", mode

    # -- scales and copies --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor | tuple[Tensor, Any]]) -> None:
        """Set the scales of every choice of every site, from one float pass over batches [n, ...] or (inputs, labels).

        BatchNorm layers that have seen no data yet normalise by each batch; their statistics stay as they are.

        Raises:
            ValueError: no batches, or a batch with values that are not finite.
        """
        samples = {name: Sample() for name, q in self.quantizers.items() if not q.weight}
        handles = [self.quantizers[name].register_forward_pre_hook(sample) for name, sample in samples.items()]
        count = 0
        try:
            with (
                self.as_subnet(self.space.largest()),
                self.floating(),
                evaluating(self),
                batch_statistics(self._norms),
            ):
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
                seen = samples[name]
                quantizer.start(seen.values, seen.extremes, 1 / seen.count)
        self._bind(np.asarray(self.active))

    def materialise(self, config: SubnetConfig | Sequence[int] | Indices) -> nn.Module:
        """The subnet as a plain module with its own weights: same outputs, one choice at each quantizer, no blocks that
        do not run."""
        row = self.row(config)
        self._bind(np.asarray(self.active))  # a network that was itself copied reads its scales from its own bank again
        model = copy.deepcopy(self.model)
        for layer in self.layers:
            module = model.get_submodule(layer.name)
            assert isinstance(module, QUANTIZED)
            module.fix(int(row[self.space.position[layer.weight]]), int(row[self.space.position[layer.input]]))
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.own()
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
        """Every cost of one subnet by kind (`supernet.cost.UNITS`); peak_activation_bytes where there are sites."""
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
        return self._coverage | {"layers": len(self.layers), "sites": len(self.quantizers) - len(self._elastic)}


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

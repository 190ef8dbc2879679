"""Value types of the house: quantized tensors, subnets, costs of layers; and `build`, which makes objects of YAML.

Everything here is frozen and hashable, so that one value serves as gene, YAML node, dictionary key and log line.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.resources
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from supernet.space import Dimension

OUR_PACKAGES = ("supernet", "predictors", "search", "conf")


@runtime_checkable
class NumberFormat(Protocol):
    """The grid that a number may sit on before it is multiplied by its scale.

    Attributes:
        bits: bits of storage of one element.
    """

    @property
    def bits(self) -> int: ...

    def levels(self, symmetric: bool) -> tuple[float, ...]:
        """Every level of the grid, ascending, at most 256, zero among them; `symmetric`: no zero-point shifts it."""
        ...


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the block of elements that share a scale, for a tensor of `shape`."""
        return tuple(shape)

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each output channel (axis 0 of a weight)."""

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the block of elements that share a scale, for a tensor of `shape`."""
        return (1, *shape[1:])

    def __str__(self) -> str:
        return "per-channel"


Granularity = PerTensor | PerChannel


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How one tensor is quantized: the grid, how many elements share a scale, and whether zero sits in the middle.

    Args:
        format: the grid, e.g. `Integer(4)`.
        granularity: which elements share a scale.
        symmetric: True: zero-point 0. False: an integer zero-point beside each scale.
    """

    format: NumberFormat
    granularity: Granularity = PerTensor()
    symmetric: bool = True

    @property
    def bits(self) -> int:
        """Bits of storage of one element."""
        return self.format.bits

    @property
    def form(self) -> tuple[Granularity, bool]:
        """(granularity, symmetric): what is left of the choice when the grid is taken away."""
        return self.granularity, self.symmetric

    def __str__(self) -> str:
        return f"{self.format} {self.granularity} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True, slots=True)
class Stated:
    """What a bit map found elsewhere says of one tensor.

    Attributes:
        bits: of each element.
        granularity, symmetric: None: it does not say.
    """

    bits: int
    granularity: Granularity | None = None
    symmetric: bool | None = None


Choice = QuantConfig | int


def plain(choice: Any) -> Any:
    """`choice` as JSON holds it: dataclasses become mappings with the class name under "kind", all else stays."""
    if is_dataclass(choice) and not isinstance(choice, type):
        return {"kind": type(choice).__name__} | {f.name: plain(getattr(choice, f.name)) for f in fields(choice)}
    return choice


class SubnetConfig(Mapping[str, Choice]):
    """One subnet: dimension name -> choice, a view of one canonical index row.

    Only active dimensions are keys. Two configurations are equal where dimensions and row are equal, so subnets that
    compute the same thing hash the same.

    Args:
        dimensions: the dimensions of the space, in its order.
        row: one choice index for each dimension, canonical (inactive gene = 0).
        active: names of the dimensions that are active in this row.
    """

    __slots__ = ("_active", "_by_name", "dimensions", "row")

    def __init__(self, dimensions: tuple[Dimension, ...], row: Sequence[int], active: Sequence[str]) -> None:
        self.dimensions = dimensions
        self.row = tuple(int(i) for i in row)
        self._active = tuple(active)
        self._by_name = {d.name: d.choices[i] for d, i in zip(dimensions, self.row, strict=True)}

    def __getitem__(self, name: str) -> Choice:
        if name not in self._active:
            raise KeyError(name)
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._active)

    def __len__(self) -> int:
        return len(self._active)

    def __hash__(self) -> int:
        return hash(self.row)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SubnetConfig):
            return self.row == other.row and self.dimensions == other.dimensions
        return Mapping.__eq__(self, other)

    @property
    def id(self) -> str:
        """Ten hexadecimal digits that name this subnet within its space; the same in every process."""
        return hashlib.sha256(repr(self.row).encode()).hexdigest()[:10]

    def plain(self) -> dict[str, Any]:
        """Choice values by dimension name, as JSON holds them."""
        return {name: plain(self[name]) for name in self}

    def __repr__(self) -> str:
        return f"SubnetConfig({self.id}: {', '.join(f'{n}={self[n]}' for n in self)})"


@dataclass(frozen=True, slots=True)
class Layer:
    """What is fixed about one multiplying layer, whichever subnet is active.

    Attributes:
        name: path of the module, e.g. `layer1.0.conv1`.
        kind: `conv`, `linear`, or `matmul` for a product of two activations; its right operand stands for the weight.
        macs: multiply-accumulates for one example.
        weights: number of weight elements.
        outputs: output channels.
        behind_norm: its output goes into a BatchNorm that will be folded: scales are then per channel in the file, and
            there is a bias.
        bias: it has a bias of its own.
        shape: input shape without the batch.
        active_if: conjunction of (dimension, allowed choices) under which the layer runs.
    """

    name: str
    kind: str
    macs: int
    weights: int
    outputs: int
    behind_norm: bool
    bias: bool
    shape: tuple[int, ...]
    active_if: tuple[tuple[str, tuple[Choice, ...]], ...] = ()

    @property
    def weight(self) -> str:
        """Name of the dimension that holds the weight's (of a product: the right operand's) QuantConfig."""
        return f"{self.name}.right.input" if self.kind == "matmul" else f"{self.name}.weight"

    @property
    def input(self) -> str:
        """Name of the dimension that holds the input's (of a product: the left operand's) QuantConfig."""
        return f"{self.name}.left.input" if self.kind == "matmul" else f"{self.name}.input"


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One row of a subnet's cost table: an active layer at its true bits.

    Attributes:
        macs, weights: counts.
        weight_bits, input_bits: for each element.
    """

    name: str
    kind: str
    macs: int
    weights: int
    weight_bits: int
    input_bits: int
    shape: tuple[int, ...]

    @property
    def bitops(self) -> int:
        """MACs x weight bits x input bits."""
        return self.macs * self.weight_bits * self.input_bits


SI = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def si(value: float, unit: str = "", digits: int = 4) -> str:
    """`value` with an SI prefix and `digits` significant digits, e.g. `si(2.5e6, "B")` = `2.5 MB`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    prefix = next((p for p in ("T", "G", "M", "k", "", "m", "u", "n") if abs(value) >= SI[p] * 0.99995), "n")
    return f"{value / SI[prefix]:.{digits}g} {prefix}{unit}".strip()


def locate(target: str, trusted: Sequence[str] = ()) -> Any:
    """The class or function that `target` names: a class of ours, what conf/ registers, or what is in `trusted`.

    A dotted path is not enough: `supernet.config.os.system` walks through our package into another one. The object
    found must be defined where its name says, so `__module__.__qualname__` has to equal `target`, in one of our
    packages. Functions of ours have to be registered, since some of them write files or build what they are told to.

    Raises:
        ValueError: the target is not ours and not trusted, or does not exist.
    """
    module_name, _, name = target.rpartition(".")
    ours = module_name.split(".")[0] in OUR_PACKAGES
    if not ours and target not in trusted and target not in registered():
        raise ValueError(
            f"_target_ must name a class or function of {', '.join(OUR_PACKAGES[:3])}, got {target!r}; "
            "classes of your own are named on the command line of this run, with trust=[...]"
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_ {target!r} does not exist ({error}); see conf/ for the names there are") from error
    defined = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', '?')}"
    if ours and (defined != target or not callable(found)):
        raise ValueError(
            f"_target_ must be defined where its name says, but {target!r} is {defined!r}; "
            "write that name if it is meant"
        )
    if not (isinstance(found, type) or target in trusted or target in registered()):
        raise ValueError(
            f"_target_ must name a class, or a function that conf/ names, got the function {target!r}; "
            "allow it on the command line of this run, with trust=[...]"
        )
    return found


@functools.cache
def registered() -> tuple[str, ...]:
    """Every `_target_` that the shipped conf/ names: our registry, and the only way in for other packages' classes."""
    found: set[str] = set()
    folders = [importlib.resources.files("conf")]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_dir():
                folders.append(entry)
            elif entry.name.endswith(".yaml"):
                found.update(re.findall(r"_target_:\s*([\w.]+)", entry.read_text()))
    return tuple(sorted(found))


def build(node: Any, /, *, trusted: Sequence[str] = (), **extra: Any) -> Any:
    """The object that a configuration node describes: `_target_` called with the other keys, depth first.

    Hydra's `instantiate` with `_convert_="all"` (with its default, dataclasses inside a list silently become
    DictConfig), after each target has passed `locate`. Nodes without `_target_` come back as plain dict, list or value.

    Args:
        node: a DictConfig, mapping, list or value.
        trusted: full names outside our packages that the user allows on this command line.
        extra: keyword arguments added to the outermost call.

    Raises:
        ValueError: a target that is not allowed, or arguments that the target refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    for value in leaves(node):
        if isinstance(value, str) and "${" in value:  # Hydra would resolve it, into what nobody has looked at
            raise ValueError(
                f"settings must be resolved before objects are made of them, got {value!r}; write the value"
            )
    for target in targets(node):
        locate(target, trusted)
    try:
        return instantiate(node, _convert_="all", **extra) if isinstance(node, dict | list) else node
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        name = node.get("_target_", "the list") if isinstance(node, dict) else "the list"
        raise ValueError(f"{name} does not take these settings: {cause or error}") from error


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in a nest of mappings and lists, also below `_args_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def leaves(node: Any) -> Iterator[Any]:
    """Every key and every value that is neither mapping nor list."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from leaves(value)
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value)
    else:
        yield node

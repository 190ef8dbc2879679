"""The protocols of the house, in one file: who calls what, when, with which shapes.

Values (`NumberFormat`, `QuantConfig`, ...) live in `supernet.config`; here is what has behaviour. Classes need not
inherit from these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.config import Stated, SubnetConfig
from supernet.cost import Factors
from supernet.space import Dimension, Indices

Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]


@runtime_checkable
class ElasticModule(Protocol):
    """A module that contributes dimensions to the search space under its own path."""

    def dimensions(self, prefix: str) -> list[Dimension]:
        """The dimensions of this module, named `<prefix>.<what>`."""
        ...


@runtime_checkable
class Task(Protocol):
    """Data, loss and metric of one kind of problem. Four parts, no leaks:

    weights learn on `train`; BatchNorm on `recalibrate` (fixed training images, not augmented); pairs, `tell`,
    re-evaluation and parity debugging use `select`; `test` is read once, by export and report.
    """

    name: str
    n_classes: int
    in_channels: int

    def example(self) -> Float[Tensor, "1 c h w"]:
        """One normalised input, to trace and count with."""
        ...

    def train(self, rng: np.random.Generator) -> Iterator[Batch]:
        """One epoch of shuffled, augmented batches; the same generator state gives the same epoch."""
        ...

    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        ...

    def recalibrate(self, n: int | None = None) -> Sequence[Float[Tensor, "n c h w"]]:
        """Batches of the first n recalibration images (None: all)."""
        ...

    def select(self, n: int | None = None) -> Iterable[Batch]:
        """Batches of the first n images of the select part, in fixed order."""
        ...

    def test(self, n: int | None = None) -> Iterable[Batch]:
        """Batches of the first n images of the test part, in fixed order."""
        ...

    def loss(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """The training loss of one batch."""
        ...

    def describe(self) -> dict[str, Any]:
        """Sizes of the parts, classes and normalisation, for cards and reports."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Decides which subnets a training step runs. The loop calls `ask` once a step, and `tell` where `feedback` asks
    for it.

    Attributes:
        feedback: "none"; "train_loss": told after each step; "select_loss": told every `every` steps with losses on
            select.
        every: steps between two `tell` of "select_loss".
    """

    feedback: Literal["none", "train_loss", "select_loss"]
    every: int

    def ask(self, n: int, rng: np.random.Generator) -> Indices:
        """[n, d] canonical, admissible rows; the same generator state and history give the same rows."""
        ...

    def tell(self, indices: Indices, scores: NDArray[np.float64], step: int, total_steps: int) -> None:
        """Losses [n] of rows [n, d] that were asked for."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything `ask` depends on besides the generator, as plain Python and arrays."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


@runtime_checkable
class Settling(Protocol):
    """What a sampler that ends at one subnet has besides: training logs its figures and writes the subnet down."""

    def settled(self) -> Indices:
        """[d] the canonical row that it has settled on, or would now."""
        ...

    def figures(self) -> dict[str, float]:
        """How settled it is, by name; always the same names."""
        ...


class SearchAlgorithm(Sampler, Protocol):
    """A sampler that also keeps the best of what it was told.

    Its state comes back out of JSON, arrays as lists, when a search that was killed goes on.
    """

    def front(self) -> tuple[Indices, NDArray[np.float64]]:
        """Non-dominated rows [n, d] and their objectives [n, m]."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """What a subnet will be worth; higher is better. Inactive genes have no influence."""

    def fit(self, indices: Indices, scores: NDArray[np.float64]) -> None:
        """Learn from measured scores [n] of rows [n, d]."""
        ...

    def predict(self, indices: Indices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [n] and standard deviation [n] of the score of rows [n, d]."""
        ...


class Engine(Protocol):
    """Measures subnets: in this process, on several, on a cluster."""

    def __call__(
        self, net: Any, configs: Sequence[SubnetConfig], recalibration: Sequence[Tensor], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, NDArray[np.bool_], float]]:
        """For each subnet of `net` (a SuperNet) its position, [images] outcomes and the seconds that it took.

        In whatever order; each position comes exactly once. `net` is left as it was.

        Args:
            net: the supernet.
            configs: the subnets.
            recalibration: input batches for BatchNorm.
            batches: images and labels to judge on.
        """
        ...


class Sensitivity(Protocol):
    """What each choice costs in quality, as a sum of tables (higher is worse)."""

    def __call__(self, net: Any, batches: Iterable[Tensor | Batch]) -> Factors:
        """Measure `net` (a SuperNet) on batches of images, or of images and labels; it is left as it was.

        Methods that want labels take, where batches have none, the classes that the network says itself in float.
        """
        ...


class Calibrator(Protocol):
    """Makes one subnet right without training it."""

    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Adapt `model` in place from input batches."""
        ...


class Exporter(Protocol):
    """Writes a materialised subnet to a file of one kind, and proves that the file computes the same."""

    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        """Write the file and return its path: `path`, or the same with the suffix of its kind; nothing half-written
        stays behind. A kind of several files puts the others beside it.

        Raises:
            ValueError: this subnet cannot be such a file; says why in one line. `profile=all` goes on without it.
        """
        ...

    def verify(self, path: Path, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """Run the file beside the model; figures and a verdict."""
        ...


@runtime_checkable
class BitMapReader(Protocol):
    """Understands one form in which others write down which layer has how many bits."""

    def recognises(self, content: Any) -> bool:
        """Whether `content` (JSON, or the other tool's own objects) has this form; looks at its outside only."""
        ...

    def read(self, content: Any, names: Any) -> dict[str, Stated]:
        """What it says, by our dimension (`layer1.0.conv1.weight`).

        Args:
            content: what was recognised.
            names: how the layers of the network are found by foreign names (`supernet.export.assignments.names.Names`).
        """
        ...


@runtime_checkable
class BitMapWriter(Protocol):
    """Writes one subnet in a form that others read."""

    def write(self, net: Any, config: SubnetConfig, loose: bool = False) -> dict[str, Any]:
        """The bit map of a subnet of `net` (a SuperNet), as JSON holds it.

        Args:
            net: the supernet.
            config: the subnet.
            loose: what the form cannot say takes the next that it can; else it is an error.
        """
        ...

    def beside(self, subnet: nn.Module, net: Any) -> dict[str, bytes]:
        """Files that the map of a materialised subnet needs beside it, by name."""
        ...


class Target(Protocol):
    """A machine with a runtime, on which files are tried and timed.

    Models are of the kind that the target takes (onnx.ModelProto); names are the caller's.

    Attributes:
        name: of the folder that holds its tables.
    """

    @property
    def name(self) -> str: ...

    def origin(self) -> dict[str, Any]:
        """What measurements hold for: versions, processor, threads. Of another origin they say nothing."""
        ...

    def load(self, model: Any) -> tuple[list[tuple[str, str]], Callable[..., NDArray[np.float64]]]:
        """(kind, name) of each kernel that a model runs, and a function from its inputs, by name, to its only output.

        Raises VerificationError where the model does not load, the function where it does not run.
        """
        ...

    def integer(self, kernels: list[tuple[str, str]]) -> bool:
        """Whether kernels compute on codes alone."""
        ...

    def pieces(self, models: Mapping[str, Any], memory: int) -> dict[str, float]:
        """Seconds of operators inside a network of `memory` bytes, and under "" those of one call, whatever runs."""
        ...

    def whole(self, models: Mapping[str, Any]) -> dict[str, float]:
        """Seconds of whole networks, batch 1."""
        ...

"""The ways that a quantized convolution runs in a compiled graph, each beside torch's own convolution.

    python benchmarks/convolutions.py [--rounds 40]

`first` (supernet/elastic/first.py) learns the scale of the images without their gradient; the convolution goes by way
of it. `patches` (supernet/elastic/patches.py) is one product of matrices; "chosen" says whether a layer of that size
runs so in training. A time is that of a forward and a backward pass of one layer with its quantizers (8 bits), float32,
channels_last, gradients to weight and scales (and input, for `patches`). Both sides take turns; the ratio is of the
medians of the same rounds, with a bootstrap 95 % interval.

Prints a table and writes --json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from supernet.elastic.layers import QuantConv2d

RESULT = Path(__file__).resolve().parent / "results" / "convolutions.json"
WARM_UP = 3
FIRST, PATCHES = "first", "patches"


@dataclass(frozen=True)
class Case:
    """One layer: images [n, c, h, h] to k channels by a kernel of i x i, padded by i // 2 unless patches touch."""

    layer: str
    way: str
    n: int
    c: int
    h: int
    k: int
    i: int
    stride: int = 1

    @property
    def padding(self) -> int:
        """On each side."""
        return 0 if self.stride == self.i else self.i // 2


CASES = (
    Case("first of a ResNet-20, 32 px", FIRST, 128, 3, 32, 16, 3),
    Case("first of a ResNet-18, 64 px", FIRST, 16, 3, 64, 64, 7, 2),
    Case("first of a ResNet-18, 224 px", FIRST, 16, 3, 224, 64, 7, 2),
    Case("first of a ViT-tiny, 64 px", PATCHES, 16, 3, 64, 192, 16, 16),
    Case("512 to 512 channels at 2x2", PATCHES, 16, 512, 2, 512, 3),
    Case("256 to 512 channels, 4x4 to 2x2", PATCHES, 16, 256, 4, 512, 3, 2),
    Case("1x1, 256 to 512 channels, 4x4 to 2x2", PATCHES, 16, 256, 4, 512, 1, 2),
    Case("128 to 256 channels, 8x8 to 4x4", PATCHES, 16, 128, 8, 256, 3, 2),
    Case("256 to 256 channels at 4x4", PATCHES, 16, 256, 4, 256, 3),
)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and bootstrap; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", type=Path, default=RESULT, help="default benchmarks/results/convolutions.json")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    return options


def layer(case: Case, seed: int) -> tuple[QuantConv2d, Tensor]:
    """The quantized layer, its scales started, and its images."""
    import torch
    from torch import nn

    from supernet.config import PerChannel, QuantConfig
    from supernet.elastic.layers import QuantConv2d
    from supernet.formats.integer import Integer

    torch.manual_seed(seed)
    conv = nn.Conv2d(case.c, case.k, case.i, case.stride, case.padding, bias=False)
    made = QuantConv2d.from_float(conv).quantize([QuantConfig(Integer(8), PerChannel())], [QuantConfig(Integer(8))])
    images = torch.randn(case.n, case.c, case.h, case.h)
    made.weight_quantizer.start(made.weight)
    made.input_quantizer.start(images[:1])
    layout = torch.channels_last
    return made.to(memory_format=layout), images.contiguous(memory_format=layout)  # type: ignore[call-overload]


def sides(case: Case, seed: int, compile: Callable[[Any], Any]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A forward and backward pass by way of torch's convolution, and by the case's own; both give the outcome."""
    import torch

    from supernet.elastic import first, patches

    made, images = layer(case, seed)

    def plain(x: Tensor) -> Tensor:
        return made._conv_forward(made.input_quantizer(x), made.weight_quantizer(made.weight), None)

    def product(x: Tensor) -> Tensor:
        return patches.convolve(made, made.input_quantizer(x), made.weight_quantizer(made.weight))

    def short(x: Tensor) -> Tensor:
        lines = first.linearised(made, x, made.input_quantizer)
        assert lines is not None
        return first.convolve(made, lines, made.weight_quantizer(made.weight))

    def side(function: Callable[[Tensor], Tensor], wanted: bool) -> Callable[[], Tensor]:
        x, run = images.clone().requires_grad_(wanted), compile(function)
        grad = torch.randn_like(run(x))

        def both() -> Tensor:
            made.zero_grad(set_to_none=True)
            x.grad = None
            out: Tensor = run(x)
            out.backward(grad)
            return out.detach()

        return both

    return side(plain, True), side(short if case.way == FIRST else product, case.way != FIRST)


def measured(case: Case, options: argparse.Namespace, compile: Callable[[Any], Any]) -> dict[str, Any]:
    """Medians in seconds, their ratio with its interval, and whether the layer runs so in training."""
    import torch

    from benchmarks.timing.intervals import ratio_interval
    from supernet.elastic.patches import is_faster

    both = sides(case, options.seed, compile)
    one, other = (run() for run in both)
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    times: tuple[list[float], list[float]] = [], []
    for round in range(WARM_UP + options.rounds):
        for k in (0, 1) if round % 2 else (1, 0):
            start = time.perf_counter()
            both[k]()
            if round >= WARM_UP:
                times[k].append(time.perf_counter() - start)
    made, images = layer(case, options.seed)
    chosen = case.way == FIRST or is_faster(made, images)
    ratio = ratio_interval(times[1], times[0], options.seed)
    return asdict(case) | {
        "convolution": median(times[0]),
        "this": median(times[1]),
        "ratio": ratio._asdict(),
        "chosen": chosen,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Lines of Markdown."""
    lines = ["| layer | way | convolution (ms) | this (ms) | ratio | chosen |", "|---|---|---|---|---|---|"]
    for case in found:
        ratio = case["ratio"]
        figures = f"{1e3 * case['convolution']:.2f} | {1e3 * case['this']:.2f}"
        interval = f"{ratio['middle']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(
            f"| {case['layer']}, batch {case['n']} | {case['way']} | {figures} | {interval} | "
            f"{'yes' if case['chosen'] else 'no'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases; the exit code."""
    options = parsed(arguments)
    import torch

    from supernet.artefacts import command, provenance, write_json
    from supernet.elastic.regions import compiled
    from supernet.memory import keep_freed

    keep_freed()
    torch.set_num_threads(options.threads)
    found = []
    for k, case in enumerate(CASES):
        print(f"{k + 1}/{len(CASES)} {case.layer}", file=sys.stderr, flush=True)
        found.append(measured(case, options, compiled))
    facts = {name: getattr(options, name) for name in ("seed", "rounds", "threads")}
    whole = {"command": command(sys.argv), "torch": torch.__version__, **facts, "cases": found}
    write_json(options.json, whole | {"provenance": provenance(options.seed)})
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What an exported file costs beside float and beside onnxruntime's own quantization, measured side by side in one run.

    python benchmarks/export.py [--models resnet20,resnet18,vit_tiny,mobilenetv2] [--data DATA]

For each network: our file with weights and activations of 8 bits (profiles int8 and int8_amx), the float network
(torch.onnx.export simplified by onnxruntime, and our own float twin; the faster one is the baseline), and
`onnxruntime.quantization.quantize_static` (QDQ, weights int8 per channel, activations uint8) of the simplified file,
calibrated on the same images. All files are open in one process; in each round each of them takes one image several
times in a row (the median counts), in a shuffled order, on one thread. A ratio is the median of one side over the
median of the other in the same rounds, with a bootstrap 95 % interval; a goal is met when the middle of that is within
its limit.

The error is the largest difference to the float file's logits on the test images, as a share of the largest logit.
Seconds are those of `elastibit export` for one subnet: fold, write, prove. Sizes are of files with weights of 2 to 8
bits in containers of 2, 4 and 8 bits (first and last layer 8 bits), without metadata, over what weights, scales,
zero-points and biases need in these containers, and at their true bits. DATA may hold trained weights and images
(ResNet-20 on CIFAR-10, MobileNetV2 on ImageNet); then ResNet-20's accuracy with and without deployment sites is
measured too. What is missing is random.

Writes --json after each network and prints the tables at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.exporting.goals import (
    BYTES,
    ERROR,
    FAILURES,
    LATENCY,
    MODELS,
    OVERHEAD,
    PROFILES,
    SECONDS,
    STATIC,
    TORCH,
    TWIN,
)
from benchmarks.step_time import words

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession
    from torch import Tensor, nn

    from benchmarks.exporting.problems import Material, Problem
    from supernet.elastic.supernet import SuperNet

RESULT = Path(__file__).resolve().parent / "results" / "export.json"
SIZES = (2, 3, 4, 6, 8)
ACTIVATIONS = (4, 8)
TURN, FEWEST_TIMES = 5e-3, 5
"""About how many seconds a file computes, image after image, before it is the next one's turn; the fewest images."""


@dataclass
class Outcome:
    """What was measured of one network.

    Attributes:
        figures: contestant -> measure -> one value for each round (seconds), or one value.
        failed: part -> reason.
        facts: of our files, by profile: parity, kernels, what is computed in float.
        sizes: bits -> bytes (`supernet.export.profile.sizes`), and the file over the ideal and the nominal ones.
        accuracy: name -> share of test images.
        about: of weights and images.
    """

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def attempt(self, part: str, run: Callable[[], Any]) -> Any:
        """What `run` gives; its failure is noted under the part's name, and the other parts go on."""
        try:
            return run()
        except Exception as error:  # other tools, and models that cannot be exported yet, raise anything
            reason = str(error).splitlines() or [""]
            self.failed[part] = f"{type(error).__name__}: {reason[0][:300]}"
            return None


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=words(MODELS), default=MODELS, metavar="A,B,...", help=f"of {', '.join(MODELS)}")
    add("--rounds", type=int, default=40, help="default %(default)s; goals are judged from 40 on")
    add("--data", type=Path, help="folder with trained weights and images; default everything is random")
    add("--seed", type=int, default=0, help="of weights, images and order; default %(default)s")
    add("--json", type=Path, default=RESULT, help="result file; default benchmarks/results/export.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is at least 1, got {options.rounds}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data} is no folder")
    return options


# -- one network ------------------------------------------------------------------------------------------------------
def measured(problem: Problem, options: argparse.Namespace, outcome: Outcome) -> None:
    """Make all files of a network and measure them."""
    from benchmarks.exporting.problems import material

    made = material(problem, options.data, options.seed)
    outcome.about = {"trained": made.trained, "calibration": len(made.calibration), "test": len(made.test)}
    with tempfile.TemporaryDirectory() as folder:
        files = rivals(made, Path(folder), outcome)
        outcome.attempt("ours", lambda: ours(problem, made, Path(folder), files, outcome))
        sessions = {name: opened(path) for name, path in files.items()}
        for name, path in files.items():
            outcome.figures[name] = {BYTES: [path.stat().st_size]} | outcome.figures.get(name, {})
        errors(sessions, made, outcome)
        race(sessions, made, options, outcome)
    if problem.accuracy and made.trained:
        outcome.attempt("accuracy", lambda: outcome.accuracy.update(accuracies(problem, made)))


def rivals(made: Material, folder: Path, outcome: Outcome) -> dict[str, Path]:
    """Files of the float network and of its static quantization."""
    from benchmarks.exporting.rivals import float_file, quantized_file

    files = {}
    simplified = outcome.attempt(TORCH, lambda: float_file(made.model, made.test[:1], folder / "float.onnx"))
    if simplified is not None:
        files[TORCH] = simplified
        made_static = outcome.attempt(
            STATIC, lambda: quantized_file(simplified, made.calibration, folder / "static.onnx")
        )
        files |= {} if made_static is None else {STATIC: made_static}
    return files


def ours(problem: Problem, made: Material, folder: Path, files: dict[str, Path], outcome: Outcome) -> None:
    """Our files by profile, the float twin, and the sizes; fills `files`."""
    import onnx

    from supernet.artefacts import VerificationError
    from supernet.export.bundle import export
    from supernet.export.deploy import deploy
    from supernet.export.onnx import write_float

    net = supernet(problem, made)
    subnet = net.materialise(chosen(net, 8, 8)).eval()
    for profile in PROFILES:
        name, start = f"ours.{profile}", time.perf_counter()
        try:
            card = export(subnet, made.test[:1], folder / profile, profile, made.batches())
        except VerificationError as error:
            outcome.failed[name] = str(error).splitlines()[0]
            outcome.figures[name] = {FAILURES: [1.0]}
            continue
        outcome.figures[name] = {SECONDS: [time.perf_counter() - start], FAILURES: [0.0]}
        proof = card["verification"]
        kept = ("agreement", "accuracy", "kernels", "unfused", "sqnr_db")
        outcome.facts[name] = {key: proof[key] for key in kept}
        files[name] = folder / profile / "model.onnx"
    twin = write_float(deploy(subnet, made.test[:1]))
    files[TWIN] = folder / "twin.onnx"
    onnx.save(twin, files[TWIN])
    for bits in SIZES:
        outcome.attempt(f"size at {bits} bits", lambda bits=bits: size(net, made, bits, outcome))


def supernet(problem: Problem, made: Material, sites: bool = True) -> SuperNet:
    """The calibrated supernet of a problem."""
    from supernet.config import PerChannel
    from supernet.elastic.supernet import SuperNet

    net = SuperNet(
        made.model,
        made.test[:1],
        weight_bits=SIZES,
        input_bits=ACTIVATIONS,
        granularities=[PerChannel()],
        sites=sites,
    )
    net.eval().calibrate(made.calibration.split(32))
    return net


def chosen(net: SuperNet, weight_bits: int, input_bits: int) -> list[int]:
    """The row of symmetric weights and asymmetric inputs with so many bits, or the nearest that a layer has."""

    def distance(name: str, choice: Any) -> tuple[int, bool]:
        weight = name.endswith(".weight")
        return abs(choice.bits - (weight_bits if weight else input_bits)), choice.symmetric != weight

    row = []
    for dimension in net.space.dimensions:
        choices = dimension.choices
        row.append(min(range(len(choices)), key=lambda k: distance(dimension.name, choices[k])))
    return row


def size(net: SuperNet, made: Material, bits: int, outcome: Outcome) -> None:
    """Bytes of the packed file with weights of `bits` bits, and what it needs at least: in its containers (first and
    last layer 8 bits) and at the true bits."""
    import json

    from supernet.export.bundle import named
    from supernet.export.deploy import deploy
    from supernet.export.lint import without_metadata
    from supernet.export.profile import Profile, sizes

    exporter = named("packed")
    assert isinstance(exporter, Profile)
    deployed = deploy(net.materialise(chosen(net, bits, 8)).eval(), made.test[:1])
    model = exporter.loadable(deployed)
    (rows,) = (json.loads(entry.value) for entry in model.metadata_props if entry.key == "elastibit.layers")
    stored = {row["name"]: row["stored_bits"] for row in rows}
    found = sizes(model.ByteSize(), without_metadata(model), deployed, stored)
    over = {f"over_{which}": found["bare"] / found[which] for which in ("ideal", "nominal")}
    outcome.sizes[str(bits)] = {**found, **over}
    outcome.figures[f"ours.packed.w{bits}"] = {BYTES: [found["bare"]], OVERHEAD: [over["over_ideal"]]}


def accuracies(problem: Problem, made: Material) -> dict[str, float]:
    """Of the float network, and of subnets with and without deployment sites; scales are calibrated, nothing learns."""
    found = {"float": accuracy(made.model, made)}
    for sites in (True, False):
        net = supernet(problem, made, sites)
        for bits in (8, 4):
            subnet = net.materialise(chosen(net, bits, bits)).eval()
            found[f"w{bits}a{bits}, {'sites' if sites else 'no sites'}"] = accuracy(subnet, made)
    return found


def accuracy(model: nn.Module, made: Material) -> float:
    """Share of the test images that a module classifies as labelled."""
    import torch

    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).double() for images, labels in made.batches()]
    return float(torch.cat(right).mean())


# -- files in the runtime ---------------------------------------------------------------------------------------------
def opened(path: Path) -> InferenceSession:
    """A session of one thread."""
    import onnx

    from supernet.export.runtime import session

    return session(onnx.load(path))[0]


def logits(session: InferenceSession, images: Tensor) -> np.ndarray[Any, Any]:
    """[n, classes] of a file, one image after another, as quantize_static calibrated."""
    import numpy as np

    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image.numpy()})[0] for image in images.split(1)])


def errors(sessions: Mapping[str, InferenceSession], made: Material, outcome: Outcome) -> None:
    """Largest difference of each file to the float file, over the largest of its logits; accuracy where trained."""
    import numpy as np

    if TORCH not in sessions:
        return
    found = {name: logits(session, made.test) for name, session in sessions.items()}
    for name, values in found.items():
        off = float(np.abs(values - found[TORCH]).max() / np.abs(found[TORCH]).max())
        outcome.figures[name][ERROR] = [off]
        if made.trained:
            outcome.accuracy[name] = float((values.argmax(1) == made.labels.numpy()).mean())


class _Turn:
    """A file that `benchmarks.timing.race.rounds` can ask for the seconds of one image."""

    def __init__(self, session: InferenceSession, feed: dict[str, Any]) -> None:
        self.session, self.feed, self.times = session, feed, FEWEST_TIMES
        self.times = max(FEWEST_TIMES, round(TURN / self.ask(LATENCY, 0)["seconds"]))

    def ask(self, word: str, timeout: float) -> dict[str, Any]:
        """Median seconds of one image, among several in a row: what another process interrupts does not count."""
        seconds = []
        for _ in range(self.times):
            start = time.perf_counter()
            self.session.run(None, self.feed)
            seconds.append(time.perf_counter() - start)
        return {"seconds": median(seconds)}


def race(
    sessions: Mapping[str, InferenceSession], made: Material, options: argparse.Namespace, outcome: Outcome
) -> None:
    """Time every file in every round."""
    from benchmarks.timing.race import Terms, rounds

    image = made.test[:1].numpy()
    turns = {name: _Turn(one, {one.get_inputs()[0].name: image}) for name, one in sessions.items()}
    terms = Terms(options.rounds, options.seed, 1, (LATENCY,), Path(), Path())
    times, failed = rounds(turns, dict.fromkeys(turns, (LATENCY,)), terms)
    outcome.failed |= failed
    for name, of in times.items():
        outcome.figures[name] |= of


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every network that was asked for, write the file, print the tables; 1 if none of ours could be timed."""
    options = parsed(arguments)
    import torch

    from benchmarks.exporting.problems import PROBLEMS
    from benchmarks.exporting.report import result, table
    from benchmarks.timing.table import goal_table
    from supernet.artefacts import progress, write_json

    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    found: dict[str, Any] = {}
    with progress("export", total=len(options.models)) as bar:
        for model in options.models:
            outcomes[model] = outcome = Outcome()
            outcome.attempt(model, lambda model=model, outcome=outcome: measured(PROBLEMS[model], options, outcome))
            found = result(outcomes, options)
            write_json(options.json, found)
            bar.advance(note=model)
    print(table(found), goal_table(found["goals"]), sep="\n\n")
    print(f"\nGoals: {found['judged']}. All figures are in {options.json.name}.")
    return 0 if any(LATENCY in o.figures.get("ours.int8", {}) for o in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The goals of benchmarks/export.py as data, in the form of benchmarks/timing/goals.py."""

from __future__ import annotations

from benchmarks.timing.goals import Goal

LATENCY, ERROR, BYTES, SECONDS, FAILURES, OVERHEAD = "latency", "error", "bytes", "seconds", "failures", "overhead"
TORCH, TWIN, STATIC = "fp32.torch", "fp32.twin", "ort.static"
FP32 = ("fp32.*",)
MODELS = ("resnet20", "resnet18", "vit_tiny", "mobilenetv2")
PROFILES = ("int8", "int8_amx")
FEWEST_ROUNDS = 40

GOALS = (
    *(
        Goal(work, model, f"ours.{profile}", LATENCY, limit, against)
        for work, model, limit, against in (
            ("time of an image, 5 times below float", "resnet18", 1 / 5, FP32),
            ("time of an image, beside quantize_static", "resnet18", 1.05, (STATIC,)),
            ("time of an image, 2 times below float", "mobilenetv2", 1 / 2, FP32),
        )
        for profile in PROFILES
    ),
    Goal("time of an image, 1.3 times below float", "vit_tiny", "ours.int8", LATENCY, 1 / 1.3, FP32),
    Goal("largest error of the logits", "vit_tiny", "ours.int8", ERROR, 0.05),
    *(Goal("files that fail their proof", model, "ours.int8", FAILURES, 0) for model in MODELS),
    Goal("export and proof (s)", "resnet18", "ours.int8", SECONDS, 20),
    *(
        Goal(f"bytes at {b} bits over the least", "resnet18", f"ours.packed.w{b}", OVERHEAD, 1.03)
        for b in (2, 3, 4, 6, 8)
    ),
)
"""At most `limit`; of a time, as a share of the fastest of `against`."""


def why_not_judged(rounds: int) -> str | None:
    """What keeps a run from being judged by the goals' own terms; None where nothing does."""
    return None if rounds >= FEWEST_ROUNDS else f"{rounds} rounds, the goals ask for {FEWEST_ROUNDS}"

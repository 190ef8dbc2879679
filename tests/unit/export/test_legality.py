"""Trials of choices on a target, and the view of the space that they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from supernet.artefacts import VerificationError
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.cost import repair
from supernet.export.legality import GRID, INPUT, WEIGHT, Shape, legal, shape_of, trial, trials, verdict
from supernet.export.profile import Profile
from supernet.export.runtime import unfused
from supernet.export.targets.ort_cpu import OrtCpu
from supernet.formats.integer import Integer

CONV = Shape("conv", (6, 4, 3, 3), padding=(1, 1))
INT8, PACKED = Profile("int8"), Profile("packed", (4, 8))


class Fake(OrtCpu):
    """A target that refuses four-bit storage, and whose output one may bend."""

    def __init__(self, bend: Callable[[Any], Any] = lambda out: out) -> None:
        super().__init__()
        object.__setattr__(self, "bend", bend)

    def load(self, model: onnx.ModelProto) -> Any:
        if any(t.data_type == onnx.TensorProto.INT4 for t in model.graph.initializer):
            raise VerificationError("no INT4 here")
        kernels, call = super().load(model)

        def bent(inputs: Any) -> Any:
            return self.bend(call(inputs))  # type: ignore[attr-defined]

        return kernels, bent


@pytest.mark.parametrize("shape", GRID, ids=str)
def test_every_shape_of_the_grid_runs_in_8_bits(shape: Shape) -> None:
    found = verdict(OrtCpu(), INT8, shape, WEIGHT, INPUT)
    assert found["right"] and found["integer"] and found["most_off"] <= 1, found["why"]


def test_a_trial_is_the_layer_that_it_stands_for() -> None:
    """The witness is torch, in float: the deployed trial lies within its grid's error."""
    deployed, x = trial(CONV, WEIGHT, INPUT)
    layer = deployed.operators()[1]
    real = nn.functional.conv2d(x, layer.weight, layer.shift, padding=1)  # type: ignore[arg-type]
    got = deployed(x)
    assert tuple(got.shape) == (4, 6, 8, 8)
    assert float((got - real).pow(2).mean() / real.pow(2).mean()) < 2e-3


def test_packed_weights_run_in_float_and_8_bits_on_codes() -> None:
    four = QuantConfig(Integer(4), PerChannel())
    kinds = {}
    for name, profile, weight in (("int8", INT8, four), ("packed", PACKED, four), ("wide", PACKED, WEIGHT)):
        found = verdict(OrtCpu(), profile, CONV, weight, INPUT)
        assert found["loads"] and found["runs"] and found["right"], found["why"]
        kinds[name] = found["integer"], bool(unfused([(kind, "") for kind in found["kernels"]]))
    assert kinds == {"int8": (True, False), "packed": (False, True), "wide": (True, False)}


def test_what_a_target_refuses_or_computes_wrongly_is_said() -> None:
    four = QuantConfig(Integer(4), PerChannel())
    refused = verdict(Fake(), PACKED, CONV, four, INPUT)
    assert (refused["loads"], refused["runs"], refused["right"]) == (False, False, False)
    assert refused["why"] == "no INT4 here"
    wrong = verdict(Fake(lambda out: np.where(out > out.mean(), out - 3, out)), INT8, CONV, WEIGHT, INPUT)
    assert wrong["loads"] and wrong["runs"] and not wrong["right"] and wrong["most_off"] >= 2
    assert "codes off" in wrong["why"]
    rare = verdict(
        Fake(lambda out: out + (np.arange(out.size).reshape(out.shape) % 50 == 0)), INT8, CONV, WEIGHT, INPUT
    )
    assert not rare["right"] and "% equal" in rare["why"]


def test_shapes_of_a_net_are_cut_down_to_what_matters() -> None:
    depthwise = nn.Conv2d(8, 8, (5, 3), (2, 1), (2, 1), groups=8)
    shape = Shape.of(depthwise, (8, 224, 200), True)
    assert (shape.weight, shape.groups, shape.size) == ((8, 1, 5, 3), 8, (8, 8))
    wide = Shape.of(nn.Conv2d(512, 1000, 3), (512, 7, 7), True)
    assert wide.weight == (72, 64, 3, 3) and wide == Shape.of(nn.Conv2d(64, 136, 3), (64, 7, 7), True)
    assert Shape.of(nn.Conv2d(576, 576, 3, groups=576), (576, 7, 7), True).weight == (64, 1, 3, 3)
    assert Shape.of(nn.Linear(2048, 1000), (2048,), False).weight == (72, 64)
    assert str(shape) == "conv 8x1x5x3 stride 2x1 padding 2x1 groups 8 bias normed"
    found = verdict(OrtCpu(), INT8, shape, WEIGHT, INPUT)
    assert found["right"], found["why"]


@pytest.fixture(scope="module")
def tried(resnet: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A net and invented records: no 2-bit weight is integer, no asymmetric 3-bit input is right, in some layers."""
    net = resnet[0]
    records = {}
    for key, shape, weight, data in trials(net):
        bad = data.bits == 3 and not data.symmetric and shape.weight[0] == 8
        records[key] = {"right": not bad, "integer": not (weight.bits == 2 and shape.kind == "conv")}
    return net, records


def test_each_shape_and_choice_is_tried_once(tried: Any) -> None:
    net, records = tried
    shapes = {str(shape_of(net, layer.name)) for layer in net.layers}
    expected = set()
    for layer in net.layers:
        for gene, what in ((layer.weight, "weight"), (layer.input, "input")):
            choices = net.space.dimensions[net.space.position[gene]].choices
            expected |= {f"{shape_of(net, layer.name)} | {what} {choice}" for choice in choices}
    assert set(records) == expected and len(shapes) < len(net.layers)


def test_the_view_holds_what_is_legal_and_moves_keep_it(tried: Any) -> None:
    net, records = tried
    view, rng = legal(net, records), np.random.default_rng(0)

    def lawful(rows: Any) -> bool:
        for row in rows:
            config = net.space.config(row)
            for layer in net.layers:
                if layer.weight not in config:
                    continue
                weight, data = config[layer.weight], config[layer.input]
                if weight.bits == 2:
                    return False
                if data.bits == 3 and not data.symmetric and shape_of(net, layer.name).weight[0] == 8:
                    return False
        return True

    rows = view.sample_indices(200, rng)
    assert lawful(rows) and not lawful(net.space.sample_indices(200, rng))
    assert lawful(view.mutate(rows, 0.5, rng))
    low = {"bytes": float(np.quantile(net.costs.kinds["bytes"].value(rows), 0.2))}
    fitted = repair(view, rows, low, net.costs.kinds, rng)
    assert lawful(fitted) and (net.costs.kinds["bytes"].value(fitted) <= low["bytes"]).all()
    assert view.fingerprint == net.fingerprint and view.smallest()["one.0.conv1.weight"].bits == 3


def test_any_admits_what_runs_in_float(tried: Any) -> None:
    net, records = tried
    view = legal(net, records, "any")
    assert view.smallest()["one.0.conv1.weight"].bits == 2


def test_what_was_not_tried_or_leaves_nothing_is_refused(tried: Any) -> None:
    net, records = tried
    with pytest.raises(ValueError, match="legal is integer or any, got 'fast'"):
        legal(net, records, "fast")
    with pytest.raises(ValueError, match=r"conv\.weight .* was not tried on the target"):
        legal(net, {})
    none = {key: record | {"integer": False} for key, record in records.items()}
    with pytest.raises(ValueError, match=r"runs conv\.weight in no way"):
        legal(net, none)


def test_a_trial_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (trial(CONV, WEIGHT, QuantConfig(Integer(4), PerTensor(), False))[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.operators()[1].codes, two.operators()[1].codes)  # type: ignore[arg-type]

"""Latency as a sum of tables: equal to the sum over the pieces of each subnet, deployed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from supernet.config import build
from supernet.cost import Costs
from supernet.elastic.supernet import SuperNet
from supernet.export.latency import Anatomy
from supernet.export.profile import Profile


@pytest.fixture(scope="module", params=[(8,), (4, 8)], ids=["int8", "packed"])
def anatomy(request: Any, resnet: Any) -> Anatomy:
    return Anatomy(resnet[0], Profile("x", request.param))


def times(anatomy: Anatomy, seed: int = 0) -> dict[str, float]:
    random = np.random.default_rng(seed)
    return {key: float(random.uniform(1, 2)) for key in anatomy.models}


def test_the_sum_is_that_of_the_subnets_own_pieces(anatomy: Anatomy) -> None:
    """The witness deploys every subnet and adds up what is in it."""
    net, seconds = anatomy.net, times(anatomy)
    factors, rng = anatomy.factors(seconds, 7.0), np.random.default_rng(5)
    configs = [net.space.smallest(), net.space.uniform("w4a8"), net.space.uniform("w8a2")]
    configs += [net.space.sample(rng) for _ in range(5)]
    for config in configs:
        assert factors.value(np.array([config.row]))[0] == pytest.approx(7.0 + anatomy.counted(config, seconds))


def test_products_of_attention_are_pieces_too() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    options = {"img_size": 16, "patch_size": 8, "num_classes": 10, "depth": 2, "embed_dim": 48, "num_heads": 3}
    net = SuperNet("timm/vit_tiny_patch16_224", images[:1], bits=(4, 8), **options)  # type: ignore[arg-type]
    net.calibrate([images])
    anatomy, rng = Anatomy(net, Profile("int8")), np.random.default_rng(0)
    seconds = times(anatomy)
    assert any(name.endswith(".scores") for name in anatomy.names.values())
    for config in (net.space.smallest(), net.space.sample(rng), net.space.sample(rng)):
        counted = anatomy.counted(config, seconds)
        assert anatomy.factors(seconds).value(np.array([config.row]))[0] == pytest.approx(counted)


def test_a_block_that_does_not_run_costs_nothing(anatomy: Anatomy) -> None:
    net, seconds = anatomy.net, times(anatomy)
    row = np.array(net.space.largest().row)
    at = net.space.position["two.depth"]
    less = row.copy()
    less[at] = 0
    less = net.space.canonical(less)[0]
    own = [p for p in anatomy.of(row) if p.owner.startswith("two.1.")]
    others = [p for p in anatomy.of(row) if not p.owner.startswith("two.1.") and p.owner]
    assert len(own) >= 3 and len(others) > len(own)
    factors = anatomy.factors(seconds)
    gone = factors.value(row[None])[0] - factors.value(less[None])[0]
    assert gone == pytest.approx(sum(seconds[p.key] for p in own))


def test_in_int8_bits_of_weights_take_no_time_and_fewer_bits_of_inputs_take_more(resnet: Any) -> None:
    anatomy = Anatomy(resnet[0], Profile("int8"))
    space = anatomy.net.space
    value = anatomy.factors(times(anatomy)).value
    rows = {bits: np.array([space.uniform(bits).row]) for bits in ("w8a8", "w2a8", "w8a4", "w8a2")}
    full = value(rows["w8a8"])[0]
    assert value(rows["w2a8"])[0] == full < value(rows["w8a4"])[0] == value(rows["w8a2"])[0]


def test_it_is_a_kind_of_cost(resnet: Any) -> None:
    anatomy = Anatomy(resnet[0], Profile("int8"))
    costs = Costs(anatomy.net.space, anatomy.net.layers)
    costs.kinds["latency"] = anatomy.factors(dict.fromkeys(anatomy.models, 0.0001), 2e-4)
    assert costs.parse({"latency": "30ms"}) == {"latency": pytest.approx(0.03)}
    for text in ("3500us", "3.5m", "3.5 ms", "0.0035"):
        assert costs.limit("latency", text) == pytest.approx(3.5e-3)
    assert costs.limit("latency", 0.002) == 0.002
    uniform = np.array([anatomy.net.space.uniform("w4a4").row])
    assert costs.limit("latency", "w4a4") == pytest.approx(costs.kinds["latency"].value(uniform)[0])
    low, high = costs.reachable("latency")
    assert 0 < low < high
    with pytest.raises(ValueError, match=r"no subnet has latency <= 100 us; the smallest reaches [\d.]+ ms"):
        costs.parse({"latency": "100us"})


def test_a_landmark_is_deployed_once_for_each_form_of_storage(resnet: Any) -> None:
    net = resnet[0]
    wide, packed = (Anatomy(net, build(p)) for p in profiles())
    forms = [len(set(anatomy._weights["one.0.conv1.weight"])) for anatomy in (wide, packed)]
    assert forms == [3, 5], "in int8: zero-points by tensor, by channel, none; packed: 4 and 2 bits besides"
    keys = [{key for key in anatomy.models if "int8[4,4,3,3]" in key} for anatomy in (wide, packed)]
    assert keys[0] == keys[1] and len(wide.models) < len(packed.models)


def profiles() -> list[dict[str, Any]]:
    made = {"_target_": "supernet.export.profile.Profile", "name": "x"}
    return [made | {"containers": [8]}, made | {"containers": [2, 4, 8]}]

"""Ties and pins as users write them, on a network whose partners are known."""

import numpy as np
import pytest
import torch
from torch import nn

from search.allocation import Program
from search.views import constrained, pins
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.factors import Factors


class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.first, self.second = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.side = nn.Conv2d(a, b, 1) if a != b else None

    def forward(self, x):
        out = self.second(self.first(x).relu())
        return (out + (x if self.side is None else self.side(x))).relu()


class Net(nn.Module):
    """A stem, a block with a shortcut convolution, an elastic stage of two more, three linear layers side by side."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(1, 2, 3, padding=1), Block(2, 3)
        self.stage = Stage(Block(3, 3), Block(3, 3), min_depth=1)
        self.q, self.k, self.v = (nn.Linear(48, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stage(self.wide(self.stem(x).relu())).flatten(1)
        return self.head((self.q(x) * self.k(x) + self.v(x)).relu())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SuperNet(Net(), torch.randn(1, 1, 4, 4), bits=(2, 4, 8), symmetries=[True], granularities=["per-tensor"])


def tied(net, view):
    return {frozenset(net.space.dimensions[i].name for i in group) for group in view.ties}


def both(*names):
    return {frozenset(f"{name}.{what}" for name in names) for what in ("weight", "input")}


def test_partners_are_found_in_the_graph(net):
    assert tied(net, constrained(net, ["shortcuts"])) == both("wide.first", "wide.side")
    assert tied(net, constrained(net, ["qkv"])) == both("q", "k", "v")
    assert both("wide.second", "wide.side") == tied(net, constrained(net, ["residual"]))
    inner = [layer.name for layer in net.layers]
    assert tied(net, constrained(net, ["weights_inputs"])) == {frozenset([f"{n}.weight", f"{n}.input"]) for n in inner}


def test_what_overlaps_is_one_group(net):
    """As in HAWQ-V3: weight and input of the first convolution and of its shortcut have one bit-width."""
    view = constrained(net, ["shortcuts", "weights_inputs", "residual"])
    group = {f"wide.{n}.{what}" for n in ("first", "second", "side") for what in ("weight", "input")}
    assert frozenset(group) in tied(net, view)
    names = [name for members in tied(net, view) for name in members]
    assert len(names) == len(set(names))


def test_patterns_name_layers_or_dimensions(net):
    assert tied(net, constrained(net, [["stage.*.first", "stage.*.second"]])) == both(
        *(f"stage.{b}.{n}" for b in "01" for n in ("first", "second"))
    )
    assert tied(net, constrained(net, [["*.first.weight"], ["q.input", "k.input"]])) == {
        frozenset(f"{b}.first.weight" for b in ("wide", "stage.0", "stage.1")),
        frozenset(["q.input", "k.input"]),
    }


@pytest.mark.parametrize(
    ("pin", "left"),
    [
        ({"q": 4}, {"q.weight": "4", "q.input": "4"}),
        ({"q": "w8"}, {"q.weight": "8", "q.input": "248"}),
        ({"stage.*": "w4a2"}, {"stage.0.first.weight": "4", "stage.1.second.input": "2", "q.weight": "248"}),
        ({"stage.*": 8}, {"stage.1.first.input": "8", "stage.depth": "12"}),
        ({"stage.depth": 2, "k.input": "4"}, {"stage.depth": "2", "k.input": "4", "k.weight": "248"}),
        ({"v": "int4-per-tensor-symmetric"}, {"v.weight": "4", "v.input": "4"}),
        ({"v.weight": "int2 per-tensor"}, {"v.weight": "2", "v.input": "248"}),
        ({"*.weight": 4, "q*": "a8"}, {"k.weight": "4", "q.input": "8"}),
    ],
)
def test_pins(net, pin, left):
    layers = {"*.weight": 4}
    if pin.keys() & layers.keys():  # the first and the last layer have no 4 bits
        pin = {f"{name}.weight": 4 for name in ("q", "k", "v")} | {k: v for k, v in pin.items() if k != "*.weight"}
    view = constrained(net, pin=pin)
    for name, offered in left.items():
        i = net.space.position[name]
        d = net.space.dimensions[i]
        kept = [c for c, mask in zip(d.choices, view.admissible[i], strict=True) if mask]
        assert "".join(str(getattr(c, "bits", c)) for c in kept) == offered


def test_every_subnet_of_the_view_keeps_ties_and_pins(net, rng):
    view = constrained(net, ["shortcuts", "weights_inputs"], {"stage.0.*": 4})
    for row in view.sample_indices(50, rng):
        config = net.space.config(row)
        assert len({config[f"wide.{n}.{w}"].bits for n in ("first", "side") for w in ("weight", "input")}) == 1
        assert {c.bits for name, c in config.items() if name.startswith("stage.0.")} == {4}
        assert all(
            config[layer.weight].bits == config[layer.input].bits for layer in net.layers if layer.weight in config
        )
    limit = {"bitops": 0.5 * net.cost(view.largest())["bitops"]}
    errors = Factors(tuple(((i,), 4.0 ** -np.arange(float(n))) for i, n in enumerate(net.space.sizes)))
    best = Program(view, errors, net.costs.kinds).solve(limit)
    assert view.admits(best[None]).all()


def test_pins_of_the_command_line():
    assert pins(["layer4.*:w8", "a.depth:2"]) == {"layer4.*": "w8", "a.depth": "2"}
    assert pins({"a": 3}) == {"a": 3} and pins([]) == {}
    for wrong in (["layer4"], [":w8"], ["a:"], ["a:1", "a:2"], [7]):
        with pytest.raises(ValueError, match="pin is a list of pattern:choice"):
            pins(wrong)


def test_a_view_of_a_view(net):
    before = net.space.restrict({"q.weight": lambda c: c.bits > 2})
    view = constrained(net, ["qkv"], space=before)
    assert view.admissible[net.space.position["v.weight"]].tolist() == [False, True, True]
    assert constrained(net, space=before) is before and constrained(net) is net.space


@pytest.mark.parametrize(
    ("tie", "pin", "said"),
    [
        (["shortcut"], {}, "shortcuts, qkv, residual, weights_inputs and of groups of patterns.*got 'shortcut'"),
        ([["nothing.*"]], {}, "a tie needs two or more dimensions"),
        ([["q.weight", "head.weight"]], {}, "tied dimensions need the same choices, these differ: q.weight, head"),
        ([], {"nothing": 8}, "pin 'nothing': 8 pins nothing"),
        ([], {"q": 3}, "leaves q.weight without a choice; it has int2 per-tensor"),
        ([], {"q": "8bit"}, "a pin is 8, w8, a4, w4a8 or e.g. int8-per-channel-symmetric, got '8bit' for 'q'"),
        ([], {"q": True}, "got True for 'q'"),
        ([], {"q": "fp4"}, "leaves q.weight without a choice"),
        ([], {"q": ""}, "a pin is 8"),
    ],
)
def test_what_cannot_be(net, tie, pin, said):
    with pytest.raises(ValueError, match=said):
        constrained(net, tie, pin)


def test_a_word_without_partners_says_why():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    net = SuperNet(plain, torch.randn(1, 1, 8, 8), bits=(4, 8))
    with pytest.raises(ValueError, match="tie 'qkv' finds nothing to tie in this network: no such partners"):
        constrained(net, ["qkv"])
    with pytest.raises(ValueError, match=r"different choices \(2: 8 and 4\); train with granularities=.per-tensor."):
        constrained(net, ["weights_inputs"])

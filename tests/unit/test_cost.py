"""Costs against sums written out by hand; limits as users type them; repair and fill."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from supernet.config import Layer, PerChannel, PerTensor, QuantConfig
from supernet.cost import Costs, Factors, cheapest, fill, label, over, repair
from supernet.formats.integer import Integer
from supernet.space import Dimension, Indices, SearchSpace

WEIGHT = tuple(
    QuantConfig(Integer(b), g, s) for b in (2, 4, 8) for g in (PerTensor(), PerChannel()) for s in (True, False)
)
INPUT = tuple(QuantConfig(Integer(b), PerTensor(), s) for b in (2, 4, 8) for s in (True, False))
PIN = (QuantConfig(Integer(8), PerChannel()),)
DEEP, DEEPER = (("s.depth", (2, 3)),), (("s.depth", (3,)),)

LAYERS = (
    Layer("stem", "conv", 3456, 108, 4, True, False, (3, 6, 6)),
    Layer("s.0", "conv", 5184, 145, 4, True, False, (4, 6, 6)),
    Layer("s.1", "conv", 5000, 144, 4, False, True, (4, 6, 6), DEEP),
    Layer("s.2", "conv", 700, 144, 4, False, False, (4, 6, 6), DEEPER),
    Layer("head", "linear", 40, 40, 10, False, True, (4,)),
)


def made() -> Costs:
    dimensions = [Dimension("s.depth", (1, 2, 3))]
    for layer in LAYERS:
        pinned = layer.name in ("stem", "head")
        dimensions.append(Dimension(layer.weight, PIN if pinned else WEIGHT, layer.active_if))
        dimensions.append(Dimension(layer.input, PIN if pinned else INPUT, layer.active_if))
    return Costs(SearchSpace(dimensions), LAYERS)


COSTS = made()
SPACE = COSTS.space


def by_hand(row: Any) -> dict[str, float]:
    """Every kind of cost, layer by layer, as the README would explain it."""
    config = SPACE.config(row)
    cost = dict.fromkeys(COSTS.kinds, 0.0)
    read: list[tuple[int, int, int, int]] = []
    for layer in LAYERS:
        if layer.weight not in config:
            continue
        w, a = config[layer.weight], config[layer.input]
        assert isinstance(w, QuantConfig) and isinstance(a, QuantConfig)
        edge = layer.name in ("stem", "head")
        cost["macs"] += layer.macs
        cost["bitops"] += layer.macs * w.bits * a.bits
        cost["bitops_first_last_8"] += layer.macs * (64 if edge else w.bits * a.bits)
        cost["bitops_inner"] += 0 if edge else layer.macs * w.bits * a.bits
        scales = layer.outputs if layer.behind_norm or w.granularity == PerChannel() else 1
        zeros = 0 if w.symmetric else scales
        biases = layer.outputs if layer.bias or layer.behind_norm else 0
        cost["bytes"] += math.ceil(layer.weights * w.bits / 8) + 4 * scales + zeros + 4 * biases + 5
        read += [] if edge else [(layer.weights, w.bits, math.prod(layer.shape), a.bits)]
    cost["average_weight_bits"] = sum(n * bits for n, bits, _, _ in read) / sum(n for n, _, _, _ in read)
    cost["average_input_bits"] = sum(n * bits for _, _, n, bits in read) / sum(n for _, _, n, _ in read)
    return cost


class TestFactors:
    def test_every_kind_equals_the_sum_by_hand(self, rng: np.random.Generator) -> None:
        rows = SPACE.sample_indices(60, rng)
        for kind, factors in COSTS.kinds.items():
            assert factors.value(rows) == pytest.approx([by_hand(row)[kind] for row in rows], rel=1e-12)
        assert COSTS.of(rows[0]) == pytest.approx(by_hand(rows[0]))
        assert COSTS.of(SPACE.config(rows[0])) == COSTS.of(rows[0])

    def test_bytes_counted_by_hand_once_more_with_numbers(self) -> None:
        """Codes, 4 B for each scale and each bias, 5 B for the input; 145 weights of 2 bits take 37 B."""
        stem, inner, head = 108 + 4 * 4 + 4 * 4 + 5, 37 + 4 * 4 + 4 * 4 + 5, 40 + 10 * 4 + 10 * 4 + 5
        assert COSTS.of(SPACE.smallest())["bytes"] == stem + inner + head == 145 + 74 + 125

    def test_a_sum_of_lookups_and_a_multiple(self) -> None:
        one = Factors((((), np.array(2.0)), ((0,), np.array([1.0, 10.0]))))
        two = Factors((((0, 1), np.array([[1.0, 2.0], [3.0, 4.0]])),))
        rows = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        assert one.value(rows).tolist() == [3, 3, 12, 12]
        assert (one + two).value(rows).tolist() == [4, 5, 15, 16]
        assert (two * 0.5).value(rows).tolist() == [0.5, 1, 1.5, 2]
        assert Factors().value(rows).tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("kind", ["bitops", "bitops_first_last_8", "bitops_inner", "bytes"])
    def test_cost_rises_with_bits(self, kind: str, rng: np.random.Generator) -> None:
        _, up = SPACE.neighbours
        value = COSTS.kinds[kind].value
        for row in SPACE.sample_indices(40, rng):
            for gene in np.flatnonzero(SPACE.active(row[None])[0]):
                higher = SPACE.spread(row[None], np.array([gene]), up[gene][row[gene]][None])
                assert value(higher) >= value(row[None])
                name = SPACE.dimensions[gene].name
                if kind == "bitops" and higher.tolist() != [row.tolist()] and not name.startswith(("stem", "head")):
                    assert value(higher) > value(row[None])

    def test_uniform_bitops_are_macs_times_bits(self) -> None:
        cost = COSTS.of(SPACE.uniform("w4a2"))
        inner, edge = 5184 + 5000 + 700, 3456 + 40
        assert cost["bitops"] == cost["bitops_first_last_8"] == 8 * inner + 64 * edge
        assert cost["bitops_inner"] == 8 * inner and cost["macs"] == inner + edge


class TestLimits:
    @pytest.mark.parametrize(
        ("kind", "text", "value"),
        [
            ("bitops", "2.5M", 2.5e6),
            ("bitops", "2.5 MBitOps", 2.5e6),
            ("bitops", "100 BitOps", 100),
            ("bytes", "120kB", 120e3),
            ("bytes", "120 k", 120e3),
            ("bytes", "300B", 300),
            ("bytes", "1e3", 1000),
            ("bytes", ".5 kB", 500),
            ("macs", "500 MACs", 500),
            ("macs", "5MMACs", 5e6),
            ("macs", 7, 7),
            ("macs", np.float64(7.5), 7.5),
            ("macs", np.int64(7), 7),
        ],
    )
    def test_numbers_with_and_without_prefix_and_unit(self, kind: str, text: Any, value: float) -> None:
        assert COSTS.limit(kind, text) == pytest.approx(value, rel=1e-15)

    def test_uniform_bits_mean_what_that_subnet_costs(self) -> None:
        for kind in COSTS.kinds:
            assert COSTS.limit(kind, "w4a2") == COSTS.of(SPACE.uniform("w4a2"))[kind]
        assert COSTS.parse({"bitops": "w4a4", "bytes": "1kB"}) == {
            "bitops": COSTS.of(SPACE.uniform("w4a4"))["bitops"],
            "bytes": 1000.0,
        }

    @pytest.mark.parametrize(
        ("kind", "text", "message"),
        [
            ("bitops", "2.5Q", r"number with SI prefix in BitOps \(e.g. 2.5M\) or wXaY, got '2.5Q'"),
            ("bitops", "5kB", "in BitOps .* got '5kB'"),
            ("bytes", "1.2.3", "got '1.2.3'"),
            ("bytes", "", "got ''"),
            ("bytes", "-3", "got '-3'"),
            ("bytes", "0", "must be positive, got 0"),
            ("bytes", -1.0, "must be positive, got -1"),
            ("bytes", float("nan"), "must be positive, got nan"),
            ("bytes", float("inf"), "must be positive, got inf"),
            ("bytes", True, "number or wXaY, got True"),
            ("bitops", "w3a4", r"3-bit weights, this space offers \[2, 4, 8\]"),
            ("latency", "3m", "one of bitops, .*, average_input_bits; got 'latency'"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, kind: str, text: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            COSTS.limit(kind, text)

    @pytest.mark.parametrize("budget", ["w4a4", {}, None, 5, ["w4a4"]])
    def test_a_budget_names_its_kind(self, budget: Any) -> None:
        with pytest.raises(ValueError, match=r"mapping kind -> limit, e.g. {'bitops': 'w4a4'}"):
            COSTS.parse(budget)

    @pytest.mark.parametrize("kind", list(COSTS.kinds))
    def test_reachable_is_what_enumeration_finds(self, kind: str) -> None:
        ends = [end_of_range(kind, sign) for sign in (1, -1)]
        assert COSTS.reachable(kind) == pytest.approx(ends, rel=1e-12)

    @pytest.mark.parametrize("kind", list(COSTS.kinds))
    def test_a_limit_below_everything_names_the_nearest_that_can_be_reached(self, kind: str) -> None:
        low = COSTS.reachable(kind)[0]
        assert COSTS.parse({kind: low}) == {kind: low}
        with pytest.raises(ValueError, match=rf"no subnet has {kind} <= .*; the smallest reaches .*: raise the budget"):
            COSTS.parse({kind: 0.99 * low})

    def test_a_view_has_limits_of_its_own(self) -> None:
        view = Costs(SPACE.restrict({"s.?.weight": lambda c: c.bits >= 4, "s.depth": [2]}), LAYERS)
        low = 64 * (3456 + 40) + 4 * 2 * (5184 + 5000)
        assert view.reachable("bitops")[0] == low
        with pytest.raises(ValueError, match=r"the smallest reaches 305.2 kBitOps"):
            view.parse({"bitops": low - 1})

    def test_labels_are_what_was_typed(self) -> None:
        assert label({"bitops": "w3a3"}) == "w3a3"
        assert label({"bitops": "2.5M", "bytes": 120000.0}) == "2.5M-120000"


def end_of_range(kind: str, sign: int) -> float:
    """Exact end of the range: layers are independent once the depth is fixed."""
    if kind.startswith("average"):  # every inner layer has 2 and 8 bits
        return 2.0 if sign == 1 else 8.0
    best = math.inf
    for depth in (1, 2, 3):
        total = 0.0
        for layer in LAYERS:
            if dict(layer.active_if).get("s.depth") and depth not in dict(layer.active_if)["s.depth"]:
                continue
            pinned = layer.name in ("stem", "head")
            options = []
            for w, a in itertools.product(PIN if pinned else WEIGHT, PIN if pinned else INPUT):
                product = layer.macs * w.bits * a.bits
                scales = layer.outputs if layer.behind_norm or w.granularity == PerChannel() else 1
                bias = layer.outputs if layer.bias or layer.behind_norm else 0
                size = math.ceil(layer.weights * w.bits / 8) + scales * (4 if w.symmetric else 5) + 4 * bias + 5
                options.append(
                    {
                        "bitops": product,
                        "bitops_first_last_8": 64 * layer.macs if pinned else product,
                        "bitops_inner": 0 if pinned else product,
                        "bytes": size,
                        "macs": layer.macs,
                    }[kind]
                )
            total += min(sign * o for o in options)
        best = min(best, total)
    return sign * best


VIEWS = {
    "whole": SPACE,
    "restricted": SPACE.restrict({"s.?.weight": lambda c: c.bits >= 4, "s.depth": [1, 3]}),
    "tied": SPACE.tie([["s.?.weight"], ["s.?.input"]]),
}


@pytest.mark.parametrize("view", list(VIEWS))
class TestRepairAndFill:
    def limits(self, space: SearchSpace, share: float, *kinds: str) -> dict[str, float]:
        costs, limits = Costs(space, LAYERS), {}
        for kind in kinds:
            low, high = costs.reachable(kind)
            limits[kind] = low + share * (high - low)
        return limits

    @pytest.mark.parametrize("kinds", [("bitops",), ("bytes",), ("bitops", "bytes")], ids="-".join)
    @pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 1.0])
    def test_repair_is_never_over(
        self, view: str, kinds: tuple[str, ...], share: float, rng: np.random.Generator
    ) -> None:
        space = VIEWS[view]
        limits = self.limits(space, share, *kinds)
        before = space.sample_indices(60, rng)
        after = repair(space, before, limits, COSTS.kinds, rng)
        assert (over(limits, COSTS.kinds, after) <= 1e-12).all()
        assert space.admits(after).all()
        kept = over(limits, COSTS.kinds, before) <= 0
        assert np.array_equal(after[kept], before[kept]), "rows that fit are left alone"

    @pytest.mark.parametrize("kinds", [("bitops",), ("bitops", "bytes")], ids="-".join)
    def test_fill_spends_and_is_never_over(self, view: str, kinds: tuple[str, ...], rng: np.random.Generator) -> None:
        space = VIEWS[view]
        limits = self.limits(space, 0.5, *kinds)
        before = repair(space, space.sample_indices(60, rng), limits, COSTS.kinds, rng)
        after = fill(space, before, limits, COSTS.kinds, rng)
        assert (over(limits, COSTS.kinds, after) <= 1e-12).all() and space.admits(after).all()
        spent = [COSTS.kinds["bitops"].value(rows) for rows in (before, after)]
        assert (spent[1] >= spent[0]).all() and spent[1].mean() > 1.05 * spent[0].mean()

    def test_the_same_generator_gives_the_same_rows(self, view: str) -> None:
        space = VIEWS[view]
        limits = self.limits(space, 0.2, "bitops")

        def run(seed: int) -> Indices:
            np.random.seed(seed)  # noqa: NPY002 (the disturbance)
            rng = np.random.default_rng(5)
            rows = repair(space, space.sample_indices(20, rng), limits, COSTS.kinds, rng)
            return fill(space, rows, limits, COSTS.kinds, rng)

        assert np.array_equal(run(0), run(1))

    def test_cheapest_takes_the_best_choice_of_each_gene(self, view: str) -> None:
        space = VIEWS[view]
        rows = space.sample_indices(5, np.random.default_rng(0))
        found = cheapest(space, rows, COSTS.kinds["bytes"].value)
        assert (COSTS.kinds["bytes"].value(found) <= COSTS.kinds["bytes"].value(rows)).all()
        assert space.admits(found).all()


def test_no_limits_are_kept_by_everything() -> None:
    rows = SPACE.sample_indices(4, np.random.default_rng(0))
    assert over({}, COSTS.kinds, rows).tolist() == [-1] * 4

"""The search space against enumeration: canonical rows, views, moves, landmarks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from supernet.config import PerChannel, PerTensor, QuantConfig, SubnetConfig
from supernet.formats.integer import Integer
from supernet.space import Dimension, Indices, SearchSpace, magnitude

C2, C4 = QuantConfig(Integer(2)), QuantConfig(Integer(4))
C4A, C8 = QuantConfig(Integer(4), PerTensor(), False), QuantConfig(Integer(8))
CHOICES = (C2, C4, C4A, C8)


def small() -> SearchSpace:
    """Two depths, five tensors, two of which run only where the first or the second stage is deep."""
    deep, deeper = (("s.depth", (2, 3)),), (("t.depth", (2,)),)
    return SearchSpace(
        [
            Dimension("s.depth", (1, 2, 3)),
            Dimension("t.depth", (1, 2)),
            Dimension("a.weight", CHOICES),
            Dimension("b.weight", CHOICES, deep),
            Dimension("c.weight", CHOICES, deeper),
            Dimension("c.input", (C4, C8), deeper),
        ]
    )


def tied_depths() -> SearchSpace:
    deep = [((f"{s}.depth", (2, 3)),) for s in "st"]
    return SearchSpace(
        [
            Dimension("s.depth", (1, 2, 3)),
            Dimension("t.depth", (1, 2, 3)),
            Dimension("a.weight", CHOICES, deep[0]),
            Dimension("b.weight", CHOICES, deep[1]),
            Dimension("c.weight", CHOICES),
            Dimension("c.input", (C4, C8)),
        ]
    )


VIEWS: dict[str, Callable[[], SearchSpace]] = {
    "whole": small,
    "restricted": lambda: small().restrict({"*.weight": (C4, C8), "s.depth": lambda d: d != 2}),
    "pinned": lambda: small().pin({"b.weight": C8, "t.depth": 2}),
    "tied": lambda: small().tie([["*.weight"]]),
    "restricted, then tied": lambda: small().restrict({"b.weight": (C4, C4A)}).tie([["a.weight", "b.weight"]]),
    "tied, then restricted": lambda: small().tie([["a.weight", "b.weight"]]).restrict({"b.weight": (C4, C4A)}),
    "tied depths": lambda: tied_depths().restrict({"*.weight": (C4, C8)}).tie([["*.depth"], ["*.weight"]]),
}


@pytest.fixture(params=list(VIEWS))
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return VIEWS[request.param]()


def everything(space: SearchSpace) -> Indices:
    return np.array(list(itertools.product(*(range(n) for n in space.sizes))), dtype=np.int64)


def runs(space: SearchSpace, row: Any) -> dict[str, Any]:
    """What a row stands for, written out without the space's own arithmetic."""
    chosen: dict[str, Any] = {}
    for d, i in zip(space.dimensions, row, strict=True):
        if all(name in chosen and chosen[name] in allowed for name, allowed in d.active_if):
            chosen[d.name] = d.choices[i]
    return chosen


def admitted(space: SearchSpace) -> set[tuple[tuple[str, Any], ...]]:
    """Every subnet of a view by brute force: active choices admissible, active tied ones equal."""
    found = set()
    for row in everything(space):
        chosen = runs(space, row)
        good = all(
            space.admissible[i][d.choices.index(chosen[d.name])]
            for i, d in enumerate(space.dimensions)
            if d.name in chosen
        )
        names = [[space.dimensions[i].name for i in group] for group in space.ties]
        tied = all(len({chosen[n] for n in group if n in chosen}) <= 1 for group in names)
        if good and tied:
            found.add(tuple(sorted(chosen.items())))
    return found


class TestCanonical:
    def test_it_is_idempotent(self, space: SearchSpace) -> None:
        once = space.canonical(everything(space))
        assert np.array_equal(space.canonical(once), once)

    def test_rows_are_equal_exactly_where_subnets_are(self) -> None:
        space = small()
        rows = everything(space)
        canonical = [tuple(r) for r in space.canonical(rows)]
        subnets = [tuple(sorted(runs(space, r).items())) for r in rows]
        assert len(set(zip(canonical, subnets, strict=True))) == len(set(canonical)) == len(set(subnets))

    def test_inactive_genes_are_zero_and_active_ones_are_kept(self) -> None:
        space = small()
        for row, canonical in zip(everything(space), space.canonical(everything(space)), strict=True):
            active = [d.name in runs(space, row) for d in space.dimensions]
            assert np.array_equal(canonical, np.where(active, row, 0))

    def test_tied_genes_follow_the_first_that_runs(self) -> None:
        space = small().tie([["b.weight", "c.weight"]])
        rows = np.array([[0, 1, 0, 3, 1, 0], [1, 1, 0, 3, 1, 0], [0, 0, 0, 3, 1, 1]])
        expected = [[0, 1, 0, 0, 1, 0], [1, 1, 0, 3, 3, 0], [0, 0, 0, 0, 0, 0]]
        assert space.canonical(rows).tolist() == expected

    @pytest.mark.parametrize("row", [[0] * 5, [0] * 7, [-1, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
    def test_wrong_rows_are_refused(self, row: list[int]) -> None:
        with pytest.raises(ValueError, match="6 indices"):
            small().canonical(np.array([row]))

    def test_a_dimension_depends_on_earlier_ones_only(self) -> None:
        gated = Dimension("a.weight", CHOICES, (("s.depth", (2,)),))
        with pytest.raises(ValueError, match=r"a.weight depends on 's.depth', which must be an earlier"):
            SearchSpace([gated, Dimension("s.depth", (1, 2))])
        with pytest.raises(ValueError, match="must be an earlier"):
            SearchSpace([gated])

    def test_dimensions_need_names_and_choices_that_differ(self) -> None:
        with pytest.raises(ValueError, match="names must differ"):
            SearchSpace([Dimension("a", (1,)), Dimension("a", (1, 2))])
        for choices in ((), (C2, C2)):
            with pytest.raises(ValueError, match="needs distinct choices"):
                Dimension("a", choices)


class TestViews:
    def test_admitted_rows_are_those_of_brute_force(self, space: SearchSpace) -> None:
        rows = np.unique(space.canonical(everything(space)), axis=0)
        kept = [tuple(sorted(runs(space, r).items())) for r in rows[space.admits(rows)]]
        assert len(kept) == len(set(kept)) and set(kept) == admitted(space)

    def test_sampling_reaches_every_admitted_subnet_and_no_other(
        self, space: SearchSpace, rng: np.random.Generator
    ) -> None:
        rows = np.unique(space.sample_indices(20_000, rng), axis=0)
        assert {tuple(sorted(runs(space, r).items())) for r in rows} == admitted(space)

    @pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
    def test_mutation_stays_in_the_view(self, space: SearchSpace, rate: float, rng: np.random.Generator) -> None:
        rows = space.sample_indices(500, rng)
        moved = space.mutate(rows, rate, rng)
        assert space.admits(moved).all()
        if rate == 0:
            assert np.array_equal(moved, rows)

    def test_a_step_up_or_down_stays_in_the_view(self, space: SearchSpace, rng: np.random.Generator) -> None:
        rows = space.sample_indices(400, rng)
        for table in space.neighbours:
            gene = np.argmax(rng.random(rows.shape) * space.active(rows), axis=1)
            value = np.array([table[g][r[g]] for r, g in zip(rows, gene, strict=True)])
            moved = space.spread(rows, gene, value)
            assert space.admits(moved).all()
            for row, new, g, v in zip(rows, moved, gene, value, strict=True):
                before, after = runs(space, row), runs(space, new)
                name = space.dimensions[g].name
                assert after[name] == space.dimensions[g].choices[v]
                group = next((t for t in space.ties if g in t), (g,))
                others = {space.dimensions[i].name for i in range(len(space)) if i not in group}
                assert {n: c for n, c in after.items() if n in before.keys() & others} == {
                    n: c for n, c in before.items() if n in after.keys() & others
                }

    def test_landmarks_are_in_the_view(self, space: SearchSpace) -> None:
        for config in (space.smallest(), space.largest(), space.uniform("w4a4")):
            assert space.admits(np.array([config.row])).all()

    def test_they_keep_dimensions_indices_and_fingerprint(self, space: SearchSpace) -> None:
        whole = tied_depths() if space.sizes[1] == 3 else small()
        assert space.fingerprint == whole.fingerprint and space.dimensions == whole.dimensions
        row = space.sample_indices(1, np.random.default_rng(1))[0]
        assert whole.config(row) == space.config(row) and hash(whole.config(row)) == hash(space.config(row))

    def test_the_parent_is_left_alone(self) -> None:
        parent = small()
        parent.restrict({"a.weight": (C8,)})
        parent.tie([["*.weight"]])
        assert all(mask.all() for mask in parent.admissible) and parent.ties == ()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda s: s.restrict({"z*": (C2,)}), "no dimension matches 'z\\*'; there are s.depth, t.depth"),
            (lambda s: s.pin({"a.weight": QuantConfig(Integer(3))}), "leaves a.weight without a choice; it has int2"),
            (lambda s: s.tie([["a.weight"]]), "two or more dimensions, .* matches a.weight"),
            (lambda s: s.tie([["q", "r"]]), "matches none"),
            (lambda s: s.tie([["c.*"]]), "same choices, these differ: c.weight, c.input"),
            (lambda s: s.tie([["a.weight", "b.weight"], ["b.weight", "c.weight"]]), "one tie only: b.weight, c.weight"),
            (lambda s: s.pin({"a.weight": C2, "b.weight": C8}).tie([["*.weight"]]), "no admissible choice in common"),
            (lambda s: s.tie([["*.weight"]]).pin({"a.weight": C2, "b.weight": C8}), "no admissible choice in common"),
        ],
    )
    def test_impossible_views_are_refused(self, make: Callable[[SearchSpace], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(small())


class TestSampling:
    def test_every_choice_is_equally_likely(self, rng: np.random.Generator) -> None:
        n = 12_000
        rows, space = small().sample_indices(n, rng), small()
        active = space.active(rows)
        for i, size in enumerate(space.sizes):
            counts = np.bincount(rows[active[:, i], i], minlength=size)
            expected = counts.sum() / size
            assert ((counts - expected) ** 2 / expected).sum() < 25  # chi-square, 3 degrees at most: p < 2e-5

    def test_mutation_redraws_the_share_it_is_told(self, rng: np.random.Generator) -> None:
        space = SearchSpace([Dimension(f"{i}.weight", CHOICES) for i in range(6)])
        rows = space.sample_indices(4000, rng)
        assert np.mean(space.mutate(rows, 0.4, rng) != rows) == pytest.approx(0.4 * 3 / 4, abs=0.02)

    def test_what_a_mutation_wakes_is_drawn(self, rng: np.random.Generator) -> None:
        """A gene that becomes active has no value of its own: its 0 means inactive, not the first choice."""
        space = small()
        shallow = space.canonical(np.tile([0, 0, 0, 0, 0, 0], (3000, 1)))
        woken = space.mutate(shallow, 0.5, rng)
        counts = np.bincount(woken[woken[:, 0] > 0, 3], minlength=4)
        assert counts.min() > 0.2 * counts.sum()

    def test_the_same_generator_gives_the_same_rows_whatever_the_global_one_does(self) -> None:
        space, drawn = small(), []
        for seed in (0, 1):
            np.random.seed(seed)  # noqa: NPY002 (the disturbance)
            rng = np.random.default_rng(7)
            rows = space.sample_indices(20, rng)
            drawn.append((rows.tolist(), space.mutate(rows, 0.5, rng).tolist(), space.sample(rng)))
        assert drawn[0] == drawn[1]


class TestLandmarks:
    def test_smallest_and_largest(self) -> None:
        assert dict(small().smallest()) == {"s.depth": 1, "t.depth": 1, "a.weight": C2}
        expected = {"s.depth": 3, "t.depth": 2, "a.weight": C8, "b.weight": C8, "c.weight": C8, "c.input": C8}
        assert dict(small().largest()) == expected

    def test_uniform_bits_prefer_the_usual_form_and_the_largest_architecture(self) -> None:
        config = small().uniform("w4a8", weight_form=(PerTensor(), False))
        assert config["a.weight"] == config["b.weight"] == C4A and config["c.input"] == C8
        assert (config["s.depth"], config["t.depth"]) == (3, 2)

    def test_a_dimension_without_these_bits_takes_the_nearest(self) -> None:
        config = small().pin({"b.weight": C8}).uniform("w2a4")
        assert (config["a.weight"], config["b.weight"], config["c.input"]) == (C2, C8, C4)

    @pytest.mark.parametrize("bits", ["w4", "4", "a4w4", "w4a4x", ""])
    def test_other_spellings_are_refused(self, bits: str) -> None:
        with pytest.raises(ValueError, match="written wXaY"):
            small().uniform(bits)

    def test_bits_that_nothing_offers_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"3-bit weights, this space offers \[2, 4, 8\]"):
            small().uniform("w3a4")

    def test_neighbours_are_the_next_bits_of_the_same_form(self) -> None:
        down, up = small().neighbours
        at = small().position["a.weight"]
        assert [CHOICES[i] for i in up[at]] == [C4, C8, C8, C8]
        assert [CHOICES[i] for i in down[at]] == [C2, C2, C2, C4]
        view_down, _ = small().pin({"a.weight": C4A}).neighbours
        assert CHOICES[view_down[at][3]] == C4A

    @pytest.mark.parametrize("direction", [0, 1])
    def test_neighbours_by_definition(self, direction: int, space: SearchSpace) -> None:
        sign = (-1, 1)[direction]
        for d, mask, table in zip(space.dimensions, space.admissible, space.neighbours[direction], strict=True):
            sizes = np.array([magnitude(c) for c in d.choices])
            for j, here in enumerate(sizes):
                beyond = sizes[mask & (sign * (sizes - here) > 0)]
                wanted = here if len(beyond) == 0 else beyond[np.argmin(np.abs(beyond - here))]
                assert sizes[table[j]] == wanted


class TestFiles:
    def test_configurations_and_rows_are_two_views_of_one_thing(self, space: SearchSpace) -> None:
        rows = space.sample_indices(50, np.random.default_rng(3))
        configs = [space.config(row) for row in rows]
        assert np.array_equal(space.indices(configs), rows)
        assert np.array_equal(space.indices(configs[0]), rows[:1])
        assert np.array_equal(space.indices([dict(c) for c in configs]), rows)
        assert all(dict(c) == runs(space, r) for c, r in zip(configs, rows, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"a.weight": QuantConfig(Integer(3))}, "a.weight=int3 per-tensor symmetric is not in this space"),
            ({"z.weight": C2}, r"z.weight=.* is not in this space \(no such dimension\)"),
            ({"s.depth": 4}, "s.depth=4 is not in this space"),
        ],
    )
    def test_configurations_of_another_model_are_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small().indices(dict(small().largest()) | change)

    def test_a_configuration_names_every_active_dimension(self) -> None:
        given = dict(small().largest())
        del given["c.weight"], given["b.weight"]
        with pytest.raises(ValueError, match=r"missing: b.weight, c.weight"):
            small().indices(given)

    def test_plain_is_json_and_complete(self, space: SearchSpace) -> None:
        described = json.loads(json.dumps(space.plain()))
        assert described["fingerprint"] == space.fingerprint
        assert [d["name"] for d in described["dimensions"]] == list(space.position)
        assert [len(d["choices"]) for d in described["dimensions"]] == space.sizes.tolist()
        assert described["admissible"] == [mask.tolist() for mask in space.admissible]
        assert described["ties"] == [list(group) for group in space.ties]

    def test_the_fingerprint_tells_spaces_apart(self) -> None:
        dimensions = list(small().dimensions)
        others = [
            [*dimensions[:2], Dimension("a.weight", CHOICES[:3]), *dimensions[3:]],
            [*dimensions[:2], Dimension("x.weight", CHOICES), *dimensions[3:]],
            [*dimensions[:3], Dimension("b.weight", CHOICES), *dimensions[4:]],
            dimensions[:-1],
        ]
        prints = {SearchSpace(d).fingerprint for d in [dimensions, *others]}
        assert len(prints) == 5 and all(len(p) == 16 for p in prints)

    def test_subnets_are_equal_across_spaces_of_one_model(self) -> None:
        one, two = small().largest(), small().largest()
        assert isinstance(one, SubnetConfig) and one == two and one.dimensions is not two.dimensions


class TestFeatures:
    def test_they_describe_the_active_genes_and_nothing_else(self) -> None:
        space = small()
        row = space.indices({"s.depth": 2, "t.depth": 1, "a.weight": C4A, "b.weight": C8})
        depth = [[1, 2 / 3], [1, 1 / 2]]
        four, eight = [1, 4 / 8, 4.0**-2, 0, 0], [1, 1, 4.0**-6, 0, 1]
        expected = np.concatenate([*depth, four, eight, [0.0] * 10])
        assert np.allclose(space.features(row)[0], expected) and space.features(row).dtype == np.float32

    def test_granularity_and_symmetry_show(self) -> None:
        space = SearchSpace([Dimension("a.weight", (QuantConfig(Integer(8), PerChannel(), True), C4A))])
        assert space.features(np.array([[0], [1]]))[:, 3:].tolist() == [[1, 1], [0, 0]]

    def test_they_lie_in_the_unit_interval_and_tell_subnets_apart(self) -> None:
        space = small()
        rows = np.unique(space.canonical(everything(space)), axis=0)
        features = space.features(rows)
        assert features.min() >= 0 and features.max() <= 1
        assert len(np.unique(features, axis=0)) == len(rows)

    def test_a_space_without_choices_has_none(self) -> None:
        assert SearchSpace([]).features(np.zeros((3, 0), dtype=np.int64)).shape == (3, 0)

"""Collecting pairs: right figures, the net untouched, safe against kills, the same set however it was interrupted."""

import json
import logging

import numpy as np
import pytest
import torch

from predictors.measuring import measure, outcomes, weights_digest
from predictors.pairs import Pairs, collect, landmarks, plan
from supernet.artefacts import read_jsonl
from supernet.calibration.batchnorm import recalibrate
from supernet.samplers.uniform import Uniform
from supernet.space import SearchSpace


def lines(path):
    return {r["id"]: {k: v for k, v in r.items() if k != "measured"} for r in read_jsonl(path)}


def test_measure_is_the_accuracy_of_the_materialised_recalibrated_subnet(net, task, rng):
    for config in (net.space.sample(rng), net.space.uniform("w3a3")):
        subnet = net.materialise(config).eval()
        recalibrate(subnet, task.recalibrate())
        with torch.no_grad():
            right = [(subnet(x).argmax(1) == y) for x, y in task.select()]
        assert measure(net, config, task.recalibrate(), task.select()) == pytest.approx(
            float(torch.cat(right).float().mean())
        )


def test_measuring_leaves_the_supernet_as_it_was(net, task, rng):
    before, active = {k: v.clone() for k, v in net.state_dict().items()}, net.active
    net.train()
    measure(net, net.space.sample(rng), task.recalibrate(), task.select())
    assert net.training and net.active == active
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_no_images_are_refused(net):
    with pytest.raises(ValueError, match="at least one batch"):
        outcomes(net, [])


def test_records_hold_what_was_measured(net, task, rng, tmp_path):
    pairs = collect(
        net, task, 9, out=tmp_path / "pairs.jsonl", rng=rng, select_images=100, recalibrate_images=48, progress=False
    )
    records = read_jsonl(tmp_path / "pairs.jsonl")
    assert len(pairs) == len(records) == 9
    for r in records:
        config = net.space.config(r["row"])
        assert r["id"] == config.id and r["row"] == list(config.row)
        assert r["costs"] == net.costs.of(config) and r["images"] == {"recalibrate": 48, "select": 100}
        assert r["score"] == pytest.approx(measure(net, config, task.recalibrate(48), task.select(100)))
        assert r["score"] == pytest.approx(np.mean(r["halves"])) and r["measured"]["seconds"] > 0
    assert np.ptp(pairs.scores) > 0 and pairs.halves.shape == (9, 2)
    order = [config.id for config in map(net.space.config, pairs.indices)]
    assert order == sorted(order)
    assert all(np.allclose(pairs.costs[k], net.costs.kinds[k].value(pairs.indices)) for k in net.costs.kinds)


def test_the_plan_has_landmarks_is_distinct_and_a_shorter_one_is_its_start(net):
    longer, shorter = (plan(net, n, np.random.default_rng(2)) for n in (90, 20))
    assert longer[:20] == shorter and len({c.id for c in longer}) == 90
    assert {net.space.largest(), net.space.smallest(), net.space.uniform("w3a3")} <= set(shorter)
    assert [c["stage.1.conv.weight"].bits for c in landmarks(net.space) if c["stage.depth"] == 3] == [8, 2, 3, 4, 8]
    cost = net.costs.kinds["bitops"].value(np.array([c.row for c in longer]))
    drawn = np.array([c.row for c in plan(net, 90, np.random.default_rng(2), Uniform(net.space))])
    assert np.log(cost).std() > 1.2 * np.log(net.costs.kinds["bitops"].value(drawn)).std()


def test_a_killed_collection_goes_on_to_the_same_set(net, task, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    one = collect(net, task, 8, out=whole, rng=np.random.default_rng(3), progress=False)
    cut.write_bytes(whole.read_bytes()[: int(0.6 * whole.stat().st_size)])  # in the middle of a line
    two = collect(net, task, 8, out=cut, rng=np.random.default_rng(3), progress=False)
    assert lines(whole) == lines(cut)
    assert np.array_equal(one.indices, two.indices) and np.array_equal(one.scores, two.scores)
    size = cut.stat().st_size
    collect(net, task, 8, out=cut, rng=np.random.default_rng(3), progress=False)
    assert cut.stat().st_size == size


def test_pairs_of_something_else_are_refused(net, task, tmp_path):
    path = tmp_path / "pairs.jsonl"
    collect(net, task, 2, out=path, select_images=50, progress=False)
    with pytest.raises(ValueError, match="images"):
        collect(net, task, 2, out=path, select_images=100, progress=False)
    record = json.loads(path.read_text().splitlines()[0])
    for key, value in (("fingerprint", "0" * 16), ("weights", "f" * 16)):
        path.write_text(json.dumps(record | {key: value}) + "\n")
        with pytest.raises(ValueError, match=f"{value}.*{record[key]}"):
            collect(net, task, 2, out=path, select_images=50, progress=False)
    path.write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(ValueError, match="line 1 has no row"):
        Pairs.from_file(path, net.space)


def test_other_weights_have_another_digest(net):
    before = weights_digest(net)
    net.model.get_submodule("head").weight.data[0, 0] += 1e-3
    assert weights_digest(net) != before


def test_pairs_come_back_from_their_file(net, task, tmp_path):
    pairs = collect(net, task, 5, out=tmp_path / "pairs.jsonl", progress=False)
    back = Pairs.from_file(tmp_path / "pairs.jsonl", net.space)
    assert np.array_equal(back.indices, pairs.indices) and np.array_equal(back.scores, pairs.scores)
    other = SearchSpace(net.space.dimensions[:-1])
    with pytest.raises(ValueError, match=f"{net.space.fingerprint}.*{other.fingerprint}"):
        Pairs.from_file(tmp_path / "pairs.jsonl", other)
    with pytest.raises(FileNotFoundError, match="no pairs"):
        Pairs.from_file(tmp_path / "none.jsonl", net.space)


def test_split_parts_are_disjoint_and_complete(net, task):
    pairs = collect(net, task, 10, progress=False)
    rest, held = pairs.split(np.random.default_rng(0), 0.3)
    assert len(rest) == 7 and len(held) == 3
    assert {tuple(r) for r in rest.indices} | {tuple(r) for r in held.indices} == {tuple(r) for r in pairs.indices}
    with pytest.raises(ValueError, match="two or more"):
        pairs.take(np.array([0])).split(np.random.default_rng(0))


def test_a_space_that_holds_fewer_says_so(make_net, caplog):
    few = make_net(bits=(8,), granularities=("per-channel",), symmetries=(True,))
    with caplog.at_level(logging.WARNING):
        assert len(plan(few, 50, np.random.default_rng(0))) == 3
    assert "only 3 distinct" in caplog.text

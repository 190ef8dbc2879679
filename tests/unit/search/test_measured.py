"""What a search measures, keeps and knows again: controls, files, and a search that is killed and goes on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from predictors.measuring import Measurer
from search.evolution import NSGA2
from search.run import search as run_search
from supernet.artefacts import read_jsonl


def net_of(space, costs):
    return SimpleNamespace(space=space, costs=costs, fingerprint=space.fingerprint, named_parameters=list)


class Opaque:
    """A predictor that shows no sensitivity."""

    def __init__(self, objective):
        self.objective = objective

    def predict(self, rows):
        return -np.log(self.objective.value(rows)), np.full(len(rows), 0.1)


class Engine:
    """Measures by a table: subnet id -> outcomes; keeps what it was asked for."""

    def __init__(self, accuracy, stop_after=None):
        self.accuracy, self.seen, self.stop_after = accuracy, [], stop_after

    def __call__(self, net, configs, recalibration, batches):
        for at, config in enumerate(configs):
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(config.id)
            yield at, np.arange(100) < round(100 * self.accuracy(config)), 0.0


TASK = SimpleNamespace(
    recalibrate=lambda n: [torch.zeros(n or 6, 1)], select=lambda n: [(torch.zeros(n or 4, 1), torch.zeros(n or 4))]
)


def measured_search(space, costs, objective, engine, seed=0, **more):
    settings = {"budgets": [{"bitops": "w4a4"}, {"bitops": "w5a5"}], "candidates": 3, "task": TASK} | more
    return run_search(
        net_of(space, costs),
        Opaque(objective),
        rng=np.random.default_rng(seed),
        sensitivity=objective,
        generations=settings.pop("generations", 2),
        population=16,
        progress=False,
        engine=engine,
        **settings,
    )


def test_measured_accuracy_decides_where_there_is_a_task(short, sensitivity, rng):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    uniform = measured_search(space, costs, objective, None, task=None)[0].controls["uniform"].config
    engine = Engine(lambda config: 0.9 if config == uniform else 0.5)
    found = measured_search(space, costs, objective, engine)
    assert found[0].config == uniform and found[0].measured == 0.9
    assert found[0].controls["uniform"].measured == 0.9 and found[0].controls["integer_program"].measured == 0.5
    assert found[0].verdict == "use the best uniform bits: the search found nothing better on select"
    assert len(engine.seen) == len(set(engine.seen)) <= 20
    assert found[1].measured == 0.5


def test_random_search_gets_as_many_measurements_and_nothing_else(short, sensitivity, rng):
    """Half of what is measured is drawn at random, within the budget, nearly filled; its best is the control."""
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    engine = Engine(lambda config: (int(config.id[:4], 16) % 97) / 100)
    (found,) = measured_search(space, costs, objective, engine, budgets={"bitops": "w4a4", "bytes": "w5a5"})
    alone = Engine(engine.accuracy)
    measured_search(space, costs, objective, alone, budgets={"bitops": "w4a4", "bytes": "w5a5"}, random_search=False)
    assert engine.seen[: len(alone.seen)] == alone.seen and len(engine.seen) == 2 * len(alone.seen)
    lucky = found.controls["random_search"]
    assert lucky.config.id in engine.seen[len(alone.seen) :]
    drawn = [c / 100 for c in (int(name[:4], 16) % 97 for name in engine.seen[len(alone.seen) :])]
    assert lucky.measured == max(drawn)
    spent = [lucky.costs[kind] / limit for kind, limit in found.limits.items()]
    assert max(spent) <= 1 and max(spent) > 0.9
    assert found.measured == max(c / 100 for c in (int(name[:4], 16) % 97 for name in engine.seen))


def test_what_is_known_is_not_measured_again(short, sensitivity, rng, tmp_path):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    first, again, other, images = (Engine(lambda config: 0.5 + int(config.id[0], 16) / 100) for _ in range(4))
    one = measured_search(space, costs, objective, first, out=tmp_path)
    two = measured_search(space, costs, objective, again, out=tmp_path)
    assert again.seen == [] and [f.plain() for f in one] == [f.plain() for f in two]
    assert len(read_jsonl(tmp_path / "measured.jsonl")) == len(first.seen)
    measured_search(space, costs, objective, other, out=tmp_path, budgets=[{"bitops": "w4a4"}, {"bitops": "w3a3"}])
    assert other.seen and not set(other.seen) & set(first.seen)
    measured_search(space, costs, objective, images, out=tmp_path, select_images=3)
    assert set(images.seen) == set(first.seen), "fewer images are another measurement"


def test_pairs_of_the_same_weights_compete_and_others_do_not(short, sensitivity, rng, tmp_path):
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    net, lucky = net_of(space, costs), space.config(space.uniform("w3a3").row)
    list(Measurer(net, TASK, out=tmp_path / "pairs.jsonl", engine=Engine(lambda config: 0.95))([lucky]))
    engine = Engine(lambda config: 0.5)
    found = measured_search(space, costs, objective, engine, reuse=[tmp_path / "pairs.jsonl", tmp_path / "no.jsonl"])
    assert {f.config.id for f in found} == {lucky.id} and lucky.id not in engine.seen
    record = read_jsonl(tmp_path / "pairs.jsonl")[0] | {"weights": "of another training"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    found = measured_search(space, costs, objective, engine, reuse=[tmp_path / "pairs.jsonl"])
    assert {f.measured for f in found} == {0.5}


@pytest.mark.parametrize("settings", [{"candidates": 0}, {"task": None}])
def test_without_measuring_the_best_predicted_wins(short, sensitivity, rng, tmp_path, settings):
    """Also where some other subnet happens to be known; what is known of the winner is shown."""
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    uniform = measured_search(space, costs, objective, None, task=None)[0].controls["uniform"].config
    known = Measurer(net_of(space, costs), TASK, out=tmp_path / "pairs.jsonl", engine=Engine(lambda config: 0.7))
    list(known([uniform]))
    engine = Engine(lambda config: 0.5)
    found = measured_search(space, costs, objective, engine, reuse=[tmp_path / "pairs.jsonl"], **settings)
    assert not engine.seen and "random_search" not in found[0].controls
    program = found[0].controls["integer_program"]
    assert found[0].predicted[0] >= program.predicted[0] > found[0].controls["uniform"].predicted[0]
    assert found[0].measured is None and found[0].controls["uniform"].measured == 0.7
    assert "prediction" in found[0].verdict


def test_without_measuring_what_is_known_of_the_best_predicted_counts(short, sensitivity, rng, tmp_path):
    """It was measured, and so was a control that is better: the control wins."""
    space, costs = short
    objective = sensitivity(space, costs.layers, rng)
    (blind,) = measured_search(space, costs, objective, None, budgets={"bitops": "w4a4"}, task=None)
    uniform, pairs = blind.controls["uniform"].config, tmp_path / "pairs.jsonl"
    engine = Engine(lambda config: 0.9 if config == uniform else 0.6)
    list(Measurer(net_of(space, costs), TASK, out=pairs, engine=engine)([blind.config, uniform]))
    (found,) = measured_search(space, costs, objective, None, budgets={"bitops": "w4a4"}, task=None, reuse=[pairs])
    assert blind.config != uniform and found.config == uniform and found.measured == 0.9


class Killed(Exception):
    pass


def test_a_search_killed_at_any_generation_ends_like_one_that_was_not(short, sensitivity, tmp_path, monkeypatch):
    space, costs = short
    objective = sensitivity(space, costs.layers, np.random.default_rng(0))
    monkeypatch.setattr("search.evolving.SAVE_EVERY", 0.0)
    accuracy = lambda config: 0.5 + int(config.id[0], 16) / 100  # noqa: E731
    settings = {"generations": 6, "budgets": {"bitops": "w4a4"}}
    straight = measured_search(space, costs, objective, Engine(accuracy), out=tmp_path / "straight", **settings)
    assert [f.name for f in (tmp_path / "straight").iterdir()] == ["measured.jsonl"], "a finished search has no state"
    told, tell = [], NSGA2.tell

    def kill(at):
        def killed(self, rows, values, step, total):
            told.append(step)
            if step == at:
                raise Killed
            tell(self, rows, values, step, total)

        return killed

    for at in (2, 4):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(NSGA2, "tell", kill(at))
            measured_search(space, costs, objective, Engine(accuracy), out=tmp_path / "killed", **settings)
        assert (tmp_path / "killed" / "search.state.json").exists()
    assert told.count(0) == 2 and told.count(2) >= 2, "the second start went on at the third generation"
    assert told.index(2) < len(told) - 1 and 0 not in told[told.index(2) + 1 :]
    halfway = measured_search(space, costs, objective, Engine(accuracy, 3), out=tmp_path / "killed", **settings)
    assert all(f.interrupted for f in halfway) and (tmp_path / "killed" / "search.state.json").exists()
    resumed = measured_search(space, costs, objective, Engine(accuracy), out=tmp_path / "killed", **settings)
    assert [f.plain() for f in resumed] == [f.plain() for f in straight]
    assert np.array_equal(resumed.rows, straight.rows) and np.array_equal(resumed.scores, straight.scores)
    assert not (tmp_path / "killed" / "search.state.json").exists()


@pytest.mark.parametrize("other", [{"budgets": {"bitops": "w6a6"}}, {"seed": 1}, {"generations": 4}])
def test_another_search_does_not_go_on_with_the_state(short, sensitivity, tmp_path, monkeypatch, other):
    space, costs = short
    objective = sensitivity(space, costs.layers, np.random.default_rng(0))
    monkeypatch.setattr("search.evolving.SAVE_EVERY", 0.0)
    engine, settings = Engine(lambda config: 0.5), {"generations": 3, "budgets": {"bitops": "w4a4"}}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("search.run.Bench", lambda *a, **k: (_ for _ in ()).throw(Killed))
        measured_search(space, costs, objective, engine, out=tmp_path, **settings)
    assert (tmp_path / "search.state.json").exists()
    fresh = measured_search(space, costs, objective, engine, **settings | other)
    same = measured_search(space, costs, objective, engine, out=tmp_path, **settings | other)
    assert [f.plain() for f in fresh] == [f.plain() for f in same]

"""Dealing subnets out: none lost, none doubled, whatever dies and in whatever order workers answer."""

from __future__ import annotations

from collections import Counter
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from predictors.crew import Bench, Death, checked, deal, processors
from predictors.measuring import unmeasured
from predictors.processes import InProcesses


class Players:
    """A crew in this process: who speaks next, and who dies, is drawn."""

    def __init__(self, rng, mortality=0.0, fatal=(), silent=()):
        self.rng, self.mortality, self.fatal, self.silent = rng, mortality, set(fatal), set(silent)
        self.numbers, self.has, self.idle, self.given = count(), {}, set(), Counter()
        self.started, self.closed, self.dismissed, self.hired = 0, 0, [], 0

    def start(self, bench, workers, asks):
        self.started += 1
        return [self.hire() for _ in range(min(asks, workers or 4))]

    def hire(self):
        self.hired += 1
        worker = next(self.numbers)
        self.has[worker] = None
        return worker

    def give(self, worker, ask):
        assert worker not in self.has, "a worker has one subnet at a time"
        self.idle.discard(worker)
        self.has[worker] = ask
        self.given[ask.id] += 1

    def report(self):
        if self.idle and self.rng.random() < self.mortality:
            return self.idle.pop(), Death("killed by SIGKILL")
        worker = self.rng.choice([w for w in self.has if w not in self.silent])
        ask = self.has.pop(worker)
        if (ask and ask.id in self.fatal) or self.rng.random() < self.mortality:
            return worker, Death("killed by SIGKILL")
        self.idle.add(worker)
        return worker, (np.array([ask.row[0] % 2 == 0]), 0.1) if ask else None

    def dismiss(self, worker):
        self.dismissed.append(worker)
        del self.has[worker]

    def close(self):
        self.closed += 1


@pytest.fixture
def bench():
    return SimpleNamespace(net=SimpleNamespace(row=lambda config: np.array(config.row)), threads=1)


def subnets(n):
    return [SimpleNamespace(id=f"s{k}", row=(k, 7)) for k in range(n)]


@pytest.mark.parametrize("seed", range(30))
def test_each_comes_once_while_workers_die(bench, seed):
    rng = np.random.default_rng(seed)
    crew, configs = Players(rng, mortality=rng.uniform(0, 0.5)), subnets(int(rng.integers(1, 25)))
    got = list(deal(crew, bench, configs, int(rng.integers(1, 6)), 1000))
    assert sorted(at for at, _, _ in got) == list(range(len(configs)))
    assert all(right[0] == (at % 2 == 0) for at, right, _ in got)
    assert not crew.closed and not crew.has


def test_the_dead_ones_subnet_is_tried_behind_all_others(bench):
    crew, order = Players(np.random.default_rng(0), fatal={"s0"}), []
    with pytest.raises(ChildProcessError, match=r"^subnet s0 ended 3 workers: killed by SIGKILL; .* kept$"):
        for at, _, _ in deal(crew, bench, subnets(9), 2, 2):
            order.append(at)
    assert sorted(order) == list(range(1, 9)) and crew.closed == 1
    assert crew.given == {"s0": 3} | {f"s{k}": 1 for k in range(1, 9)}


def test_without_retries_the_first_death_is_the_last(bench):
    crew = Players(np.random.default_rng(0), fatal={"s1"})
    with pytest.raises(ChildProcessError, match="subnet s1 ended a worker"):
        list(deal(crew, bench, subnets(2), 1, 0))
    assert crew.given["s1"] == 1


def test_workers_that_never_start_are_an_error(bench):
    crew = Players(np.random.default_rng(0), mortality=1.0)
    with pytest.raises(ChildProcessError, match=r"before the first subnet.*__main__"):
        list(deal(crew, bench, subnets(5), 2, 3))
    assert not crew.given and crew.hired <= 2 + 4


def test_nobody_waits_for_a_worker_without_room(bench):
    crew = Players(np.random.default_rng(0), silent={1, 2})
    assert len(list(deal(crew, bench, subnets(6), 3, 0))) == 6
    assert crew.dismissed == [1, 2]


def test_what_is_left_early_is_closed(bench):
    crew = Players(np.random.default_rng(0))
    results = deal(crew, bench, subnets(6), 2, 0)
    next(results)
    results.close()
    assert crew.closed == 1


def test_nothing_to_do_starts_nothing(bench):
    crew = Players(np.random.default_rng(0))
    assert list(deal(crew, bench, [], 2, 0)) == [] and crew.started == crew.closed == 0


def test_settings_out_of_range_are_refused():
    for settings in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            checked(*settings)
    checked(None, 1, 0)
    assert processors() >= 1


def test_a_bench_remembers_how_its_net_was_compiled(net, task):
    net.compile("quantizers", passes="evaluation")
    bench = Bench(net, task.recalibrate(), task.select(), threads=torch.get_num_threads())
    assert (bench.compiled, bench.passes) == ("quantizers", "evaluation")
    net.compile("off")
    assert (Bench(net, [], [], 1).compiled, net.passes) == ("off", "training")


def test_a_supernet_elsewhere_is_refused(net):
    with pytest.raises(ValueError, match=r"on the CPU, the supernet is on meta; net.cpu\(\) first"):
        Bench(net.to("meta"), [], [], 1)


def test_an_error_keeps_its_kind_and_names_the_subnet():
    for error, kind in ((ValueError("bad\nnews"), ValueError), (FileNotFoundError("bad news"), OSError)):
        named = unmeasured("abc", error)
        assert type(named) is kind and str(named) == "subnet abc could not be measured: bad news"
    assert str(unmeasured("abc", ZeroDivisionError("by 0"))).endswith("measured: ZeroDivisionError: by 0")


def test_what_cannot_travel_is_refused_in_one_line(net, task):
    net.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ValueError, match=r"cannot be sent to workers \(.*lambda.*\).*engine=local$"):
        list(InProcesses(workers=1)(net, [net.space.largest()], task.recalibrate(), task.select()))

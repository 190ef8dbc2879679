"""The plan of the measured subnets, and who leads."""

import json
from pathlib import Path

import numpy as np

from benchmarks.supernet_resnet20 import WINDOWS, leaders, planned
from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.supernet import SuperNet
from tests.unit.elastic.conftest import X


def test_any_first_part_of_the_plan_is_flat_and_fills_the_windows() -> None:
    net = SuperNet(CifarResNet(8, 5, channels=(4, 6, 8)), X[:1], bits=(2, 3, 4, 5, 6, 8))
    longer, shorter = (list(planned(net, n, 0)) for n in (300, 200))
    assert len({c.id for c in longer}) == len(longer) > 290
    assert {c.id for c in shorter} <= {c.id for c in longer}
    for part in (shorter, longer):
        cost = np.array([net.costs.of(c)["bitops"] for c in part])
        for bits in WINDOWS:
            limit = net.costs.limit("bitops", bits)
            assert (np.abs(cost / limit - 1) <= 0.05 + 1e-9).mean() > 0.15
        counts, _ = np.histogram(np.log(cost), bins=6)
        assert counts.min() > 0.06 * len(cost)


def test_the_leaders_are_the_best_of_their_neighbours_in_cost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    score = np.linspace(0.5, 0.7, 300) + rng.uniform(-0.01, 0.01, 300)
    score[[50, 150, 250]] += 0.05
    order = rng.permutation(300)
    lines = [json.dumps({"row": [int(k)], "score": score[k], "costs": {"bitops": float(k + 1)}}) for k in order]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    found = [row[0] for row in leaders(tmp_path, 20)]
    assert {50, 150, 250} <= set(found) and len(set(found)) == 20
    assert min(found) < 100 and max(found) >= 200  # cheap ones too, whatever their score

"""Two processes compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
sys.path.insert(0, {root!r})
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.samplers.cost_first import CostFirst
from supernet.samplers.sandwich import Sandwich
from supernet.training.fit import train
from supernet.training.losses import GroupProgressive, WeightDistribution
from supernet.training.module import Schedule
from tests.unit.training.conftest import Spots

torch.set_num_threads(1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    def forward(self, x):
        return self.relu(x + self.conv(x))

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), Stage(Block(), Block(), min_depth=1),
                      nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
net = SuperNet(model, Spots().example(), bits=(2, 4, 8))
net.calibrate(Spots().recalibrate())
sampler = Sandwich(net.space, net.costs, inner=lambda space, costs: CostFirst(space, costs, adapt=True))
out, processes = Path(sys.argv[1]), int(sys.argv[2])
trainer = {{"accelerator": "cpu"}} | ({{"strategy": "ddp", "devices": processes}} if processes > 1 else {{}})
poison = (1, 1) if "poison" in sys.argv else None
train(net, Spots(poison_at=poison), out=out / "run", epochs=2, sampler=sampler, validation=("w4a4",),
      validation_images=16, losses=GroupProgressive(distribution=WeightDistribution()),
      schedule=Schedule(lr=0.05, scale_lr=0.01),
      trainer=trainer, seed=3)
import os
torch.save(net.state_dict(), out / f"rank{{os.environ.get('LOCAL_RANK', 0)}}.pt")
"""


def run(folder: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "WORLD", "RANK", "LOCAL"))}
    return subprocess.run(
        [sys.executable, str(script), str(folder), str(processes), *words],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        done = run(tmp_path / name, processes)
        assert done.returncode == 0, done.stderr[-3000:]
    single = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(torch.equal(ranks[0][n], ranks[1][n]) for n in single)
    for name, tensor in single.items():
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (tmp_path / "two" / "run" / "supernet.safetensors").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_both(tmp_path: Path) -> None:
    done = run(tmp_path / "two", 2, "poison")
    assert done.returncode != 0 and "the loss became nan at step 4" in done.stderr
    assert not list((tmp_path / "two").glob("rank*.pt"))

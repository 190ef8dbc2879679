"""A run from start to end: its files, resuming it to the last bit, and what goes wrong on the way."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from supernet.artefacts import load_tensors, read_json
from supernet.elastic.supernet import SuperNet
from supernet.samplers.cost_first import CostFirst
from supernet.samplers.sandwich import Sandwich
from supernet.training.fit import OURS, train
from supernet.training.losses import GroupProgressive, Plain, WeightDistribution
from supernet.training.module import Schedule

SCHEDULE = Schedule(lr=0.05, scale_lr=0.01)


def run(net: SuperNet, task: Any, out: Path, **options: Any) -> SuperNet:
    """Two epochs with everything that has state: an adaptive sampler, dropout, momentum, validation."""
    sampler = Sandwich(net.space, net.costs, inner=lambda space, costs: CostFirst(space, costs, adapt=True))
    settings = {
        "epochs": 2,
        "sampler": sampler,
        "losses": GroupProgressive(distribution=WeightDistribution()),
        "schedule": SCHEDULE,
        "validation": ("w2a2", "w3a3", "w8a8"),
        "validation_images": 16,
        "seed": 3,
    }
    return train(net, task, out=out, **(settings | options))


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tensors(out: Path) -> dict[str, Tensor]:
    return load_tensors(out / "supernet.safetensors")[0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs without a stop."""
    from tests.unit.training.conftest import Spots, model

    out = tmp_path_factory.mktemp("straight")
    net = SuperNet(model(), Spots().example(), bits=(2, 4, 8))
    net.calibrate(Spots().recalibrate())
    run(net, Spots(), out)
    return out


class TestRun:
    def test_it_leaves_the_files_of_a_run(self, straight: Path) -> None:
        found = {p.relative_to(straight).as_posix() for p in straight.rglob("*") if p.is_file()}
        assert found == {"supernet.safetensors", "space.json", "metrics.csv", "checkpoints/last.ckpt"}
        space = read_json(straight / "space.json")
        assert space["epochs"] == 2 and space["provenance"]["seed"] == 3
        assert load_tensors(straight / "supernet.safetensors")[1] == {"fingerprint": space["fingerprint"], "epochs": 2}

    def test_the_table_has_losses_and_the_accuracy_of_the_subnets_that_exist(self, straight: Path) -> None:
        table = rows(straight)
        measured = [row for row in table if row["select/w2a2"]]
        assert [(row["epoch"], row["step"]) for row in measured] == [("0", "3"), ("1", "6")]
        assert "select/w3a3" not in table[0] and all(0 <= float(row["select/w8a8"]) <= 1 for row in measured)
        losses = [row for row in table if row["train/loss"]]
        assert losses and all(float(row["train/regulariser"]) > 0 and row["train/loss_2"] for row in losses)

    def test_training_teaches(self, straight: Path, net: SuperNet, spots: Any) -> None:
        before = {n: t.clone() for n, t in net.state_dict().items()}
        after = tensors(straight)
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert {"model.0.weight", "model.7.bias", "bank.scale", "bank.zero_point"} <= changed
        assert all(torch.isfinite(t).all() for t in after.values())

    def test_the_checkpoint_holds_tensors_and_plain_python(self, straight: Path) -> None:
        checkpoint = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["elastibit"]["done"] == 6
        assert {"fast", "slow"} <= set(checkpoint["elastibit"]["sampler"]) or checkpoint["elastibit"]["sampler"]

    def test_losses_fall_over_a_few_epochs(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        run(net, spots(), tmp_path, epochs=10, validation=(), losses=Plain(), schedule=Schedule(lr=0.1))
        losses = [float(row["train/loss_0"]) for row in rows(tmp_path) if row["train/loss_0"]]
        assert losses[-1] < 0.8 * losses[0]

    def test_without_epochs_the_run_is_written_as_it_is(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        before = {n: t.clone() for n, t in net.state_dict().items()}
        assert run(net, spots(), tmp_path, epochs=0) is net
        assert {p.name for p in tmp_path.iterdir()} == {"supernet.safetensors", "space.json"}
        assert all(torch.equal(t, before[n]) for n, t in tensors(tmp_path).items())
        assert read_json(tmp_path / "space.json")["epochs"] == 0

    def test_the_same_seed_gives_the_same_run(self, straight: Path, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        torch.manual_seed(99)  # whatever was drawn before
        run(net, spots(), tmp_path)
        expected = tensors(straight)
        assert all(torch.equal(t, expected[n]) for n, t in tensors(tmp_path).items())
        assert (tmp_path / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()

    def test_another_seed_gives_another(self, straight: Path, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        run(net, spots(), tmp_path, seed=4, epochs=1)
        assert not torch.equal(tensors(tmp_path)["model.0.weight"], tensors(straight)["model.0.weight"])


class TestResume:
    @pytest.mark.parametrize("stop", [(1, 0), (1, 2)], ids=["between epochs", "within an epoch"])
    def test_a_killed_run_goes_on_to_the_same_end(
        self, straight: Path, net: SuperNet, another: Any, spots: Any, tmp_path: Path, stop: tuple[int, int]
    ) -> None:
        with pytest.raises(RuntimeError, match="killed"):
            run(net, spots(fail_at=stop), tmp_path)
        assert read_json(tmp_path / "space.json")["epochs"] == 0
        torch.manual_seed(42)
        run(another(), spots(), tmp_path, resume=True)
        expected, found = tensors(straight), tensors(tmp_path)
        assert found.keys() == expected.keys()
        assert not [n for n in found if not torch.equal(found[n], expected[n])]
        assert (tmp_path / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()
        one, two = (read_json(p / "space.json") for p in (straight, tmp_path))
        for space in (one, two):
            del space["provenance"]["measured"]
        assert one == two

    def test_before_the_first_epoch_ends_it_starts_again(
        self, straight: Path, net: SuperNet, another: Any, spots: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(RuntimeError, match="killed"):
            run(net, spots(fail_at=(0, 2)), tmp_path)
        run(another(), spots(), tmp_path, resume=True)
        assert torch.equal(tensors(tmp_path)["model.0.weight"], tensors(straight)["model.0.weight"])

    def test_a_finished_run_stays_finished(self, straight: Path, another: Any, spots: Any, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(straight, tmp_path / "run")
        net = run(another(), spots(), tmp_path / "run", resume=True)
        expected = tensors(straight)
        assert all(torch.equal(t, expected[n]) for n, t in net.state_dict().items())
        assert read_json(tmp_path / "run" / "space.json")["epochs"] == 2

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", "whole"], ids=["empty", "cut", "foreign"])
    def test_a_broken_checkpoint_is_named_and_the_run_is_left_alone(
        self, straight: Path, another: Any, spots: Any, tmp_path: Path, content: bytes | str
    ) -> None:
        import shutil

        shutil.copytree(straight, tmp_path / "run")
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        if isinstance(content, bytes):
            last.write_bytes(content)
        else:
            torch.save({"state_dict": {}}, last)
        with pytest.raises(ValueError, match=r"last.ckpt cannot be read \(.*\); delete it to start again"):
            run(another(), spots(), tmp_path / "run", resume=True)
        for name in ("supernet.safetensors", "space.json", "metrics.csv"):
            assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()

    def test_a_truncated_checkpoint_is_found_out(
        self, straight: Path, another: Any, spots: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "checkpoints").mkdir()
        whole = (straight / "checkpoints" / "last.ckpt").read_bytes()
        (tmp_path / "checkpoints" / "last.ckpt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="cannot be read"):
            run(another(), spots(), tmp_path, resume=True)

    def test_a_checkpoint_that_would_run_code_is_refused(self, another: Any, spots: Any, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "pwned",)

        (tmp_path / "checkpoints").mkdir()
        torch.save({"elastibit": {"done": Evil()}}, tmp_path / "checkpoints" / "last.ckpt")
        with pytest.raises(ValueError, match="cannot be read"):
            run(another(), spots(), tmp_path, resume=True)
        assert not (tmp_path / "pwned").exists()

    def test_another_space_is_refused_with_both_fingerprints(
        self, straight: Path, spots: Any, net: SuperNet, tmp_path: Path
    ) -> None:
        import shutil

        from tests.unit.training.conftest import model

        shutil.copytree(straight, tmp_path / "run")
        other = SuperNet(model(), spots().example(), bits=(2, 4, 8), symmetries=(True,), first_last_bits=4)
        other.calibrate(spots().recalibrate())
        with pytest.raises((ValueError, RuntimeError), match=rf"{net.fingerprint}.*{other.fingerprint}|size mismatch"):
            run(other, spots(), tmp_path / "run", resume=True)

    def test_a_new_run_does_not_take_up_an_old_ones_checkpoint(
        self, straight: Path, net: SuperNet, spots: Any, tmp_path: Path
    ) -> None:
        import shutil

        shutil.copytree(straight, tmp_path / "run")
        with pytest.raises(RuntimeError, match="killed"):
            run(net, spots(fail_at=(0, 1)), tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


class TestMishaps:
    def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
        self, straight: Path, net: SuperNet, spots: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(
            ValueError, match=r"the loss became nan at step 4 \(subnet \w+\); the last checkpoint is kept"
        ):
            run(net, spots(poison_at=(1, 1)), tmp_path)
        checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["elastibit"]["done"] == 3
        assert all(torch.isfinite(t).all() for t in checkpoint["state_dict"].values() if t.is_floating_point())
        assert read_json(tmp_path / "space.json")["epochs"] == 0

    def test_so_does_a_regulariser_that_is_not_finite(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        class Broken(WeightDistribution):
            def __call__(self, net: Any) -> Tensor:
                return super().__call__(net) * torch.inf  # type: ignore[operator]

        with pytest.raises(ValueError, match=r"the loss became inf at step 0 \(the regulariser\)"):
            run(net, spots(), tmp_path, losses=GroupProgressive(distribution=Broken()))

    def test_options_of_the_trainer_that_are_ours_are_refused(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        for name in OURS:
            with pytest.raises(ValueError, match=rf"trainer.{name} has no effect .*; use \S+"):
                run(net, spots(), tmp_path, trainer={name: 1})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": -1}, "epochs is 0 .* or more, got -1"),
            ({"validation": ("w4",)}, "uniform subnets such as w4a4, got 'w4'"),
        ],
    )
    def test_wrong_settings_are_refused_before_anything_is_written(
        self, net: SuperNet, spots: Any, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            run(net, spots(), tmp_path, **options)
        assert not list(tmp_path.iterdir())

    def test_an_own_logger_gets_the_figures_too(self, net: SuperNet, spots: Any, tmp_path: Path) -> None:
        from pytorch_lightning.loggers import CSVLogger

        run(net, spots(), tmp_path / "run", epochs=1, logger=CSVLogger(tmp_path / "own", name="", version=""))
        assert "select/w2a2" in (tmp_path / "own" / "metrics.csv").read_text()

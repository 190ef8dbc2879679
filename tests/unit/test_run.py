"""The run directory: written and read back, and what is refused on the way in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from supernet.artefacts import load_tensors, read_json, save_tensors
from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.supernet import SuperNet
from supernet.formats.powers import PowersOfTwo
from supernet.run import Run, load, save

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BACKBONE = {
    "_target_": "supernet.backbones.cifar_resnet.CifarResNet",
    "depth": 14,
    "channels": [4, 4, 6],
    "min_depth": 1,
    "weights": "/nowhere/to/be/found.safetensors",
}
TASK = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf" / "task" / "digits.yaml"))
FACTORY = "supernet.backbones.python.from_factory"


def model() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(14, in_channels=1, channels=(4, 4, 6), min_depth=1)


def calibrated(**options: Any) -> SuperNet:
    net = SuperNet(model(), X[:1], **({"bits": (2, 4)} | options))
    net.calibrate([X])
    return net.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuperNet, Path]:
    """A run made from Python objects."""
    out, net = tmp_path_factory.mktemp("run"), calibrated()
    save(net, out, seed=7, trained=3)
    return net, out


@pytest.fixture
def folder(written: tuple[SuperNet, Path], tmp_path: Path) -> Path:
    """A copy of it to be broken."""
    shutil.copytree(written[1], tmp_path / "copy")
    return tmp_path / "copy"


def configured(folder: Path, **groups: Any) -> Path:
    OmegaConf.save(OmegaConf.create({"backbone": BACKBONE, "task": TASK} | groups), folder / "config.yaml")
    return folder


def same(one: SuperNet, two: SuperNet) -> bool:
    rng = np.random.default_rng(0)
    for _ in range(3):
        config = one.space.sample(rng)
        with one.as_subnet(config), two.as_subnet(config):
            if not torch.equal(one(X), two(X)):
                return False
    return one.fingerprint == two.fingerprint


class TestRoundTrip:
    def test_the_files_say_where_they_come_from(self, written: tuple[SuperNet, Path]) -> None:
        net, out = written
        assert {p.name for p in out.iterdir()} == {"supernet.safetensors", "space.json"}
        space = read_json(out / "space.json")
        assert space["fingerprint"] == net.fingerprint and space["epochs"] == 3
        assert space["provenance"]["seed"] == 7 and space["provenance"]["versions"]["torch"]
        assert space["audit"] == net.audit() and space["example"] == [1, 1, 8, 8]
        assert "_target_" not in (out / "space.json").read_text()
        assert load_tensors(out / "supernet.safetensors")[0].keys() == net.state_dict().keys()

    def test_a_module_or_a_function_brings_it_back(self, written: tuple[SuperNet, Path]) -> None:
        net, out = written
        for given in (model(), model):
            run = load(out, model=given)
            assert isinstance(run, Run) and same(run.net, net)
            assert run.trained == 3 and run.task is None and run.config == {} and not run.net.training

    @pytest.mark.parametrize(
        "options",
        [
            {"sites": False},
            {"granularities": ["per-channel"], "symmetries": (True,), "first_last_bits": None},
            {"weight_bits": (2, 5), "input_bits": (3,), "allow": ["nothing.*"]},
            {"formats": [PowersOfTwo(3)]},
        ],
        ids=["no sites", "one form", "bits", "another format"],
    )
    def test_so_do_the_options_it_was_made_with(self, options: dict[str, Any], tmp_path: Path) -> None:
        net = calibrated(**options)
        save(net, tmp_path)
        assert same(load(tmp_path, model=model).net, net)

    def test_a_configuration_brings_it_back_without_the_weights_it_started_from(self, tmp_path: Path) -> None:
        net = calibrated()
        save(net, tmp_path, config={"backbone": BACKBONE, "task": TASK, "seed": 3})
        run = load(tmp_path)
        assert same(run.net, net) and run.config["seed"] == 3
        assert run.task is not None and run.task.n_classes == 10

    def test_saving_again_replaces_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        net = calibrated()
        save(net, tmp_path)
        with torch.no_grad():
            net.model.get_parameter("linear.bias").fill_(5.0)
        save(net, tmp_path, trained=1)
        assert load(tmp_path, model=model).trained == 1
        assert (load_tensors(tmp_path / "supernet.safetensors")[0]["model.linear.bias"] == 5).all()
        assert {p.name for p in tmp_path.iterdir()} == {"supernet.safetensors", "space.json"}


class TestRefusals:
    @pytest.mark.parametrize("name", ["space.json", "supernet.safetensors"])
    def test_a_folder_that_is_no_run(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"is not a run directory: {name} is missing; make one with"):
            load(folder, model=model)

    @pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
    def test_truncated_tensors(self, folder: Path, keep: float) -> None:
        file = folder / "supernet.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match=r"supernet.safetensors is truncated or not a safetensors file"):
            load(folder, model=model)

    def test_truncated_json(self, folder: Path) -> None:
        text = (folder / "space.json").read_text()
        (folder / "space.json").write_text(text[: len(text) // 2])
        with pytest.raises(ValueError, match=r"space.json is not valid JSON"):
            load(folder, model=model)

    def test_a_run_of_another_space_names_both_fingerprints(self, folder: Path, written: Any) -> None:
        def shallow() -> nn.Module:
            return CifarResNet(8, in_channels=1, channels=(4, 4, 6))

        other = SuperNet(shallow(), X[:1], bits=(2, 4)).fingerprint
        with pytest.raises(ValueError, match=rf"is of space {written[0].fingerprint}, this model makes {other}; give"):
            load(folder, model=shallow)

    def test_tensors_of_another_space_name_both_fingerprints(self, folder: Path, written: Any) -> None:
        tensors, _ = load_tensors(folder / "supernet.safetensors")
        save_tensors(folder / "supernet.safetensors", tensors, {"fingerprint": "0" * 16})
        with pytest.raises(
            ValueError, match=rf"is of space {'0' * 16}, space.json of {written[0].fingerprint}; restore"
        ):
            load(folder, model=model)

    def test_a_model_of_the_same_space_but_other_sizes(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"does not fit the model: .*size mismatch.*; give the model") as caught:
            load(folder, model=lambda: CifarResNet(14, in_channels=1, channels=(4, 4, 8), min_depth=1))
        assert "\n" not in str(caught.value)

    def test_tensors_that_are_missing(self, folder: Path) -> None:
        tensors, metadata = load_tensors(folder / "supernet.safetensors")
        del tensors["model.linear.bias"]
        save_tensors(folder / "supernet.safetensors", tensors, metadata)
        with pytest.raises(ValueError, match=r"does not fit the model: .*model.linear.bias"):
            load(folder, model=model)

    def test_a_run_without_configuration_needs_the_model(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"made from a module, not from a configuration; pass model="):
            load(folder)

    def test_a_format_that_nobody_registers(self, folder: Path) -> None:
        space = read_json(folder / "space.json")
        space["options"]["formats"] = [{"kind": "Strange", "bits": 4}]
        (folder / "space.json").write_text(json.dumps(space))
        with pytest.raises(ValueError, match=r"number format 'Strange' is not registered; add conf/format"):
            load(folder, model=model)


class TestHostileConfig:
    @pytest.mark.parametrize(
        "text", ["a: [1", "- 1\n- 2\n", "x: ${nowhere}\n", "42\n"], ids=["cut", "list", "loose", "number"]
    )
    def test_what_is_no_configuration(self, folder: Path, text: str) -> None:
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml .*; restore it"):
            load(folder, model=model)

    @pytest.mark.parametrize("group", ["task", "backbone"])
    @pytest.mark.parametrize(
        "evil",
        [
            {"_target_": "os.system", "_args_": ["touch pwned"]},
            {"_target_": "supernet.config.os.system", "_args_": ["touch pwned"]},
            {"_target_": "supernet.artefacts.write_text", "path": "pwned", "text": "x"},
            {"_target_": FACTORY, "factory": "os:mkdir", "path": "pwned"},
            {"_target_": FACTORY, "_args_": ["os:mkdir"], "path": "pwned"},
            r"\${oc.create:{_target_: os.mkdir, path: pwned}}",
        ],
        ids=["function", "through our module", "a writer of ours", "factory", "factory in _args_", "escaped"],
    )
    @pytest.mark.parametrize("nested", [False, True], ids=["itself", "inside"])
    def test_nothing_it_names_is_called(
        self, folder: Path, group: str, evil: Any, nested: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        node = {"task": TASK, "backbone": BACKBONE}[group] | {"source" if group == "task" else "channels": [evil]}
        configured(folder, **{group: node if nested or isinstance(evil, str) else evil})
        with pytest.raises(ValueError, match=r"_target_|factory of its own|must be resolved"):
            load(folder)
        assert not (folder / "pwned").exists()

    def test_a_factory_is_called_where_the_user_says_so(
        self, folder: Path, written: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        (folder / "mine_of_run.py").write_text(
            "from supernet.backbones.cifar_resnet import CifarResNet\n"
            "def make(n_classes, in_channels):\n"
            "    return CifarResNet(14, n_classes, in_channels, (4, 4, 6), min_depth=1)\n"
        )
        configured(folder, backbone={"_target_": FACTORY, "factory": "mine_of_run:make"})
        with pytest.raises(
            ValueError, match=r"factory of its own, 'mine_of_run:make'; allow it with trust=\[mine_of_run:make\]"
        ):
            load(folder)
        assert same(load(folder, trusted=["mine_of_run:make"]).net, written[0])
        assert same(load(folder, model=model).net, written[0]), "a model that is given needs no factory"

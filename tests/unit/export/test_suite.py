"""Several profiles at once: what can be written is, what cannot is named, and one failure does not stop the others."""

import json

import pytest
import torch

import elastibit
import supernet.export.bundle as bundle
from supernet.artefacts import VerificationError
from supernet.export.bundle import export, named
from supernet.export.profile import Profile
from supernet.export.suite import Suite


def batches(x):
    return [(part, torch.arange(len(part)) % 5) for part in x.split(16)]


class Refused(Profile):
    """A profile that no subnet can have."""

    def export(self, model, example, path):
        raise ValueError("sums do not fit")


class Wrong(Profile):
    """A profile whose files never pass."""

    def verify(self, path, model, batches):
        figures = super().verify(path, model, batches)
        figures["verification"] |= {"passed": False, "failures": ["all wrong"]}
        return figures


@pytest.fixture
def pretend(monkeypatch):
    """Makes names stand for exporters that conf/profile does not have."""

    def install(**exporters):
        before = bundle._built
        monkeypatch.setattr(bundle, "_option", lambda name: name)
        monkeypatch.setattr(bundle, "_built", lambda name: exporters.get(name) or before(bundle.CONF / f"{name}.yaml"))

    return install


class TestSuite:
    def test_each_into_its_own_folder(self, resnet, subnets, tmp_path):
        _, x = resnet
        made = export(subnets[1][1], x[:1], tmp_path, Suite(["int8", "packed"]), iter(batches(x)), seed=3)
        assert list(made["cards"]) == ["int8", "packed"] and made["skipped"] == {}
        for name, card in made["cards"].items():
            assert json.loads((tmp_path / name / "card.json").read_text())["profile"] == card["profile"] == name
            assert card["verification"]["images"] == 32, "a generator of batches serves every profile"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["int8", "packed", "profiles.json"]

    def test_what_a_subnet_cannot_have_is_left_out(self, resnet, subnets, tmp_path, pretend):
        _, x = resnet
        pretend(refused=Refused("refused"))
        made = export(subnets[0][1], x[:1], tmp_path, Suite(["refused", "int8"]), batches(x))
        assert made["skipped"] == {"refused": "sums do not fit"} and list(made["cards"]) == ["int8"]
        said = json.loads((tmp_path / "profiles.json").read_text())
        assert said == {"written": ["int8"], "skipped": {"refused": "sums do not fit"}, "failed": []}

    def test_one_that_fails_is_an_error_after_the_others(self, resnet, subnets, tmp_path, pretend):
        _, x = resnet
        pretend(wrong=Wrong("wrong"))
        with pytest.raises(VerificationError, match=r"wrong: [\s\S]*all wrong"):
            export(subnets[0][1], x[:1], tmp_path, Suite(["wrong", "int8"]), batches(x))
        assert (tmp_path / "int8" / "model.onnx").is_file()
        assert [p.name for p in (tmp_path / "wrong").iterdir()] == ["failed.json"]
        assert json.loads((tmp_path / "profiles.json").read_text())["failed"] == ["wrong"]

    def test_none_that_it_can_have(self, resnet, subnets, tmp_path, pretend):
        _, x = resnet
        pretend(refused=Refused("refused"))
        with pytest.raises(ValueError, match=r"none of the profiles refused \(refused: sums do not fit\)"):
            export(subnets[0][1], x[:1], tmp_path, Suite(["refused"]), batches(x))
        assert not list(tmp_path.iterdir())

    def test_bad_settings(self, resnet, subnets, tmp_path):
        _, x = resnet
        with pytest.raises(ValueError, match=r"each once, got \['int8', 'int8'\]"):
            Suite(["int8", "int8"])
        with pytest.raises(ValueError, match="got \\[\\]"):
            Suite([])
        with pytest.raises(ValueError, match="no export profile 'int9'"):
            export(subnets[0][1], x[:1], tmp_path, Suite(["int8", "int9"]), batches(x))
        with pytest.raises(ValueError, match="got none"):
            export(subnets[0][1], x[:1], tmp_path, Suite(["int8"]))
        assert not list(tmp_path.iterdir())


def test_all_names_every_profile_but_the_doubles():
    everything = {path.stem for path in bundle.CONF.glob("*.yaml")} - {"all", "carrier", "int8_amx"}
    suite = named("all")
    assert isinstance(suite, Suite) and set(suite.profiles) == everything


def test_a_carrier_is_the_file_of_int8(subnets):
    """Only its name differs, so that `all` need not write it."""
    _, _, net = subnets[4]
    files = [named(name).loadable(net) for name in ("int8", "carrier")]
    said = [{p.key: p.value for p in file.metadata_props} for file in files]
    assert [s.pop("elastibit.profile") for s in said] == ["int8", "carrier"] and said[0] == said[1]
    assert files[0].graph == files[1].graph


def test_the_python_door_knows_all(resnet, subnets, tmp_path, monkeypatch):
    _, x = resnet
    monkeypatch.setattr(bundle, "named", lambda name: Suite(["int8"]))
    assert list(elastibit.export(subnets[0][1], x[:1], tmp_path, profile="all", batches=batches(x))["cards"]) == [
        "int8"
    ]

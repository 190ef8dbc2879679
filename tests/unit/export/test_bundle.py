"""The exported folder: file, card, and what is left when the proof fails."""

import hashlib
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from supernet.artefacts import VerificationError
from supernet.export.bundle import export, named
from supernet.export.onnx import write
from supernet.export.profile import Profile, costs
from supernet.quant.quantizer import Quantizer


def batches(x):
    return ((part, torch.arange(len(part)) % 5) for part in x.split(16))


class Liar(Profile):
    """Writes another network than it was given."""

    def export(self, model, example, path):
        for module in model.modules():
            if isinstance(module, Quantizer) and module.weight:
                module.scale.data.mul_(1.3)
        super().export(model, example, path)
        for module in model.modules():
            if isinstance(module, Quantizer) and module.weight:
                module.scale.data.div_(1.3)
        return path


@pytest.fixture(scope="module")
def done(resnet, subnets, tmp_path_factory):
    """One subnet of mixed bits, exported both ways."""
    _, x = resnet
    _, subnet, _ = subnets[3]
    out = tmp_path_factory.mktemp("export")
    about = {"name": "mixed", "budget": "w4a4", "task": {"images": 32}}
    return {
        name: (out / name, export(subnet, x[:1], out / name, name, batches(x), meta=about, seed=7))
        for name in ("int8", "packed")
    }


class TestFolder:
    @pytest.mark.parametrize("name", ["int8", "packed"])
    def test_it_holds_file_and_cards(self, done, name):
        out, card = done[name]
        assert sorted(p.name for p in out.iterdir()) == ["card.json", "card.md", "model.onnx"]
        assert json.loads((out / "card.json").read_text()) == json.loads(json.dumps(card))
        content = (out / "model.onnx").read_bytes()
        assert card["file"] == {
            "name": "model.onnx",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        assert card["verification"]["bytes"]["file"] == len(content)

    def test_the_file_runs_by_itself(self, done, resnet):
        _, x = resnet
        for out, _ in done.values():
            made = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
            for n in (1, 7):
                assert made.run(["logits"], {"x": x[:n].numpy()})[0].shape == (n, 5)

    def test_packing_makes_it_smaller(self, done):
        sizes = {name: sum(row["stored_bytes"] for row in card["layers"]) for name, (_, card) in done.items()}
        assert sizes["packed"] < sizes["int8"] and done["packed"][1]["file"]["bytes"] < done["int8"][1]["file"]["bytes"]

    def test_the_file_says_what_it_is(self, done):
        for name, (out, card) in done.items():
            said = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
            assert said["elastibit.profile"] == name
            assert json.loads(said["elastibit.layers"]) == card["layers"]
            assert json.loads(said["elastibit.costs"]) == card["costs"]
            assert json.loads(said["elastibit.about"]) == {"name": "mixed", "budget": "w4a4"}
            assert json.loads(said["elastibit.provenance"])["versions"] == card["provenance"]["versions"]
            proof = json.loads(said["elastibit.verification"])
            assert proof == {name: card["verification"][name] for name in proof} and len(proof) == 3

    def test_what_is_said_changes_no_graph(self, done, resnet, subnets):
        out, _ = done["int8"]
        bare = onnx.load(out / "model.onnx")
        bare.ClearField("metadata_props")
        written = write(subnets[3][2])
        assert bare.SerializeToString() == written.SerializeToString()

    def test_another_profile_replaces_the_files(self, resnet, subnets, tmp_path):
        class Renamed(Profile):
            def export(self, model, example, path):
                (path.parent / "more.bin").write_bytes(b"more")
                return super().export(model, example, path.with_suffix(".other"))

            def verify(self, path, model, batches):
                assert path.name == "model.other"
                return super().verify(path, model, batches)

        _, x = resnet
        _, subnet, _ = subnets[0]
        export(subnet, x[:1], tmp_path, "int8", batches(x))
        (tmp_path / "mine.txt").write_text("kept")
        card = export(subnet, x[:1], tmp_path, Renamed("renamed"), batches(x))
        assert {p.name for p in tmp_path.iterdir()} == {"card.json", "card.md", "mine.txt", "model.other", "more.bin"}
        assert card["file"]["name"] == "model.other" and [row["name"] for row in card["beside"]] == ["more.bin"]
        export(subnet, x[:1], tmp_path, "int8", batches(x))
        assert {p.name for p in tmp_path.iterdir()} == {"card.json", "card.md", "mine.txt", "model.onnx"}


class TestCard:
    def test_costs_are_those_of_the_supernet(self, done, resnet, subnets):
        net, _ = resnet
        assert done["int8"][1]["costs"].items() <= net.cost(subnets[3][0]).items()
        for config, _, made in subnets:
            assert costs(made).items() <= net.cost(config).items()

    def test_layers_are_those_of_the_subnet(self, done, resnet, subnets):
        net, _ = resnet
        config = subnets[3][0]
        for (_, card), stored in zip(done.values(), ({8}, {2, 4, 8}), strict=True):
            expected = [(c.name, c.macs, c.weight_bits, c.input_bits) for c in net.layer_costs(config)]
            assert [(r["name"], r["macs"], r["weight_bits"], r["input_bits"]) for r in card["layers"]] == expected
            assert {row["stored_bits"] for row in card["layers"]} <= stored
            for row in card["layers"]:
                assert row["weight"] == str(config[f"{row['name']}.weight"])
                assert row["weight_bits"] <= row["stored_bits"] and row["nominal_bytes"] <= row["stored_bytes"]

    def test_figures_are_measured(self, done):
        for _, card in done.values():
            proof, speed = card["verification"], card["measured"]["latency"]
            assert proof["passed"] and proof["images"] == 32 and proof["bytes"]["float"] > 0
            assert speed["speedup"] == pytest.approx(speed["float_ms"] / speed["file_ms"]) and speed["rounds"] >= 20
            assert card["provenance"]["seed"] == 7 and card["provenance"]["versions"]["onnxruntime"]

    def test_it_can_be_read(self, done):
        text = (done["int8"][0] / "card.md").read_text()
        words = ("# mixed", "- budget: w4a4", "QLinearConv", "true bits", "one thread", "| two.0.conv1 |", "seed: 7")
        assert [word for word in words if word not in text] == []
        assert "{" not in text, "no raw values"


class TestFailure:
    def test_a_file_that_fails_is_not_kept(self, resnet, subnets, tmp_path):
        _, x = resnet
        _, subnet, _ = subnets[0]
        with pytest.raises(VerificationError, match=r"equal predictions|operator"):
            export(subnet, x[:1], tmp_path / "a", Liar("liar"), batches(x))
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["failed.json"]
        assert json.loads((tmp_path / "a" / "failed.json").read_text())["verification"]["failures"]
        export(subnet, x[:1], tmp_path / "a", "int8", batches(x))
        assert not (tmp_path / "a" / "failed.json").exists() and (tmp_path / "a" / "model.onnx").exists()

    def test_a_good_file_survives_a_failure(self, done, resnet, subnets):
        _, x = resnet
        out, _ = done["packed"]
        before = (out / "model.onnx").read_bytes()
        with pytest.raises(VerificationError):
            export(subnets[3][1], x[:1], out, Liar("liar"), batches(x))
        assert (out / "model.onnx").read_bytes() == before
        (out / "failed.json").unlink()

    def test_bad_settings(self, resnet, subnets, tmp_path):
        _, x = resnet
        with pytest.raises(ValueError, match=r"no export profile 'int9'; choose one of .*int8.*, packed"):
            export(subnets[0][1], x[:1], tmp_path / "a", "int9", batches(x))
        with pytest.raises(ValueError, match="got none"):
            export(subnets[0][1], x[:1], tmp_path / "a", "int8")
        with pytest.raises(ValueError, match=r"8 among them, got \[2, 4\]"):
            Profile("p", [2, 4])
        with pytest.raises(ValueError, match="rounds=3"):
            Profile("p", [8], 3)
        assert not (tmp_path / "a").exists()


class TestTwoBits:
    def test_a_runtime_that_refuses_them_gets_four(self, subnets, monkeypatch):
        """What onnxruntime says to two-bit weights depends on its version."""
        import supernet.export.profile as module

        def refuse(model):
            raise VerificationError("no implementation for INT2")

        made = subnets[2][2]
        assert named("packed").loadable(made).opset_import[0].version == 25
        monkeypatch.setattr(module, "session", refuse)
        model = named("packed").loadable(made)
        assert model.SerializeToString() == Profile("packed", [4, 8]).loadable(made).SerializeToString()
        assert len(write(made, (4, 8)).graph.node) == len(model.graph.node)

    def test_another_fault_is_not_hidden(self, subnets, monkeypatch):
        import supernet.export.profile as module

        def refuse(model):
            raise VerificationError("broken")

        monkeypatch.setattr(module, "session", refuse)
        with pytest.raises(VerificationError, match="broken"):
            named("packed").loadable(subnets[0][2])


def test_out_may_be_a_text(resnet, subnets, tmp_path, monkeypatch):
    _, x = resnet
    monkeypatch.chdir(tmp_path)
    export(subnets[0][1], x[:1], "here", batches=batches(x))
    assert Path("here/card.md").is_file()

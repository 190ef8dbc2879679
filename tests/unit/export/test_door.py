"""The door: which subnets, with which statistics, and what becomes of them."""

import hashlib
import json
import shutil

import onnx
import pytest
import torch

import elastibit
from supernet.artefacts import save_tensors
from supernet.calibration.batchnorm import norms, recalibrate
from supernet.export.__main__ import described, picked
from supernet.export.bit_maps import export_bits
from supernet.export.subnets import chosen, keep_tuned, materialised
from supernet.run import load

TRAIN = (
    "experiment=digits backbone.channels=[4,8,8] space.weight_bits=[4,8] space.input_bits=[4,8] epochs=0 "
    "calibration_images=64 threads=1"
)
LABELS = {"w4a4": "w4a4", "w8a8-6kB": "w8a8", "2.5M": "w8a8"}


def statistics(subnet):
    paths = {id(module): path for path, module in subnet.named_modules()}
    return {f"{paths[id(m)]}.{name}": b for m in norms(subnet) for name, b in m.named_buffers(recurse=False)}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A calibrated run, and files as a search would leave them."""
    path = tmp_path_factory.mktemp("door") / "run"
    assert elastibit.main(["train", *TRAIN.split(), f"run={path}"]) == 0
    run = load(path)
    records = []
    for label, bits in LABELS.items():
        config = run.net.space.uniform(bits)
        subnet = run.net.materialise(config)
        recalibrate(subnet, run.task.recalibrate(128))
        origin = {"fingerprint": run.net.fingerprint, "id": config.id}
        save_tensors(path / "subnets" / f"{config.id}.safetensors", statistics(subnet), origin)
        records.append({"label": label, "id": config.id, "indices": list(config.row), "measured": 0.5})
        (path / "subnets" / f"{config.id}.json").write_text(json.dumps(origin | records[-1]))
    (path / "front.json").write_text(json.dumps({"fingerprint": run.net.fingerprint, "subnets": records}))
    return path


@pytest.fixture
def run(searched, tmp_path):
    """A copy of it, loaded."""
    return load(shutil.copytree(searched, tmp_path / "run"))


class TestChosen:
    def test_all_of_the_front_each_once(self, run):
        assert [r["label"] for r in chosen(run, "all")] == ["w4a4", "w8a8-6kB"]

    def test_by_label_id_or_file(self, run):
        first = run.net.space.uniform("w4a4")
        assert [r["id"] for r in chosen(run, "w4a4")] == [first.id]
        assert [r["id"] for r in chosen(run, first.id)] == [first.id]
        file = run.path / "subnets" / f"{first.id}.json"
        (found,) = chosen(run, str(file))
        assert found["indices"] == list(first.row) and found["file"] == file
        (twin,) = chosen(run, "2.5M")
        assert twin["id"] == run.net.space.uniform("w8a8").id

    def test_what_is_not_there(self, run):
        with pytest.raises(ValueError, match=r"no subnet 'w5a5'; subnet=all, a file, or one of w4a4 \("):
            chosen(run, "w5a5")
        (run.path / "front.json").unlink()
        with pytest.raises(FileNotFoundError, match="make one with `elastibit search"):
            chosen(run, "all")

    def test_another_space(self, run):
        front = json.loads((run.path / "front.json").read_text())
        (run.path / "front.json").write_text(json.dumps(front | {"fingerprint": "other"}))
        with pytest.raises(ValueError, match=f"is of space other, this run of {run.net.fingerprint}"):
            chosen(run, "all")


class TestMaterialised:
    def test_statistics_are_those_that_were_stored(self, run):
        (record,) = chosen(run, "w4a4")
        path = run.path / "subnets" / f"{record['id']}.safetensors"
        subnet = materialised(run, record)
        stored = {name: value * 2 if value.is_floating_point() else value for name, value in statistics(subnet).items()}
        save_tensors(path, stored, {"fingerprint": run.net.fingerprint, "id": record["id"]})
        assert all(torch.equal(v, stored[n]) for n, v in statistics(materialised(run, record)).items())

    def test_without_a_file_they_are_measured(self, run):
        (record,) = chosen(run, "w4a4")
        (run.path / "subnets" / f"{record['id']}.safetensors").unlink()
        expected = run.net.materialise(run.net.space.uniform("w4a4"))
        recalibrate(expected, run.task.recalibrate())
        found = statistics(materialised(run, record))
        assert all(torch.equal(value, found[name]) for name, value in statistics(expected).items())

    def test_those_of_another_subnet_are_refused(self, run):
        (record,) = chosen(run, "w4a4")
        path = run.path / "subnets" / f"{record['id']}.safetensors"
        some = dict(list(statistics(materialised(run, record)).items())[:3])
        save_tensors(path, some, {"fingerprint": run.net.fingerprint, "id": record["id"]})
        with pytest.raises(ValueError, match="does not hold the BatchNorm statistics"):
            materialised(run, record)

    def test_the_card_names_model_data_and_subnet(self, run):
        (record,) = chosen(run, "w4a4")
        about = described(run, record)
        assert about["name"] == f"digits w4a4 ({record['id']})" and about["model"].startswith("CifarResNet")
        assert about["indices"] == record["indices"] and about["accuracy on select"] == 0.5
        content = (run.path / "supernet.safetensors").read_bytes()
        assert about["supernet sha256"] == hashlib.sha256(content).hexdigest()


class TestFinetuned:
    def tune(self, run, record):
        """What `elastibit finetune` leaves: here, weights that are twice as large."""
        subnet = materialised(run, record)
        with torch.no_grad():
            for parameter in subnet.parameters():
                parameter.mul_(2)
        keep_tuned(run, subnet, {"indices": record["indices"], "epochs": 3, "after": 0.75})
        return subnet

    def test_its_weights_are_picked_where_there_are(self, run, capsys):
        (record,) = chosen(run, "w4a4")
        wanted = self.tune(run, record).state_dict()
        for setting in ("auto", True):
            subnet, about = picked(run, record, setting)
            found = subnet.state_dict()
            assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert about["fine-tuned epochs"] == 3 and about["accuracy on select"] == 0.75
            assert "fine-tuned for 3 epochs" in capsys.readouterr().out
        subnet, about = picked(run, record, False)
        expected = materialised(run, record).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in subnet.state_dict().items())
        assert "fine-tuned epochs" not in about and about["accuracy on select"] == 0.5

    def test_those_of_another_training_are_left_aside(self, run, capsys):
        (record,) = chosen(run, "w4a4")
        self.tune(run, record)
        with torch.no_grad():
            next(run.net.parameters()).mul_(1.5)
        _, about = picked(run, record, "auto")
        assert "fine-tuned epochs" not in about and "of another training" in capsys.readouterr().out
        with pytest.raises(ValueError, match="make them with `elastibit finetune"):
            picked(run, record, True)

    def test_what_is_broken_or_unknown_is_refused(self, run):
        (record,) = chosen(run, "w4a4")
        with pytest.raises(ValueError, match="auto, true or false, got 'perhaps'"):
            picked(run, record, "perhaps")
        subnet = self.tune(run, record)
        path = run.path / "finetuned" / record["id"] / "weights.safetensors"
        save_tensors(path, dict(list(subnet.state_dict().items())[:3]), {})
        with pytest.raises(ValueError, match="does not hold the fine-tuned subnet"):
            picked(run, record, "auto")


@pytest.fixture
def foreign(run, tmp_path):
    """A ModelOpt configuration of a subnet that no search has found."""
    config = run.net.space.config(run.net.space.uniform("w8a4").row)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(export_bits(run.net, config, "modelopt")))
    return path, config


class TestBitMaps:
    def test_a_map_of_another_tool_is_a_subnet(self, run, foreign):
        path, config = foreign
        (record,) = chosen(run, str(path))
        assert record == {"label": "found", "id": config.id, "indices": list(config.row)}
        assert described(run, record)["budget"] == "found"
        path.write_text(json.dumps({run.net.layers[1].name: [4, 8]}))
        (record,) = chosen(run, str(path), default="w8a8", form="plain")
        found = run.net.space.config(record["indices"])
        assert found[run.net.layers[1].weight].bits == 4 and found[run.net.layers[2].weight].bits == 8

    def test_in_and_out_again(self, run, foreign, capsys):
        path, config = foreign
        words = f"threads=1 profile.rounds=20 images=64 subnet={path} bits=[modelopt,ort,plain] assignment=modelopt"
        assert elastibit.main(["export", f"run={run.path}", *words.split()]) == 0
        assert "found" in capsys.readouterr().out
        folder = run.path / "export" / config.id / "bits"
        assert sorted(p.name for p in folder.iterdir()) == ["float.onnx", "modelopt.json", "ort.json", "plain.json"]
        assert json.loads((folder / "modelopt.json").read_text()) == json.loads(path.read_text())
        named = {tensor.name for tensor in onnx.load(folder / "float.onnx").graph.initializer}
        weights = {f"{layer.name}.weight" for layer in run.net.layers if layer.weight in config}
        assert weights <= named & set(json.loads((folder / "ort.json").read_text()))

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("bits=[hawq]", "only read; write one of modelopt, ort, plain"),
            ("bits=[tvm]", "no form of bit maps 'tvm'"),
            ("subnet={path} assignment=aimet", "this is no bit map of Aimet"),
            ("subnet={path} names=[/a/b.0/Relu_1:nowhere,t.1:]", "names= points to nowhere"),
            (
                "subnet={path} names=[nowhere]",
                "names are written theirs:ours, or theirs: to leave one out; got 'nowhere'",
            ),
            ("subnet={path} default=w4", "wXaY"),
            ("subnet={wrong}", "no layer here is called nope"),
        ],
    )
    def test_bad_settings(self, run, foreign, tmp_path, capsys, words, said):
        wrong = tmp_path / "wrong.json"
        wrong.write_text(json.dumps({"nope": [4, 4]}))
        words = words.format(path=foreign[0], wrong=wrong).split()
        assert elastibit.main(["export", f"run={run.path}", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (run.path / "export").exists()


class TestDoor:
    def test_files_and_table(self, run, capsys):
        assert elastibit.main(["export", f"run={run.path}", "threads=1", "profile=packed", "profile.rounds=20"]) == 0
        out = capsys.readouterr().out
        for label in ("w4a4", "w8a8-6kB"):
            (record,) = chosen(run, label)
            folder = run.path / "export" / record["id"]
            assert sorted(p.name for p in folder.iterdir()) == ["card.json", "card.md", "model.onnx"]
            card = json.loads((folder / "card.json").read_text())
            assert card["profile"] == "packed" and card["verification"]["images"] == 450
            assert card["costs"].items() <= run.net.cost(record["indices"]).items()
            assert label in out and record["id"] in out

    def test_a_file_that_fails_does_not_stop_the_others(self, run, capsys, monkeypatch):
        import supernet.export.verify as module

        monkeypatch.setattr(module, "narrowest", lambda net: 8)
        monkeypatch.setattr(module, "EQUAL_AT_8_BITS", 1.1)  # nothing can pass
        words = ["export", f"run={run.path}", "threads=1", "images=64", "profile.rounds=20"]
        assert elastibit.main(words) == 1
        said = capsys.readouterr().err
        assert said.count("equal predictions: 100.00 % of 64 images") == 2 and "QLinearConv" in said
        for label in ("w4a4", "w8a8-6kB"):
            (record,) = chosen(run, label)
            assert [p.name for p in (run.path / "export" / record["id"]).iterdir()] == ["failed.json"]

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("subnet=none", "no subnet 'none'"),
            ("profile=int3", "choose one of all, carrier, int8"),
            ("profile.rounds=2", "20 rounds"),
        ],
    )
    def test_bad_settings(self, run, capsys, word, said):
        assert elastibit.main(["export", f"run={run.path}", word]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (run.path / "export").exists()

"""The integer profile: what it proves, what it refuses, and real images."""

import io
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic.supernet import SuperNet
from supernet.export.bundle import export, named
from supernet.export.deploy import deploy
from supernet.export.integer import integer
from supernet.export.integer_onnx import real_nodes, write_integer
from supernet.export.integer_profile import IntegerProfile, apart, moved
from supernet.export.onnx import write
from supernet.export.runtime import run, session


@pytest.fixture
def written(subnets, resnet, tmp_path):
    """A subnet, its file, and batches of images with the trained module's labels."""
    _, subnet, _ = subnets[0]
    x = resnet[1]
    with torch.no_grad():
        y = subnet(x).argmax(1)
    return subnet, IntegerProfile().export(subnet, x[:1], tmp_path / "file"), [(x[:20], y[:20]), (x[20:], y[20:])]


def test_a_file_is_proved_to_the_last_bit(written):
    subnet, path, batches = written
    proof = IntegerProfile().verify(path, subnet, batches)["verification"]
    assert proof["passed"] and proof["agreement"] == proof["agreement_needed"] == 1.0
    found = proof["integer"]
    assert (found["equal_images"], found["most_off"], len(found["entrance"])) == (32, 0.0, 1)
    assert {row["most_off"] for row in proof["operators"]} == {0.0}
    assert {"ConvInteger", "MatMulInteger", "BitShift"} <= proof["kernels"].keys() and not proof["unfused"]
    made, _ = session(onnx.load(path))
    logits = torch.from_numpy(run(made, {"x": torch.cat([x for x, _ in batches])})) * found["scale"]
    with torch.no_grad():
        trained = torch.cat([subnet(x) for x, _ in batches]).double()
    assert found["distance"]["subnet"]["most_off"] == pytest.approx(float((logits - trained).abs().max()), rel=1e-6)


@pytest.mark.parametrize("what", ["b", "off", "weight0", "c"])
def test_one_wrong_number_is_found_where_it_is(written, what):
    """One step of one constant of one operator, in a layer or its bias."""
    subnet, path, batches = written
    model = onnx.load(path)
    tensor = next(
        t
        for t in model.graph.initializer
        if t.name.endswith(f"one.0.conv1.{what}") or t.name.endswith(f"one.0.conv1.raised.{what}")
    )
    value = numpy_helper.to_array(tensor)
    wrong = value.astype(np.int64)
    wrong.flat[0] += {"b": -(1 << 24)}.get(what, 1)
    tensor.CopyFrom(numpy_helper.from_array(wrong.astype(value.dtype), tensor.name))
    onnx.save(model, path)
    proof = IntegerProfile().verify(path, subnet, batches)["verification"]
    wrong = [row["name"] for row in proof["operators"] if row["verdict"] != "ok"]
    assert not proof["passed"] and wrong == ["one.0.conv1"]
    assert any("one.0.conv1" in line for line in proof["failures"])


def test_a_file_with_real_numbers_inside_is_noticed(subnets):
    deployed = subnets[0][2]
    assert len(real_nodes(write_integer(integer(deployed)))) == 1
    assert len(real_nodes(write(deployed))) > 10


def test_few_bits_of_sums_do_not_pass(written, tmp_path):
    subnet, _, batches = written
    coarse = IntegerProfile(residual_bits=4)
    path = coarse.export(subnet, batches[0][0][:1], tmp_path / "coarse")
    proof = coarse.verify(path, subnet, batches)["verification"]
    assert proof["integer"]["most_off"] == 0.0  # the file does compute what it should
    assert not proof["passed"] and any("residual_bits=16" in line for line in proof["failures"])


def test_accuracy_may_move_by_chance_only():
    labels = torch.zeros(400, dtype=torch.long)
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    subnet = right.repeat(400, 1)

    def logits(lost, won):
        integers, deployed = subnet.clone(), subnet.clone()
        integers[:lost], deployed[lost : lost + won] = wrong, wrong
        return {"integer": integers, "deployed": deployed, "subnet": subnet}

    assert not [line for line in moved(logits(12, 4), labels) if "accuracy" in line]
    assert not [line for line in moved(logits(4, 30), labels) if "accuracy" in line]
    assert [line for line in moved(logits(20, 2), labels) if "20 of 400" in line]


def test_distances_are_those_of_their_definitions():
    ours, other = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = apart(ours, other)
    assert (found["most_off"], found["equal_labels"]) == (3.0, 0.5)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(30 / 9))
    assert apart(ours, ours)["sqnr_db"] is None


def test_a_bundle_has_card_and_file(written, tmp_path):
    subnet, _, batches = written
    card = export(subnet, batches[0][0][:1], tmp_path / "out", "integer", batches)
    assert card["profile"] == "integer" and isinstance(named("integer"), IntegerProfile)
    text = (tmp_path / "out" / "card.md").read_text()
    assert "ConvInteger" in text and "Computed in float: nothing." in text


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="20 rounds"):
        IntegerProfile(rounds=3)


def cifar(folder: Path, part: str, first: int, last: int) -> torch.Tensor:
    """Normalised images of the JPEG copy of CIFAR-10."""
    packed = np.load(folder / "cifar10" / "cifar10_jpeg.npz")
    head, scan, at = (packed[name] for name in ("jpeg_header", f"{part}_scan", f"{part}_offset"))
    files = (head.tobytes() + scan[a:b].tobytes() + b"\xff\xd9" for a, b in itertools.pairwise(at[first : last + 1]))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])
    x = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32).copy())


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_resnet20_on_1000_real_images(shared_data, bits):
    weights = shared_data / "pretrained" / "cifar10_jpeg_resnet20.safetensors"
    images, rest = cifar(shared_data, "test", 5000, 6000), cifar(shared_data, "train", 0, 256)
    net = SuperNet(CifarResNet(20, weights=weights).eval(), images[:1], bits=(4, 8)).eval()
    net.calibrate([rest])
    network = integer(deploy(net.materialise(net.space.uniform(bits)).eval(), images[:1]))
    made, _ = session(write_integer(network))
    for part in images.split(100):
        assert np.array_equal(run(made, {network.source: part}), network(part).numpy())

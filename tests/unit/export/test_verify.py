"""Verification finds what is wrong, and refuses what proves nothing."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from supernet.artefacts import VerificationError
from supernet.export.deploy import deploy
from supernet.export.onnx import write
from supernet.export.verify import compare, narrowest, operators, require, table, verify


def batches(x, classes=5):
    labels = torch.arange(len(x)) % classes
    return [(x[:20], labels[:20]), (x[20:], labels[20:])]


def changed(model, name, change):
    """The file with one initialiser changed."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            value = change(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(value.astype(numpy_helper.to_array(tensor).dtype), name))
            return model
    raise AssertionError(name)


def bump(value):
    value.flat[0] += 40 if value.flat[0] < 0 else -40
    return value


class TestVerify:
    @pytest.mark.parametrize("containers", [(8,), (2, 4, 8)])
    def test_a_file_as_it_was_written(self, resnet, subnets, containers):
        _, x = resnet
        _, subnet, net = subnets[1]
        report = verify(write(net, containers), net, batches(x), subnet)
        assert report["passed"] and report["failures"] == [] and report["images"] == 32 and report["bits"] == 4
        assert report["agreement"] == 1.0 and report["agreement_needed"] == 0.995
        assert set(report["accuracy"]) == {"file", "deployed", "subnet"}
        assert [row["name"] for row in report["operators"]] == [op.name for op in net.operators()]
        assert all(row["verdict"] == "ok" for row in report["operators"])
        require(report)

    @pytest.mark.parametrize(
        ("tensor", "change", "operator"),
        [
            ("two.0.conv1.weight", bump, "two.0.conv1"),
            ("one.0.conv2.bias", lambda b: b + 4000, "one.0.conv2"),
            ("conv.scale", lambda s: s * 1.05, "conv"),
            ("add.zero", lambda z: z + 3, "add"),
            ("linear.weight.scale", lambda s: s * 1.01, "linear"),
        ],
    )
    def test_one_wrong_number_is_found_where_it_is(self, resnet, subnets, tensor, change, operator):
        _, x = resnet
        net = subnets[0][2]
        rows = operators(changed(write(net), tensor, change), net, x)
        wrong = [row["name"] for row in rows if row["verdict"] != "ok"]
        assert operator in wrong
        readers = {op.name for op in net.operators() if operator in op.inputs}
        assert set(wrong) <= {operator, *readers}, "what reads a mislabelled tensor is wrong too, nothing else"

    def test_a_clip_that_is_missing_is_found(self, resnet, subnets):
        """Silently wrong otherwise: a 4-bit activation would run to 255."""
        _, x = resnet
        net = subnets[1][2]
        kept = net.tensors(x)
        narrow = [op for op in net.operators() if op.grid is not None and op.grid.bits == 4 and op.site == op.name]
        clipped = next(op for op in narrow if (kept[op.name] == op.grid.high).any())
        rows = operators(changed(write(net), f"{clipped.name}.high", lambda h: h * 0 + 255), net, x)
        assert [row["name"] for row in rows if row["verdict"] != "ok"] == [clipped.name]

    def test_a_wrong_file_fails_as_a_whole(self, resnet, subnets):
        _, x = resnet
        net = subnets[0][2]
        report = verify(changed(write(net), "linear.bias", lambda b: b[::-1]), net, batches(x))
        assert not report["passed"] and report["agreement"] < 0.999
        assert any(line.startswith("equal predictions:") for line in report["failures"])
        found = report["disagreements"]
        assert len(found) == round((1 - report["agreement"]) * 32)
        for row in found:
            logits = net(x)[row["image"]]
            assert row["deployed"] == int(logits.argmax()) != row["file"]
            assert row["margin"] == pytest.approx(float(logits[row["deployed"]] - logits[row["file"]]), abs=1e-5)
        with pytest.raises(VerificationError) as error:
            require(report)
        text = str(error.value)
        assert "operator linear:" in text and all(op.name in text for op in net.operators())

    def test_nothing_to_look_at(self, subnets):
        net = subnets[0][2]
        with pytest.raises(ValueError, match="needs a batch"):
            verify(write(net), net, [])

    def test_the_narrowest_bits_decide(self, subnets):
        assert [narrowest(net) for _, _, net in subnets[:3]] == [8, 4, 2]


class TestConstants:
    def test_constant_outputs_are_refused(self, resnet):
        net, x = resnet
        subnet = net.materialise(net.space.uniform("w8a8")).eval()
        subnet.linear.weight.data.zero_()
        subnet.linear.weight_quantizer.start(subnet.linear.weight)
        dead = deploy(subnet, x)
        with pytest.raises(VerificationError, match="same output for all 32 images"):
            verify(write(dead), dead, batches(x))

    def test_an_operator_without_a_sign_of_life_gets_other_codes(self, resnet):
        """Equal zeros would hide a wrong weight."""
        net, x = resnet
        subnet = net.materialise(net.space.uniform("w8a8")).eval()
        subnet.two[0].bn1.bias.data.fill_(-9.0)  # ReLU lets nothing through
        subnet.two[0].bn1.weight.data.fill_(0.1)
        made = deploy(subnet, x)
        rows = {row["name"]: row for row in operators(write(made), made, x)}
        assert rows["two.0.conv2"]["constant"] and rows["two.0.conv2"]["verdict"] == "ok"
        rows = operators(changed(write(made), "two.0.conv2.weight", bump), made, x)
        assert [row["name"] for row in rows if row["verdict"] != "ok"] == ["two.0.conv2"]


class TestCompare:
    def logits(self, n, flips):
        """n images of two classes, the first `flips` told apart; labels are the reference's classes."""
        reference = torch.zeros(n, 2, dtype=torch.float64)
        labels = torch.arange(n) % 2
        reference[torch.arange(n), labels] = 1.0
        file = reference.clone()
        file[:flips] = file[:flips].flip(1)
        return {"deployed": reference, "file": file}, labels

    @pytest.mark.parametrize(("flips", "bits", "passes"), [(1, 8, True), (2, 8, False), (5, 4, True), (6, 4, False)])
    def test_share_of_equal_predictions(self, flips, bits, passes):
        logits, labels = self.logits(1000, flips)
        labels[:flips] = 2  # both are wrong there: accuracy is equal
        assert (compare(logits, labels, bits)["failures"] == []) == passes

    def test_accuracy_may_differ_by_a_tenth_of_a_point(self):
        logits, labels = self.logits(4000, 4)
        assert compare(logits, labels, 4)["failures"] == []
        logits, labels = self.logits(4000, 5)
        (failure,) = compare(logits, labels, 4)["failures"]
        assert failure.startswith("accuracy: 99.88 % in the file, 100.00 % deployed")

    def test_one_image_of_few_is_no_failure(self):
        logits, labels = self.logits(250, 1)
        assert compare(logits, labels, 4)["failures"] == []

    def test_figures(self):
        logits, labels = self.logits(100, 1)
        figures = compare(logits | {"subnet": logits["file"]}, labels, 8)
        assert figures["accuracy"] == {"deployed": 1.0, "file": 0.99, "subnet": 0.99}
        assert figures["agreement"] == figures["subnet_agreement"] == 0.99
        assert figures["disagreements"] == [{"image": 0, "label": 0, "deployed": 0, "file": 1, "margin": 1.0}]
        assert figures["median_margin"] == 1.0
        assert figures["sqnr_db"] == pytest.approx(10 * np.log10(100 / 2))
        assert compare(dict.fromkeys(logits, logits["deployed"]), labels, 8)["sqnr_db"] is None


def test_the_table_has_a_line_for_each_operator(resnet, subnets):
    _, x = resnet
    net = subnets[1][2]
    head, *lines = table(operators(write(net), net, x[:4]))
    assert head.startswith("operator") and [line.split()[0] for line in lines] == [op.name for op in net.operators()]
    assert "QLinearConv" in lines[1] and lines[1].endswith("ok")

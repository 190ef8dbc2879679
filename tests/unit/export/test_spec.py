"""The standard's own types: what is stored in which, that it is really packed, and that another runtime agrees."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from supernet.export.deploy import deploy
from supernet.export.graph import Grid
from supernet.export.profile import layers_of
from supernet.export.spec import INT2, INT4, UINT2, UINT4, UINT8, Spec, rows_of, site_kind, write_spec
from supernet.formats.powers import PowersOfTwo


@dataclass(frozen=True, slots=True)
class E2M1:
    """A float of 4 bits, as OCP's MX formats have it."""

    bits: int = 4

    def levels(self, symmetric: bool) -> tuple[float, ...]:
        positive = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        return (*(-v for v in reversed(positive)), 0.0, *positive)

    def __str__(self) -> str:
        return "e2m1"


def batches(x):
    return [(part, torch.arange(len(part)) % 5) for part in x.split(10)]


def types(model):
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}


class TestTypes:
    @pytest.mark.parametrize(("index", "opset", "expected"), [(0, 21, "INT8"), (1, 21, "INT4"), (2, 25, "INT2")])
    def test_weights_have_the_smallest(self, subnets, index, opset, expected):
        net = subnets[index][2]
        model = write_spec(net)
        inner = [op.name for op in layers_of(net)][1:-1]
        assert model.opset_import[0].version == opset and {types(model)[f"{n}.weight"] for n in inner} == {expected}
        assert {types(model)[f"{op.name}.weight"] for op in layers_of(net)} == {expected, "INT8"}  # edges are pinned

    def test_they_are_packed(self, subnets):
        for _, _, net in subnets:
            held = {t.name: t for t in write_spec(net).graph.initializer}
            for row in rows_of(net):
                tensor = held[f"{row['name']}.weight"]
                assert len(tensor.raw_data) == row["stored_bytes"] == -(-row["weights"] * row["stored_bits"] // 8)
                assert row["stored_type"].upper() == TensorProto.DataType.Name(tensor.data_type)

    def test_their_codes_are_those_of_the_layer(self, subnets):
        for _, _, net in subnets:
            held = {t.name: numpy_helper.to_array(t) for t in write_spec(net).graph.initializer}
            for op in layers_of(net):
                assert np.array_equal(held[f"{op.name}.weight"].astype(np.int64), op.codes.numpy())

    @pytest.mark.parametrize(
        ("grid", "kind", "shift"),
        [
            (Grid(0.1, 0, 0, 3, 2), UINT2, 0),
            (Grid(0.1, 128, 126, 129, 2), INT2, 128),
            (Grid(0.1, 0, 0, 7, 3), UINT4, 0),
            (Grid(0.1, 128, 120, 135, 4), INT4, 128),
            (Grid(0.1, 128, 112, 143, 5), UINT8, 0),
            (Grid(0.1, 3, 0, 255, 8), UINT8, 0),
        ],
    )
    def test_activations(self, grid, kind, shift):
        assert site_kind(grid) == (kind, shift)

    def test_activations_in_the_file(self, subnets):
        for index, (narrow, unsigned) in {1: ("UINT4", "INT4"), 2: ("UINT2", "INT2")}.items():
            zeros = {v for k, v in types(write_spec(subnets[index][2])).items() if k.endswith("quantizer.zero")}
            assert zeros <= {narrow, unsigned, "UINT8"} and zeros & {narrow, unsigned}


class TestOtherFormats:
    @pytest.mark.parametrize(
        ("made", "stored", "opset"),
        [
            (E2M1(), "FLOAT4E2M1", 23),
            (PowersOfTwo(2), "INT2", 25),
            (PowersOfTwo(3), "INT4", 21),
            (PowersOfTwo(4), "INT8", 21),
        ],
        ids=str,
    )
    def test_the_type_that_holds_its_levels(self, supernet_of, awkward, tmp_path, made, stored, opset):
        model = nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
            nn.Linear(24, 5),
        )
        net, x = supernet_of(awkward(model), (3, 6, 6), weight_bits=[8], input_bits=[8], formats=[made])
        row = list(net.space.largest().row)
        at = net.space.position["2.weight"]
        row[at] = next(k for k, c in enumerate(net.space.dimensions[at].choices) if str(made) in str(c))
        subnet = net.materialise(row).eval()
        file = write_spec(deploy(subnet, x))
        assert types(file)["2.weight"] == stored and file.opset_import[0].version == opset
        (tensor,) = [t for t in file.graph.initializer if t.name == "2.weight"]
        scale = np.abs(numpy_helper.to_array(tensor).astype(np.float32))
        assert set(np.unique(scale)) <= {abs(v) for v in made.levels(True)}
        spec = Spec(images=20)
        figures = spec.verify(spec.export(subnet, x[:1], tmp_path / "a.onnx"), subnet, batches(x))
        assert figures["verification"]["passed"], figures["verification"]["failures"]


class TestProof:
    def test_every_subnet_in_the_evaluator(self, resnet, subnets, tmp_path):
        _, x = resnet
        for _, subnet, _ in subnets[1:5]:
            path = Spec(images=12).export(subnet, x[:1], tmp_path / "model.onnx")
            model = onnx.load(path)
            onnx.checker.check_model(model, full_check=True)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
            proof = Spec(images=12).verify(path, subnet, iter(batches(x)))["verification"]
            assert proof["passed"], proof["failures"]
            assert proof["images"] == 12 and proof["bytes"]["ideal"] < proof["bytes"]["bare"] < proof["bytes"]["file"]

    def test_a_wrong_code_is_found(self, resnet, subnets, tmp_path):
        _, x = resnet
        _, subnet, _ = subnets[2]
        path = Spec().export(subnet, x[:1], tmp_path / "model.onnx")
        model = onnx.load(path)
        (tensor,) = [t for t in model.graph.initializer if t.name == "one.0.conv1.weight"]
        codes = numpy_helper.to_array(tensor).astype(np.int8)
        tensor.CopyFrom(numpy_helper.from_array((-1 - codes).astype(ml_dtypes.int2), tensor.name))
        path.write_bytes(model.SerializeToString())
        proof = Spec().verify(path, subnet, batches(x))["verification"]
        assert not proof["passed"] and any("operator one.0.conv1" in line for line in proof["failures"])

    def test_what_moves_values_in_narrow_types(self, deployed_of):
        """Pooling, slicing and padding have no 2-bit form: they go through real numbers and lose nothing."""

        class Moves(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2, bias=False)

            def forward(self, x):
                x = nn.functional.max_pool2d(torch.relu(self.one(x)), 2)
                x = nn.functional.pad(x, (1, 0, 0, 1))[
                    :, :, ::2, 1:
                ]  # right before a layer it would be the layer's own
                return self.two(x).flatten(1)

        _, net, x = deployed_of(Moves(), (3, 12, 12), "w2a2", weight_bits=(2,), input_bits=(2,), first_last_bits=None)
        model = write_spec(net)
        assert {node.op_type for node in model.graph.node} >= {"MaxPool", "Slice", "Pad"}
        (found,) = ReferenceEvaluator(model).run(None, {net.source: x[:4].numpy()})
        assert np.abs(found - net(x[:4]).numpy()).max() <= 1e-5 * np.abs(found).max()

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="images=1"):
            Spec(images=1)

"""Networks that exporters trip over: they export and pass the strict checks of onnx, or fail with one clear line."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supernet.artefacts import VerificationError
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.onnx import write, write_float
from supernet.export.runtime import session
from supernet.export.spec import write_spec
from supernet.export.verify import operators


class Twice(nn.Module):
    """One convolution used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(F.relu(self.conv(x)))).mean((2, 3)))


class Unread(nn.Module):
    """A branch that nobody reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.aside, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.conv(x))
        self.aside(x)
        return self.head(x.mean((2, 3)))


class Bare(nn.Module):
    """No biases, groups, a depthwise convolution, odd strides and padding; every shape is different."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, (3, 1), stride=(2, 1), padding=(1, 0), bias=False)
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.three = nn.Conv2d(8, 12, 1, groups=4, bias=False)
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, x):
        return self.head(self.three(F.relu6(self.two(F.relu(self.one(x))))).mean((2, 3)))


class Two(nn.Module):
    """Two outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        return x, x.mean((2, 3))


def strict(model):
    """The checks of onnx, as strict as they go."""
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@pytest.fixture(scope="module")
def made(supernet_of):
    """A deployed network of each kind, at 4 and at 8 bits."""
    torch.manual_seed(0)
    networks = {}
    for kind in (Twice, Unread, Bare):
        net, x = supernet_of(kind(), (3, 9, 7), bits=(4, 8), first_last_bits=None)
        for bits in ("w8a8", "w4a4"):
            networks[kind, bits] = (deploy(net.materialise(net.space.uniform(bits)).eval(), x), x)
    return networks


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("kind", [Twice, Unread, Bare])
class TestTheyExport:
    def test_to_files_that_pass_every_check(self, made, kind, bits):
        net, _ = made[kind, bits]
        for model in (write(net), write(net, (4, 8)), write_float(net), write_spec(net)):
            known = strict(model).graph
            made_here = {name for node in known.node for name in node.output} - {known.output[0].name}
            assert {value.name for value in known.value_info} >= made_here
            assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
            assert len({node.name for node in model.graph.node if node.name}) == len(
                [node for node in model.graph.node if node.name]
            )

    def test_that_compute_the_same(self, made, kind, bits):
        net, x = made[kind, bits]
        for containers in ((8,), (4, 8)):
            model = write(net, containers)
            assert {row["verdict"] for row in operators(model, net, x)} == {"ok"}
            ran, _ = session(model)
            for n in (1, 3):  # the batch is free
                (logits,) = ran.run(None, {net.source: x[:n].numpy()})
                assert logits.shape == (n, 4)
                assert np.abs(logits - net(x[:n]).numpy()).max() <= 0.02 * float(net(x).abs().max())


class TestShared:
    def test_each_use_has_weights_of_its_own_in_the_file(self, made):
        """Input grids differ, and with them the units of the bias."""
        net, _ = made[Twice, "w8a8"]
        convs = [node for node in write(net).graph.node if node.op_type == "Conv"]
        assert len(convs) == 2 and len({node.input[1] for node in convs}) == 2


class TestUnread:
    def test_what_nobody_reads_is_not_written(self, made):
        net, _ = made[Unread, "w8a8"]
        assert not [t.name for t in write(net).graph.initializer if t.name.startswith("aside")]


class TestTheyFail:
    def test_another_size_than_was_traced(self, made):
        """Height and width are fixed in the file; the runtime says so."""
        net, _ = made[Bare, "w8a8"]
        ran = onnxruntime.InferenceSession(write(net).SerializeToString(), providers=["CPUExecutionProvider"])
        with pytest.raises(Exception, match="Got: 8 Expected: 7"):
            ran.run(None, {net.source: np.zeros((1, 3, 9, 8), np.float32)})

    def test_two_outputs(self, supernet_of):
        x = torch.randn(4, 3, 8, 8)
        with pytest.raises(ValueError) as said:
            net = SuperNet(Two(), x[:1], bits=(8,)).eval()
            net.calibrate([x])
            deploy(net.materialise(net.space.largest()).eval(), x)
        assert "\n" not in str(said.value)

    def test_sizes_taken_from_the_image(self):
        class Sized(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x):
                x = self.conv(x)
                return F.avg_pool2d(x, int(x.shape[2]) if x.shape[2] > 4 else 2).flatten(1)

        x = torch.randn(4, 3, 8, 8)
        with pytest.raises(ValueError) as said:
            net = SuperNet(Sized(), x[:1], bits=(8,)).eval()
            net.calibrate([x])
            deploy(net.materialise(net.space.largest()).eval(), x)
        assert "\n" not in str(said.value)

    def test_a_file_cut_short(self, made, tmp_path):
        net, _ = made[Bare, "w8a8"]
        content = write(net).SerializeToString()
        (tmp_path / "model.onnx").write_bytes(content[: len(content) // 2])
        with pytest.raises(Exception, match=r"(?i)pars|decod|truncated"):
            onnx.load(tmp_path / "model.onnx")
        broken = onnx.ModelProto.FromString(content)
        del broken.graph.initializer[0]
        with pytest.raises(VerificationError, match="does not run the file"):
            session(broken)

"""Programs of torch.export: equal outputs, loadable by torch alone, small, and silent about where they were made."""

import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from supernet.export.torch import Program, frozen
from supernet.formats.powers import PowersOfTwo


@pytest.fixture(scope="module")
def written(resnet, subnets, tmp_path_factory):
    """A subnet of mixed bits as a program."""
    _, x = resnet
    return Program().export(subnets[4][1], x[:1], tmp_path_factory.mktemp("torch") / "model.onnx")


LOADER = """
import sys, torch
images, expected = torch.load(sys.argv[2])
assert torch.equal(torch.export.load(sys.argv[1]).module()(images), expected)
assert not [name for name in sys.modules if name.split(".")[0] in ("supernet", "elastibit", "timm")]
"""


class TestProgram:
    def test_torch_alone_computes_the_same(self, written, resnet, subnets, tmp_path):
        _, x = resnet
        torch.save((x[:3], subnets[4][1](x[:3]).detach()), tmp_path / "pair.pt")
        words = [sys.executable, "-W", "ignore", "-c", LOADER, str(written), str(tmp_path / "pair.pt")]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_any_number_of_images(self, written, resnet, subnets):
        _, x = resnet
        program = torch.export.load(written).module()
        for n in (1, 2, 7):
            assert torch.equal(program(x[:n]), subnets[4][1](x[:n]))

    def test_it_names_no_place(self, written):
        with zipfile.ZipFile(written) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
        assert b"stack_trace" not in content and b".py" not in content

    def test_one_wrong_weight_is_found(self, written, resnet, subnets):
        _, x = resnet
        batches = [(x, torch.arange(32) % 5)]
        weight = subnets[4][1].linear.weight
        before = weight.data.clone()
        weight.data[0] += 10 * subnets[4][1].linear.weight_quantizer.scale.data.max()
        try:
            proof = Program().verify(written, subnets[4][1], batches)["verification"]
        finally:
            weight.data = before
        assert not proof["passed"] and "none may differ" in proof["failures"][-1]
        assert Program().verify(written, subnets[4][1], batches)["verification"]["passed"]

    def test_what_torch_refuses(self, resnet, monkeypatch, tmp_path):
        def refuse(*args, **options):
            raise RuntimeError("data-dependent\nexpression")

        net, x = resnet
        monkeypatch.setattr(torch.export, "export", refuse)
        with pytest.raises(ValueError, match=r"torch.export refuses the subnet \(data-dependent\)"):
            Program().export(net.materialise(net.space.largest()), x[:1], tmp_path / "a")
        assert not list(tmp_path.iterdir())


class TestFrozen:
    def test_it_holds_codes_and_learns_nothing(self, subnets):
        for _, subnet, _ in subnets:
            made = frozen(subnet)
            for layer in [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
                assert layer.weight.dtype == torch.int8
            assert not [name for name, _ in made.named_parameters() if "quantizer" in name or "site" in name]

    def test_bit_for_bit(self, resnet, subnets):
        _, x = resnet
        for _, subnet, _ in subnets:
            assert torch.equal(frozen(subnet)(x), subnet(x))

    def test_another_format(self, supernet_of):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        net, x = supernet_of(model, (3, 6, 6), weight_bits=[8], input_bits=[8], formats=[PowersOfTwo(4)])
        wanted = next(k for k, c in enumerate(net.space.dimensions[2].choices) if "pow2" in str(c))
        row = list(net.space.largest().row)
        row[2] = wanted
        subnet = net.materialise(row).eval()
        assert "pow2-4" in str(subnet.get_submodule("2").weight_quantizer.choices[0])
        made = frozen(subnet)
        assert torch.equal(made(x), subnet(x)) and int(made.get_submodule("2").weight.abs().max()) == 64

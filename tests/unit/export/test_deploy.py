"""From a materialised subnet to integer operators: the same codes, every BatchNorm folded, what is refused named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supernet.config import PerTensor, QuantConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.deploy import deploy
from supernet.export.graph import Move
from supernet.export.operators import Add, Conv, GlobalAverage, Layer, Linear, Pointwise, Quantize
from supernet.formats.powers import PowersOfTwo
from supernet.quant.quantizer import Quantizer


class Run(nn.Module):
    """Layers by name, and a forward pass given as a function."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def quantized(subnet, x):
    """Values of every activation quantizer of a subnet, by path."""
    seen, handles = {}, []
    for path, module in subnet.named_modules():
        if isinstance(module, Quantizer) and not module.weight:
            handles.append(module.register_forward_hook(lambda m, i, o, path=path: seen.update({path: o})))
    with torch.no_grad():
        seen[""] = subnet(x)
    for handle in handles:
        handle.remove()
    return seen


class TestParity:
    def test_each_operator_gives_the_codes_of_the_subnet(self, resnet, subnets):
        """Fed the subnet's own codes: one code off at most, beside the rounding of the bias that is stated."""
        _, x = resnet
        for _, subnet, net in subnets:
            real = quantized(subnet, x)
            kept = {net.source: x}
            for op in net.operators():
                got = op([kept[n] for n in op.inputs], [net.grids[n] for n in op.inputs])
                if op.site is not None:
                    grid = op.grid
                    trained = grid.encode(real[op.site].reshape(got.shape))
                    allowed, rounded = 0, 0.0
                    if isinstance(op, Layer) and op.bias is not None:
                        rounded = 0.5 * float(op.scale.max()) * net.grids[op.inputs[0]].scale / op.fine / grid.scale
                        allowed = 1 + int(rounded)
                    elif isinstance(op, Add | GlobalAverage):
                        allowed = 1
                    off = (got - trained).abs()
                    assert off.max() <= allowed, (op.name, float(off.max()))
                    # a channel shares one rounding of its bias, so with few channels the share scatters
                    assert (off > 0).double().mean() <= 2e-3 + 3 * rounded, op.name
                    got = trained
                kept[op.name] = got
            last = net.operators()[-1]
            half = 0.5 * float(last.scale.max()) * net.grids[last.inputs[0]].scale
            assert torch.allclose(kept[net.result], real[""], atol=half + 1e-5)

    def test_predictions_are_those_of_the_subnet(self, resnet, subnets):
        _, x = resnet
        same = [(net(x).argmax(1) == quantized(subnet, x)[""].argmax(1)).double().mean() for _, subnet, net in subnets]
        assert min(same) > 0.8 and sum(same) / len(same) > 0.95

    def test_the_subnet_is_left_as_it_was(self, resnet):
        net, x = resnet
        subnet = net.materialise(net.space.uniform("w4a4")).train()
        before = {name: value.clone() for name, value in subnet.state_dict().items()}
        deploy(subnet, x)
        assert subnet.training and all(torch.equal(v, before[n]) for n, v in subnet.state_dict().items())


class TestStructure:
    def test_every_norm_is_folded_and_every_operator_has_a_grid(self, subnets):
        for _, subnet, net in subnets:
            norms = sum(isinstance(m, nn.BatchNorm2d) for m in subnet.modules())
            assert net.folded == norms == sum(isinstance(op, Conv) for op in net.operators())
            assert [op.name for op in net.operators() if op.grid is None] == ["linear"]

    def test_blocks_that_were_cut_are_gone(self, subnets):
        config, _, net = subnets[-1]
        assert config["two.depth"] == 1
        names = [op.name for op in net.operators()]
        assert not any(name.startswith("two.1") for name in names)
        assert "two.0.conv2" in names

    def test_activations_and_quantizers_leave_no_operator(self, subnets):
        for _, _, net in subnets:
            assert not any(isinstance(op, Pointwise) for op in net.operators())
            for op in net.operators():
                if op.activation == "relu":
                    assert op.grid.low == op.grid.zero, op.name

    def test_consumers_with_fewer_bits_requantize(self, resnet):
        """One tensor, three readers: a convolution at 3 bits, one at 6, and a sum at the site's own 8."""
        net = Run(
            lambda s, x: s.a(y := F.relu(s.stem(x))) + s.b(y) + y,
            stem=nn.Conv2d(3, 4, 3, padding=1),
            a=nn.Conv2d(4, 4, 3, padding=1),
            b=nn.Conv2d(4, 4, 1),
        )
        big = SuperNet(net, torch.zeros(1, 3, 6, 6), first_last_bits=None).eval()
        x = torch.randn(16, 3, 6, 6)
        big.calibrate([x])
        pick = dict(big.space.uniform("w4a8"))
        for name, bits in (("a.input", 3), ("b.input", 6)):
            choices = big.space.dimensions[big.space.position[name]].choices
            pick[name] = next(c for c in choices if c.bits == bits)
        made = deploy(big.materialise(big.space.indices(pick)[0]), x)
        steps = {op.name: op for op in made.operators() if isinstance(op, Quantize)}
        bits = {name.removesuffix(".input_quantizer"): op.grid.bits for name, op in steps.items()}
        assert bits == {"stem": 8, "a": 3, "b": 6}
        assert steps["a.input_quantizer"].inputs == steps["b.input_quantizer"].inputs == ("stem",)
        assert made.grids["stem"].bits == 8
        assert sum("stem" in op.inputs for op in made.operators()) == 3

    def test_a_quantizer_moves_before_what_only_moves_values(self, subnets):
        """Pooled, flattened, quantized becomes pooled, quantized, flattened: the pooling can be fused."""
        _, _, net = subnets[0]
        flatten = next(op for op in net.operators() if isinstance(op, Move) and op.name == "flatten")
        assert flatten.inputs == ("pool",) and net.grids["pool"] is not None

    def test_a_classifier_of_linear_layers(self, deployed_of, awkward):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        subnet, net, x = deployed_of(awkward(model), (3, 2, 2))
        assert [op.kind for op in net.operators()] == ["Quantize", "Reshape", "Linear", "Linear"]
        assert torch.allclose(net(x), subnet(x), atol=0.05)

    def test_a_layer_that_runs_twice(self, deployed_of):
        layer = nn.Conv2d(3, 3, 3, padding=1)
        _, net, _ = deployed_of(Run(lambda s, x: s.c(F.relu(s.c(x))), c=layer), (3, 4, 4))
        assert [op.name for op in net.operators() if isinstance(op, Conv)] == ["c", "c_1"]


class TestActivations:
    def test_relu6_bounds_the_codes_from_above(self, deployed_of, awkward):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)
        )
        model = awkward(model)
        model[1].weight.data *= 9
        subnet, net, x = deployed_of(model, (3, 6, 6))
        grid = next(op for op in net.operators() if isinstance(op, Conv)).grid
        assert grid.decode(torch.tensor(float(grid.high))) == pytest.approx(6.0, abs=grid.scale)
        assert torch.allclose(net(x), subnet(x), atol=0.1)

    def test_an_activation_inside_a_timm_norm(self, awkward, deployed_of):
        from timm.layers import BatchNormAct2d

        first = nn.Conv2d(3, 4, 3, bias=False)
        model = nn.Sequential(first, BatchNormAct2d(4), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        subnet, net, x = deployed_of(awkward(model), (3, 6, 6))
        first = next(op for op in net.operators() if isinstance(op, Conv))
        assert first.activation == "relu" and net.folded == 1
        assert torch.allclose(net(x), subnet(x), atol=0.1)

    def test_what_has_no_integer_kernel_is_an_island(self, awkward, deployed_of):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        subnet, net, x = deployed_of(awkward(model), (3, 6, 6))
        assert [op.kind for op in net.operators()][1:3] == ["Conv", "Pointwise"]
        assert net.grids[net.operators()[2].name] is not None, "quantized right behind it"
        assert torch.allclose(net(x), subnet(x), atol=0.1)


REFUSED = {
    "a norm behind nothing": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)),
        r"1 of 2 cannot be folded: 0",
    ),
    "a norm behind a sum": (
        lambda: Run(lambda s, x: s.c(s.n(x + s.a(x))), a=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3), c=nn.Conv2d(3, 2, 4)),
        r"1 of 1 cannot be folded: n",
    ),
    "an unknown module": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 2, 2)),
        r"1 is PReLU, which the exporter does not know",
    ),
    "an unknown function": (
        lambda: Run(lambda s, x: torch.sort(s.c(x), dim=1).values, c=nn.Conv2d(3, 2, 4)),
        r"is getattr|is sort, which the exporter does not know",
    ),
    "twice a tensor": (
        lambda: Run(lambda s, x: torch.add(s.c(x), s.c(x), alpha=2), c=nn.Conv2d(3, 2, 4)),
        r"add adds 2 times a tensor",
    ),
    "two outputs": (lambda: Run(lambda s, x: (s.c(x), s.c(x)), c=nn.Conv2d(3, 2, 4)), r"returns a tuple"),
    "a mean over channels": (lambda: Run(lambda s, x: s.c(x).mean(1), c=nn.Conv2d(3, 2, 4)), r"mean over axes \[1\]"),
    "another padding": (
        lambda: Run(lambda s, x: s.c(F.pad(x, (1, 1, 0, 0), mode="reflect")), c=nn.Conv2d(3, 2, 4)),
        r"mode=reflect",
    ),
}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 2, 4)

    def forward(self, x, other=None):
        return self.c(x)


class TestRefusals:
    def test_a_second_input(self):
        """One that the supernet has not taken at its default."""
        with pytest.raises(ValueError, match=r"takes 2 and returns a tensor"):
            deploy(TwoInputs(), torch.randn(1, 3, 4, 4))

    @pytest.mark.parametrize("case", REFUSED)
    def test_name_what_is_in_the_way(self, case):
        make, message = REFUSED[case]
        net = SuperNet(make().eval(), torch.randn(1, 3, 4, 4), bits=[8]).eval()
        net.calibrate([torch.randn(4, 3, 4, 4)])
        subnet = net.materialise(net.space.largest())
        with pytest.raises(ValueError, match=message):
            deploy(subnet, torch.randn(1, 3, 4, 4))

    def test_a_forward_pass_that_cannot_be_traced(self):
        model = Run(lambda s, x: s.c(x) if x.sum() > 0 else s.c(-x), c=nn.Conv2d(3, 2, 4))
        net = SuperNet(model, torch.randn(1, 3, 4, 4), sites=False, bits=[8]).eval()
        net.calibrate([torch.randn(4, 3, 4, 4)])
        with pytest.raises(ValueError, match=r"cannot be traced .* must not branch on its data"):
            deploy(net.materialise(net.space.largest()), torch.randn(1, 3, 4, 4))

    def test_what_was_not_calibrated(self, residual):
        net = SuperNet(residual(), torch.randn(1, 3, 8, 8), bits=[8])
        subnet = net.materialise(net.space.largest())
        subnet.conv.input_quantizer.scale.data.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"conv\.input_quantizer needs positive finite scales, .* calibrate"):
            deploy(subnet, torch.randn(1, 3, 8, 8))

    def test_activations_on_another_grid(self, residual):
        net = SuperNet(residual(), torch.randn(1, 3, 8, 8), bits=[8])
        subnet = net.materialise(net.space.largest())
        subnet.conv.input_quantizer = Quantizer([QuantConfig(PowersOfTwo(4), PerTensor(), True)])
        with pytest.raises(ValueError, match=r"conv\.input_quantizer must have one choice, .* it has pow2-4"):
            deploy(subnet, torch.randn(1, 3, 8, 8))


class TestWithoutSites:
    def test_sums_stay_in_float(self, residual, deployed_of):
        """sites=False exports too, unfused: nothing is quantized that was not in the subnet."""
        subnet, net, x = deployed_of(residual(), (3, 8, 8), sites=False)
        sums = [op for op in net.operators() if isinstance(op, Add)]
        assert sums and all(net.grids[name] is None for op in sums for name in op.inputs)
        assert isinstance(net.operators()[-1], Linear)
        assert torch.allclose(net(x), subnet(x), atol=0.1)

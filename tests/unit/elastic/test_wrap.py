"""Finding layers, counting products, swapping, and where sites are placed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.config import PerTensor, QuantConfig
from supernet.elastic.audit import multiplications
from supernet.elastic.layers import QuantConv2d, QuantLayer, QuantLinear
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.elastic.wrap import discover, evaluating, swap, trace
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers under short names, and a forward pass given as a function of the module and the input."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(a: int = 3, b: int = 4, k: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, bias=False, **options)


def sites(net: SuperNet) -> set[str]:
    return {name for name in net.quantizers if not name.endswith(("weight_quantizer", "input_quantizer"))}


def behind_sites(net: SuperNet) -> set[str]:
    """Layers that take 8-bit codes as they are."""
    return {name for name, m in net.model.named_modules() if isinstance(m, QuantLayer) and m.input_quantizer.bypass}


class TestDiscover:
    def test_layers_in_order_with_their_counts(self) -> None:
        found = discover(CifarResNet(8, channels=(4, 6, 8)), IMAGE)
        names = ["conv1", *[f"layer{s}.0.conv{k}" for s in (1, 2, 3) for k in (1, 2)], "linear"]
        assert [f.name for f in found] == names
        first, last = found[0], found[-1]
        assert (first.macs, first.weights, first.outputs, first.shape) == (64 * 4 * 27, 108, 4, (3, 8, 8))
        assert first.behind_norm and not first.bias and last.bias and not last.behind_norm
        assert (last.kind, last.macs, last.weights, last.shape) == ("linear", 80, 80, (8,))
        assert found[3].macs == 16 * 6 * 4 * 9, "stride 2 halves height and width"

    def test_groups_tokens_and_batches_count_right(self) -> None:
        depthwise = discover(conv(4, 8, groups=4), torch.zeros(2, 4, 8, 8))[0]
        assert depthwise.macs == 64 * 8 * 9
        assert discover(nn.Linear(5, 7), torch.zeros(3, 11, 5))[0].macs == 11 * 35

    def test_a_layer_that_runs_twice_is_listed_once_with_both(self) -> None:
        net = Net(lambda m, x: m.a(m.bn(m.a(x))), a=conv(3, 3), bn=nn.BatchNorm2d(3))
        found = discover(net, IMAGE)
        assert [(f.name, f.macs, f.behind_norm) for f in found] == [("a", 2 * 64 * 81, True)]

    def test_only_the_layer_right_before_is_behind_a_norm(self) -> None:
        net = Net(lambda m, x: m.bn(F.relu(m.a(x)) + m.b(x)), a=conv(), b=conv(), bn=nn.BatchNorm2d(4))
        assert not any(f.behind_norm for f in discover(net, IMAGE))

    def test_a_model_with_nothing_to_quantize_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"Sequential has nothing to quantize: no nn.Conv2d or nn.Linear ran"):
            SuperNet(nn.Sequential(nn.ReLU(), nn.Flatten()), IMAGE)

    def test_every_module_has_its_own_mode_back(self) -> None:
        net = CifarResNet(8)
        net.bn1.eval()
        before = net.bn1.running_mean.clone()
        discover(net, torch.randn(1, 3, 8, 8))
        with pytest.raises(RuntimeError), evaluating(net):
            raise RuntimeError
        assert net.training and net.layer1.training and not net.bn1.training
        assert torch.equal(net.bn1.running_mean, before)


class TestMultiplications:
    def test_they_equal_what_discover_counts(self) -> None:
        net = CifarResNet(8, channels=(4, 6, 8))
        assert multiplications(net, IMAGE) == {f.name: f.macs for f in discover(net, IMAGE)}
        assert multiplications(net, IMAGE.repeat(3, 1, 1, 1)) == multiplications(net, IMAGE)

    def test_products_outside_layers_are_laid_at_the_module_that_makes_them(self) -> None:
        net = Net(lambda m, x: m.inner(x) @ torch.ones(8, 5), inner=Net(lambda m, x: m.a(x) @ x.mT, a=conv(3, 3)))
        assert multiplications(net, IMAGE) == {"inner.a": 64 * 81, "inner": 3 * 8 * 8 * 8, "": 3 * 8 * 8 * 5}

    def test_fused_attention_is_not_overlooked(self) -> None:
        tokens, width = 6, 16
        attention = nn.MultiheadAttention(width, 2, batch_first=True)
        net = Net(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=attention)
        x = torch.randn(1, tokens, width)
        net.eval()
        with torch.no_grad():
            assert multiplications(net, x)["a"] == tokens * width * width * 4 + 2 * tokens * tokens * width
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        assert set(multiplications(layer, x)) == {"self_attn", "linear1", "linear2"}
        assert [f.name for f in discover(layer, x)] == ["linear1", "linear2"]


class TestSwap:
    CHOICES = (QuantConfig(Integer(4)),)

    def test_the_parameters_stay_the_same_objects(self) -> None:
        net = CifarResNet(8)
        weight, bias = net.linear.weight, net.linear.bias
        net.linear.eval()
        swap(net, "linear", self.CHOICES, self.CHOICES)
        assert isinstance(net.linear, QuantLinear) and net.linear.weight is weight and net.linear.bias is bias
        assert not net.linear.training

    def test_a_conv_keeps_its_geometry(self) -> None:
        layer = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 1), 2, True, "reflect")
        net = nn.Sequential(layer)
        x = torch.randn(2, 4, 9, 9)
        expected = layer(x)
        swap(net, "0", self.CHOICES, self.CHOICES)
        assert isinstance(net[0], QuantConv2d)
        net[0].weight_quantizer.enabled = net[0].input_quantizer.enabled = False
        assert torch.equal(net(x), expected)

    def test_a_layer_with_two_names_is_swapped_under_both(self) -> None:
        shared = conv(3, 3)
        net = SuperNet(
            Net(lambda m, x: m.f(m.b(F.relu(m.a(x))).mean((2, 3))), a=shared, b=shared, f=nn.Linear(3, 2)), IMAGE
        )
        assert not [m for m in net.modules() if type(m) in (nn.Conv2d, nn.Linear)], "nothing is silently left in float"
        assert [layer.name for layer in net.layers] == ["a", "f"] and net.layers[0].macs == 2 * 64 * 81


def chain(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(m.pool(F.relu(m.bn(m.b(m.r(m.a(x)))))).flatten(1))


def residual(m: nn.Module, x: Tensor) -> Tensor:
    x = m.r(m.a(x))
    return m.f(m.pool(F.relu(m.bn(m.b(x)) + x)).flatten(1))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "a": conv,
    "b": lambda: conv(4, 4),
    "c": lambda: conv(4, 4),
    "f": lambda: nn.Linear(4, 2),
    "bn": lambda: nn.BatchNorm2d(4),
    "r": nn.ReLU,
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.MaxPool2d(2),
    "avg": lambda: nn.AvgPool2d(2),
    "same": nn.Identity,
    "drop": nn.Dropout,
    "depth": lambda: DropPath(0.5),
}


def net_of(run: Callable[..., Tensor]) -> Net:
    return Net(run, **{name: make() for name, make in PARTS.items()})


PLACED: dict[str, tuple[Callable[..., Tensor], set[str], set[str]]] = {
    "a chain has each layer's own": (chain, {"relu"}, set()),
    "a residual sum": (residual, {"r", "bn", "relu"}, {"b"}),
    "two readers": (
        lambda m, x: m.f((lambda y: m.b(y) * m.c(y))(m.r(m.a(x))).mean((2, 3))),
        {"r", "b", "c", "mul"},
        {"b", "c"},
    ),
    "maximum and padding stay on the grid": (
        lambda m, x: m.f((lambda y: m.b(y) + y)(F.pad(m.max(m.r(m.a(x))), (1, 1, 1, 1))).mean((2, 3))),
        {"r", "b", "add"},
        {"b"},
    ),
    "a slice stays on the grid": (
        lambda m, x: m.f((lambda y: m.b(y)[:, :, 1:] + y[:, :, :-1])(m.r(m.a(x))).mean((2, 3))),
        {"r", "b", "add"},
        {"b"},
    ),
    "padding with a number leaves it": (
        lambda m, x: m.f((lambda y: m.b(y) + y)(F.pad(m.r(m.a(x)), (1, 1), value=0.3)).mean((2, 3))),
        {"r", "pad", "b", "add"},
        {"b"},
    ),
    "an average makes new values": (
        lambda m, x: m.f((lambda y: m.b(y) + y)(m.avg(m.r(m.a(x)))).mean((2, 3))),
        {"r", "avg", "b", "add"},
        {"b"},
    ),
    "identities, dropout and stochastic depth are looked through": (
        lambda m, x: m.f((lambda y: m.depth(m.same(m.bn(m.b(y)))) + m.drop(y))(F.relu(m.same(m.a(x)))).mean((2, 3))),
        {"relu", "bn", "add"},
        {"b"},
    ),
    "an identity before a layer": (lambda m, x: m.f(m.b(m.same(F.relu(m.a(x)))).mean((2, 3))), {"b"}, set()),
    "joined tensors": (
        lambda m, x: m.f((lambda y: torch.cat([m.b(y), y[:, :0]], 1))(m.r(m.a(x))).mean((2, 3))),
        {"r", "b", "cat"},
        {"b"},
    ),
    "flattened before the classifier": (
        lambda m, x: m.f((m.r(m.a(x)) * 2)[:, :, 0, 0].reshape(-1, 4).contiguous()),
        {"r"},
        set(),
    ),
    "an activation that clips nothing has a site on either side": (
        lambda m, x: m.f(F.silu(m.bn(m.a(x))).mean((2, 3))),
        {"bn", "silu"},
        set(),
    ),
    "numbers are no tensors": (
        lambda m, x: m.f((lambda y: m.b(y).reshape(y.shape[0], y.size(1), -1).mean(-1) * y.shape[-1])(m.r(m.a(x)))),
        {"b", "mean"},
        set(),
    ),
    "parts of a tensor are no tensor": (
        lambda m, x: m.f((lambda p: torch.cat([p[1], p[0]], 1))(m.r(m.a(x)).chunk(2, 1)).mean((2, 3))),
        {"r", "cat"},
        set(),
    ),
    "parameters are no activations": (
        lambda m, x: m.f((m.a(x) + m.bn.weight.view(1, 4, 1, 1) * 2).mean((2, 3))),
        {"a", "add"},
        set(),
    ),
    "an input that is not taken by a layer alone": (
        lambda m, x: m.f(torch.cat([m.a(x), x], 1)[:, 3:].mean((2, 3))),
        {"x", "a", "cat"},
        {"a"},
    ),
}


class TestSites:
    @pytest.mark.parametrize("name", list(PLACED))
    def test_where_they_are(self, name: str) -> None:
        run, expected, grid = PLACED[name]
        model = net_of(run)
        net = SuperNet(model, IMAGE, bits=(4, 8), first_last_bits=None, allow=["*"])
        assert sites(net) == {f"site_{node}" for node in expected}
        assert behind_sites(net) == grid
        with net.floating():
            torch.testing.assert_close(net.eval()(IMAGE), model.eval()(IMAGE))
        net.calibrate([IMAGE])
        net(IMAGE).sum().backward()

    def test_of_a_residual_network(self) -> None:
        net = SuperNet(CifarResNet(8), IMAGE)
        blocks = {f"layer{s}.0.site_{n}" for s in (1, 2, 3) for n in ("bn2", "relu2")}
        assert sites(net) == {"site_relu", *blocks}, "a shortcut without parameters moves codes"
        assert behind_sites(net) == {f"layer{s}.0.conv1" for s in (1, 2, 3)}
        assert net.audit()["sites"] == 7 and net.audit()["covered"] == 1.0

    def test_a_site_is_eight_bits_per_tensor(self) -> None:
        net = SuperNet(CifarResNet(8), IMAGE)
        for name in sites(net):
            assert net.quantizers[name].choices == (QuantConfig(Integer(8), PerTensor(), False),)

    def test_of_eight_bit_choices_behind_a_site_one_is_left(self) -> None:
        net = SuperNet(CifarResNet(8), IMAGE, bits=(4, 8))
        inner, free = (
            net.space.dimensions[net.space.position[f"layer1.0.{n}.input"]].choices for n in ("conv1", "conv2")
        )
        assert [c.bits for c in inner] == [4, 4, 8] and [c.bits for c in free] == [4, 4, 8, 8]

    def test_a_layer_that_reads_a_grid_only_once_of_twice_quantizes_itself(self) -> None:
        """Its 8-bit choice would otherwise let a float tensor pass."""
        model = net_of(lambda m, x: m.f((lambda y: m.b(y) + m.b(m.r(m.c(y))))(m.r(m.a(x))).mean((2, 3))))
        net = SuperNet(model, IMAGE, bits=(4, 8), first_last_bits=None)
        assert behind_sites(net) == {"c"}
        twice = net_of(
            lambda m, x: m.f((lambda y: m.b(y) + m.b(m.max(y).repeat(1, 1, 2, 2)[:, :, ::1]))(m.r(m.a(x))).mean((2, 3)))
        )
        assert "b" not in behind_sites(SuperNet(twice, IMAGE, bits=(4, 8), first_last_bits=None))

    def test_the_image_is_quantized_before_a_stage(self) -> None:
        block = nn.Sequential(conv(3, 3), nn.ReLU())
        net = SuperNet(nn.Sequential(Stage(block), nn.Flatten(), nn.Linear(192, 2)), IMAGE, bits=(4, 8))
        assert "site_input_1" in sites(net)
        net.calibrate([IMAGE])
        seen = []
        net.model.get_submodule("0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        net(IMAGE)
        assert len(seen[0].unique()) <= 256 < len(IMAGE.unique()) * 2

    def test_they_can_be_switched_off(self) -> None:
        model = CifarResNet(8)
        net = SuperNet(model, IMAGE, sites=False)
        assert sites(net) == behind_sites(net) == set() and net.audit()["sites"] == 0
        assert net.space.dimensions == SuperNet(model, IMAGE, sites=False).space.dimensions
        net.calibrate([IMAGE])
        assert torch.isfinite(net(IMAGE)).all()


class TestTrace:
    def test_what_depends_on_data_is_refused_with_the_way_out(self) -> None:
        def run(m: nn.Module, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                raise AssertionError
            return m.f(m.pool(m.a(x)).flatten(1))

        with pytest.raises(ValueError, match=r"Net cannot be traced \(.*control flow\); pass sites=False to train it"):
            SuperNet(net_of(run), IMAGE)
        assert SuperNet(net_of(run), IMAGE, sites=False).audit()["covered"] == 1.0

    def test_an_error_without_words_is_named(self) -> None:
        def run(m: nn.Module, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise LookupError
            return m.f(m.pool(m.a(x)).flatten(1))

        with pytest.raises(ValueError, match=r"cannot be traced \(LookupError\)"):
            SuperNet(net_of(run), IMAGE)

    def test_a_functional_dropout_is_not_active_in_evaluation(self) -> None:
        model = net_of(lambda m, x: m.f(F.dropout(m.pool(m.r(m.a(x))), 0.5, m.training).flatten(1)))
        assert model.training
        net = SuperNet(model, IMAGE)
        net.calibrate([IMAGE])
        net.eval()
        assert torch.equal(net(IMAGE), net(IMAGE))

    def test_normalisation_with_activation_is_kept_as_one_node(self) -> None:
        from timm.layers import BatchNormAct2d

        model = Net(lambda m, x: m.f(m.n(m.a(x)).mean((2, 3))), a=conv(), n=BatchNormAct2d(4), f=nn.Linear(4, 2))
        graph = trace(model).graph
        assert "n" in {str(n.target) for n in graph.nodes} and not [n for n in graph.nodes if n.target is F.batch_norm]

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                lambda: nn.Sequential(Stage(conv(3, 3)), nn.Flatten(), nn.Linear(192, 2)),
                "0.0 is a QuantConv2d; wrap it",
            ),
            (lambda: Stage(nn.Sequential(conv(3, 3), nn.ReLU())), "a Stage cannot be the whole model"),
        ],
    )
    def test_stages_that_would_lose_their_blocks_are_refused(
        self, model: Callable[[], nn.Module], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            SuperNet(model(), IMAGE)


class TestAudit:
    def test_products_outside_layers_are_an_error_that_names_shares_and_the_way_out(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = self.qkv(x).chunk(3, -1)
                return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))

        x = torch.randn(1, 10, 16)
        model = nn.Sequential(nn.Linear(16, 16), Attention())
        total = 10 * 16 * 16 + 10 * 16 * 48 + 2 * 10 * 10 * 16 + 64
        share = 3200 / total
        with pytest.raises(
            ValueError, match=rf"only {100 * (1 - share):.1f} % .* float stay 1 \({100 * share:.1f} %\)"
        ):
            SuperNet(model, x)
        with pytest.raises(ValueError, match="allow=\\[pattern"):
            SuperNet(model, x, allow=["0.*"])
        audit = SuperNet(model, x, allow=["1*"]).audit()
        assert audit["left_in_float"] == {"1": 3200} and audit["macs"] == total
        assert audit["covered"] == pytest.approx(1 - share) and audit["layers"] == 3

    def test_layers_of_other_kinds_are_named(self) -> None:
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(4 * 81, 2))
        with pytest.raises(ValueError, match=r"float stay 0 \("):
            SuperNet(model, IMAGE)

    def test_a_subclass_is_not_taken_for_the_layer(self) -> None:
        class Odd(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        with pytest.raises(ValueError, match=r"float stay 1 \("):
            SuperNet(nn.Sequential(nn.Flatten(), Odd(192, 5), nn.Linear(5, 2)), IMAGE)


def test_quantizers_are_no_layers_of_the_network() -> None:
    net = SuperNet(CifarResNet(8), IMAGE)
    assert {name for name, m in net.model.named_modules() if isinstance(m, Quantizer)} == set(net.quantizers)

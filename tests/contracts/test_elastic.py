"""Laws of every elastic module, and of the SuperNet over every backbone of conf/backbone and some of timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, fx, nn

from supernet.config import PerChannel, PerTensor, QuantConfig, build
from supernet.elastic.layers import QuantConv2d, QuantLinear
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.formats.integer import Integer
from supernet.interfaces import ElasticModule
from supernet.space import SearchSpace

CONF = Path(__file__).parents[2] / "conf" / "backbone"
CHANGES = {
    "python": {"factory": "laws_of_elastic:make"},
    "timm": {"stages": ["layer1", "layer2", "layer3", "layer4"], "zero_init_last": False},
    "cifar_resnet20": {"depth": 8, "channels": [4, 6, 8]},
    "cifar_resnet": {"depth": 14, "channels": [4, 6, 8], "min_depth": 1},
}
FACTORY = """
from torch import nn
def make(n_classes, in_channels):
    stem = nn.Sequential(nn.Conv2d(in_channels, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    body = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(stem, body, nn.Flatten(), nn.Linear(4, n_classes))
"""
CHOICES = (QuantConfig(Integer(2), PerChannel()), QuantConfig(Integer(8), PerTensor(), False))

MODULES: dict[str, Callable[[], ElasticModule]] = {
    "QuantConv2d": lambda: QuantConv2d.from_float(nn.Conv2d(3, 4, 3)).quantize(CHOICES, CHOICES[1:]),
    "QuantLinear": lambda: QuantLinear.from_float(nn.Linear(3, 4)).quantize(CHOICES, CHOICES[1:]),
    "Stage": lambda: Stage(nn.Identity(), nn.Identity(), min_depth=1),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
class TestElasticModule:
    def test_its_dimensions_lie_under_its_own_path_and_make_a_space(self, make: Callable[[], ElasticModule]) -> None:
        module = make()
        assert isinstance(module, ElasticModule)
        dimensions = module.dimensions("some.path")
        assert dimensions and all(d.name.startswith("some.path.") for d in dimensions)
        assert len(SearchSpace(dimensions)) == len(dimensions)
        assert module.dimensions("some.path") == dimensions
        assert [d.choices for d in module.dimensions("b")] == [d.choices for d in dimensions]


def from_conf(name: str) -> nn.Module:
    cfg = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), CHANGES.get(name, {}))
    made = build(cfg, n_classes=5, in_channels=2)
    assert isinstance(made, nn.Module)
    return made


def from_timm(name: str) -> nn.Module:
    node = {"_target_": "supernet.backbones.timm_models.timm_model", "name": name, "n_classes": 5, "in_channels": 2}
    made = build(node)
    assert isinstance(made, nn.Module)
    return made


NETS = [pytest.param((from_conf, path.stem), id=path.stem) for path in sorted(CONF.glob("*.yaml"))]
NETS += [pytest.param((from_timm, name), id=f"timm/{name}") for name in ("mobilenetv2_100",)]


@pytest.fixture(scope="module", params=NETS)
def wrapped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, SuperNet, Tensor]:
    """A float model in evaluation, the calibrated SuperNet around it, and a few images."""
    make, name = request.param
    folder = tmp_path_factory.mktemp("factory")
    (folder / "laws_of_elastic.py").write_text(FACTORY)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = make(name)
    x = torch.randn(3, 2, 32, 32)
    with torch.no_grad():
        model.train()(x)  # statistics that fit
    net = SuperNet(model.eval(), x[:1], bits=(2, 8))
    net.calibrate([x])
    return model, net.eval(), x


Wrapped = tuple[nn.Module, SuperNet, Tensor]


class TestSuperNet:
    def test_in_float_it_is_the_model(self, wrapped: Wrapped) -> None:
        model, net, x = wrapped
        with torch.no_grad(), net.as_subnet(net.space.largest()), net.floating():
            assert torch.equal(net(x), model(x))

    def test_a_materialised_subnet_computes_the_same(self, wrapped: Wrapped, rng: np.random.Generator) -> None:
        _, net, x = wrapped
        for config in (net.space.sample(rng), net.space.smallest()):
            with torch.no_grad(), net.as_subnet(config):
                assert torch.equal(net.materialise(config)(x), net(x))

    def test_nothing_is_left_in_float(self, wrapped: Wrapped) -> None:
        _, net, _ = wrapped
        assert net.audit()["covered"] == 1.0 and net.audit()["left_in_float"] == {}
        assert not [m for m in net.modules() if type(m) in (nn.Conv2d, nn.Linear)]

    def test_every_tensor_of_every_site_is_quantized(self, wrapped: Wrapped) -> None:
        """What comes out of a quantizer has no more values than its bits can name, whoever reads it."""
        _, net, x = wrapped
        seen: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _inputs, out: seen.update({name: out.unique().numel()})

        handles = [q.register_forward_hook(keep(name)) for name, q in net.quantizers.items()]
        with torch.no_grad(), net.as_subnet(net.space.uniform("w2a2")):
            net(x)
        for handle in handles:
            handle.remove()
        assert seen.keys() == net.quantizers.keys()
        for name, quantizer in net.quantizers.items():
            bits = quantizer.choices[quantizer.choice].bits
            assert seen[name] <= 2**bits * quantizer.channels, name

    def test_normalisation_stays_one_node(self, wrapped: Wrapped) -> None:
        model, net, _ = wrapped
        graphs = [m for m in net.modules() if isinstance(m, fx.GraphModule)]
        assert graphs and not [n for g in graphs for n in g.graph.nodes if n.target is F.batch_norm]
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        kept = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(kept) == len(norms)

    def test_the_weights_keep_their_names(self, wrapped: Wrapped) -> None:
        model, net, _ = wrapped
        state = net.state_dict()
        assert all(torch.equal(state[f"model.{n}"], t) for n, t in model.state_dict().items())

    def test_every_active_parameter_and_scale_learns(self, wrapped: Wrapped) -> None:
        _, net, x = wrapped
        net.zero_grad(set_to_none=True)
        unchanged: set[str] = set()  # passed through, or on a grid of 8 bits already: its scale has no gradient

        def note(name: str) -> Callable[..., None]:
            def check(quantizer: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
                if torch.equal(inputs[0], out) and (quantizer.bypass or out.unique().numel() <= 2**8):
                    unchanged.add(name)

            return check

        handles = [q.register_forward_hook(note(name)) for name, q in net.quantizers.items()]
        with net.as_subnet(net.space.uniform("w8a8")):
            net(x).square().sum().backward()
        for handle in handles:
            handle.remove()
        idle = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
        assert idle <= {"bank.zero_point"}
        learned = {n for n, span in net.bank.spans.items() if net.bank.scale.grad[span].any()}
        passing = {n for n, q in net.quantizers.items() if q.bypass}
        assert passing <= unchanged and not any(net.quantizers[n].weight for n in unchanged)
        assert set(net.quantizers) - learned == unchanged
        net.zero_grad(set_to_none=True)

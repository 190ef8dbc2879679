"""Laws of every backbone of conf/backbone."""

import itertools
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from supernet.config import build
from supernet.elastic.stage import Stage

CONF = Path(__file__).parents[2] / "conf" / "backbone"
CHANGES = {
    "python": {"factory": "laws_of_backbones:make", "width": 6},
    "timm": {"stages": ["layer1", "layer2", "layer3", "layer4"], "zero_init_last": False},
}
FACTORY = """
from torch import nn
def make(n_classes, in_channels, width):
    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, n_classes))
"""
CLASSES, CHANNELS = 7, 2


@pytest.fixture(params=sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def make(request, tmp_path, monkeypatch):
    """A function that makes the backbone from a fixed seed, as the door does."""
    (tmp_path / "laws_of_backbones.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.merge(OmegaConf.load(request.param), CHANGES.get(request.param.stem, {}))

    def made():
        torch.manual_seed(0)
        return build(cfg, n_classes=CLASSES, in_channels=CHANNELS)

    return made


@pytest.fixture
def x():
    return torch.randn(3, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(1))


class TestBackbone:
    def test_it_has_the_classes_and_channels_of_the_task(self, make, x):
        net = make()
        assert isinstance(net, nn.Module)
        assert net(x).shape == (3, CLASSES)

    def test_every_parameter_learns(self, make, x):
        net = make()
        net(x).square().sum().backward()
        idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle

    @pytest.mark.parametrize("pixels", [32, 48])
    def test_its_trace_computes_the_same_at_any_size(self, make, pixels):
        net = make().eval()
        x = torch.randn(2, CHANNELS, pixels, pixels)
        traced = torch.fx.symbolic_trace(net)
        assert torch.equal(traced(x), net(x))

    def test_it_is_plain(self, make):
        """Nothing is quantized here: only torch's own modules hold parameters, as the wrapper swaps those."""
        for module in make().modules():
            if list(module.parameters(recurse=False)):
                assert type(module).__module__.startswith("torch.nn.")

    def test_images_do_not_see_each_other_in_evaluation(self, make, x):
        net = make().eval()
        assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5)

    def test_its_weights_go_into_another_one(self, make, x):
        net, other = make(), make()
        for p in other.parameters():
            nn.init.normal_(p)
        other.load_state_dict(net.state_dict())
        assert torch.equal(net.eval()(x), other.eval()(x))

    def test_stages_can_be_cut_block_by_block(self, make, x):
        """Each block after the first keeps the shape of its input, and each depth is another function."""
        net = make().eval()
        for name, stage in [(n, m) for n, m in net.named_modules() if isinstance(m, Stage)]:
            outputs = []
            for depth in range(stage.min_depth, len(stage) + 1):
                stage.depth = depth
                outputs.append(net(x))
            assert all(o.shape == outputs[0].shape for o in outputs), name
            assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs)), name

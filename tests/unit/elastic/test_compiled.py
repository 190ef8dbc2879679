"""A compiled supernet computes what the eager one does, and has no memory of what it was when it was compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.elastic import regions
from supernet.elastic.regions import Regions, compiled
from supernet.elastic.supernet import MODES, SuperNet
from supernet.formats.powers import PowersOfTwo
from supernet.quant import ste
from supernet.quant.ste import fused
from tests.unit.elastic.conftest import X, small, step
from tests.unit.quant.graphs import HIDDEN, counted

pytestmark = HIDDEN


class TestSame:
    """Without inductor; one compiled network serves all tests of a mode."""

    @pytest.fixture(params=MODES[1:], scope="class")
    @staticmethod
    def shared(request: pytest.FixtureRequest) -> Iterator[SuperNet]:
        net = small()
        with counted():
            net.compile(request.param)
            yield net

    @pytest.fixture
    def net(self, shared: SuperNet) -> Iterator[SuperNet]:
        """Put back as it was."""
        state = copy.deepcopy(shared.state_dict())
        shared.zero_grad()
        yield shared
        shared.load_state_dict(state)

    def test_outputs_gradients_and_statistics(self, net: SuperNet, rng: np.random.Generator) -> None:
        eager = small()
        for _ in range(10):
            config = net.space.sample(rng)
            net.zero_grad()
            eager.zero_grad()
            torch.testing.assert_close(step(net, config), step(eager, config), rtol=1e-4, atol=1e-4)
            for (name, p), q in zip(net.named_parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
            for b, c in zip(net.buffers(), eager.buffers(), strict=True):
                torch.testing.assert_close(b, c)

    def test_what_is_trained_or_loaded_afterwards_counts(self, net: SuperNet) -> None:
        state = copy.deepcopy(net.state_dict())
        before = step(net, net.space.largest())
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        assert not torch.allclose(step(net, net.space.largest()), before)
        net.load_state_dict(state)
        torch.testing.assert_close(step(net, net.space.largest()), before)

    def test_subnets_may_run_one_after_the_other_and_backward_later(self, net: SuperNet) -> None:
        configs = [net.space.largest(), net.space.smallest(), net.space.uniform("w2a4")]
        separate, losses = [], []
        for config in configs:
            net.zero_grad()
            step(net, config)
            separate.append([p.grad for p in net.parameters()])
        for config in configs:
            with net.as_subnet(config):
                losses.append(net(X).square().mean())
        for k in (1, 2, 0):
            net.zero_grad()
            losses[k].backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), separate[k], strict=True))

    def test_in_float_nothing_is_quantized(self, net: SuperNet) -> None:
        quantized, eager = step(net, net.space.smallest()), small()
        with net.floating(), eager.floating():
            torch.testing.assert_close(net(X), eager(X))
        torch.testing.assert_close(step(net, net.space.smallest()), quantized)

    def test_a_copy_computes_with_its_own_weights(self, net: SuperNet) -> None:
        before = step(net, net.space.largest())
        twin = copy.deepcopy(net)
        net.zero_grad()
        with torch.no_grad():
            twin.model.get_parameter("6.weight").mul_(-1)
        assert not torch.allclose(step(twin, twin.space.largest()), before)
        assert twin.model.get_parameter("6.weight").grad is not None
        assert all(p.grad is None for p in net.parameters())

    def test_a_subnet_that_is_taken_out_computes_the_same(self, net: SuperNet) -> None:
        config = net.space.uniform("w4a4")
        expected = step(net, config)
        torch.testing.assert_close(net.materialise(config).train()(X).detach(), expected)

    def test_its_modules_are_not_registered_a_second_time(self, net: SuperNet) -> None:
        assert set(net.state_dict()) == set(small().state_dict())
        assert len([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]) == 3


@pytest.fixture
def inductor() -> Iterator[None]:
    """Nothing is left of what other tests compiled, nor of what this one does."""
    torch._dynamo.reset()
    fused.cache_clear()
    yield
    torch._dynamo.reset()
    fused.cache_clear()


def resnet() -> SuperNet:
    torch.manual_seed(0)
    net = SuperNet(CifarResNet(8, 5, channels=(4, 6, 8)), X[:1], bits=(2, 4, 8))
    net.calibrate([X])
    return net


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Size of the difference, relative."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("mode", MODES[1:])
def test_inductor_computes_the_same(mode: str, rng: np.random.Generator) -> None:
    """Sums are taken in another order, so a value near a tie may get the neighbouring code."""
    net = resnet()
    eager = copy.deepcopy(net)
    net.compile(mode)
    torch._dynamo.utils.counters.clear()
    for config in [net.space.largest(), *(net.space.sample(rng) for _ in range(4))]:
        net.zero_grad()
        eager.zero_grad()
        assert difference(step(net, config), step(eager, config)) < 2e-2
        ours, theirs = ([p.grad for p in n.parameters()] for n in (net, eager))
        assert [len(g) for g in ours] == [len(g) for g in theirs]
        for (name, _), one, two in zip(net.named_parameters(), ours, theirs, strict=True):
            assert difference(one, two) < 0.1, name
        assert difference(*(torch.cat([g.flatten() for g in gs]) for gs in (ours, theirs))) < 2e-2
    for b, c in zip(net.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-2, atol=1e-2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= {"quantizers": 8, "regional": 5, "whole": 1}[mode]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("inductor")
def test_inductor_gives_the_same_codes_except_near_ties(rng: np.random.Generator) -> None:
    """Block by block, from the same input: at most one step apart, and hardly ever."""
    net = resnet().eval()
    for path, channels in (("layer1.0", 4), ("layer2.0", 4), ("layer3.0", 6)):
        block, site = net.model.get_submodule(path), net.quantizers[f"{path}.site_relu2"]
        run: Callable[[Tensor], Tensor] = Regions(block, compiled)
        for _ in range(3):
            x = (torch.rand(8, channels, 16, 16) * 255).round() / 255
            with torch.no_grad(), net.as_subnet(net.space.sample(rng)), net.bank.selected():
                steps = ((run(x) - block(x)) / site.select()[0]).abs().round()
            assert steps.max() <= 1 and float(steps.mean()) < 1e-3


def test_grids_that_are_not_integer_are_compiled_too() -> None:
    """By table."""
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())], nn.Flatten())
    net = SuperNet(model, X[:1], bits=(2, 4), formats=[PowersOfTwo(4)], sites=False)
    net.calibrate([X])
    eager, config = copy.deepcopy(net), net.space.config(np.array([len(d.choices) - 1 for d in net.space.dimensions]))
    assert config["2.weight"].format == PowersOfTwo(4)
    with counted():
        net.compile("regional")
        torch.testing.assert_close(step(net, config), step(eager, config), rtol=1e-4, atol=1e-4)
    for p, q in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("inductor")
def test_a_changed_formula_is_not_served_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second process finds the first one's graphs; one with another gradient of the scales must not.

    The code of the quantizers is known by its file, which another formula changes.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else it may be served by an earlier run of this test

    def gradient() -> Tensor:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        net = small()
        net.compile("whole")
        step(net, net.space.largest())
        assert net.bank.scale.grad is not None
        return net.bank.scale.grad

    def doubled(*operands: Any) -> tuple[Tensor, ...]:
        grad_v, grad_scale, grad_zero = formula(*operands)
        return grad_v, grad_scale * 2, grad_zero

    def hits() -> int:
        return int(torch._dynamo.utils.counters["aot_autograd"].get("autograd_cache_hit", 0))

    formula = ste.straight_through
    first = gradient()
    torch.testing.assert_close(gradient(), first)
    assert hits() > 0
    monkeypatch.setattr(ste, "straight_through", doubled)
    changed_file = tmp_path / "ste.py"
    changed_file.write_text(f"{Path(ste.__file__).read_text()}# another formula\n")
    monkeypatch.setattr(ste, "__file__", str(changed_file))
    regions._digest.cache_clear()
    changed = gradient()
    assert hits() == 0
    regions._digest.cache_clear()
    torch.testing.assert_close(changed.square().sum(), 4 * first.square().sum(), rtol=1e-3, atol=0)

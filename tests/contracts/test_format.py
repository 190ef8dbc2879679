"""Laws of every number format of conf/format, through the one quantizer that uses them."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from supernet.config import NumberFormat, PerTensor, QuantConfig, build
from supernet.quant.quantizer import Quantizer

CONF = Path(__file__).parents[2] / "conf" / "format"


def every():
    """Each YAML at each width that its class accepts."""
    for path in sorted(CONF.glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path))
        for bits in range(1, 9):
            try:
                yield pytest.param(build(node | {"bits": bits}), id=f"{path.stem}-{bits}")
            except ValueError as error:
                assert str(bits) in str(error), "a refusal names the value"


@pytest.fixture(params=list(every()))
def fmt(request):
    return request.param


@pytest.fixture
def quantizer(fmt):
    """One choice, scale 0.3: not a power of two, so that products round."""
    made = Quantizer([QuantConfig(fmt, PerTensor(), True)], 1, weight=True)
    made.scale.data.fill_(0.3)
    return made


@pytest.fixture
def x(fmt):
    top = fmt.levels(True)[-1]
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(1, 4000, generator=generator) * 0.3 * top
    fine = torch.randn(1, 1000, generator=generator)
    return torch.cat([spread, fine, torch.zeros(1, 1)], dim=1)


def test_every_yaml_gives_a_format():
    assert {p.stem for p in CONF.glob("*.yaml")} <= {p.id.rsplit("-", 1)[0] for p in every()}


class TestFormat:
    def test_it_is_a_frozen_value(self, fmt):
        assert isinstance(fmt, NumberFormat)
        assert hash(fmt) == hash(type(fmt)(bits=fmt.bits)) and fmt == type(fmt)(bits=fmt.bits)
        with pytest.raises((AttributeError, TypeError)):
            fmt.bits = 3

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_levels_ascend_hold_zero_and_are_no_more_than_the_bits_can_name(self, fmt, symmetric):
        levels = fmt.levels(symmetric)
        assert list(levels) == sorted(set(levels))
        assert 0.0 in levels
        assert 2 ** (fmt.bits - 1) < len(levels) <= 2**fmt.bits <= 256

    def test_levels_are_whole_multiples_of_the_scale(self, fmt):
        """The quantizer's table keeps lowest and highest level as integers, and so do files."""
        assert all(level == int(level) for level in fmt.levels(True))

    def test_levels_are_kept(self, fmt, quantizer):
        levels = torch.tensor(fmt.levels(True))[None] * 0.3
        assert torch.equal(quantizer(levels), levels)

    def test_quantizing_twice_changes_nothing(self, quantizer, x):
        once = quantizer(x)
        assert torch.equal(quantizer(once), once)

    def test_order_is_kept(self, quantizer, x):
        ordered = quantizer(x.sort(dim=1).values)
        assert (ordered.diff(dim=1) >= 0).all()

    def test_the_nearest_level_is_chosen(self, fmt, quantizer, x):
        levels = torch.tensor(fmt.levels(True), dtype=torch.float64)
        wanted = x.double() / torch.tensor(0.3).double()
        least = (wanted[..., None] - levels).abs().min(-1).values
        got = (wanted - quantizer.encode(x).double()).abs()
        torch.testing.assert_close(got, least, atol=1e-5, rtol=1e-6)
        assert set(quantizer.encode(x).flatten().tolist()) <= set(fmt.levels(True))

    def test_forward_is_encode_then_decode(self, quantizer, x):
        assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))

    def test_gradients_reach_value_and_scale(self, quantizer, x):
        x = x.clone().requires_grad_()
        quantizer(x).square().sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.any()
        assert torch.isfinite(quantizer.scale.grad).all() and quantizer.scale.grad.any()

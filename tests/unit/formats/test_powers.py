"""What is special to powers of two; what every format owes is in tests/contracts/test_format.py."""

import numpy as np
import pytest
import torch

from supernet.config import PerChannel, PerTensor, QuantConfig, plain
from supernet.elastic.supernet import SuperNet
from supernet.formats.powers import PowersOfTwo
from supernet.quant.quantizer import Quantizer


class TestPowersOfTwo:
    def test_the_grid_is_written_out(self):
        assert PowersOfTwo(3).levels(True) == (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_every_product_is_a_shift(self, bits):
        for level in PowersOfTwo(bits).levels(True):
            mantissa, exponent = np.frexp(abs(level))
            assert level == 0 or mantissa == 0.5  # frexp writes 2^k as 0.5 * 2^(k+1)
            assert 37 * abs(level) == (37 << int(exponent) - 1 if level else 0)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_it_fits_the_int8_of_a_file(self, bits):
        levels = PowersOfTwo(bits).levels(True)
        assert set(np.array(levels).astype(np.int8).tolist()) == {int(v) for v in levels}

    @pytest.mark.parametrize("bits", [1, 5, 8])
    def test_bits_out_of_range_are_refused(self, bits):
        with pytest.raises(ValueError, match=f"2 to 4 bits, got {bits}"):
            PowersOfTwo(bits)

    def test_it_beats_integers_of_as_many_bits_on_heavy_tails(self):
        """Weights with rare large values: an even grid of 4 bits spends its levels where nothing is."""
        from supernet.formats.integer import Integer

        x = torch.distributions.StudentT(2.0).sample
        torch.manual_seed(0)
        weight = x((1, 20_000))
        errors = []
        for fmt in (PowersOfTwo(4), Integer(4)):
            quantizer = Quantizer([QuantConfig(fmt, PerTensor(), True)], 1, weight=True)
            largest = float(weight.abs().max())
            quantizer.scale.data.fill_(largest / fmt.levels(True)[-1])
            relative = (quantizer(weight) - weight).detach().abs() / largest
            errors.append(float(relative.mean()))
        assert errors[0] < 0.5 * errors[1]

    def test_a_supernet_learns_with_it_beside_the_integers(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3),
            torch.nn.Flatten(),
            torch.nn.LazyLinear(3),
        )
        images = torch.randn(16, 1, 6, 6)
        model(images)
        net = SuperNet(model, images[:1], bits=(2, 4), formats=[PowersOfTwo(4)])
        net.calibrate([images])
        choice = QuantConfig(PowersOfTwo(4), PerChannel())
        assert choice in net.space.dimensions[net.space.position["2.weight"]].choices
        config = net.space.pin({"2.weight": choice}).largest()
        with net.as_subnet(config):
            net(images).square().mean().backward()
        assert net.model.get_submodule("2").weight.grad.any()
        codes = net.quantizers["2.weight_quantizer"]
        with net.as_subnet(config):
            used = set(codes.encode(net.model.get_submodule("2").weight).flatten().tolist())
        assert used <= set(PowersOfTwo(4).levels(True))
        assert plain(choice)["format"] == {"kind": "PowersOfTwo", "bits": 4}

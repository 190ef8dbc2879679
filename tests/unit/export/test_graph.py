"""The grid of uint8 codes, and the deployed network as a container."""

import itertools

import pytest
import torch

from supernet.config import PerTensor, QuantConfig
from supernet.export.graph import Deployed, Grid
from supernet.export.operators import Add, Pointwise, Quantize, Reshape
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer

KINDS = list(itertools.product(range(2, 9), (True, False), (True, False)))


def quantizer(bits: int, symmetric: bool, unsigned: bool, zero: float = 0.6) -> Quantizer:
    made = Quantizer([QuantConfig(Integer(bits), PerTensor(), symmetric)])
    made.set_unsigned(unsigned)
    made.scale.data.fill_(0.13)
    made.zero_point.data.fill_(0.0 if symmetric else zero * 2**bits / 4)
    return made


@pytest.fixture
def values() -> torch.Tensor:
    """Numbers far over both ends, grid points, and ties between them."""
    halves = torch.arange(-600, 600) / 2 * torch.tensor(0.13)
    return torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(0)) * 8, halves])


@pytest.mark.parametrize(("bits", "symmetric", "unsigned"), KINDS)
class TestGrid:
    def test_it_is_the_grid_of_the_quantizer(self, bits, symmetric, unsigned, values):
        made = quantizer(bits, symmetric, unsigned)
        grid = Grid.of(made)
        codes = grid.encode(values)
        assert torch.equal(codes, made.encode(values) + (0 if unsigned else 128))
        assert torch.equal(grid.decode(codes), made(values))

    def test_codes_fit_a_byte_and_have_their_bits(self, bits, symmetric, unsigned, values):
        grid = Grid.of(quantizer(bits, symmetric, unsigned))
        assert 0 <= grid.low <= grid.zero <= grid.high <= 255
        assert grid.high - grid.low <= 2**bits - 1
        assert set(grid.encode(values).tolist()) == set(range(grid.low, grid.high + 1)), "every code is reached"

    @pytest.mark.parametrize("activation", ["relu", "relu6"])
    def test_an_activation_moves_into_the_bounds(self, bits, symmetric, unsigned, activation, values):
        grid = Grid.of(quantizer(bits, symmetric, unsigned))
        real = {"relu": torch.relu, "relu6": torch.nn.functional.relu6}[activation](values)
        assert torch.equal(grid.after(activation).encode(values), grid.encode(real))
        assert grid.after(activation).zero == grid.zero


class TestClip:
    def test_only_a_full_byte_needs_none(self):
        assert not Grid.of(quantizer(8, False, True)).clipped
        assert not Grid.of(quantizer(8, True, True)).clipped
        assert not Grid.of(quantizer(8, False, False)).clipped
        assert Grid.of(quantizer(8, True, False)).clipped, "-128 is no code of symmetric 8 bits"
        assert Grid.of(quantizer(7, True, True)).clipped


class TestDeployed:
    @pytest.fixture
    def net(self):
        grid = Grid(0.1, 128, 0, 255, 8)
        first, second, last = Quantize("a", ["x"]), Reshape("b", ["a"], (4,)), Add("c", ["b", "b"])
        first.grid = last.grid = grid
        relu = Pointwise("d", ["c"], "relu")
        return Deployed([first, second, last, relu], "x", "d", torch.zeros(1, 2, 2), 0, (4,))

    def test_a_move_keeps_the_grid(self, net):
        assert net.grids["b"] == net.grids["a"] and net.grids["d"] is None and net.grids["x"] is None

    def test_it_computes(self, net):
        x = torch.tensor([[[0.26, -0.5], [3.0, 99.0]]])
        assert torch.allclose(net(x), torch.tensor([[0.6, 0.0, 6.0, 12.7]]))

    def test_all_tensors_can_be_had(self, net):
        x = torch.randn(3, 2, 2)
        kept = net.tensors(x)
        assert set(kept) == {"x", "a", "b", "c", "d"}
        assert torch.equal(kept["d"], net(x)) and kept["b"].shape == (3, 4)

    def test_a_network_may_end_in_codes(self, net):
        ends = Deployed(list(net.ops)[:2], "x", "b", torch.zeros(1, 2, 2), 0, (4,))
        assert torch.allclose(ends(torch.full((1, 2, 2), 0.26)), torch.full((1, 4), 0.3))

"""Layouts that other kernels of onnxruntime take: the file gives the same logits, bit for bit."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from supernet.config import PerChannel
from supernet.export.kernels import shift, spare, tiled, widen
from supernet.export.onnx import write
from supernet.export.operators import Conv
from supernet.export.runtime import counts, run, session, unfused


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def convolutions(net):
    return {op.name: op for op in net.operators() if isinstance(op, Conv)}


class TestShift:
    @pytest.mark.parametrize(("low", "high", "zero"), [(-128, 126, 1), (-127, 127, -1), (-128, 127, 0), (-7, 8, 1)])
    def test_the_values_stay_and_fit_an_int8(self, low, high, zero):
        codes = np.arange(low, high + 1).reshape(-1, 1, 1, 1)
        moved, by = shift(codes, np.zeros(len(codes), np.int64))
        assert (by == zero).all() and (moved - by.reshape(-1, 1, 1, 1) == codes).all()
        assert moved.min() >= -128 and moved.max() <= 127

    def test_what_has_a_zero_point_stays(self):
        codes, zero = np.array([[3], [4]]), np.array([0, 5])
        moved, by = shift(codes, zero)
        assert (moved == codes).all() and (by == zero).all()


class TestWiden:
    def test_new_channels_stand_for_zero(self):
        codes, zero = np.arange(24).reshape(2, 3, 2, 2), np.array([5, -1])
        wide = widen(codes, zero, 1)
        assert wide.shape == (2, 4, 2, 2) and (wide[:, :3] == codes).all()
        assert (wide[:, 3] - zero.reshape(-1, 1, 1) == 0).all()


def image(window, channels=3, **options):
    first = nn.Conv2d(channels, 16, window, **options)
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


class TestFile:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_small_window_reads_four_channels(self, deployed_of, awkward, channels):
        """The first zero-point is not 0, so that zeros on the grid and codes of 0 differ."""
        subnet, net, x = deployed_of(awkward(image(3, channels, stride=2, padding=1)), (channels, 9, 9))
        model = write(net)
        (name,) = convolutions(net)
        assert constants(model)[f"{name}.weight"].shape[1] == 4 and net.grids[net.operators()[0].name].zero
        made, kernels = session(model)
        assert counts(kernels)["QLinearConv"] == 1 == counts(kernels)["Pad"] and not unfused(kernels)
        assert np.array_equal(run(made, {net.source: x}), net(x).double().numpy())
        (witness,) = ReferenceEvaluator(model).run(None, {net.source: x[:4].numpy()})
        assert np.abs(witness - subnet(x[:4]).detach().numpy()).max() <= 0.1 * np.abs(witness).max()

    @pytest.mark.parametrize(
        ("model", "size"), [(lambda: image(7), 9), (lambda: image(3, 4), 5), (lambda: image(3, 3, groups=1), 5)]
    )
    def test_others_keep_theirs(self, deployed_of, model, size):
        made = model()
        channels = made[0].in_channels
        _, net, _ = deployed_of(made, (channels, size, size))
        (op,) = convolutions(net).values()
        assert spare(op) == (1 if made[0].kernel_size == (3, 3) and channels == 3 else 0)

    def test_depthwise_convolutions_keep_their_one_channel(self, deployed_of):
        _, net, _ = deployed_of(image(3, 16, groups=16), (16, 5, 5))
        (op,) = convolutions(net).values()
        assert spare(op) == 0 and not tiled(op, 10**6)


@pytest.fixture(scope="module")
def tiles(deployed_of, awkward):
    """Sums of 360 terms over 36 pixels, and shorter ones."""
    layers = [nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 16, 3, padding=1), nn.ReLU()]
    last = [nn.MaxPool2d(3), nn.Conv2d(16, 40, 1), nn.ReLU(), nn.Conv2d(40, 8, 2), nn.Flatten(), nn.Linear(8, 3)]
    return deployed_of(awkward(nn.Sequential(*layers, *last)), (3, 8, 8), granularities=[PerChannel()])


class TestTiles:
    def test_only_long_sums_over_many_pixels_are_moved(self, tiles):
        _, deployed, _ = tiles
        plain, moved = constants(write(deployed)), constants(write(deployed, tiles=True))
        zeros = {name for name, value in moved.items() if name.endswith(".weight.zero") and value.any()}
        assert zeros == {"3.weight.zero"} and not any(plain[name].any() for name in zeros)
        assert np.array_equal(moved["3.weight"].astype(int) - moved["3.weight.zero"][0], plain["3.weight"])

    def test_the_logits_are_the_same(self, tiles):
        _, deployed, x = tiles
        for model in (write(deployed), write(deployed, tiles=True)):
            made, kernels = session(model)
            assert counts(kernels)["QLinearConv"] == 4 and not unfused(kernels)
            assert np.array_equal(run(made, {deployed.source: x}), deployed(x).double().numpy())

    def test_codes_of_four_bits_in_their_own_container_stay(self, deployed_of):
        model = nn.Sequential(
            nn.Conv2d(3, 40, 3), nn.Conv2d(40, 16, 3), nn.Conv2d(16, 2, 3), nn.Flatten(), nn.Linear(32, 2)
        )
        _, deployed, _ = deployed_of(model, (3, 10, 10), "w4a8")
        assert not constants(write(deployed, (4, 8), tiles=True))["1.weight.zero"].any()


def test_zeros_around_an_image_become_padding_of_the_convolution(deployed_of, awkward):
    """As TensorFlow pads: one more row below and one more column on the right."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6(), nn.ZeroPad2d((0, 1, 2, 1)),
        nn.Conv2d(8, 8, 3, 2, padding=(1, 0), groups=8), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    subnet, net, x = deployed_of(awkward(model), (3, 8, 8))
    assert [op.padding for op in convolutions(net).values()] == [(0, 0, 1, 1), (3, 0, 2, 1)]
    assert "Pad" not in {op.kind for op in net.operators()}
    assert torch.allclose(net(x), subnet(x), atol=0.05)
    made, _ = session(write(net))
    assert np.array_equal(run(made, {net.source: x}), net(x).double().numpy())

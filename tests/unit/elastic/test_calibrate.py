"""Start values of all scales from one pass over the data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from supernet.elastic.sampling import SAMPLES_PER_BATCH, Sample
from supernet.elastic.supernet import SuperNet
from tests.unit.elastic.conftest import X, backbone


class TestCalibrate:
    def test_every_scale_is_set_and_activations_after_relu_are_unsigned(self, net: SuperNet) -> None:
        for name, quantizer in net.quantizers.items():
            assert (quantizer.scale > 0).all() and not (quantizer.scale == 1).all(), name
        assert net.quantizers["layer1.0.conv2.input_quantizer"].unsigned
        assert not net.quantizers["conv1.input_quantizer"].unsigned
        assert not net.quantizers["layer1.0.site_bn2"].unsigned

    def test_more_bits_come_closer_to_the_float_model(self, net: SuperNet) -> None:
        with net.as_subnet(net.space.largest()), net.floating():
            reference = net(X)
        errors = []
        for bits in ("w2a2", "w3a3", "w8a8"):
            with net.as_subnet(net.space.uniform(bits)):
                errors.append(float((net(X) - reference).square().mean().detach()))
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * errors[0]

    def test_it_restores_the_subnet_the_modes_and_the_statistics(self) -> None:
        net = SuperNet(backbone(), X[:1], bits=(4, 8))
        net.model.get_submodule("bn1").eval()
        stats = net.model.get_buffer("bn1.running_mean").clone()
        with net.as_subnet(net.space.smallest()):
            net.calibrate([X, X[:2]])
            assert net.active == net.space.smallest().row
        assert net.training and not net.model.get_submodule("bn1").training
        assert torch.equal(net.model.get_buffer("bn1.running_mean"), stats)
        assert all(q.enabled for q in net.quantizers.values())

    @pytest.mark.parametrize(
        ("batches", "message"),
        [([], "at least one batch"), ([X, torch.full_like(X, torch.nan)], "must be finite, but a batch holds NaN")],
    )
    def test_bad_batches_leave_it_as_it_was(self, net: SuperNet, batches: list[Tensor], message: str) -> None:
        before, active = copy.deepcopy(net.state_dict()), net.active
        with pytest.raises(ValueError, match=message):
            net.calibrate(batches)
        assert net.active == active and all(q.enabled for q in net.quantizers.values())
        assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
        assert not net.model._forward_pre_hooks and not any(q._forward_pre_hooks for q in net.quantizers.values())

    def test_samples_of_large_tensors_meet_every_column(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stride that divides the width would see one column of the images only."""
        monkeypatch.setattr("supernet.elastic.sampling.SAMPLES_PER_BATCH", 64)
        net = SuperNet(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten()), torch.zeros(1, 1, 16, 16), bits=(8,))
        image = torch.zeros(8, 1, 16, 16)
        image[..., 1:] = torch.rand(8, 1, 16, 15, generator=torch.Generator().manual_seed(0)) + 1
        caught: list[tuple[Tensor, tuple[float, float], float]] = []
        monkeypatch.setattr(net.quantizers["0.input_quantizer"], "start", lambda *seen: caught.append(seen))
        net.calibrate([image, image.flip(0)])
        ((values, extremes, share),) = caught
        assert len(values) < 2 * 200 and 0.8 < float((values > 0).float().mean()) < 1
        assert extremes == (0.0, float(image.max())) and share == 1 / (2 * image.numel())

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_a_sample_holds_on_to_nothing_and_meets_all_channels_in_any_layout(
        self, layout: torch.memory_format
    ) -> None:
        """Channel c holds the value c alone, so the sample's histogram must be that of the whole."""
        sample, channels = Sample(), 24
        x = torch.arange(channels).float()[None, :, None, None].expand(4, channels, 40, 40)
        for batch in (x, x + channels):
            sample(nn.Identity(), (batch.contiguous(memory_format=layout),))
        counts = sample.values.long().bincount().double()
        assert len(counts) == 2 * channels and counts.min() / counts.max() > 0.9
        assert sample.extremes == (0.0, 2 * channels - 1) and sample.count == 2 * x.numel()
        assert sum(kept.untyped_storage().nbytes() for kept in sample.kept) < 4 * 2 * SAMPLES_PER_BATCH * 1.5

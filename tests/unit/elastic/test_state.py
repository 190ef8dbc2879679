"""What a SuperNet keeps: loaded, copied, saved, moved, or taken out of it as one subnet."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from supernet.elastic.supernet import SuperNet
from supernet.quant.quantizer import Quantizer
from tests.unit.elastic.conftest import X, backbone, small, some, step


class TestState:
    def test_a_loaded_one_computes_the_same(self, net: SuperNet) -> None:
        twin = SuperNet(backbone(), X[:1], bits=(2, 3, 8)).eval()
        twin.load_state_dict(net.state_dict())
        assert twin.fingerprint == net.fingerprint
        for config in some(net, 3):
            with net.as_subnet(config), twin.as_subnet(config):
                assert torch.equal(net(X), twin(X))

    def test_a_copy_is_independent(self, net: SuperNet) -> None:
        twin = copy.deepcopy(net)
        with twin.as_subnet(net.space.smallest()):
            lower = twin(X)
            assert not torch.equal(net(X), lower)
            with net.as_subnet(net.space.smallest()):
                assert torch.equal(net(X), lower)

    def test_a_loaded_one_needs_no_binding_to_know_which_activations_are_unsigned(self, net: SuperNet) -> None:
        twin = SuperNet(backbone(), X[:1], bits=(2, 3, 8)).eval()
        twin.load_state_dict(net.state_dict())
        for one in (net, twin):
            one.zero_grad(set_to_none=True)
            one(X).square().sum().backward()
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name

    def test_in_double_precision_it_is_still_a_supernet(self, net: SuperNet) -> None:
        wide, config = copy.deepcopy(net).double(), net.space.uniform("w8a8")
        with net.as_subnet(config), wide.as_subnet(config):
            torch.testing.assert_close(wide(X.double()).float(), net(X), rtol=0.1, atol=0.1)
            assert all(q.scale.dtype == torch.float64 for q in wide.quantizers.values())
            wide(X.double()).sum().backward()
        assert wide.bank.scale.grad.dtype == torch.float64 and wide.bank.scale.grad.any()

    def test_one_that_was_saved_whole_learns_like_the_one_it_was(self) -> None:
        net, file = small(), io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        for config in some(net, 2):
            assert torch.equal(step(twin, config), step(net, config))
            for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
                assert q.grad is not None and torch.equal(p.grad, q.grad), name

    @pytest.mark.parametrize("loaded", [False, True])
    def test_one_that_was_evaluated_in_inference_mode_can_be_trained(self, loaded: bool) -> None:
        """Lightning evaluates so. What is bound meanwhile must be of use to autograd afterwards."""
        net = small()
        if loaded:
            net.load_state_dict(net.state_dict())
        with torch.inference_mode(), net.as_subnet(net.space.smallest()):
            net(X)
        net(X).sum().backward()
        step(net, net.space.uniform("w2a4"))


class TestMaterialised:
    def test_what_a_copy_learns_is_in_what_is_taken_out_of_it(self, net: SuperNet) -> None:
        """Whichever comes first, binding a subnet or changing the bank."""
        twin, config = copy.deepcopy(net), some(net, 1)[0]
        before = net.materialise(config).eval()(X)
        with torch.no_grad():
            twin.bank.scale.mul_(1.5)
        taken = twin.materialise(config).eval()(X)
        with twin.as_subnet(config):
            assert torch.equal(twin(X), taken)
        assert not torch.equal(taken, before) and torch.equal(net.materialise(config).eval()(X), before)

    def test_it_holds_every_scale(self, net: SuperNet) -> None:
        """Also those of sites, which have nothing to choose: they are saved, moved and trained like weights."""
        subnet = net.materialise(some(net, 1)[0]).eval()
        quantizers = {n: m for n, m in subnet.named_modules() if isinstance(m, Quantizer)}
        held = {n for n, _ in subnet.named_parameters()}
        assert {f"{n}.{what}" for n in quantizers for what in ("scale", "zero_point")} <= held
        other, expected = copy.deepcopy(subnet), subnet(X)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.1)
        assert not torch.equal(other(X), expected)
        other.load_state_dict(subnet.state_dict())
        assert torch.equal(other(X), expected)

    def test_it_keeps_no_memory_of_other_choices(self, net: SuperNet) -> None:
        """One choice each, not views that keep the bank of all choices alive."""
        subnet = net.materialise(net.space.smallest())
        largest = max(
            p.untyped_storage().nbytes()
            for q in subnet.modules()
            if isinstance(q, Quantizer)
            for p in (q.scale, q.zero_point)
        )
        assert largest <= 4 * max(q.channels for q in net.quantizers.values())

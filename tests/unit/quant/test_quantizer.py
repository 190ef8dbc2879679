"""The Quantizer: choices as data, the bank, bypass, unsigned activations, saving and loading."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer

CHOICES = [
    QuantConfig(Integer(b), g, s) for b in range(2, 9) for g in (PerTensor(), PerChannel()) for s in (True, False)
]
INPUTS = [QuantConfig(Integer(b), PerTensor(), s) for b in range(2, 9) for s in (True, False)]


@dataclass(frozen=True)
class Ternary:
    """The smallest grid that is not a two's complement one; makes a quantizer take its table path."""

    bits: int = 2

    def levels(self, symmetric: bool) -> tuple[float, ...]:
        return (-1.0, 0.0, 1.0)


def weights(seed: int = 0) -> Tensor:
    """Four channels of very different extent, one of them shifted."""
    made = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
    return (
        made * torch.tensor([0.1, 1.0, 5.0, 0.01])[:, None, None, None]
        + torch.tensor([0, 0, 9, 0])[:, None, None, None]
    )


def quantizer(kind: str) -> tuple[Quantizer, Tensor]:
    """A started quantizer of one kind, and data for it."""
    if kind == "weight":
        made, v = Quantizer(CHOICES, 4, weight=True), weights()
    elif kind == "linear weight":
        made, v = Quantizer(CHOICES, 4, weight=True), weights().flatten(1)
    else:
        made, v = Quantizer(INPUTS), torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        v = v.relu() if kind == "unsigned" else v - 0.3
    made.start(v)
    return made, v


KINDS = ["weight", "linear weight", "signed", "unsigned"]


class TestForward:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_decode_of_encode_bit_for_bit_for_every_choice(self, kind: str) -> None:
        made, v = quantizer(kind)
        wide = torch.cat([v, v * 5]) if not made.weight else v
        for k, choice in enumerate(made.choices):
            with made.using(k):
                codes = made.encode(wide)
                assert torch.equal(made(wide), made.decode(codes))
                low, high = made.limits(k)
                assert codes.min() >= low and codes.max() <= high and torch.equal(codes, codes.round())
                assert len(codes.unique()) <= 2**choice.bits
                assert high - low + 1 == 2**choice.bits - (choice.bits == 8 and choice.symmetric and low < 0)
                assert torch.equal(made(made(wide)), made(wide)), "quantizing twice changes nothing"

    @pytest.mark.parametrize("kind", KINDS)
    def test_more_bits_lose_less(self, kind: str) -> None:
        made, v = quantizer(kind)
        for form in {c.form for c in made.choices}:
            errors = []
            for k in [k for k, c in enumerate(made.choices) if c.form == form]:
                with made.using(k):
                    errors.append(float((made(v) - v).square().mean().detach()))
            assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 100

    def test_per_channel_uses_a_scale_for_each_channel(self) -> None:
        made, v = quantizer("weight")
        errors = {}
        for k, choice in enumerate(made.choices):
            if choice.bits == 4:
                with made.using(k):
                    errors[choice.form] = ((made(v) - v).abs().amax((1, 2, 3)) / v.abs().amax((1, 2, 3))).detach()
        assert errors[PerTensor(), True][3] == 1, "the small channel vanishes beside the large one"
        assert (errors[PerChannel(), True] < 0.5).all()

    def test_equal_channels_are_quantized_alike_per_tensor_and_per_channel(self) -> None:
        v = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
        made = Quantizer(CHOICES, 4, weight=True)
        made.start(v)
        for bits, symmetric in itertools.product(range(2, 9), (True, False)):
            pair = [CHOICES.index(QuantConfig(Integer(bits), g, symmetric)) for g in (PerTensor(), PerChannel())]
            out = []
            for k in pair:
                with made.using(k):
                    out.append(made(v))
            torch.testing.assert_close(*out)

    def test_it_is_the_identity_while_it_is_not_enabled(self) -> None:
        made, v = quantizer("weight")
        made.enabled = False
        assert made(v) is v

    def test_half_precision_inputs_are_taken(self) -> None:
        made, v = quantizer("signed")
        half = v.bfloat16().requires_grad_()
        made(half).sum().backward()
        assert half.grad is not None and half.grad.dtype == torch.bfloat16


class TestChoice:
    def test_using_restores_what_was_bound_also_after_an_error_and_when_nested(self) -> None:
        made, _ = quantizer("weight")
        with made.using(3):
            with pytest.raises(RuntimeError, match="inner"), made.using(7):
                assert made.choice == 7
                raise RuntimeError("inner")
            assert made.choice == 3
        assert made.choice == 0

    def test_backward_works_after_another_choice_was_bound(self) -> None:
        """Two subnets run forward, then backward in the other order: each has its own gradient."""
        separate = []
        for k in (2, 9):
            made, v = quantizer("weight")
            with made.using(k):
                made(v).square().sum().backward()
            separate.append(made.scale.grad)
        made, v = quantizer("weight")
        losses = []
        for k in (2, 9):
            with made.using(k):
                losses.append(made(v).square().sum())
        losses[1].backward()
        assert torch.equal(made.scale.grad, separate[1])
        losses[0].backward()
        assert torch.equal(made.scale.grad, separate[0] + separate[1])

    @pytest.mark.parametrize("kind", ["weight", "signed"])
    def test_only_the_addressed_entries_of_the_bank_have_a_gradient(self, kind: str) -> None:
        for k in range(len(CHOICES if kind == "weight" else INPUTS)):
            made, v = quantizer(kind)
            with made.using(k):
                (made(v) - 0.9 * v).square().sum().backward()
            start, n = made.spans[k]
            inside = torch.zeros(len(made.scale), dtype=torch.bool)
            inside[start : start + n] = True
            assert made.scale.grad[inside].all() and not made.scale.grad[~inside].any()
            assert not made.zero_point.grad[~inside].any()
            assert made.choices[k].symmetric <= (not made.zero_point.grad[inside].any())

    def test_a_quantizer_needs_a_choice(self) -> None:
        with pytest.raises(ValueError, match="at least one choice"):
            Quantizer([])

    def test_a_zero_point_needs_an_integer_grid(self) -> None:
        with pytest.raises(ValueError, match="a zero-point needs an integer grid; make these symmetric"):
            Quantizer([QuantConfig(Ternary(), PerTensor(), False)])


class TestGradient:
    @pytest.mark.parametrize("k", range(len(CHOICES)), ids=lambda k: str(CHOICES[k]))
    def test_of_scale_and_zero_point_is_lsqs_times_one_over_sqrt_n_qmax(self, k: int) -> None:
        made, v = quantizer("weight")
        (at, n), (low, high) = made.spans[k], made.limits(k)
        with (
            torch.no_grad()
        ):  # some values outside, so that the zero-point has a gradient too; it lies inside the codes
            made.scale[at : at + n] *= 0.7
            made.zero_point[at : at + n] = made.zero_point[at : at + n].clamp(low + 1, high - 1) + 0.3
        grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
        with made.using(k):
            made(v).backward(grad)
        symmetric = CHOICES[k].symmetric
        s = made.scale.detach()[at : at + n].double().view(n, 1)
        z = torch.zeros_like(s) if symmetric else made.zero_point.detach()[at : at + n].double().round().view(n, 1)
        z = z.clamp(low, high)
        rows, g = v.double().reshape(n, -1), grad.double().reshape(n, -1)
        q = (v.reshape(n, -1) / made.scale.detach()[at : at + n].view(n, 1)).double().round() + z
        inside, code = (q >= low) & (q <= high), q.clamp(low, high)
        factor = 1 / (rows.shape[1] * high) ** 0.5  # N: the weights that share the scale
        by_scale = (g * torch.where(inside, code - z - rows / s, code - z)).sum(1) * factor
        by_zero = (-g * s * ~inside).sum(1) * factor
        torch.testing.assert_close(made.scale.grad[at : at + n].double(), by_scale, rtol=1e-4, atol=1e-4)
        expected = torch.zeros(n) if symmetric else by_zero
        torch.testing.assert_close(made.zero_point.grad[at : at + n].double(), expected.double(), rtol=1e-4, atol=1e-5)

    def test_n_of_an_activation_is_one_example(self) -> None:
        grads = []
        for copies in (1, 3):
            made, v = quantizer("signed")
            with made.using(4):
                made(v.repeat(copies, 1, 1, 1)).sum().backward()
            grads.append(made.scale.grad)
        torch.testing.assert_close(grads[1], 3 * grads[0])

    def test_of_the_values_passes_straight_through_inside(self) -> None:
        made, v = quantizer("signed")
        v = (v * 3).requires_grad_()
        with made.using(2):
            made(v).backward(torch.full_like(v, 2.0))
            codes = torch.round(v / made.scale[2]) + made.zero_point[2].round()
        low, high = made.limits(2)
        assert torch.equal(v.grad, 2.0 * ((codes >= low) & (codes <= high)))

    def test_the_zero_point_stays_within_the_codes(self) -> None:
        made, v = quantizer("signed")
        made.zero_point.data.fill_(1000.0)
        for k, choice in enumerate(made.choices):
            with made.using(k):
                _, zero, low, high = made.parameters_of(v)
                assert zero.item() == (0 if choice.symmetric else high) and low <= zero.item()


class TestTable:
    def test_with_another_format_beside_them_integers_compute_the_same_bit_for_bit(self) -> None:
        integer, v = quantizer("weight")
        mixed = Quantizer([*CHOICES, QuantConfig(Ternary(), PerChannel())], 4, weight=True)
        assert integer.integer and not mixed.integer
        mixed.start(v)
        grids = torch.cat([v.flatten(1), (torch.arange(-140, 140) + 0.5)[None] * 0.01 * torch.ones(4, 1)], dim=1)
        for k in range(len(CHOICES)):
            at, n = integer.spans[k]
            assert torch.equal(integer.scale[at : at + n], mixed.scale[at : at + n])
            assert torch.equal(integer.zero_point[at : at + n], mixed.zero_point[at : at + n])
            with integer.using(k), mixed.using(k):
                integer.scale.data[at], mixed.scale.data[at] = 0.01, 0.01  # ties are exact or nearly so
                assert torch.equal(integer(grids), mixed(grids))
                assert torch.equal(integer.encode(grids), mixed.encode(grids))
                assert torch.equal(mixed(grids), mixed.decode(mixed.encode(grids)))

    def test_the_other_format_is_used_where_it_is_chosen(self) -> None:
        mixed = Quantizer([*CHOICES, QuantConfig(Ternary(), PerChannel())], 4, weight=True)
        mixed.start(weights())
        with mixed.using(len(CHOICES)):
            codes = mixed.encode(weights())
            assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
            assert torch.equal(mixed(weights()), mixed.decode(codes))
            alone = mixed.only(len(CHOICES))
            assert torch.equal(alone(weights()), mixed(weights()))


class TestBypass:
    def made(self) -> tuple[Quantizer, Tensor]:
        made = Quantizer(INPUTS, bypass=8)
        v = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
        made.start(v)
        return made, v

    def test_choices_of_enough_bits_pass_the_input_through(self) -> None:
        made, v = self.made()
        for k, choice in enumerate(INPUTS):
            with made.using(k):
                assert torch.equal(made(v), v) == (choice.bits == 8)

    def test_what_passes_has_no_gradient_in_the_bank(self) -> None:
        made, v = self.made()
        v.requires_grad_()
        with made.using(len(INPUTS) - 1):
            (made(v) * 3).sum().backward()
        assert not made.scale.grad.any() and not made.zero_point.grad.any()
        assert torch.equal(v.grad, torch.full_like(v, 3.0))


class TestUnsigned:
    def test_activations_that_are_never_negative_start_at_code_zero(self) -> None:
        made, v = quantizer("unsigned")
        assert made.unsigned and not made.signed
        for k, choice in enumerate(INPUTS):
            assert made.limits(k) == (0, 2**choice.bits - 1)
            with made.using(k):
                assert made.encode(v).max() > 2 ** (choice.bits - 1) and made.encode(v).min() == 0

    def test_weights_stay_signed(self) -> None:
        made = Quantizer(CHOICES, 4, weight=True)
        made.start(weights().abs())
        assert not made.unsigned

    def test_the_bound_choice_follows(self) -> None:
        made = Quantizer(INPUTS)
        made.bind(torch.tensor(made.fields(4)))
        made.start(torch.rand(3, 50))
        assert made.choice == 4 and made.row.tolist()[1:3] == [0, 15]


class TestState:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_loaded_one_computes_the_same(self, kind: str) -> None:
        made, v = quantizer(kind)
        twin = Quantizer(made.choices, made.channels, made.weight)
        assert set(made.state_dict()) == {"scale", "zero_point", "signed"}
        twin.load_state_dict(made.state_dict())
        assert twin.unsigned == made.unsigned
        for k in range(len(made.choices)):
            with made.using(k), twin.using(k):
                assert torch.equal(made(v), twin(v))

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_choice_alone_computes_the_same(self, kind: str) -> None:
        made, v = quantizer(kind)
        for k in range(len(made.choices)):
            alone = made.only(k)
            assert alone.choices == (made.choices[k],) and len(alone.scale) == made.spans[k][1]
            with made.using(k):
                assert torch.equal(alone(v), made(v)) and torch.equal(alone.encode(v), made.encode(v))

    def test_what_is_written_about_it(self) -> None:
        made, _ = quantizer("unsigned")
        assert "14 choices, activation, channels=1, unsigned=True" in repr(made)
        assert "int2 per-tensor asymmetric" in repr(made.only(1))


@pytest.mark.parametrize("far", [12.0, 300.0])
def test_one_value_far_out_of_many_is_weighed_as_one(far: float) -> None:
    """No worse than the best of 32 ranges on all values, whether start saw them all or a sample without that value.

    12 is best cut off at any number of bits, as is 300 at 8; at 4 and 2 bits 300 decides the range alone.
    """
    v = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    v[123] = far
    made = [Quantizer([QuantConfig(Integer(b)) for b in (8, 4, 2)]) for _ in range(2)]
    made[0].start(v)
    made[1].start(v[::7], (float(v.min()), far), 1 / len(v))

    def loss(scale: Tensor, low: float, high: float) -> float:
        codes = torch.clamp(torch.round(v / scale), low, high)
        return float((codes * scale - v).abs().pow(2.4).double().mean())

    for k, choice in enumerate(made[0].choices):
        low, high = made[0].limits(k)
        best = min(loss(shrink * 2 * far / (high - low), low, high) for shrink in torch.linspace(1, 0.15, 32))
        for quantizer in made:
            scale = quantizer.scale.detach()[k]
            assert loss(scale, low, high) <= 1.01 * best
            assert torch.isclose(scale * (high - low), torch.tensor(2 * far)) == (far == 300 and choice.bits <= 4)


@pytest.mark.parametrize(("least", "unsigned"), [(-0.5, False), (0.0, True)])
def test_a_negative_value_that_the_sample_missed_keeps_the_sign(least: float, unsigned: bool) -> None:
    made = Quantizer(INPUTS)
    made.start(torch.rand(100, generator=torch.Generator().manual_seed(0)), (least, 1.0), 1e-3)
    assert made.unsigned is unsigned

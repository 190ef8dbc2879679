"""The Bank: one gather gives every quantizer what it would have chosen by itself, and gradients find their way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.bank import Bank
from supernet.quant.quantizer import Quantizer
from supernet.quant.ste import BYPASS

WEIGHTS = [
    QuantConfig(Integer(b), g, s) for b in range(2, 9) for g in (PerTensor(), PerChannel()) for s in (True, False)
]
INPUTS = [QuantConfig(Integer(b), PerTensor(), s) for b in range(2, 9) for s in (True, False)]
SITE = [QuantConfig(Integer(8), PerTensor(), False)]


def quantizers() -> dict[str, Quantizer]:
    """Of several widths and numbers of choices, with learned values of which some zero-points lie beyond the codes."""
    made = {
        "conv": Quantizer(WEIGHTS, 4, weight=True),
        "image": Quantizer(INPUTS),
        "site": Quantizer(SITE),
        "relu": Quantizer(INPUTS, bypass=8),
        "single": Quantizer(WEIGHTS, 1, weight=True),
        "linear": Quantizer(WEIGHTS[3:5], 7, weight=True),
    }
    made["relu"].set_unsigned(True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for quantizer in made.values():
            quantizer.scale.copy_(torch.rand(quantizer.scale.shape, generator=generator) + 0.1)
            quantizer.zero_point.copy_(torch.randn(quantizer.zero_point.shape, generator=generator) * 40)
    return made


@pytest.fixture
def alone() -> dict[str, Quantizer]:
    return quantizers()


@pytest.fixture
def bank() -> Bank:
    return Bank(quantizers())


def random_choices(held: Mapping[str, Quantizer], rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.integers(len(q.choices)) for q in held.values()])


def inputs(held: Mapping[str, Quantizer]) -> dict[str, Tensor]:
    """Something for each quantizer to quantize, with values on both sides of its limits."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(q.channels, 30, generator=generator) * 100 for name, q in held.items()}


def loss(held: Mapping[str, Quantizer]) -> Tensor:
    return torch.stack([q(x).square().mean() for q, x in zip(held.values(), inputs(held).values(), strict=True)]).sum()


class TestSelected:
    def test_values_and_gradients_are_those_of_each_quantizer_alone(
        self, bank: Bank, alone: dict[str, Quantizer], rng: np.random.Generator
    ) -> None:
        for _ in range(50):
            choices = random_choices(alone, rng)
            bank.zero_grad()
            bank.bind(choices)
            with bank.selected():
                chosen = {name: q.select() for name, q in bank.quantizers.items()}
                loss(bank.quantizers).backward()
            for (name, quantizer), choice in zip(alone.items(), choices, strict=True):
                quantizer.zero_grad()
                with quantizer.using(int(choice)):
                    for one, two in zip(quantizer.select(), chosen[name], strict=True):
                        assert torch.equal(one, two), name
            for quantizer, choice in zip(alone.values(), choices, strict=True):
                quantizer.bind(torch.tensor(quantizer.fields(int(choice))))
            loss(alone).backward()
            for name, quantizer in alone.items():
                for got, own in ((bank.scale, quantizer.scale), (bank.zero_point, quantizer.zero_point)):
                    torch.testing.assert_close(got.grad[bank.spans[name]], own.grad, rtol=1e-5, atol=0)

    def test_every_choice_is_bound_with_its_fields(self, bank: Bank) -> None:
        for k in range(len(WEIGHTS)):
            choices = np.array([min(k, len(q.choices) - 1) for q in bank.quantizers.values()])
            bank.bind(choices)
            for quantizer, choice in zip(bank.quantizers.values(), choices, strict=True):
                assert quantizer.row.tolist() == quantizer.fields(int(choice)) and quantizer.choice == choice
        assert bank.quantizers["relu"].row[BYPASS] == 1 and bank.quantizers["image"].row[BYPASS] == 0

    def test_spans_lie_side_by_side_and_cover_the_bank(self, bank: Bank, alone: dict[str, Quantizer]) -> None:
        ends = [0]
        for name, span in bank.spans.items():
            assert span.start == ends[-1] and span.stop - span.start == len(alone[name].scale)
            assert torch.equal(bank.scale[span], alone[name].scale)
            assert torch.equal(bank.zero_point[span], alone[name].zero_point)
            ends.append(span.stop)
        assert ends[-1] == len(bank.scale) == len(bank.zero_point) and list(bank.spans) == list(alone)

    def test_gradients_land_in_the_entries_of_the_bound_choice_only(self, bank: Bank, rng: np.random.Generator) -> None:
        for name in bank.quantizers:
            choices = random_choices(bank.quantizers, rng)
            bank.zero_grad()
            bank.bind(choices)
            with bank.selected():
                for t in bank.quantizers[name].select():
                    t.sum().backward(retain_graph=True)
            start, n = bank.quantizers[name].spans[choices[list(bank.quantizers).index(name)]]
            inside = torch.zeros(len(bank.scale), dtype=torch.bool)
            inside[bank.spans[name]][start : start + n] = True
            assert torch.equal(bank.scale.grad != 0, inside)
            symmetric = bank.quantizers[name].row[3] == 0
            assert torch.equal(bank.zero_point.grad != 0, inside & ~symmetric)

    def test_one_entry_of_several_channels_gets_the_sum_of_theirs(self, bank: Bank) -> None:
        choice = WEIGHTS.index(QuantConfig(Integer(3), PerTensor(), False))
        bank.bind(np.array([choice, 0, 0, 0, 0, 0]))
        with bank.selected():
            scale, zero = bank.quantizers["conv"].select()
            assert scale.shape == (4,) and len(scale.unique()) == 1
            upward = torch.tensor([1.0, 10.0, 100.0, 1000.0])
            torch.autograd.backward([scale, zero], [upward, 2 * upward])
        at = bank.spans["conv"].start + bank.quantizers["conv"].spans[choice][0]
        factor = 1 / (3 * 4) ** 0.5  # the highest code, and four channels that share the entry
        assert bank.scale.grad[at].item() == pytest.approx(1111 * factor)
        assert bank.zero_point.grad[at].item() == pytest.approx(2222 * factor)

    def test_a_quantizer_that_is_used_twice_gets_both_gradients(self, bank: Bank) -> None:
        bank.bind(np.array([9, 4, 0, 4, 4, 1]))
        grads = []
        for times in (1, 2):
            bank.zero_grad()
            with bank.selected():
                x = inputs(bank.quantizers)["image"]
                sum(bank.quantizers["image"](x).square().mean() for _ in range(times)).backward()
            grads.append(bank.scale.grad)
        torch.testing.assert_close(grads[1], 2 * grads[0])

    def test_what_was_handed_in_is_taken_back_also_after_an_error(self, bank: Bank) -> None:
        bank.bind(np.zeros(6, dtype=np.int64))
        with bank.selected():
            assert all(q.given is not None for q in bank.quantizers.values())
        assert all(q.given is None for q in bank.quantizers.values())
        with pytest.raises(RuntimeError, match="inside"), bank.selected():
            raise RuntimeError("inside")
        assert all(q.given is None for q in bank.quantizers.values())


class TestBackward:
    def test_it_works_after_the_context_closed_and_after_another_choice_ran(
        self, bank: Bank, rng: np.random.Generator
    ) -> None:
        rows = [random_choices(bank.quantizers, rng) for _ in range(3)]
        separate, losses = [], []
        for choices in rows:
            bank.zero_grad()
            bank.bind(choices)
            with bank.selected():
                loss(bank.quantizers).backward()
            separate.append((bank.scale.grad, bank.zero_point.grad))
        for choices in rows:
            bank.bind(choices)
            with bank.selected():
                losses.append(loss(bank.quantizers))
        for k in (1, 2, 0):
            bank.zero_grad()
            losses[k].backward()
            assert torch.equal(bank.scale.grad, separate[k][0])
            assert torch.equal(bank.zero_point.grad, separate[k][1])

    def test_it_works_after_a_step_of_the_optimizer(self, bank: Bank) -> None:
        """The gradient is that of the values that were run forward."""
        bank.bind(np.array([9, 4, 0, 4, 4, 1]))
        with bank.selected():
            loss(bank.quantizers).backward()
        with bank.selected():
            later = loss(bank.quantizers)
        expected = bank.scale.grad.clone()
        bank.zero_grad()
        with torch.no_grad():
            bank.scale.mul_(3)
        later.backward()
        assert torch.equal(bank.scale.grad, expected)


class TestBind:
    def test_what_earlier_subnets_saved_is_never_written_to(self, bank: Bank, rng: np.random.Generator) -> None:
        kept: list[tuple[list[Tensor], list[Tensor]]] = []
        for _ in range(20):
            bank.bind(random_choices(bank.quantizers, rng))
            now = [*(q.row for q in bank.quantizers.values()), bank.bound.entry, bank.bound.limits]
            kept.append((now, [t.clone() for t in now]))
        assert all(torch.equal(t, copied) for now, copies in kept for t, copied in zip(now, copies, strict=True))
        assert len({t.data_ptr() for now, _ in kept for t in now[-2:]}) == 40

    def test_a_sign_that_calibration_finds_counts_from_the_next_binding_on(self, bank: Bank) -> None:
        choices = np.array([0, INPUTS.index(QuantConfig(Integer(4), PerTensor(), False)), 0, 0, 0, 0])
        bank.bind(choices)
        bank.quantizers["image"].start(torch.rand(100) + 1)
        bank.bind(choices)
        with bank.selected():
            scale, zero = bank.quantizers["image"].select()
            scale.backward()
        assert bank.quantizers["image"].row.tolist() == [5, 0, 15, 1, 0] and zero.item() == 0
        assert bank.scale.grad[bank.spans["image"]][5].item() == pytest.approx(15**-0.5)

    def test_what_was_bound_before_is_bound_again_as_it_was(self, bank: Bank, rng: np.random.Generator) -> None:
        bank.bind(random_choices(bank.quantizers, rng))
        before, rows = bank.bound, [q.row for q in bank.quantizers.values()]
        bank.bind(random_choices(bank.quantizers, rng))
        bank.rebind(before)
        assert bank.bound is before
        assert all(q.row is row for q, row in zip(bank.quantizers.values(), rows, strict=True))

    def test_binding_again_takes_fields_that_have_changed_since(self, bank: Bank) -> None:
        choices = np.array([0, INPUTS.index(QuantConfig(Integer(4), PerTensor(), False)), 0, 0, 0, 0])
        bank.bind(choices)
        before = bank.bound
        bank.quantizers["image"].start(torch.rand(100) + 1)
        bank.rebind(before)
        assert bank.quantizers["image"].row.tolist() == [5, 0, 15, 1, 0]


class Net(nn.Module):
    """A bank beside its quantizers, as a supernet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(quantizers())
        self.bank = Bank(dict(self.parts.items()))
        self.bank.bind(np.zeros(6, dtype=np.int64))


class TestViews:
    def lent(self, net: Net) -> bool:
        """Whether every quantizer of `net` reads and writes the memory of the bank of `net`."""
        return all(
            getattr(net.parts[name], what).data_ptr() == getattr(net.bank, what)[span].data_ptr()
            and getattr(net.parts[name], what).dtype == getattr(net.bank, what).dtype
            for name, span in net.bank.spans.items()
            for what in ("scale", "zero_point")
        )

    def test_parameters_and_state_are_the_banks(self) -> None:
        net = Net()
        assert {n for n, _ in net.named_parameters()} == {"bank.scale", "bank.zero_point"}
        assert set(net.state_dict()) == {"bank.scale", "bank.zero_point", *(f"parts.{n}.signed" for n in net.parts)}
        assert self.lent(net) and not any(q.scale.requires_grad for q in net.parts.values())

    def test_they_follow_loading(self) -> None:
        net, other = Net(), Net()
        with torch.no_grad():
            other.bank.scale.mul_(2)
            other.bank.zero_point.add_(1)
        net.load_state_dict(other.state_dict())
        assert self.lent(net)
        assert torch.equal(net.parts["conv"].scale, other.parts["conv"].scale)

    def test_they_follow_a_step_of_the_optimizer(self) -> None:
        net = Net()
        before = net.parts["linear"].scale.clone()
        net.bank.scale.grad = torch.ones_like(net.bank.scale)
        torch.optim.SGD([net.bank.scale], lr=0.5).step()
        assert torch.equal(net.parts["linear"].scale, before - 0.5)

    def test_start_values_go_to_the_bank(self) -> None:
        net = Net()
        net.parts["linear"].start(torch.randn(7, 20, generator=torch.Generator().manual_seed(0)))
        alone = Quantizer(WEIGHTS[3:5], 7, weight=True)
        alone.start(torch.randn(7, 20, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(net.bank.scale[net.bank.spans["linear"]], alone.scale) and self.lent(net)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_they_follow_a_move(self, dtype: torch.dtype) -> None:
        net = Net()
        net.to(dtype)
        net.bank.bind(np.array([1, 1, 0, 1, 1, 1]))
        assert self.lent(net) and net.bank.scale.dtype == dtype
        assert all(q.select()[0].dtype == dtype for q in net.parts.values())

    @pytest.mark.parametrize("way", ["copied", "pickled", "saved"])
    def test_a_copy_learns_in_its_own_bank(self, way: str) -> None:
        net = Net()
        if way == "saved":  # keeps shared memory shared
            torch.save(net, file := io.BytesIO())
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(net) if way == "copied" else pickle.loads(pickle.dumps(net))
        with twin.bank.selected():
            loss(twin.bank.quantizers).backward()
            assert all(q.given is not None for q in twin.parts.values())
            assert all(q.given is None for q in net.parts.values())
        assert net.bank.scale.grad is None and all(
            twin.bank.scale.grad[span].any() for span in twin.bank.spans.values()
        )
        assert all(q.given is None for q in twin.parts.values())

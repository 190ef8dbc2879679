"""The sensitivity against the network itself run with one thing changed."""

import numpy as np
import pytest
import torch

from predictors.layer_outputs import chosen, inputs_at, relative_errors
from predictors.output_mse import OutputMSE
from predictors.sensitivity import monotone
from supernet.calibration.batchnorm import recalibrated
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.formats.integer import Integer
from supernet.quant.quantizer import Quantizer


def every_position(net, task):
    return OutputMSE(images=48, positions=48 * 64)(net, task.recalibrate())


def table_of(net, factors, gene):
    at = net.space.position[gene]
    [(dims, table)] = [(d, t) for d, t in factors.terms if d[0] == at]
    return dims, table


@torch.no_grad()
def direct(net, task, name, weight=None, data=None):
    """Relative output error of one layer, from running the network in float with one choice switched on."""
    images = task.recalibrate()[0]
    outputs, module = [], net.model.get_submodule(name)
    with net.as_subnet(net.space.largest()), net.floating(), recalibrated(net, [images]):
        for on in (False, True):
            kept = []
            handle = module.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
            q, choice = (module.weight_quantizer, weight) if weight is not None else (module.input_quantizer, data)
            q.enabled = on
            with q.using(choice):
                net(images)
            q.enabled = False
            handle.remove()
            outputs.append(kept[0])
    exact, changed = outputs
    bias = 0 if module.bias is None else module.bias.view(1, -1, *[1] * (exact.dim() - 2))
    centred = exact - bias
    centred = centred - centred.mean([i for i in range(exact.dim()) if i != 1], keepdim=True)
    return float((changed - exact).square().sum() / centred.square().sum())


@pytest.mark.parametrize("name", ["stem", "stage.1.conv", "group", "head"])
def test_errors_are_those_of_the_network_run_with_one_choice(net, task, name):
    factors = every_position(net, task)
    for what in ("weight", "input"):
        dims, table = table_of(net, factors, f"{name}.{what}")
        table = table[..., -1] if len(dims) == 2 else table
        quantizer = getattr(net.model.get_submodule(name), f"{what}_quantizer")
        raw = [
            direct(net, task, name, **{"weight" if what == "weight" else "data": k})
            for k in range(len(quantizer.choices))
        ]
        assert np.allclose(table, monotone(np.array(raw), quantizer), rtol=1e-3, atol=1e-9)


def test_few_positions_come_near_all(net, task):
    rough, exact = OutputMSE(images=48, positions=200)(net, task.recalibrate()), every_position(net, task)
    rows = net.space.sample_indices(40, np.random.default_rng(0))
    assert np.corrcoef(np.log(rough.value(rows)), np.log(exact.value(rows)))[0, 1] > 0.97


def test_more_bits_never_cost_more_and_blocks_have_a_price(net, task):
    factors = every_position(net, task)
    for layer in net.layers:
        for gene in (layer.weight, layer.input):
            _, table = table_of(net, factors, gene)
            choices = net.space.dimensions[net.space.position[gene]].choices
            for form in {c.form for c in choices}:
                column = [table[k] for k in range(len(choices)) if choices[k].form == form]
                assert (np.diff(np.array(column), axis=0) <= 0).all()
    _, price = table_of(net, factors, "stage.depth")
    assert price[-1] == 0 and (np.diff(price) <= 0).all() and price[0] > 0
    lowest = table_of(net, factors, "stage.1.conv.weight")[1][0, -1]
    assert lowest > 10 * table_of(net, factors, "stage.1.conv.weight")[1][-1, -1] > 0


def test_blocks_that_do_nothing_are_free(net, task):
    for block in net.model.get_submodule("stage"):
        block.norm.weight.data.zero_()
        block.norm.bias.data.zero_()
    _, price = table_of(net, every_position(net, task), "stage.depth")
    assert np.allclose(price, 0, atol=1e-6)


def test_layers_that_do_not_run_cost_nothing(net, task):
    factors = every_position(net, task)
    gene = net.space.position["stage.2.conv.weight"]
    dims, table = table_of(net, factors, "stage.2.conv.weight")
    assert dims == (gene, net.space.position["stage.depth"]) and not table[:, :2].any() and table[:, 2].all()


def test_the_net_is_left_as_it_was(net, task):
    before, active = {k: v.clone() for k, v in net.state_dict().items()}, net.active
    net.train()
    first, second = (OutputMSE()(net, task.recalibrate()) for _ in range(2))
    assert net.training and net.active == active and all(q.enabled for q in net.quantizers.values())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first.terms, second.terms, strict=True))


def sampled(module, x, positions, rng):
    [patches] = inputs_at(module, (x,), chosen(module, (x,), positions, rng))
    return patches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"groups": 2, "padding": (2, 0)},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_sampled_patches_give_the_convolution(options):
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(4, 6, 3, bias=False, **options), torch.randn(3, 4, 9, 7)
    patches = sampled(conv, x, 10**6, np.random.default_rng(0))
    groups = conv.groups
    weight = conv.weight.reshape(groups, 6 // groups, -1).transpose(1, 2)
    found = (patches @ weight).permute(0, 2, 1).reshape(6, -1)
    assert torch.allclose(found, conv(x).permute(1, 0, 2, 3).reshape(6, -1), atol=1e-5)
    assert sampled(conv, x, 30, np.random.default_rng(0)).shape == (groups, 30, 4 // groups * 9)


def test_sequences_of_a_linear_layer_are_positions(rng):
    x = torch.randn(2, 5, 3)
    assert torch.equal(sampled(torch.nn.Linear(3, 4), x, 100, rng)[0], x.reshape(10, 3))


def test_monotone_repair_works_within_each_form():
    choices = [QuantConfig(Integer(b), g) for b in (4, 2, 3) for g in (PerTensor(), PerChannel())]
    repaired = monotone(np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.5]), Quantizer(choices, 2, weight=True))
    assert repaired.tolist() == [3.0, 0.5, 3.0, 2.0, 3.0, 0.5]


def test_settings_and_empty_batches_are_refused(net):
    with pytest.raises(ValueError, match="at least 1"):
        OutputMSE(images=0)
    with pytest.raises(ValueError, match="at least one batch"):
        OutputMSE()(net, [])
    assert relative_errors(net.model.get_submodule("head"), (torch.randn(1, 6, 8),))[0].shape == (4,)

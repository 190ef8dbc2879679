"""Fisher scores of a softmax regression against the formula, and of a network against gradients taken by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from predictors.fisher_out import FisherOut
from predictors.fisher_weight import FisherWeight
from predictors.weight_mse import WeightMSE
from supernet.elastic.attention import MatMul
from supernet.elastic.supernet import SuperNet


class Scores(nn.Module):
    """Convolution, product of activations, linear layer: without BatchNorm, so that images do not meet."""

    def __init__(self):
        super().__init__()
        self.conv, self.product = nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2), MatMul(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        return self.head(self.product(x, torch.tanh(x).transpose(1, 2)).mean(2))


@pytest.fixture(scope="module")
def regression():
    """(net, images [50, 5], labels) of a softmax regression, all choices of few bits."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 5), torch.arange(50) % 3
    net = SuperNet(nn.Sequential(nn.Linear(5, 3)), x[:1], bits=(2, 3, 4), first_last_bits=None, sites=False)
    net.calibrate([x])
    return net, x, y


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    x, y = torch.randn(20, 2, 6, 6), torch.arange(20) % 3
    net = SuperNet(Scores(), x[:1], bits=(2, 4), first_last_bits=None)
    net.calibrate([x])
    return net, x, y


@torch.no_grad()
def changes(net, x):
    """The layer, and what each choice adds to its weight and to its input."""
    module = net.model.get_submodule("0")
    found = {}
    for gene, tensor in (("weight", module.weight.detach()), ("input", x)):
        quantizer, each = getattr(module, f"{gene}_quantizer"), []
        for k in range(len(quantizer.choices)):
            with quantizer.using(k):
                each.append(quantizer(tensor).detach() - tensor)
        found[gene] = each
    return module, found


def test_fisher_of_outputs_is_the_formula_of_softmax_regression(regression):
    net, x, y = regression
    module, found = changes(net, x)
    weight, bias = module.weight.detach(), module.bias.detach()
    slope = torch.softmax(F.linear(x, weight, bias), 1) - F.one_hot(y, 3)
    scores = FisherOut(images=50, positions=50).scores(net, x, y)
    expected = {
        "0.weight": [float((slope * F.linear(x, d)).square().sum() / 50) for d in found["weight"]],
        "0.input": [float((slope * F.linear(d, weight)).square().sum() / 50) for d in found["input"]],
    }
    for gene, values in expected.items():
        assert scores[gene] == pytest.approx(values, rel=1e-4)


def test_diagonal_fisher_is_the_formula_of_softmax_regression(regression):
    net, x, y = regression
    module, found = changes(net, x)
    weight, bias = module.weight.detach(), module.bias.detach()
    slope = torch.softmax(F.linear(x, weight, bias), 1) - F.one_hot(y, 3)
    fisher = torch.einsum("no,ni->oi", slope.square(), x.square()) / 50
    lean = (slope @ weight).square() / 50
    scores = FisherWeight(images=50).scores(net, x, y)
    assert scores["0.weight"] == pytest.approx([float((fisher * d.square()).sum()) for d in found["weight"]], rel=1e-4)
    assert scores["0.input"] == pytest.approx([float((lean * d.square()).sum()) for d in found["input"]], rel=1e-4)


def test_tensor_errors_are_those_of_the_tensors(regression):
    net, x, y = regression
    module, found = changes(net, x)
    relative, absolute = (WeightMSE(relative=r).scores(net, x, y) for r in (True, False))
    for gene, tensor, each in (("weight", module.weight, 1), ("input", x, 50)):
        squares = np.array([float(d.square().sum()) for d in found[gene]])
        assert absolute[f"0.{gene}"] == pytest.approx(squares / each, rel=1e-4)
        assert relative[f"0.{gene}"] == pytest.approx(squares / float(tensor.detach().square().sum()), rel=1e-4)


def by_hand(net, x, y, name, gene, choice, of_output):
    """Sum of gradient^2 x change^2 of one tensor or of its layer's output, from one pass and gradient per image."""
    module, quantizer = net.model.get_submodule(name), None
    total = 0.0
    with net.floating():
        for image, label in zip(x.split(1), y.split(1), strict=True):
            seen = []
            handles = [
                module.register_forward_pre_hook(lambda m, a: tuple(t.clone() for t in a)),
                module.register_forward_hook(lambda m, a, o, seen=seen: seen.append((a, o))),
            ]
            loss = F.cross_entropy(net(image.clone().requires_grad_()), label)
            [handle.remove() for handle in handles]
            [(arguments, output)] = seen
            quantizer = getattr(module, module.genes[gene])
            at = 1 if gene == "right.input" else 0
            tensor = module.weight if gene == "weight" else arguments[at]
            [gradient] = torch.autograd.grad(loss, output if of_output else tensor)
            with torch.no_grad():
                quantizer.enabled = True
                with quantizer.using(choice):
                    change = module(*arguments) - output if of_output else quantizer(tensor) - tensor
                quantizer.enabled = False
                total += float((gradient * change).square().sum())
    return total / len(x)


@pytest.mark.parametrize(
    ("name", "gene"), [("conv", "weight"), ("conv", "input"), ("product", "left.input"), ("product", "right.input")]
)
def test_gradients_are_those_of_single_images_and_layers(network, name, gene):
    net, x, y = network
    outputs, tensors = FisherOut(images=20, positions=10**6), FisherWeight(images=20)
    for kind, of_output in ((outputs, True), (tensors, False)):
        found = kind.scores(net, x, y)[f"{name}.{gene}"]
        assert found[1] == pytest.approx(by_hand(net, x, y, name, gene, 1, of_output), rel=1e-3)


def test_samples_come_near_the_whole(network):
    net, x, y = network
    pairs = (
        (FisherOut(images=20, positions=60), FisherOut(images=20, positions=10**6), "conv.weight"),
        (FisherWeight(images=20, elements=24), FisherWeight(images=20), "conv.input"),
        (WeightMSE(relative=False, elements=500), WeightMSE(relative=False), "conv.input"),
    )
    for rough, whole, gene in pairs:
        few, all_of_them = (kind.scores(net, x, y)[gene] for kind in (rough, whole))
        assert not np.array_equal(few, all_of_them) and np.allclose(few, all_of_them, rtol=0.5)


def test_other_labels_and_losses_give_other_scores(network):
    net, x, y = network
    for kind in (FisherOut, FisherWeight):
        given, turned = (kind(images=20).scores(net, x, labels)["head.weight"] for labels in (y, (y + 1) % 3))
        other = kind(images=20, loss=lambda a, b: 2 * F.cross_entropy(a, b)).scores(net, x, y)["head.weight"]
        assert not np.allclose(given, turned) and np.allclose(other, 4 * given, rtol=1e-4)

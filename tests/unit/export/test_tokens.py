"""Transformers: each operator in torch, in the reference and in onnxruntime, and whole networks as files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supernet.backbones.timm_models import timm_model
from supernet.config import PerChannel, PerTensor, QuantConfig
from supernet.elastic.supernet import SuperNet
from supernet.export.bundle import export
from supernet.export.deploy import deploy
from supernet.export.graph import Grid, Move
from supernet.export.onnx import write, write_float
from supernet.export.operators import Layer, Linear
from supernet.export.operators_tokens import LayerNorm, Product, Scale, Shift, Softmax
from supernet.export.profile import costs, layers
from supernet.export.runtime import counts, run, session
from supernet.export.verify import compare, operators
from supernet.formats.integer import Integer

CHOICE = QuantConfig(Integer(8), PerTensor(), False)


class Run(nn.Module):
    """A forward pass given as a function of the input and a dictionary of parts."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run, self.parts = run, nn.ModuleDict(parts)
        self.c = nn.Parameter(torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(2)))

    def forward(self, x):
        return self.run(x, self)


FUNCTIONS = {
    "layer_norm": lambda x, m: F.layer_norm(x, (6,)),
    "layer_norm, two axes": lambda x, m: F.layer_norm(x, (5, 6), eps=0.1),
    "layer_norm, affine": lambda x, m: F.layer_norm(x, (6,), m.c[0, 0], bias=m.c[0, 0] * 2, eps=1e-3),
    "softmax": lambda x, m: F.softmax(x, dim=1),
    ".softmax": lambda x, m: x.softmax(-1),
    "torch.softmax": lambda x, m: torch.softmax(x, -2),
    ".transpose": lambda x, m: x.transpose(1, 2),
    ".transpose, from behind": lambda x, m: x.transpose(-2, -1),
    "torch.transpose": lambda x, m: torch.transpose(x, 2, 1),
    ".permute": lambda x, m: x.permute(0, 2, 1),
    ".permute, a tuple": lambda x, m: x.permute((0, -1, 1)),
    "torch.permute": lambda x, m: torch.permute(x, (0, 2, 1)),
    "a constant added": lambda x, m: x + m.c,
    "added to a constant": lambda x, m: m.c * 3 + x,
    "a number added": lambda x, m: x + 0.3,
    "a multiple of a constant": lambda x, m: torch.add(x, m.c, alpha=2),
    "a constant multiplied": lambda x, m: x * m.c[0, 0],
    "a number multiplied": lambda x, m: 0.3 * x,
    "divided": lambda x, m: (x + x) / 2,
    "mean of tokens": lambda x, m: x.mean(1),
    "mean of channels, kept": lambda x, m: x.mean(dim=-1, keepdim=True),
    "a class token": lambda x, m: torch.cat([m.c.expand(x.shape[0], -1, -1), x], 1),
    "tokens on both sides": lambda x, m: torch.cat(
        (m.c.expand(x.size(0), 2, -1), x, m.c.expand(x.shape[0], 1, 6)), dim=1
    ),
    "one token": lambda x, m: x[:, 0],
    "the last token": lambda x, m: x[:, -1],
    "one channel of some tokens": lambda x, m: x[:, 1:, 2],
    "chunk": lambda x, m: (lambda p: p[0] * p[2] + p[1])(x.chunk(3, -1)),
    "chunk, uneven": lambda x, m: x.chunk(2, 1)[1],
    "torch.split": lambda x, m: (lambda p: p[1].softmax(-1) * p[0][:, :, :2])(torch.split(x, [4, 2], dim=2)),
    ".unbind": lambda x, m: (lambda t: t[0] + t[-1])(x.unbind(1)),
}
PARTS = {
    "LayerNorm": nn.LayerNorm(6),
    "LayerNorm, plain": nn.LayerNorm((5, 6), elementwise_affine=False),
    "LayerNorm, no bias": nn.LayerNorm(6, bias=False),
    "Softmax": nn.Softmax(-1),
}


def agree(model):
    x = 2 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    made = deploy(model.eval(), x)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(made(x), expected, atol=1e-6, rtol=1e-6)
    for file in (write(made), write_float(made)):
        assert np.allclose(run(session(file)[0], {made.source: x}), expected.numpy(), atol=1e-5)
    return made


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods(name):
    agree(Run(FUNCTIONS[name]))


@pytest.mark.parametrize("name", PARTS)
def test_modules(name):
    agree(Run(lambda x, m: m.parts["a"](x), a=PARTS[name]))


def test_what_moves_values_is_known_as_such():
    moves = {name for name, f in FUNCTIONS.items() if all(isinstance(op, Move) for op in agree(Run(f)).operators())}
    kept = ("one token", "the last token", "one channel of some tokens", "chunk, uneven")
    assert moves == {name for name in FUNCTIONS if "transpose" in name or "permute" in name or name in kept}


REFUSED = {
    "moves the batch to axis 1": lambda x, m: x.permute(1, 0, 2),
    "takes a mean over the batch": lambda x, m: x.mean(0),
    "takes a part of the batch": lambda x, m: x[0],
    "divides by a tensor": lambda x, m: x / x,
    "softmax with dim=0": lambda x, m: x.softmax(0),
    "joins constants with 2 tensors": lambda x, m: torch.cat([x, m.c.expand(2, 1, 6), x], 1),
    "a constant of its own for each image": lambda x, m: x + torch.arange(2.0).view(2, 1, 1) * m.c,
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_uses_are_refused(said):
    with pytest.raises(ValueError, match=said):
        deploy(Run(REFUSED[said]), torch.randn(1, 5, 6))


class TestProduct:
    GRIDS = (Grid(0.03, 120, 0, 255, 8), Grid(0.5, 7, 3, 250, 8))

    def codes(self, grid, *shape):
        return torch.randint(grid.low, grid.high + 1, shape, generator=torch.Generator().manual_seed(shape[-1])).float()

    @pytest.mark.parametrize("depth", [9, 600])
    @pytest.mark.parametrize("grid", [None, Grid(2.0, 128, 0, 255, 8)])
    def test_it_sums_exactly_and_multiplies_once(self, depth, grid):
        """Beyond 2^24 float32 could not hold the sums."""
        product = Product("p", ("l", "r"), CHOICE, 0.125, depth, self.GRIDS)
        product.grid = grid
        left, right = self.codes(self.GRIDS[0], 2, 4, depth), self.codes(self.GRIDS[1], 2, depth, 3)
        sums = (left.numpy().astype(object) - 120) @ (right.numpy().astype(object) - 7)
        unit = np.float32(np.float32(0.03) * np.float32(0.125)) * np.float32(0.5)
        if grid is None:
            expected = sums.astype(np.float32) * unit
        else:
            expected = np.clip(np.round(sums.astype(np.float32) * (unit / np.float32(2.0))) + 128, 0, 255)
        assert np.array_equal(product([left, right], self.GRIDS).numpy(), expected)

    def test_sums_beyond_int32_are_refused(self):
        with pytest.raises(ValueError, match="p sums 70000 products"):
            Product("p", ("l", "r"), CHOICE, 1.0, 70000, self.GRIDS)


def vit(name="vit_tiny_patch16_224", seed=0, **options):
    """A small transformer with weights that make attention and channels uneven."""
    torch.manual_seed(seed)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "num_heads": 3, "depth": 2, "n_classes": 10}
    model = timm_model(name, **size | options).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.2 * parameter.shape[1] ** -0.5)
        elif parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FEW = {"granularities": [PerChannel()], "symmetries": [False], "bits": (4, 8)}


@pytest.fixture(scope="module")
def net():
    """A calibrated supernet of it; not to be changed."""
    made = SuperNet(vit(), IMAGES[:1], **FEW).eval()
    made.calibrate([IMAGES])
    return made


class TestNetwork:
    def test_from_supernet_to_verified_file(self, net, tmp_path):
        subnet = net.materialise(net.space.uniform("w8a8")).eval()
        batches = [(IMAGES, subnet(IMAGES).argmax(1))]
        card = export(subnet, IMAGES[:1], tmp_path, "int8", batches)
        proof = card["verification"]
        assert proof["passed"] and proof["agreement"] == 1.0
        kernels = proof["kernels"]
        assert kernels["QGemm"] == 9 and kernels["QLinearConv"] == 1 and "Gemm" not in kernels
        assert kernels["MatMulIntegerToFloat"] == kernels["QLinearMatMul"] == 2 and "MatMul" not in kernels
        assert kernels["LayerNormalization"] == 5 and kernels["Gelu"] == 2 and kernels["Softmax"] == 2
        assert len(card["costs"]) == 5 and card["costs"].items() <= net.cost(net.space.uniform("w8a8")).items()
        made = deploy(subnet, IMAGES)
        with torch.no_grad():
            exact = vit()(IMAGES)
        assert (made(IMAGES) - exact).abs().max() < 0.1 * exact.abs().max()
        twin = run(session(write_float(made))[0], {made.source: IMAGES})
        assert np.abs(twin - exact.numpy()).max() < 1e-5 * float(exact.abs().max())

    @pytest.mark.parametrize("bits", ["w4a8", "w8a4", "w4a4"])
    def test_fewer_bits(self, net, bits):
        subnet = net.materialise(net.space.uniform(bits)).eval()
        made = deploy(subnet, IMAGES)
        assert {row["verdict"] for row in operators(write(made), made, IMAGES)} == {"ok"}
        assert costs(made).items() <= net.cost(net.space.uniform(bits)).items()
        rows = {row["name"]: row for row in layers(made, (8,))}
        assert rows["blocks.0.attn.mix"]["macs"] == 17 * 17 * 48
        assert rows["blocks.0.attn.mix"]["weight_bits"] == int(bits[3])

    def test_codes_go_through_what_moves_them(self, net):
        """Queries, keys and values are quantized as they leave their layer; heads are parted as codes."""
        made = deploy(net.materialise(net.space.uniform("w8a8")).eval(), IMAGES)
        floats = {op.name for op in made.operators() if op.kind == "Transpose" and op.grid is None}
        assert not floats
        mix, scores = (
            next(op for op in made.operators() if op.name == f"blocks.0.attn.{n}") for n in ("mix", "scores")
        )
        assert mix.grid is not None and scores.grid is None
        kinds = {type(op) for op in made.operators() if op.grid is not None}
        assert {Softmax, LayerNorm} < kinds

    def test_a_class_token_is_no_batch_of_copies(self, net):
        made = deploy(net.materialise(net.space.uniform("w8a8")).eval(), IMAGES)
        file = write(made)
        assert "Expand" not in {node.op_type for node in file.graph.node}
        one, all_of = (run(session(file)[0], {made.source: x}) for x in (IMAGES[:1], IMAGES))
        assert np.array_equal(one, all_of[:1]) and [op.kind for op in made.operators()][3:7] == [
            *("Transpose", "Pad", "Shift", "Shift")
        ]


class TestControl:
    """A second right evaluation says how often two of them may disagree."""

    def test_it_differs_in_last_bits_only(self, net):
        made = deploy(net.materialise(net.space.uniform("w8a8")).eval(), IMAGES)
        other = made.jittered(IMAGES, torch.Generator().manual_seed(0))
        off = float((other - made(IMAGES)).abs().max() / made(IMAGES).abs().max())
        assert made.coupled and 0 < off < 0.05
        assert torch.equal(other, made.jittered(IMAGES, torch.Generator().manual_seed(0)))

    def test_networks_of_codes_have_none(self, deployed_of, residual):
        _, made, _ = deployed_of(residual(), (3, 8, 8))
        assert not made.coupled

    @pytest.mark.parametrize(
        ("control", "file", "passes"), [(0, 1, False), (2, 4, True), (2, 5, False), (None, 1, False)]
    )
    def test_a_file_may_disagree_twice_as_often(self, control, file, passes):
        n = 200
        reference = torch.eye(2, dtype=torch.float64)[torch.arange(n) % 2]

        def flipped(count):
            return torch.cat([reference[:count].flip(1), reference[count:]])

        logits = {"file": flipped(file), "deployed": reference}
        if control is not None:
            logits |= {"control 0": flipped(control), "control 1": reference}
        found = compare(logits, torch.zeros(n, dtype=torch.long), 8)
        assert (not found["failures"]) == passes and set(found["accuracy"]) == {"file", "deployed"}
        assert found["control_agreement"] == (None if control is None else 1 - control / n)


VARIANTS = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale, tokens added later": ("deit3_small_patch16_224", {"init_values": 0.5}),
    "mean of tokens": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "normed heads, registers": ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2}),
    "elastic depth": ("vit_tiny_patch16_224", {"stages": ["blocks"]}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_relatives(name):
    backbone, options = VARIANTS[name]
    model = vit(backbone, **{"depth": 1, "embed_dim": 24} | ({"depth": 2} if "stages" in options else {}) | options)
    net = SuperNet(model, IMAGES[:1], **FEW | {"bits": (8,)}).eval()
    assert net.audit()["covered"] == 1.0
    net.calibrate([IMAGES])
    config = net.space.smallest()
    made = deploy(net.materialise(config).eval(), IMAGES)
    assert [row for row in operators(write(made), made, IMAGES) if row["verdict"] != "ok"] == []
    with net.as_subnet(config), net.floating(), torch.no_grad():
        exact = net(IMAGES)
    twin = run(session(write_float(made))[0], {made.source: IMAGES})
    assert np.abs(twin - exact.numpy()).max() < 1e-5 * float(exact.abs().max())
    assert costs(made).items() <= net.cost(config).items()
    fused = counts(session(write(made))[1])
    assert fused["QGemm"] == sum(isinstance(op, Linear) for op in made.operators())
    assert fused["QGemm"] + fused["QLinearConv"] == sum(isinstance(op, Layer) for op in made.operators())
    assert not {"MatMul", "FusedMatMul", "Gemm", "Conv"} & fused.keys()


def test_constants_have_no_place_among_codes():
    """A layer scale behind a layer is a product with real numbers."""
    model = Run(lambda x, m: m.parts["b"](m.parts["a"](x) * m.c + m.c), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    x = torch.randn(8, 5, 6)
    net = SuperNet(model, x[:1], bits=(8,)).eval()
    net.calibrate([x])
    made = deploy(net.materialise(net.space.largest()).eval(), x)
    kinds = {op.kind: op.grid is not None for op in made.operators()}
    assert kinds == {"Quantize": True, "Linear": False, "Scale": False, "Shift": True}
    assert {Scale, Shift} <= {type(op) for op in made.operators()}

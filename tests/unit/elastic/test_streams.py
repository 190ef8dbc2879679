"""Sites in networks of tokens: none on what only float kernels read, and those of images as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.backbones.timm_models import timm_model
from supernet.elastic.layers import QuantLayer
from supernet.elastic.stage import Stage
from supernet.elastic.supernet import SuperNet
from supernet.elastic.wrap import trace

IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers under short names, and a forward pass given as a function of the module and the input."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def sites(net: SuperNet) -> set[str]:
    genes = ("weight_quantizer", "input_quantizer", "left_quantizer", "right_quantizer")
    return {name for name in net.quantizers if not name.endswith(genes)}


def behind_sites(net: SuperNet) -> set[str]:
    return {name for name, m in net.model.named_modules() if isinstance(m, QuantLayer) and m.input_quantizer.bypass}


def parts() -> dict[str, nn.Module]:
    conv, linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
    return {"c": conv, "d": nn.Conv2d(4, 4, 1), "a": linear, "b": nn.Linear(4, 4), "n": nn.LayerNorm(4)}


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


PLACED: dict[str, tuple[Tensor, Callable[..., Tensor], set[str], set[str]]] = {
    "a residual stream": (TOKENS, lambda m, x: m.b(F.gelu(m.a(m.n(x)))) + x, set(), set()),
    "a chain": (TOKENS, lambda m, x: m.b(F.gelu(m.a(x))), set(), set()),
    "normalised once, read by two layers": (
        TOKENS,
        lambda m, x: (lambda y: m.a(y) * m.b(y).sigmoid())(m.n(x)),
        {"site_n"},
        {"a", "b"},
    ),
    "normalised once, read by a layer and a sum": (TOKENS, lambda m, x: m.b(y := m.n(m.a(x))) + y, set(), set()),
    "a convolution into tokens": (IMAGE, lambda m, x: m.a(m.n(tokens(m.c(x)))), {"site_c"}, set()),
    "constants on the way": (
        IMAGE,
        lambda m, x: m.a(m.n(tokens(m.c(x)) + m.n.bias * 2)),
        {"site_c"},
        set(),
    ),
    "tokens into a convolution": (
        IMAGE,
        lambda m, x: m.d(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) + x,
        {"site_x", "site_d"},
        {"a"},
    ),
    "softmax": (TOKENS, lambda m, x: m.b(m.a(x).softmax(-1)), set(), set()),
    "a linear layer on vectors has a site": (
        TOKENS[:, 0],
        lambda m, x: (lambda y: m.b(y) + y)(m.a(x)),
        {"site_a", "site_b"},
        {"b"},
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_where_they_are(name: str) -> None:
    x, run, expected, grid = PLACED[name]
    net = SuperNet(Net(run, **parts()), x, bits=(4, 8), first_last_bits=None)
    assert sites(net) == expected and behind_sites(net) == grid


def test_blocks_of_a_transformer_may_be_left_out() -> None:
    """The stream between them stays real, at every depth."""
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "num_heads": 2, "depth": 3, "n_classes": 5}
    x = torch.randn(4, 3, 16, 16)
    model = timm_model("vit_tiny_patch16_224", stages=["blocks"], **size).eval()
    net = SuperNet(model, x[:1], bits=(4, 8)).eval()
    assert sites(net) == {"site_patch_embed_proj"} and net.elastic_depths == ["blocks.depth"]
    net.calibrate([x])
    seen: list[Tensor] = []
    for block in net.model.get_submodule("blocks").children():
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for depth in (1, 3):
        config = net.space.config(net.space.pin({"blocks.depth": depth}).largest().row)
        subnet = net.materialise(config).eval()
        seen.clear()
        with net.as_subnet(config), torch.no_grad():
            assert torch.equal(net(x), subnet(x))
        assert len(seen) == depth and all(len(s.unique()) > 256 for s in seen)


def test_a_stage_of_images_behind_tokens_gets_a_grid() -> None:
    block = Net(lambda m, x: m.r(m.c(x)) + x, c=nn.Conv2d(4, 4, 1), r=nn.ReLU())
    net = SuperNet(
        Net(
            lambda m, x: m.f(m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3))),
            a=nn.Linear(4, 4),
            s=Stage(block),
            f=nn.Linear(4, 2),
        ),
        IMAGE,
        bits=(4, 8),
        first_last_bits=None,
    )
    net.calibrate([IMAGE])
    seen: list[Tensor] = []
    net.model.get_submodule("s").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(IMAGE)
    assert len(seen[0].unique()) < 200 < IMAGE.numel() and "s.0.c" in behind_sites(net)


def test_optional_arguments_have_their_defaults_in_the_graph() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Any = None, times: int = 2) -> Tensor:
            return x * times if mask is None else x + mask

    graph = trace(Masked()).graph
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["x"]
    assert torch.equal(trace(Masked())(TOKENS), TOKENS * 2)

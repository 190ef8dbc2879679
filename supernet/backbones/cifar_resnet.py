"""Residual networks for small images: the ResNet family of CIFAR, at any depth 6 n + 2 and any width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from supernet.artefacts import load_tensors
from supernet.elastic.stage import Stage


class PaddedShortcut(nn.Module):
    """Shortcut without parameters across a change of shape: every second pixel, new channels zero on both sides.

    Option A of He et al., CVPR 2016, arXiv:1512.03385, section 3.3; equal halves as in
    akamaster/pytorch_resnet_cifar10, whose weights we load.
    """

    only_moves = True  # its output sits on the grid of its input, so no site is needed behind it

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"channels must not shrink from stage to stage, got {in_channels} -> {out_channels}; order them"
            )
        new = out_channels - in_channels
        self.stride = stride
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d p q"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; with stride 1 and equal channels it may be left out of a chain."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else PaddedShortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d p q"]:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + (x if self.shortcut is None else self.shortcut(x)))


class CifarResNet(nn.Module):
    """Stem, three stages of (depth - 2) / 6 basic blocks each, global average pool, linear classifier.

    He et al., CVPR 2016, arXiv:1512.03385, section 4.2. Parameter names are those of akamaster/pytorch_resnet_cifar10.
    Stages 2 and 3 halve height and width.

    Args:
        depth: weight layers, 6 n + 2: 8, 14, 20, 32, 44, 56, ...
        n_classes: size of the output.
        in_channels: channels of the images.
        channels: of the three stages, ascending.
        min_depth: fewest blocks of a stage that may run, 1..n; None: the depth is not elastic.
        weights: a safetensors file to start from, with every parameter of this network; None: He initialisation.

    Raises:
        ValueError: a depth outside the family, or weights of another network.
        FileNotFoundError: `weights` does not exist.
    """

    def __init__(
        self,
        depth: int = 20,
        n_classes: int = 10,
        in_channels: int = 3,
        channels: Sequence[int] = (16, 32, 64),
        min_depth: int | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            near = 6 * max(round((depth - 2) / 6), 1) + 2
            raise ValueError(
                f"depth of a CIFAR ResNet must be 6 n + 2 (8, 14, 20, 32, 44, 56, ...), got {depth}; nearest is {near}"
            )
        if len(channels) != 3:
            raise ValueError(
                f"channels must name the width of 3 stages, got {list(channels)}; e.g. channels=[16,32,64]"
            )
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(channels[0], channels[0], blocks, 1, min_depth)
        self.layer2 = _stage(channels[0], channels[1], blocks, 2, min_depth)
        self.layer3 = _stage(channels[1], channels[2], blocks, 2, min_depth)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[2], n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if weights is not None:
            _load(self, Path(weights).expanduser(), f"a ResNet-{depth} of {n_classes} classes")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


def _stage(in_channels: int, channels: int, blocks: int, stride: int, min_depth: int | None) -> Stage:
    rest = (BasicBlock(channels, channels) for _ in range(blocks - 1))
    return Stage(BasicBlock(in_channels, channels, stride), *rest, min_depth=min_depth)


def _load(net: nn.Module, path: Path, wanted: str) -> None:
    """Load every tensor of a safetensors file; BatchNorm's batch counters may be absent, no output depends on them."""
    state, _ = load_tensors(path)
    own = net.state_dict()
    missing = sorted(k for k in own.keys() - state.keys() if not k.endswith("num_batches_tracked"))
    foreign = sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    if missing or foreign or shapes:
        parts = (("missing", missing), ("not of this network", foreign), ("of another shape", sorted(shapes)))
        found = ", ".join(f"{len(names)} tensors {what} (first {names[0]})" for what, names in parts if names)
        raise ValueError(
            f"weights {path} do not fit {wanted}: {found}; set depth, n_classes and channels as they were trained"
        )
    net.load_state_dict(state)

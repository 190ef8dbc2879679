"""What is exported: four networks, with trained weights and images where a data folder has them, else random ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Problem:
    """A network on images [3, size, size].

    Attributes:
        weights: its file below DATA.
        images: how many are calibrated with, and how many tested on, where the images are random.
        accuracy: whether accuracy with and without deployment sites is measured, if the weights are trained.
    """

    name: str
    size: int
    classes: int
    weights: str = ""
    images: tuple[int, int] = (128, 128)
    accuracy: bool = False


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("resnet20", 32, 10, "pretrained/cifar10_resnet20.safetensors", accuracy=True),
        Problem("resnet18", 64, 10),
        Problem("vit_tiny", 64, 10),
        Problem(
            "mobilenetv2", 224, 1000, "pretrained/imagenet_tf2_mobilenet_v2_1.0_224_ptq.safetensors", images=(16, 16)
        ),
    )
}


@dataclass
class Material:
    """A float network in evaluation, and images for it.

    Attributes:
        calibration, test: [n, 3, size, size].
        labels: of test; where nothing is trained, what the float network says.
        trained: whether the weights are.
    """

    model: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Tensor
    trained: bool

    def batches(self, size: int = 100) -> list[tuple[Tensor, Tensor]]:
        """The test images with labels."""
        return list(zip(self.test.split(size), self.labels.split(size), strict=True))


def material(problem: Problem, data: Path | None, seed: int) -> Material:
    """Trained where `data` holds the problem's weights and images, else random."""
    torch.manual_seed(seed)  # layers initialise from the global generator
    weights = data / problem.weights if data is not None and problem.weights else None
    if data is None or weights is None or not weights.is_file():
        return _random(problem, NETWORKS[problem.name](problem, None), seed)
    calibration, test, labels = {"resnet20": cifar10, "mobilenetv2": imagenet}[problem.name](data)
    return Material(NETWORKS[problem.name](problem, weights).eval(), calibration, test, labels, True)


@torch.no_grad()
def _random(problem: Problem, model: nn.Module, seed: int) -> Material:
    """Random images; BatchNorm knows them, and no class is the answer to all."""
    from supernet.calibration.batchnorm import norms, recalibrate

    rng = torch.Generator().manual_seed(seed)
    calibration, test = (torch.randn(n, 3, problem.size, problem.size, generator=rng) for n in problem.images)
    if norms(model):
        recalibrate(model, [calibration])
    model.eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.bias -= model(calibration).mean(0)
    return Material(model, calibration, test, model(test).argmax(1), False)


# -- networks ----------------------------------------------------------------------------------------------------------
def _resnet20(problem: Problem, weights: Path | None) -> nn.Module:
    from supernet.backbones.cifar_resnet import CifarResNet

    return CifarResNet(20, problem.classes, weights=weights)


def _resnet18(problem: Problem, weights: Path | None) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model("resnet18", num_classes=problem.classes, zero_init_last=False)
    return made


def _vit_tiny(problem: Problem, weights: Path | None) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=problem.classes, img_size=problem.size, patch_size=8
    )
    return made


def _mobilenetv2(problem: Problem, weights: Path | None) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=problem.classes)
    model = statically_padded(model, torch.zeros(1, 3, problem.size, problem.size))
    if weights is not None:
        dequantized(model, weights)
    return model


NETWORKS: dict[str, Callable[[Problem, Path | None], nn.Module]] = {
    "resnet20": _resnet20,
    "resnet18": _resnet18,
    "vit_tiny": _vit_tiny,
    "mobilenetv2": _mobilenetv2,
}


def statically_padded(model: nn.Module, example: Tensor) -> nn.Module:
    """timm's convolutions that pad by the size of their input (as TensorFlow does), as zeros around plain ones."""
    from timm.layers import Conv2dSame, get_same_padding

    found: dict[str, tuple[int, ...]] = {}

    def meet(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found.update({name: tuple(inputs[0].shape[2:])})

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Conv2dSame)}
    handles = [module.register_forward_pre_hook(meet(name)) for name, module in layers.items()]
    with torch.no_grad():
        model.eval()(example)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        pads = [
            get_same_padding(size, kernel, step, rate)
            for size, kernel, step, rate in zip(
                found[name], layer.kernel_size, layer.stride, layer.dilation, strict=True
            )
        ]
        (high, wide) = pads
        plain = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups,
            layer.bias is not None,
        )  # fmt: skip
        plain.load_state_dict(layer.state_dict())
        zeros = nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(zeros, plain))
    return model


@torch.no_grad()
def dequantized(model: nn.Module, weights: Path) -> None:
    """Load MobileNetV2 from a file of integer weights with BatchNorm folded: layer after layer, in module order.

    Each BatchNorm becomes the layer's bias; class 0 (background) of the file is left out.
    """
    from supernet.artefacts import load_tensors

    state, _ = load_tensors(weights)
    index = -1
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            index += 1
            parts = ("weight_q", "weight_scale", "weight_zero_point", "bias")
            codes, scale, zero, bias = (state[f"layers.{index}.{part}"].float() for part in parts)
            shape = (-1, *[1] * (codes.dim() - 1))
            weight = (codes - zero.view(shape)) * scale.view(shape)
            if isinstance(module, nn.Linear):
                module.weight.copy_(weight.flatten(1)[1:])
                module.bias.copy_(bias[1:])
            else:
                module.weight.copy_(weight)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
            module.weight.fill_(1.0)
            module.bias.copy_(bias)


# -- images ------------------------------------------------------------------------------------------------------------
def cifar10(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """512 exact training images, the 1,000 exact test images, and their labels."""
    from PIL import Image

    index = np.load(data / "cifar10" / "cifar10_lossless_index.npz")

    def part(name: str, n: int) -> Tensor:
        tiles = np.asarray(Image.open(data / "cifar10" / f"cifar10_lossless_{name}.webp"))
        images = tiles.reshape(-1, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)[:n]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
        return (torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255 - mean) / std

    labels = torch.from_numpy(index["test_label"].astype(np.int64))
    return part("train", 512), part("test", len(labels)), labels


def imagenet(data: Path, calibrated: int = 64, tested: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Every eighth of the first images to calibrate with, every eighth of all from the fifth on to test."""
    from PIL import Image

    file = np.load(data / "imagenet1k_sample" / "imagenet1k_sample_224.npz")
    content, offset, label = file["jpeg"].tobytes(), file["offset"], file["label"].astype(np.int64)

    def part(which: range) -> Tensor:
        images = [np.asarray(Image.open(io.BytesIO(content[offset[i] : offset[i + 1]]))) for i in which]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

    test = range(4, len(label), 8)[:tested]
    return part(range(0, len(label), 8)[:calibrated]), part(test), torch.from_numpy(label[list(test)])

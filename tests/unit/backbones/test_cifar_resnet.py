"""The CIFAR ResNet against published numbers, published weights and a plain re-implementation of its block."""

import io
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from supernet.backbones.cifar_resnet import BasicBlock, CifarResNet, PaddedShortcut

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def accuracy(net, pixels, labels):
    net.eval()
    x = torch.from_numpy(((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = torch.cat([net(part) for part in x.split(250)])
    return float((logits.argmax(1).numpy() == labels).mean())


def jpeg_test(folder, n):
    packed = np.load(folder / "cifar10" / "cifar10_jpeg.npz")
    head, scan, at = packed["jpeg_header"].tobytes(), packed["test_scan"].tobytes(), packed["test_offset"][: n + 1]
    files = (head + scan[a:b] + b"\xff\xd9" for a, b in itertools.pairwise(at))
    return np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files]), packed["test_label"][:n]


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameter_counts_of_the_paper(depth, millions):
    """He et al. 2016, table 6."""
    count = sum(p.numel() for p in CifarResNet(depth).parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_depth_counts_the_weight_layers(depth):
    layers = [m for m in CifarResNet(depth).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_published_weights_reach_their_accuracy_on_lossless_images(shared_data):
    """91.5 % of the first 1,000 official test images; README of the pretrained weights."""
    index = np.load(shared_data / "cifar10" / "cifar10_lossless_index.npz")
    mosaic = np.asarray(Image.open(shared_data / "cifar10" / "cifar10_lossless_test.webp"))
    pixels = mosaic.reshape(-1, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    net = CifarResNet(20, weights=shared_data / "pretrained" / "cifar10_resnet20.safetensors")
    assert accuracy(net, pixels, index["test_label"]) == pytest.approx(0.915, abs=0.0015)


def test_weights_for_jpeg_reach_their_accuracy_on_the_first_thousand(shared_data):
    net = CifarResNet(20, weights=shared_data / "pretrained" / "cifar10_jpeg_resnet20.safetensors")
    assert accuracy(net, *jpeg_test(shared_data, 1000)) == pytest.approx(0.894, abs=0.0015)


@pytest.mark.slow
def test_weights_for_jpeg_reach_their_accuracy(shared_data):
    """88.78 % of all 10,000."""
    net = CifarResNet(20, weights=shared_data / "pretrained" / "cifar10_jpeg_resnet20.safetensors")
    assert accuracy(net, *jpeg_test(shared_data, 10_000)) == pytest.approx(0.8878, abs=0.0003)


def test_resnet56_loads_its_published_weights(shared_data):
    path = shared_data / "pretrained" / "cifar10_resnet56.safetensors"
    net, state = CifarResNet(56, weights=path), load_file(path)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def test_shortcut_takes_every_second_pixel_and_pads_both_sides():
    x = torch.randn(2, 16, 8, 8)
    out = PaddedShortcut(16, 32, 2)(x)
    assert out.shape == (2, 32, 4, 4)
    for row in range(4):
        for column in range(4):
            assert torch.equal(out[:, 8:24, row, column], x[:, :, 2 * row, 2 * column])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_the_formula(stride):
    """relu(bn(conv(relu(bn(conv x)))) + shortcut), in functions and in training mode."""
    torch.manual_seed(0)
    block, x = BasicBlock(8, 8 * stride, stride), torch.randn(4, 8, 6, 6)
    out = block(x)

    def normed(y, bn):
        return F.batch_norm(y, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)

    inner = F.relu(normed(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1))
    inner = normed(F.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
    shortcut = x if stride == 1 else torch.cat([torch.zeros(4, 4, 3, 3), x[..., ::2, ::2], torch.zeros(4, 4, 3, 3)], 1)
    assert torch.allclose(out, F.relu(inner + shortcut), atol=1e-6)


def test_a_shorter_stage_is_the_smaller_network():
    """ResNet-20 with stages cut to 2 blocks is ResNet-14 with the same parameters."""
    large, small = CifarResNet(20, min_depth=1).eval(), CifarResNet(14).eval()
    small.load_state_dict({key: large.state_dict()[key] for key in small.state_dict()})
    for stage in (large.layer1, large.layer2, large.layer3):
        stage.depth = 2
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(large(x), small(x))


def test_elastic_depth_changes_no_name_and_no_number():
    fixed, elastic = CifarResNet(20), CifarResNet(20, min_depth=2)
    assert list(fixed.state_dict()) == list(elastic.state_dict())
    assert fixed.layer1.min_depth == 3
    assert elastic.layer1.min_depth == 2


def test_weights_survive_a_round_trip(tmp_path):
    net = CifarResNet(14, n_classes=5, in_channels=1, channels=(8, 12, 20))
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    again = CifarResNet(14, 5, 1, (8, 12, 20), weights=str(tmp_path / "a.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 18}, "6 n + 2 .* got 18; nearest is 20"),
        ({"depth": 2}, "got 2; nearest is 8"),
        ({"depth": 20, "channels": (16, 32)}, "3 stages, got [16, 32]"),
        ({"depth": 20, "channels": (16, 8, 4)}, "must not shrink from stage to stage, got 16 -> 8"),
        ({"depth": 20, "min_depth": 4}, "min_depth must lie in 1..3"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        CifarResNet(**settings)


def test_weights_of_another_network_are_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(CifarResNet(20).state_dict(), path)
    with pytest.raises(ValueError, match=r"do not fit a ResNet-32 of 10 classes: 60 tensors missing") as error:
        CifarResNet(32, weights=path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="36 tensors not of this network"):
        CifarResNet(14, channels=(16, 32, 64), weights=path)
    with pytest.raises(ValueError, match=r"2 tensors of another shape \(first linear.bias \[10\] for \[100\]\)"):
        CifarResNet(20, n_classes=100, weights=path)


def test_weights_that_are_absent_or_cut_short(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        CifarResNet(8, weights=path)
    save_file(CifarResNet(8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        CifarResNet(8, weights=path)

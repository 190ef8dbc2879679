"""Our door to timm against timm itself."""

import timm
import torch
from pytest import fixture, mark, raises
from safetensors.torch import save_file

from supernet.backbones.timm_models import timm_model
from supernet.elastic.stage import Stage

STAGES = ["layer1", "layer2", "layer3", "layer4"]


@fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_resnet18_equals_timm(x):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=10).eval()
    torch.manual_seed(0)
    ours = timm_model("resnet18", n_classes=10, stages=STAGES).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_named_chains_become_stages(x):
    net = timm_model("resnet18", n_classes=10, stages=STAGES[2:], min_depth=1, zero_init_last=False).eval()
    assert [isinstance(net.get_submodule(s), Stage) for s in STAGES] == [False, False, True, True]
    whole = net(x)
    net.layer4.depth = 1
    cut = net(x)
    assert cut.shape == whole.shape
    features = net.layer3(net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x)))))))
    assert torch.equal(cut, net.fc(net.global_pool(net.layer4[0](features))))
    assert not torch.equal(cut, whole)


def test_blocks_of_a_vision_transformer_are_a_stage():
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=5).eval()
    torch.manual_seed(0)
    ours = timm_model("test_vit", n_classes=5, stages=["blocks"], min_depth=2).eval()
    x = torch.randn(1, *theirs.default_cfg["input_size"])
    assert torch.equal(ours(x), theirs(x))
    assert ours.blocks.min_depth == 2


def test_settings_reach_timm():
    assert timm_model("resnet18", n_classes=3, zero_init_last=False).layer1[0].bn2.weight.min() == 1
    assert timm_model("resnet18", n_classes=3, zero_init_last=True).layer1[0].bn2.weight.max() == 0
    assert timm_model("resnet18", in_channels=1).conv1.weight.shape[1] == 1
    assert timm_model("resnet18").fc.out_features == 1000


@mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_from_a_file(tmp_path, suffix, x):
    made = timm.create_model("resnet18", num_classes=10).eval()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}, "epoch": 3}, path)
    else:
        save_file(made.state_dict(), path)
    assert torch.equal(timm_model("resnet18", pretrained=path, n_classes=10).eval()(x), made(x))


def test_classifier_of_another_size_stays_fresh_and_is_logged(tmp_path, caplog):
    made = timm.create_model("resnet18", num_classes=10)
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    net = timm_model("resnet18", pretrained=str(tmp_path / "w.safetensors"), n_classes=4)
    assert torch.equal(net.layer4[1].conv2.weight, made.layer4[1].conv2.weight)
    assert net.fc.out_features == 4
    assert "fc.weight [10, 512] left out, the model has [4, 512]" in caplog.text


def test_weights_that_do_not_fit(tmp_path):
    save_file(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    with raises(ValueError, match=r"w.safetensors does not fit resnet34: .*; choose the model") as error:
        timm_model("resnet34", pretrained=tmp_path / "w.safetensors", n_classes=10)
    assert "\n" not in str(error.value)
    with raises(ValueError, match=r"does not fit resnet18.*size mismatch for conv1.weight"):
        timm_model("resnet18", pretrained=tmp_path / "w.safetensors", n_classes=10, in_channels=1)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    (tmp_path / "text.pth").write_text("no weights at all")
    for name in ("cut.safetensors", "text.pth"):
        with raises(ValueError, match=f"{name} does not fit resnet18"):
            timm_model("resnet18", pretrained=tmp_path / name)
    with raises(FileNotFoundError, match=r"absent.pth does not exist"):
        timm_model("resnet18", pretrained=tmp_path / "absent.pth")


def test_unsafe_weights_are_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": {"fc.weight": Trap()}}, tmp_path / "trap.pth")
    with raises(ValueError, match=r"trap.pth does not fit"):
        timm_model("resnet18", pretrained=tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_wrong_names_say_the_near_ones():
    with raises(ValueError, match=r"timm has no model 'resnet19'; nearest: .*resnet1"):
        timm_model("resnet19")
    with raises(ValueError, match=r"no model 'qqqqqqqq'; timm.list_models"):
        timm_model("qqqqqqqq")
    with raises(ValueError, match="Invalid pretrained tag"):
        timm_model("resnet18.no_such_tag")
    with raises(ValueError, match=r"got 'layer9'; there are layer1, layer2"):
        timm_model("resnet18", stages=["layer9"])
    with raises(ValueError, match=r"min_depth must lie in 1..2"):
        timm_model("resnet18", stages=["layer1"], min_depth=3)


def test_download_without_a_connection_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("the hub\ncannot be reached")

    monkeypatch.setattr(timm, "create_model", offline)
    with raises(ValueError, match="pretrained=True: the hub cannot be reached; set pretrained=false or a file"):
        timm_model("resnet18", pretrained=True)

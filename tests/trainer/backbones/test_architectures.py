"""Every family builds with its own initialisation, gives [N, D], and refuses what it cannot take."""

import pytest
import torch
from torch import nn

from headstart.trainer.backbones.architectures import (
    architecture_names,
    build_architecture,
    find_architecture,
)
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

FAMILIES = {
    "torchvision:alexnet": (64, 4096),
    "torchvision:vgg11_bn": (32, 4096),
    "torchvision:resnet18": (32, 512),
    "torchvision:resnet50": (32, 2048),
    "torchvision:densenet121": (32, 1024),
    "torchvision:mobilenet_v2": (32, 1280),
    "torchvision:mobilenet_v3_large": (32, 1280),
    "torchvision:efficientnet_b0": (32, 1280),
    "torchvision:convnext_tiny": (32, 768),
    "torchvision:vit_b_16": (224, 768),
    "torchvision:swin_t": (32, 768),
    "torchvision:regnet_y_400mf": (32, 440),
    "torchvision:shufflenet_v2_x0_5": (32, 1024),
    "torchvision:squeezenet1_1": (32, 512),
    "torchvision:mnasnet0_5": (32, 1280),
    "torchvision:googlenet": (64, 1024),
    "torchvision:inception_v3": (96, 2048),
    "headstart:craft-vgg16-bn": (16, 512),
    "headstart:english-g2": (32, 256),
    "headstart:mtcnn-onet": (48, 1152),
    "headstart:efficientnet-lite0": (32, 1280),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_gives_pooled_features(name):
    side, num_features = FAMILIES[name]
    architecture = find_architecture(name)
    module, found = build_architecture(name)
    assert (found, architecture.num_features) == (num_features, num_features)
    module.eval()
    with torch.no_grad():
        features = module(torch.rand(2, architecture.channels, side, side))
    assert features.shape == (2, num_features)
    assert features.dtype == torch.float32
    # A run saves its backbone under its own names and reads it back through the same renaming.
    assert all(architecture.own_name(own) == own for own in module.state_dict())


def test_features_are_what_the_classifier_was_given():
    import torchvision

    torch.manual_seed(3)
    whole = torchvision.models.mobilenet_v2().eval()
    torch.manual_seed(3)
    module = build_architecture("torchvision:mobilenet_v2")[0].eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(whole.classifier(module(pixels)), whole(pixels))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "headstart:english-g2", "headstart:efficientnet-lite0"])
def test_initialisation_is_random_and_seeded(name):
    def first_convolution(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        module, _ = build_architecture(name)
        return next(layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d))

    assert torch.equal(first_convolution(0), first_convolution(0))
    assert not torch.equal(first_convolution(0), first_convolution(1))


def test_initialisation_is_the_architectures_own():
    """ResNet's last batch norms start at one and its convolutions by fan-out; ViT's head-less blocks by
    Xavier."""
    torch.manual_seed(0)
    resnet, _ = build_architecture("torchvision:resnet18")
    weight = resnet.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    english, _ = build_architecture("headstart:english-g2")
    weight = english.features[8].weight  # torch's own: uniform in +-1/sqrt(fan in)
    assert weight.abs().max().item() == pytest.approx(1 / (128 * 9) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [
        ("torchvision:resnt50", "torchvision:resnet50"),
        ("torchvision:vit_b16", "torchvision:vit_b_16"),
        ("headstart:english_g2", "headstart:english-g2"),
        ("resnet50", "torchvision:resnet50"),
    ],
)
def test_unknown_architecture_suggests_the_nearest(asked, suggested):
    with pytest.raises(SourceError, match=f"no architecture '{asked}'.*did you mean .*{suggested}"):
        build_architecture(asked)


def test_far_off_name_lists_all():
    with pytest.raises(SourceError, match=r"accepted: .*torchvision:alexnet"):
        find_architecture("?")
    assert {"torchvision:resnet50", "headstart:english-g2"} <= set(architecture_names())


def _preprocessing(crop: int, channels: int = 3) -> Preprocessing:
    return Preprocessing(resize=crop, crop=crop, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)


@pytest.mark.parametrize(
    ("name", "side"),
    [("torchvision:vit_b_16", 224), ("torchvision:vit_h_14", 518), ("torchvision:maxvit_t", 224),
     ("headstart:mtcnn-onet", 48)],
)  # fmt: skip
def test_fixed_sizes_are_refused_clearly(name, side):
    find_architecture(name).check(_preprocessing(side))
    with pytest.raises(SourceError, match=f"{side}x{side} pixels alone.*crop is 96; set it to {side}"):
        find_architecture(name).check(_preprocessing(96))


def test_channels_are_checked():
    with pytest.raises(SourceError, match=r"english-g2 takes 1 channel.* is 3; set it to 1"):
        find_architecture("headstart:english-g2").check(_preprocessing(48))


@pytest.mark.slow
@pytest.mark.timeout(900)  # 80 networks: more than the usual 300 s where other processes have the cores
def test_every_torchvision_model_is_described():
    for name in architecture_names():
        assert find_architecture(name).num_features > 0


def test_the_default_dtype_changes_no_number_that_is_drawn():
    def drawn() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_architecture("headstart:mtcnn-onet")[0].state_dict()

    expected = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        found = drawn()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name

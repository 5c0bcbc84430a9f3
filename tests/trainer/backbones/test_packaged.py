"""The modules written here against the definitions they follow."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from headstart.trainer.backbones.packaged import (
    CraftVgg16,
    EfficientNetLite0,
    EnglishG2,
    MtcnnOnet,
    SameConv2d,
)


@pytest.mark.parametrize("size", [1, 6, 7, 12, 13, 96])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    """Output i sees the inputs from i * stride - total // 2, with zeros outside; total from the ceiling
    rule."""
    torch.manual_seed(0)
    layer = SameConv2d(1, 1, kernel, stride, bias=False)
    maps = torch.rand(1, 1, size, size + 1)
    found, weight = layer(maps).detach(), layer.weight.detach()
    assert found.shape[2:] == (-(-size // stride), -(-(size + 1) // stride))
    for row in (0, found.shape[2] - 1):
        for column in (0, found.shape[3] - 1):
            expected = 0.0
            for i in range(kernel):
                for j in range(kernel):
                    y = row * stride + i - _before(size, kernel, stride)
                    x = column * stride + j - _before(size + 1, kernel, stride)
                    if 0 <= y < size and 0 <= x < size + 1:
                        expected += float(weight[0, 0, i, j] * maps[0, 0, y, x])
            assert found[0, 0, row, column].item() == pytest.approx(expected, abs=1e-5)


def _before(size: int, kernel: int, stride: int) -> int:
    return max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2


def test_craft_is_the_head_of_torchvisions_vgg():
    features = torchvision.models.vgg16_bn().features[:40]
    craft = CraftVgg16()
    craft.features.load_state_dict(features.state_dict())
    pixels = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        expected = features.eval()(pixels).mean(dim=(2, 3))
        torch.testing.assert_close(craft.eval()(pixels), expected)


def test_lite_blocks_are_residual_only_where_shapes_agree():
    module = EfficientNetLite0()
    assert [block.residual for block in module.blocks] == [
        False, False, True, False, True, False, True, True, False, True, True, False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("module", [EnglishG2, CraftVgg16, EfficientNetLite0, MtcnnOnet])
def test_gradients_reach_every_parameter(module):
    torch.manual_seed(0)
    net = module().train()
    channels = next(net.parameters()).shape[1]
    F.mse_loss(net(torch.rand(4, channels, 48, 48)), torch.zeros(4, net.num_features)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())

"""Backbones whose weights come in registry packages and that torchvision does not have, written from their
papers.

Each module takes normalised pixels [N, C, S, S] and returns pooled features [N, D]; a fresh one has its own
random initialisation, that of torch's layers where nothing else is said. Layer and pooling were chosen by a
linear probe on 300 labelled digits, the smaller D where it made no difference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CraftVgg16(nn.Module):
    """The encoder of CRAFT (Baek et al., arXiv 1904.01941): VGG-16 with batch norm up to conv5-2; D = 512.

    [N, 3, S, S] with S at least 16 -> [N, 512] by a global average. Initialised as torchvision's `vgg16_bn`
    is.
    """

    num_features = 512
    widths = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512)  # 0 is a 2x2 max-pool

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self.widths:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, 512]."""
        return torch.mean(self.features(pixels), dim=(2, 3))


class EnglishG2(nn.Module):
    """EasyOCR's second-generation English recogniser (a CRNN, arXiv 1507.05717) without its LSTM; D = 256.

    Grey [N, 1, S, S] with S at least 32 -> [N, 256] by a global average. Pooling is (2, 1) from the third on:
    the original reads lines of text, so it keeps the width.
    """

    num_features = 256

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d((2, 1)),
            nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(256, 256, 2), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, 256]."""
        return torch.mean(self.features(pixels), dim=(2, 3))


class MtcnnOnet(nn.Module):
    """The output network of MTCNN (Zhang et al., arXiv 1604.02878) up to its fourth convolution; D = 1152.

    [N, 3, 48, 48] -> [N, 1152], the 128 maps of 3x3 flattened: where a stroke lies matters to this net, a
    global average loses 4 points in the probe and the dense layer after it, which was trained for faces
    alone, 4 as well.
    """

    num_features = 1152

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, 1152]; ceil_mode is Caffe's rounding, with which the weights were trained."""
        maps = F.max_pool2d(self.prelu1(self.conv1(pixels)), 3, 2, ceil_mode=True)
        maps = F.max_pool2d(self.prelu2(self.conv2(maps)), 3, 2, ceil_mode=True)
        maps = F.max_pool2d(self.prelu3(self.conv3(maps)), 2, 2, ceil_mode=True)
        return torch.flatten(self.prelu4(self.conv4(maps)), 1)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: at stride 2 and an even size, the odd pixel goes right
    and below."""

    def forward(self, maps: Tensor) -> Tensor:  # noqa: D102
        pads: list[int] = []
        for axis in (1, 0):  # F.pad counts from the last axis
            size, kernel, stride = maps.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(maps, pads) if any(pads) else maps)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False
) -> nn.Sequential:
    groups = inputs if depthwise else 1
    return nn.Sequential(
        SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
    )


class _LiteBlock(nn.Module):
    """An inverted residual with ReLU6 and without squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _convolution(inputs, inner) if expansion > 1 else None
        self.depthwise = _convolution(inner, inner, kernel, stride, depthwise=True)
        self.project = _convolution(inner, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        inner = maps if self.expand is None else F.relu6(self.expand(maps))
        projected: Tensor = self.project(F.relu6(self.depthwise(inner)))
        return maps + projected if self.residual else projected


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; the Lite variant of TensorFlow's models); D = 1280.

    [N, 3, S, S] with S at least 32 -> [N, 1280] by a global average. Initialised as torchvision's
    EfficientNet is. Drop-connect, which acts in training alone, is left out.
    """

    num_features = 1280
    # Expansion, width, kernel, stride of the first block, blocks.
    stages = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3),
              (6, 192, 5, 2, 4), (6, 320, 3, 1, 1))  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, 3, 2)
        blocks, inputs = [], 32
        for expansion, width, kernel, stride, num_blocks in self.stages:
            for index in range(num_blocks):
                blocks.append(_LiteBlock(inputs, width, expansion, kernel, stride if index == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _convolution(inputs, self.num_features)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, 1280]."""
        maps = self.blocks(F.relu6(self.stem(pixels)))
        return torch.mean(F.relu6(self.head(maps)), dim=(2, 3))

"""Architectures by name: `torchvision:resnet50`, `headstart:english-g2`; each gives pooled features [N, D].

A torchvision classification model loses its classifier, the last linear layer, so that its features are what
that layer was given. `build` starts from the architecture's own random initialisation, which is what the
control `scratch` needs: a blanket Kaiming initialisation of a deep net with fresh batch norm collapses it and
would flatter any transfer.
"""

import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headstart.trainer.backbones import packaged
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_NUM_CLASSES = 1000  # of a torchvision model as it is built, before its classifier is taken away


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build a backbone and how to read other people's weights into it."""

    name: str
    """As a card writes it, `torchvision:resnet50`."""
    build: Callable[[], nn.Module]
    """A new module, [N, channels, S, S] float32 -> [N, D], with the architecture's own random
    initialisation."""
    num_features: int
    """D."""
    crop: int = 224
    """The input side S that the architecture is meant for."""
    fixed: bool = False
    """Whether it takes no other side than `crop`."""
    channels: int = 3
    """Channels of the input."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements that turn the published names of tensors into the module's."""
    dropped: str = r"(?!)"
    """Regular expression of the published tensors, after renaming, that the features do not need."""
    version: int = 1
    """Part of every fingerprint; raised when layer or pooling changes."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What is assumed of weights that come without a card: ImageNet's constants, resize to 8/7 of the
        crop."""
        return Preprocessing(resize=round(self.crop * 8 / 7), crop=self.crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def own_name(self, published: str) -> str | None:
        """Return the module's name of a published tensor; None where the features do not need it."""
        name = published
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return None if re.match(self.dropped, name) else name

    def check(self, preprocessing: Preprocessing) -> None:
        """Raise `SourceError` where the preprocessing does not give what the architecture takes."""
        if preprocessing.channels != self.channels:
            raise SourceError(
                f"{self.name} takes {self.channels} channel(s), the card's preprocessing.channels is "
                f"{preprocessing.channels}; set it to {self.channels}"
            )
        if self.fixed and preprocessing.crop != self.crop:
            raise SourceError(
                f"{self.name} takes {self.crop}x{self.crop} pixels alone, the card's preprocessing.crop "
                f"is {preprocessing.crop}; set it to {self.crop}, or choose an architecture of any size, "
                "such as torchvision:resnet50"
            )


def find_architecture(name: str) -> Architecture:
    """Return the architecture called `name`; raises `SourceError` with the nearest names where there is
    none."""
    if name in _PACKAGED:
        return _PACKAGED[name]
    if name in architecture_names():
        return _torchvision(name.removeprefix("torchvision:"))
    near = difflib.get_close_matches(name, architecture_names(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"accepted: {', '.join(architecture_names())}"
    raise SourceError(f"there is no architecture {name!r}; {hint}")


def build_architecture(name: str) -> tuple[nn.Module, int]:
    """Return a randomly initialised float32 module [N, C, S, S] -> [N, D], and D.

        module, num_features = build_architecture("torchvision:resnet50")

    Draws from torch's global generator: seed it first. Raises `SourceError` for an unknown architecture.
    """
    architecture = find_architecture(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # in another dtype other numbers would be drawn
    try:
        return architecture.build(), architecture.num_features
    finally:
        torch.set_default_dtype(before)


@functools.cache
def architecture_names() -> tuple[str, ...]:
    """Return every architecture that `build_architecture` knows."""
    import torchvision  # takes as long as torch itself, and most commands need neither names nor models

    models = torchvision.models.list_models(module=torchvision.models)
    return (*_PACKAGED, *(f"torchvision:{name}" for name in models))


_PACKAGED = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="headstart:craft-vgg16-bn",
            build=packaged.CraftVgg16,
            num_features=packaged.CraftVgg16.num_features,
            crop=64,
            renames=((r"^basenet\.slice[1-4]\.", "features."),),
            dropped=r"basenet\.slice5\.|upconv\d\.|conv_cls\.",
        ),
        Architecture(
            name="headstart:english-g2",
            build=packaged.EnglishG2,
            num_features=packaged.EnglishG2.num_features,
            crop=48,
            channels=1,
            renames=((r"^FeatureExtraction\.ConvNet\.", "features."),),
            dropped=r"SequenceModeling\.|Prediction\.",
        ),
        Architecture(
            name="headstart:mtcnn-onet",
            build=packaged.MtcnnOnet,
            num_features=packaged.MtcnnOnet.num_features,
            crop=48,
            fixed=True,
            renames=((r"^features\.", ""),),
            dropped=r"(conv|prelu)[56]",
        ),
        Architecture(
            name="headstart:efficientnet-lite0",
            build=packaged.EfficientNetLite0,
            num_features=packaged.EfficientNetLite0.num_features,
            crop=96,
            renames=(
                (r"^_conv_stem\.", "stem.0."),
                (r"^_bn0\.", "stem.1."),
                (r"^_conv_head\.", "head.0."),
                (r"^_bn1\.", "head.1."),
                (r"^_blocks\.", "blocks."),
                (r"\._expand_conv\.", ".expand.0."),
                (r"\._bn0\.", ".expand.1."),
                (r"\._depthwise_conv\.", ".depthwise.0."),
                (r"\._bn1\.", ".depthwise.1."),
                (r"\._project_conv\.", ".project.0."),
                (r"\._bn2\.", ".project.1."),
            ),
            dropped=r"_fc\.",
        ),
    )
}


@functools.cache
def _torchvision(name: str) -> Architecture:
    """Describe a torchvision model by building it once without memory, on the meta device."""
    import torchvision

    arguments: dict[str, Any] = {"weights": None}
    crop, fixed = 224, False
    if name.startswith(("vit_", "maxvit_")):
        fixed = True
    if name.startswith("vit_"):
        # ViT-H/14 has published weights for 518 pixels alone; the position embedding fixes the size for good.
        crop = torchvision.models.get_model_weights(name).DEFAULT.meta["min_size"][0]
        arguments["image_size"] = crop
    if name in ("inception_v3", "googlenet"):
        # The weights were ported from TensorFlow's scale: transform_input undoes ImageNet's constants.
        arguments |= {"aux_logits": False, "init_weights": True, "transform_input": True}
        crop = 299 if name == "inception_v3" else crop
    builder = torchvision.models.get_model_builder(name)
    try:
        with torch.device("meta"):
            classifier, num_features, _ = _classifier(builder(**arguments))
    except NotImplementedError:  # RegNet computes its widths with tensors
        classifier, num_features, _ = _classifier(builder(**arguments))

    def build() -> nn.Module:
        model: nn.Module = builder(**arguments)
        path, _, features = _classifier(model)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, features)
        return model

    return Architecture(
        name=f"torchvision:{name}",
        build=build,
        num_features=num_features,
        crop=crop,
        fixed=fixed,
        # DenseNet's published weights are older than its module: norm.1 is norm1 there.
        renames=((r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2."),),
        dropped=rf"{re.escape(classifier)}\.|aux1\.|aux2\.|AuxLogits\.",
    )


def _classifier(model: nn.Module) -> tuple[str, int, nn.Module]:
    """Return the classifier's path, the number of its inputs, and what stands in its place to give
    features."""
    import torchvision

    if isinstance(model, torchvision.models.SqueezeNet):  # its classifier is a convolution before the pooling
        return "classifier", 512, nn.AdaptiveAvgPool2d(1)
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    path, layer = layers[-1]
    if layer.out_features != _NUM_CLASSES:
        raise SourceError(f"{type(model).__name__} does not end in a linear classifier; choose another architecture")
    return path, layer.in_features, nn.Identity()

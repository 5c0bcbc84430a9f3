import itertools
import re

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.dataset import PARTS, ImageArrays, LabelledImages
from headstart.trainer.inputs.split import (
    duplicates_between,
    num_contents_of_several_classes,
    num_repeats,
    split_images,
)
from headstart.trainer.recipe import Split


def images_of(class_sizes, seed=0, parts=()):
    """Blank images, class i as often as class_sizes[i], shuffled by a seed; a split needs only labels."""
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    if seed is not None:
        np.random.default_rng(seed).shuffle(labels)
    arrays = ImageArrays(np.zeros((len(labels), 1, 1), dtype=np.uint8))
    digests = tuple(str(i) for i in range(len(labels)))
    classes = tuple(f"c{i}" for i in range(len(class_sizes)))
    brought = {name: np.flatnonzero(np.array(parts) == name) for name in PARTS if name in parts}
    return LabelledImages(classes, labels, digests, arrays, np.ones(len(labels), dtype=bool), brought)


def sizes(parts):
    return {name: len(indices) for name, indices in parts.items()}


def check_stratified(images, parts, within=1.0):
    """Each class has its share of each part, to the rounding, and one image at least."""
    overall = np.bincount(images.labels, minlength=len(images.classes))
    for indices in parts.values():
        counts = np.bincount(images.labels[indices], minlength=len(images.classes))
        ideal = overall * len(indices) / len(images)
        assert counts.min() >= 1
        assert (np.abs(counts - ideal) <= within).all()


def check_disjoint(images, parts):
    together = np.concatenate(list(parts.values()))
    assert len(set(together.tolist())) == len(together) <= len(images)
    assert all((np.diff(indices) > 0).all() for indices in parts.values())


def test_counts_and_rest():
    images = images_of([500] * 10)
    parts = split_images(images, Split(train=300, validation=300, test="rest"), seed=0)
    assert sizes(parts) == {"train": 300, "validation": 300, "test": 4400}
    check_disjoint(images, parts)
    check_stratified(images, parts, within=0)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (Split(), [70, 15, 15]),
        (Split(train=0.7, validation=0.15, test=0.15), [70, 15, 15]),
        (Split(train=20, validation=0.25, test="rest"), [20, 25, 55]),
        (Split(train="rest", validation=0.1, test=10), [80, 10, 10]),
        (Split(train=0.2, validation=0.2, test=0.2), [20, 20, 20]),
        (Split(train=30, validation=30, test=30), [30, 30, 30]),
    ],
    ids=["default", "fractions", "mixed", "train-rest", "fractions-leave-some", "counts-leave-some"],
)
def test_sizes(split, expected):
    images = images_of([40, 33, 27])
    parts = split_images(images, split, seed=1)
    assert list(sizes(parts).values()) == expected
    check_disjoint(images, parts)
    check_stratified(images, parts)


@pytest.mark.parametrize("size", [3, 4])
def test_a_small_class_leaves_one_image_for_each_part_to_come(size):
    images = images_of([50, size, size])
    for seed in range(5):
        parts = split_images(images, Split(train=48, validation=4, test="rest"), seed)
        assert all(np.bincount(images.labels[indices], minlength=3).min() >= 1 for indices in parts.values())


def test_the_seed_decides_which_of_equal_classes_gets_the_image_left_over():
    images = images_of([10, 10, 10])
    larger = {
        np.bincount(images.labels[split_images(images, Split(train=10, validation=9, test=9), seed)["train"]]).argmax()
        for seed in range(20)
    }
    assert larger == {0, 1, 2}


def test_fractions_are_rounded_together():
    parts = split_images(images_of([5, 5]), Split(train=0.5, validation=0.25, test=0.25), seed=0)
    assert sum(sizes(parts).values()) == 10  # 2.5 is not rounded up twice


@settings(max_examples=150, deadline=None)
@given(
    class_sizes=st.lists(st.integers(3, 60), min_size=2, max_size=8),
    shares=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
    rest=st.sampled_from([None, *PARTS]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_split_is_disjoint_stratified_and_of_its_size(class_sizes, shares, rest, seed):
    images = images_of(class_sizes)
    # Counts that can be met: at least one image of every class in every part.
    free = len(images) - 3 * len(class_sizes)
    wanted = [len(class_sizes) + int(free * share) for share in (*shares, 1 - sum(shares))]
    asked = {name: "rest" if name == rest else size for name, size in zip(PARTS, wanted, strict=True)}
    parts = split_images(images, Split(**asked), seed)
    expected = dict(zip(PARTS, wanted, strict=True))
    if rest is not None:
        expected[rest] = len(images) - sum(size for name, size in expected.items() if name != rest)
    assert sizes(parts) == expected
    check_disjoint(images, parts)
    small = min(class_sizes) * min(wanted) / len(images) < 1  # then the minimum of one bends the proportions
    check_stratified(images, parts, within=np.inf if small else 2.0)
    again = split_images(images_of(class_sizes), Split(**asked), seed)
    assert all(np.array_equal(parts[name], again[name]) for name in PARTS)


def test_the_seed_decides_and_nothing_else():
    images, split = images_of([30, 30]), Split(train=20, validation=20, test=20)
    np.random.seed(1)
    first = split_images(images, split, seed=7)
    np.random.seed(2)
    assert all(np.array_equal(first[name], split_images(images, split, seed=7)[name]) for name in PARTS)
    assert not np.array_equal(first["train"], split_images(images, split, seed=8)["train"])


def test_a_known_split_stays_as_it_is():
    # Runs are resumed and compared by their splits: a change of NumPy or of this code must not move them.
    parts = split_images(images_of([6, 4], seed=None), Split(train=4, validation=2, test=2), seed=0)
    assert {name: indices.tolist() for name, indices in parts.items()} == {
        "train": [2, 3, 6, 8], "validation": [1, 7], "test": [0, 9],
    }  # fmt: skip


def test_each_image_is_chosen_equally_often():
    images, split = images_of([10, 10]), Split(train=6, validation=6, test=8)
    chosen = np.zeros(20)
    for seed in range(400):
        chosen[split_images(images, split, seed)["train"]] += 1
    assert np.abs(chosen / 400 - 0.3).max() < 0.1  # 4.4 standard deviations


REFUSED = {
    "counts": (
        [50, 50],
        Split(train=60, validation=30, test=20),
        r"asks for 110 images .* there are 100 to divide",
    ),
    "counts-and-rest": (
        [50, 50],
        Split(train=60, validation=50, test="rest"),
        r"\(train 60, validation 50, test rest\)",
    ),
    "nothing-left": (
        [50, 50],
        Split(train=60, validation=40, test="rest"),
        r"test would have 0; .* so 2 or more",
    ),
    "fewer-than-classes": ([50, 50], Split(train=1, validation=40, test="rest"), r"train would have 1;"),
    "small-classes": (
        [50, 2, 1],
        Split(),
        r"in each of train, validation, test: c1 \(2\), c2 \(1\); 3 are needed",
    ),
    "small-fraction": ([3, 3], Split(train=0.1, validation=2, test=2), r"train would have 1;"),
}


@pytest.mark.parametrize(("class_sizes", "split", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(class_sizes, split, said):
    with pytest.raises(DataError, match=said):
        split_images(images_of(class_sizes), split, seed=0)


def test_a_division_that_does_for_many_small_classes_is_named():
    many = images_of([3] * 300)  # the default divides 900 images into parts of 630, 135 and 135
    with pytest.raises(DataError, match=r"--set 'data.split=({train: rest, validation: 300, test: 300})'$") as refused:
        split_images(many, Split(), seed=0)
    asked = yaml.safe_load(re.search(r"{.*}", str(refused.value))[0])
    assert sizes(split_images(many, Split(**asked), seed=0)) == {"train": 300, "validation": 300, "test": 300}
    with pytest.raises(DataError, match=r"so 300 or more: add images$"):
        split_images(images_of([2] * 300), Split(), seed=0)


def brought(*names):
    """200 images, the first 100 of which are train and the rest divided among the other parts."""
    others = list(itertools.islice(itertools.cycle(names[1:]), 100)) if len(names) > 1 else []
    return images_of([120, 80] if others else [60, 40], parts=[names[0]] * 100 + others)


def test_all_parts_brought_win_over_any_sizes():
    images = brought("train", "validation", "test")
    parts = split_images(images, Split(train=10, validation=10, test=10), seed=0)
    assert all(np.array_equal(parts[name], images.parts[name]) for name in PARTS)


@pytest.mark.parametrize(
    ("parts", "split", "expected"),
    [
        (("train", "test"), Split(), {"train": 85, "validation": 15, "test": 100}),
        (("train", "test"), Split(train=300, validation=20), {"train": 80, "validation": 20, "test": 100}),
        (
            ("train", "test"),
            Split(train=30, validation="rest", test=5),
            {"train": 35, "validation": 65, "test": 100},
        ),
        (("train", "validation"), Split(), {"train": 85, "validation": 100, "test": 15}),
        (("train", "validation"), Split(train=0.5, test=0.2), {"train": 80, "validation": 100, "test": 20}),
        (("train", "validation"), Split(train=50, validation=1), {"train": 51, "validation": 100, "test": 49}),
        (("train", "validation"), Split(train=300, test=20), {"train": 80, "validation": 100, "test": 20}),
        (
            ("train", "validation"),
            Split(train="rest", validation=300, test=0.1),
            {"train": 90, "validation": 100, "test": 10},
        ),
        (("train", "validation", "test"), Split(), {"train": 100, "validation": 50, "test": 50}),
        (("train",), Split(), {"train": 70, "validation": 15, "test": 15}),
        (("train",), Split(train=10, validation=10, test=10), {"train": 10, "validation": 10, "test": 10}),
    ],
    ids=str,
)
def test_missing_parts_are_carved_from_train(parts, split, expected):
    images = brought(*parts)
    result = split_images(images, split, seed=0)
    assert sizes(result) == expected
    check_disjoint(images, result)
    for name in parts[1:]:
        assert np.array_equal(result[name], images.parts[name])
    assert set(result["train"]) <= set(images.parts["train"])


def test_what_is_carved_from_train_is_never_of_the_test_images_that_come_before_it():
    images = images_of([120, 80], parts=["test"] * 100 + ["train"] * 100)
    parts = split_images(images, Split(), seed=0)
    check_disjoint(images, parts)
    assert set(parts["train"]) | set(parts["validation"]) == set(range(100, 200))


def test_duplicates_are_counted():
    images = images_of([4, 4])
    object.__setattr__(images, "digests", ("a", "b", "c", "a", "a", "d", "b", "e"))
    assert duplicates_between(images, [0, 1, 2], [3, 4, 5, 6, 7]) == 3
    assert duplicates_between(images, [2], [5, 7]) == 0
    assert duplicates_between(images, [], [0]) == 0
    assert num_repeats(images, range(8)) == 3  # a twice more, b once
    assert num_repeats(images, [3, 7, 4]) == 1
    assert num_repeats(images, [0, 1, 2]) == num_repeats(images, []) == 0


def test_contents_under_several_classes_are_counted_once_each():
    images = images_of([4, 2, 2], seed=None)
    assert num_contents_of_several_classes(images) == 0
    object.__setattr__(images, "digests", ("a", "a", "b", "c", "b", "b", "b", "c"))  # a: 0; b: 0, 1, 2; c: 0, 2
    assert num_contents_of_several_classes(images) == 2

"""Dividing labelled images into train, validation and test, every class in the same proportion.

    parts = split_images(images, recipe.data.split, recipe.seed)
    images.subset(parts["train"])

A division depends on the labels, the sizes and the seed, and on no random state that something else could
have moved.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.dataset import PARTS, LabelledImages, some
from headstart.trainer.recipe import Size, Split

Indices = npt.NDArray[np.int64]


def split_images(images: LabelledImages, split: Split, seed: int) -> dict[str, Indices]:
    """Return sorted, disjoint indices for train, validation and test.

    Parts that the data brings win over the recipe's sizes. Where it brings validation or test, what it lacks is
    carved from its training images by its size (`rest`: what all three sizes would leave of them), and train keeps
    what is left. Other data is divided by all three sizes, and what they leave over is not used. Fractions are of the
    images being divided. Every class gets its proportion of each part, and at least one image.

    Raises DataError for sizes that need more images than there are, and for classes too small to be in every
    part.
    """
    sizes: dict[str, Size] = {name: getattr(split, name) for name in PARTS}
    divided = images.parts.get("train", np.arange(len(images), dtype=np.int64))
    brought = {name: indices for name, indices in images.parts.items() if name != "train"}
    if brought:
        carved = {name: size for name, size in sizes.items() if name != "train" and name not in brought}
        if "rest" in carved.values():
            carved = {name: size for name, size in _resolve(sizes, len(divided)).items() if name in carved}
        sizes = {"train": "rest", **carved}
    num_images = _resolve(sizes, len(divided))
    _check_sizes(num_images, sizes, len(divided), len(images.classes))
    parts = {name: divided[chosen] for name, chosen in _divide(images, divided, num_images, seed).items()}
    return {name: np.sort((parts | brought)[name]) for name in PARTS}


def duplicates_between(images: LabelledImages, left: npt.ArrayLike, right: npt.ArrayLike) -> int:
    """Count the images at `right` whose very content is also at `left`.

        leaked = duplicates_between(images, parts["train"], parts["test"])

    A leak between train and test makes a test flatter; it is the data's, so it is reported and not mended.
    """
    seen = {images.digests[i] for i in np.asarray(left, dtype=np.int64)}
    return sum(images.digests[i] in seen for i in np.asarray(right, dtype=np.int64))


def num_repeats(images: LabelledImages, indices: npt.ArrayLike) -> int:
    """Count the images at `indices` whose very content is also at an earlier one of them.

    An interval of the accuracy takes each for a new observation, and is too narrow by as many.
    """
    digests = [images.digests[i] for i in np.asarray(indices, dtype=np.int64)]
    return len(digests) - len(set(digests))


def num_contents_of_several_classes(images: LabelledImages) -> int:
    """Count the contents that are there under more than one class, of which a model can learn one at most.

    They are the data's, as duplicates are, so they too are reported and not mended.
    """
    num_classes = Counter(digest for digest, _ in set(zip(images.digests, images.labels.tolist(), strict=True)))
    return sum(num > 1 for num in num_classes.values())


def _resolve(sizes: dict[str, Size], num_divided: int) -> dict[str, int]:
    """Turn counts, fractions and `rest` into numbers of images."""
    fractions = {name: size * num_divided for name, size in sizes.items() if isinstance(size, float)}
    # Rounded together, so that .7 + .15 + .15 of 10 images is 10 and not 11.
    rounded = _apportion(np.array(list(fractions.values())), round(sum(fractions.values())))
    result = {name: int(size) for name, size in zip(fractions, rounded, strict=True)}
    result |= {name: size for name, size in sizes.items() if isinstance(size, int)}
    rest = num_divided - sum(result.values())
    if rest < 0:
        raise DataError(
            f"data.split asks for {sum(result.values()):,} images ({_asked(sizes)}) and there are {num_divided:,}"
            " to divide; lower the sizes, or use fractions and rest"
        )
    return {name: result.get(name, rest) for name in sizes}


def _check_sizes(num_images: dict[str, int], sizes: dict[str, Size], num_divided: int, num_classes: int) -> None:
    """Refuse numbers of images that leave a part without one of every class."""
    small = [f"{name} would have {num:,}" for name, num in num_images.items() if num < num_classes]
    if small:
        smallest = f"{{train: rest, validation: {num_classes}, test: {num_classes}}}"
        enough = num_divided >= num_classes * len(sizes)
        raise DataError(
            f"data.split ({_asked(sizes)}) divides {num_divided:,} images of {num_classes} classes so that "
            f"{some(small)}; each part needs one image of every class, so {num_classes} or more: "
            + (f"change the sizes, as by --set 'data.split={smallest}'" if enough else "add images")
        )


def _asked(sizes: dict[str, Size]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _divide(images: LabelledImages, divided: Indices, sizes: dict[str, int], seed: int) -> dict[str, Indices]:
    """Choose positions in `divided` for each part."""
    labels = images.labels[divided]
    left = np.bincount(labels, minlength=len(images.classes))
    few = [f"{images.classes[i]} ({left[i]})" for i in np.flatnonzero(left < len(sizes))]
    if few:
        raise DataError(
            f"these classes have too few images to be in each of {', '.join(sizes)}: {some(few)}; "
            f"{len(sizes)} are needed of each: add images of them, or leave these classes out"
        )
    # A bit generator's stream is fixed by NumPy's promise; what its `permutation` makes of it is not.
    bits = np.random.PCG64(seed)
    order = np.argsort(bits.random_raw(len(labels)), kind="stable")
    tie_breaks = np.argsort(bits.random_raw(len(left)), kind="stable")
    by_class = _group(order, labels, len(left))
    result: dict[str, Indices] = {}
    taken = np.zeros_like(left)
    for position, (name, size) in enumerate(sizes.items()):
        reserve = len(sizes) - position - 1  # one image of every class for each part still to come
        num_each = _apportion(left * (size / left.sum()), size, 1, left - reserve, tie_breaks)
        result[name] = np.concatenate(
            [group[start : start + num] for group, start, num in zip(by_class, taken, num_each, strict=True)]
        )
        taken, left = taken + num_each, left - num_each
    return result


def _group(order: Indices, labels: npt.NDArray[np.int64], num_classes: int) -> list[Indices]:
    """Split an order of samples by class, keeping it within each."""
    grouped = order[np.argsort(labels[order], kind="stable")]
    return np.split(grouped, np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def _apportion(
    ideal: npt.NDArray[np.float64],
    total: int,
    least: int = 0,
    most: Indices | None = None,
    tie_breaks: Indices | None = None,
) -> Indices:
    """Round ideal shares [C] to whole numbers from `least` to `most` that add up to `total`.

    The largest remainders are rounded up. There must be a solution: C * least <= total <= sum(most).
    """
    ties = np.arange(len(ideal)) if tie_breaks is None else tie_breaks
    limit = np.full(len(ideal), total) if most is None else most
    share = np.clip(np.floor(ideal + 1e-9).astype(np.int64), least, limit)
    while (missing := total - int(share.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(share < limit if step > 0 else share > least)
        gap = step * (ideal - share)[movable]
        share[movable[np.lexsort((ties[movable], -gap))[: abs(missing)]]] += step
    return share

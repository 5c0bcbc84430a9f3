"""Batches of pixels: the same whatever the images' size, and few large images whole at a time."""

import numpy as np
import pytest
import torch

from headstart.trainer.inputs import batches as module
from headstart.trainer.inputs.batches import pixel_batches, to_pixels
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing

PREPROCESS = Preprocess(Preprocessing(resize=8, crop=8, mean=(0.5,) * 3, std=(0.25,) * 3))


def images(*sizes: tuple[int, int]) -> LabelledImages:
    rng = np.random.default_rng(0)
    storage = ImageArrays(tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes))
    labels = np.arange(len(sizes)) % 2
    return LabelledImages(("a", "b"), labels, storage.digests(), storage, storage.grey())


@pytest.mark.parametrize(
    "sizes", [[(40, 30)] * 5, [(40, 30), (10, 12), (41, 30), (10, 12), (9, 50)]], ids=["one-size", "mixed-sizes"]
)
def test_large_images_have_the_bits_of_small_ones(monkeypatch, sizes):
    data, order = images(*sizes), [np.array([3, 0, 1]), np.array([4, 2])]
    small = list(pixel_batches(data, order, PREPROCESS))
    monkeypatch.setattr(module, "_LARGE", 1000)
    large = list(pixel_batches(data, order, PREPROCESS))
    assert all(torch.equal(s, batch) for s, batch in zip(small, large, strict=True))
    assert torch.equal(torch.cat(large), to_pixels([data.image(i) for i in (3, 0, 1, 4, 2)], PREPROCESS))


def test_large_images_are_not_resized_together(monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 1000)
    together: list[int] = []
    hook = PREPROCESS.register_forward_pre_hook(lambda _, inputs: together.append(len(inputs[0])))
    try:
        list(pixel_batches(images(*[(40, 30)] * 6), [np.arange(6)], PREPROCESS))
    finally:
        hook.remove()
    assert together == [1] * 6

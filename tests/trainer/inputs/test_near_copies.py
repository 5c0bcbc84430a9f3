"""Images saved anew are known by their pixels, and different ones are told apart."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from headstart.trainer.inputs.batches import to_pixels
from headstart.trainer.inputs.images import read_image
from headstart.trainer.inputs.near_copies import near_copies
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing

SMALL = Preprocess(Preprocessing(resize=16, crop=16, channels=1, mean=(0.0,), std=(1.0,)))


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray]:
    return [np.repeat(digit[:, :, None], 3, axis=2) for digit in (load_digits().images * 15.94).astype(np.uint8)]


def saved(image: np.ndarray, **how: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **how)
    return read_image(file.getvalue())


def pixels(images: list[np.ndarray]) -> np.ndarray:
    return to_pixels(images, SMALL).flatten(1).numpy()


def test_digits_saved_as_jpeg_are_found_and_others_are_not(digits: list[np.ndarray]):
    everything = pixels(digits)
    assert not near_copies(everything[::2], everything[1::2]).any()
    again = pixels([saved(digit, quality=90) for digit in digits[:200]])
    assert near_copies(again, everything).all()
    assert not near_copies(again, everything[200:]).any()
    assert near_copies(again * 7, everything * 7).all()  # in whatever unit


def test_what_is_one_colour_is_no_copy(digits: list[np.ndarray]):
    white = np.full((8, 8, 3), 255, np.uint8)
    assert near_copies(pixels([white, digits[0]]), pixels([white, digits[0]])).tolist() == [False, True]

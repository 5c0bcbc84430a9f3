"""Which images are those of others saved anew: another file, and nearly the same pixels."""

import numpy as np
import torch

from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks

# Root mean square difference of two pictures, in deviations of the pixels of one. Of 16x16 pixels, on digits (MNIST's
# 5,000, scikit-learn's 1,797) and 64x64 patches of photographs, an image saved as JPEG of quality 90 is off by .015 to
# .023 in the median, and .032 at most on digits; different ones by .089 at least.
_NEAR = 0.05


def near_copies(pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Say of each row of pixels [M, D] whether a row of `known` [N, D] differs from it by no more than saving does.

        near_copies(test_pixels, train_pixels)      # bool [M]

    Differences are relative to the row's own deviation, since what a lossy format leaves out is as well; an image of
    one colour has none, and is never a near copy.
    """
    found = nearest_neighbours(torch.from_numpy(pixels), RaggedTasks.from_list([torch.from_numpy(known)]))
    differences = found.distances[:, 0].numpy() / np.sqrt(pixels.shape[1])
    near: np.ndarray = differences < _NEAR * pixels.std(axis=1)
    return near

"""Drift: how far the features of live images have moved from those of the training images.

With the training images' mean m and their root mean square distance s from it, both in the package's manifest, and
the live images' mean x of n rows, the distance is

    sqrt(max(0, ||x - m||^2 / s^2 - 1/n - 1/N)),    N training images:

the Euclidean form of the distance between tasks, in units of s. Where live images are drawn as the training images
were, ||x - m||^2 is s^2 (1/n + 1/N) on average and not 0, which is why that is taken off: without it 32 rows alone
would read as 0.18.

What is left near 0 is chance: of independent rows whose features vary in ten directions or more up to about
sqrt(1.3 / n), which is 0.2 at 32 rows and 0.03 once the window is full (n is twice its length then); rows that are not
independent, as the frames of one camera, count for fewer. At 1 the live mean is as far off as a training image is. On
the pixels of handwritten digits, with 900 for training and 897 live: 0.00 for the rest of the digits (0.04 before what
is taken off), 0.34 where almost half are zeros, 0.77 for zeros alone, 2.4 for the negatives.
"""

import math
import random
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.serving.errors import PackageError
from headstart.serving.manifest import Drift

WINDOW = 1024
"""Rows that the mean remembers: each new row has this share of it, so that a change shows after about as many."""
LEAST_ROWS = 32
"""Rows before which there is no distance: it would be chance."""


class DriftGauge:
    """The running mean of live features beside the training features' mean. Safe to use from several threads.

        gauge = DriftGauge(manifest.drift, share=0.1)
        if gauge.due():
            gauge.observe(features)  # float32 [N, D]
        distance(gauge.state())

    Args:
        training: from the package's manifest.
        share: of the executions, 0 to 1, drawn at random.

    Raises:
        PackageError: a share that is none.
    """

    def __init__(self, training: Drift, share: float) -> None:
        self.training = training
        self._share = check_share(share)
        self._training_mean = np.array(training.mean)
        self._training_noise = 1 / training.num_images
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        with self._lock:
            self._rows = 0
            self._mean = np.zeros(len(self._training_mean))
            self._noise = 1.0  # sum of the rows' squared weights: one over the rows that the mean is worth

    def due(self) -> bool:
        """Whether this execution is one to look at."""
        return random.random() < self._share

    def observe(self, features: NDArray[np.float32]) -> None:
        """Take in the features of some images, [N, D]; rows that are not finite are left out."""
        rows = features[np.isfinite(features).all(axis=1)]
        if not len(rows):
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        with self._lock:
            # A plain mean until the window is full, then one that forgets.
            weight = len(rows) / min(self._rows + len(rows), max(WINDOW, len(rows)))
            self._rows += len(rows)
            self._mean += weight * (mean - self._mean)
            self._noise = (1 - weight) ** 2 * self._noise + weight**2 / len(rows)

    def state(self) -> dict[str, Any]:
        """What `distance` needs, as JSON has it; the states of several processes are added number by number."""
        with self._lock:
            worth = 1 / self._noise if self._rows else 0.0
            offset = (self._mean - self._training_mean) / self.training.spread
            return {
                "rows": self._rows,
                "worth": worth,
                "offset": (worth * offset).tolist(),
                "training_noise": worth * self._training_noise,
            }


def distance(state: dict[str, Any]) -> float | None:
    """The distance above, 0 or more; None before there are enough rows."""
    if state["rows"] < LEAST_ROWS:
        return None
    worth = state["worth"]
    squared = sum(value * value for value in state["offset"]) / worth**2
    return math.sqrt(max(0.0, squared - 1 / worth - state["training_noise"] / worth))


def check_share(share: float) -> float:
    """A share of executions, or the refusal of what is none.

    Raises:
        PackageError: it is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise PackageError(f"the share for drift is {share:g}; accepted: 0 (off) to 1 (every execution)")
    return share

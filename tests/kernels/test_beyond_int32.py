"""Tensors of more than 2^31 elements, whole: the last tasks of one have the distances that they have by themselves."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.mmd import MMD, mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks

DIM, TASKS, LAST = 2048, 30_000, 5
ROWS = 2**31 // DIM + 5000
BYTES = 4 * ROWS * DIM


def available() -> int:
    """Bytes that the machine can still give."""
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_last_tasks_are_what_they_are_by_themselves():
    if available() < 1.4 * BYTES:
        pytest.skip(f"needs {1.4 * BYTES / 1e9:.0f} GB of memory")
    torch.manual_seed(0)
    features = torch.empty(ROWS, DIM)
    for first in range(0, ROWS, 1 << 16):
        features[first : first + (1 << 16)].normal_()
    assert features.numel() > 2**31
    offsets = torch.arange(TASKS + 1) * ROWS // TASKS
    start = int(offsets[-LAST - 1])
    tasks = RaggedTasks(features, offsets)
    last = RaggedTasks(features[start:].clone(), offsets[-LAST - 1 :] - start)
    target = features[-8:] + 0.1
    assert torch.equal(euclidean_distances(target, tasks)[-LAST:], euclidean_distances(target, last))
    # Where a task lies in a stripe decides how its products are rounded: d^2 is off by some sqrt(D) u (|x|^2 + |y|^2),
    # d by that over 2 d, with d about 64 here, and a Gaussian by that over 2 sigma^2; four means make a distance.
    of_squares = DIM**0.5 * 2**-24 * 2 * float(last.features.square().sum(1).max())
    sigmas = [30.0, 60.0]
    for function, error in (
        (energy_distances, 4 * of_squares / (2 * 60)),
        (partial(mmd_distances, bandwidths=sigmas), 4 * of_squares / (2 * 30**2)),
    ):
        found, expected = (function(target, one) for one in (tasks, last))
        if isinstance(found, MMD):
            found, expected = found.distances, expected.distances
        assert float((found[-LAST:] - expected).abs().max()) <= error
        assert float(expected.max() - expected.min()) > 5 * error, "another task would not be taken for it"
    assert nearest_neighbours(target, tasks).rows[:, 0].tolist() == list(range(ROWS - 8, ROWS))

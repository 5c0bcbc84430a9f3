"""Tensors of more than 2^31 elements, whole: the last tasks of one have the distances that they have by themselves."""

import re
from pathlib import Path

import pytest
import torch

from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks

DIM, TASKS, LAST = 2048, 3000, 5
ROWS = 2**31 // DIM + 5000
BYTES = 4 * ROWS * DIM


def available() -> int:
    """Bytes that the machine can still give."""
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


@pytest.mark.slow
def test_the_last_tasks_are_what_they_are_by_themselves():
    if available() < 1.4 * BYTES:
        pytest.skip(f"needs {1.4 * BYTES / 1e9:.0f} GB of memory")
    features = torch.empty(ROWS, DIM)
    for first in range(0, ROWS, 1 << 16):
        features[first : first + (1 << 16)].normal_()
    assert features.numel() > 2**31
    offsets = torch.arange(TASKS + 1) * ROWS // TASKS
    start = int(offsets[-LAST - 1])
    tasks = RaggedTasks(features, offsets)
    last = RaggedTasks(features[start:].clone(), offsets[-LAST - 1 :] - start)
    target = features[-8:] + 0.1
    for function in (euclidean_distances, energy_distances):
        assert torch.equal(function(target, tasks)[-LAST:], function(target, last))
    sigmas = [30.0, 60.0]
    found = mmd_distances(target, tasks, bandwidths=sigmas).distances[-LAST:]
    assert torch.equal(found, mmd_distances(target, last, bandwidths=sigmas).distances)
    assert nearest_neighbours(target, tasks).rows[:, 0].tolist() == list(range(ROWS - 8, ROWS))

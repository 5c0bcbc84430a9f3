"""The classes of labelled, ragged tasks, as sets of rows of their own."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine.ground_cost import LEAST_CHUNK, Cost, Points, chunk_bytes
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.transport import Settings
from headstart.kernels.ragged import RaggedTasks

_PAIR_BYTES = 512
"""What a pair takes beside its rows: its numbers, offsets and index, as tensors and as Python's."""


class ClassRows(NamedTuple):
    """The classes of T tasks: class c has the rows order[offsets[c]] up to order[offsets[c + 1]]."""

    points: Points
    order: Tensor
    offsets: Tensor
    """[C + 1] int64 on the CPU, over all tasks."""
    first: Tensor
    """[T + 1] int64 on the CPU: the classes of task t are first[t] up to first[t + 1]."""
    values: Tensor
    """OT(y, y) of each, [C] float64, where label distances are Sinkhorn divergences; else 0."""

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.offsets) - 1

    def rows(self, low: int, high: int) -> RaggedTasks:
        """Classes low to high, as tasks: a copy of their rows."""
        offsets = self.offsets[low : high + 1]
        index = self.order[int(offsets[0]) : int(offsets[-1])]
        return RaggedTasks(self.points.features[index], offsets - offsets[0])

    def some(self, indices: list[int]) -> Points:
        """Classes of these numbers, as sets: a copy of their rows."""
        offsets = self.offsets.tolist()
        index = torch.cat([self.order[offsets[c] : offsets[c + 1]] for c in indices])
        sizes = self.offsets.diff()[indices]
        return Points(self.points.features[index], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))


def class_rows(tasks: RaggedTasks, cost: Cost, settings: Settings) -> ClassRows:
    """The classes of labelled tasks; ValueError where the memory cannot hold what their label distances take."""
    assert tasks.labels is not None
    device = tasks.features.device
    task = torch.repeat_interleave(torch.arange(tasks.num_tasks), tasks.sizes).to(device)
    # A class for each label of each task, by task and then by label.
    _, ranks = tasks.labels.unique(return_inverse=True)
    keys, classes, counts = (task * (int(ranks.max()) + 1) + ranks).unique(return_inverse=True, return_counts=True)
    first = torch.searchsorted(keys // (int(ranks.max()) + 1), torch.arange(tasks.num_tasks + 1, device=device)).cpu()
    points = Points(tasks.features.detach(), tasks.offsets, classes, classes - first.to(device)[task])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0).cpu()])
    least = 4 * int(counts.max()) * tasks.num_features * tasks.features.element_size()
    fit_memory(settings.memory, least, ", four times the largest class")
    # Half is for label distances, half for the rows of classes: see `chunks`.
    fit_memory(settings.memory, 2 * chunk_bytes(tasks.features, LEAST_CHUNK, cost))
    values = torch.zeros(len(counts), dtype=torch.float64, device=device)
    return ClassRows(points, classes.argsort(stable=True), offsets, first, values)


def each(classes: ClassRows) -> Iterator[Tensor]:
    """The rows of one class after the other."""
    for c in range(classes.num_classes):
        yield classes.rows(c, c + 1).features


def pairs(classes: ClassRows, settings: Settings) -> Iterator[tuple[list[int], list[int]]]:
    """Every two classes of one task, as many at a time as have rows that fill a quarter of the memory, or one pair.

    The larger of two comes first, so that pairs of like sizes are alike.
    """
    memory, features, first = fit_memory(settings.memory, 0), classes.points.features, classes.first.tolist()
    found = torch.cat([low + torch.triu_indices(high - low, high - low, 1) for low, high in pairwise(first)], 1)
    sizes = classes.offsets.diff()[found]
    found = found.gather(0, sizes.argsort(dim=0, descending=True, stable=True))
    ends, low = (sizes.sum(0) * features.shape[1] * features.element_size() + _PAIR_BYTES).cumsum(0), 0
    while low < len(ends):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(torch.searchsorted(ends, before + memory // 4, right=True)))
        left, right = found[:, low:high].tolist()
        yield left, right
        low = high


def chunks(
    classes: ClassRows, settings: Settings, low: int = 0, high: int | None = None
) -> Iterator[tuple[int, int, RaggedTasks]]:
    """(first, end, rows) of runs of the classes low to high, whose rows fill an eighth of the memory, or one class."""
    memory, features = fit_memory(settings.memory, 0), classes.points.features
    most = max(1, memory // 8 // (features.shape[1] * features.element_size()))
    high = classes.num_classes if high is None else high
    while low < high:
        end = int(torch.searchsorted(classes.offsets, classes.offsets[low] + most, right=True)) - 1
        end = min(max(low + 1, end), high)
        yield low, end, classes.rows(low, end)
        low = end

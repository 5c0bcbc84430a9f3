"""Distances between the classes of labelled sets, W^2 of their rows: what a label-aware transport costs, and moves."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine.classes import ClassRows, chunks, class_rows, pairs
from headstart.kernels.engine.ground_cost import LEAST_CHUNK, Cost, Points, chunk_bytes
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.transport import Settings, solve
from headstart.kernels.engine.transport_operators import as_points, sinkhorn_gradient, transports, warn_of
from headstart.kernels.frechet import frechet_gradient, frechet_table, least_bytes
from headstart.kernels.ragged import RaggedTasks


class How(NamedTuple):
    """What label distances and transports are told."""

    label_distance: str
    precision: str
    centre: Tensor | None
    settings: Settings

    @property
    def cost(self) -> Cost:
        """Of rows, without a label term."""
        return Cost(2, None, self.precision, self.centre)

    def cost_with(self, table: Tensor) -> Cost:
        """Of rows and classes, with the table of `cross_table` or `own_table`."""
        return self.cost._replace(labels=table)


def sides(
    target: Tensor, labels: Tensor, features: Tensor, task_labels: Tensor, offsets: Tensor, how: How
) -> tuple[ClassRows, ClassRows]:
    """The classes of the target and of the tasks."""
    sets = (
        RaggedTasks(target, torch.tensor([0, len(target)]), labels),
        RaggedTasks(features, offsets, task_labels),
    )
    own, sources = (class_rows(tasks, how.cost, how.settings) for tasks in sets)
    return own, sources


def with_values(classes: ClassRows, how: How) -> ClassRows:
    """The classes, and what each brings to all of its label distances."""
    if how.label_distance == "bures":
        return classes
    values = []
    for _, _, some in chunks(classes, how.settings):
        settings = how.settings._replace(memory=_half(some.features, how))
        itself = solve(Points(some.features, some.offsets), None, how.cost, settings)
        warn_of(itself.errors, settings)
        values.append(itself.values)
    return classes._replace(values=torch.cat(values))


def _half(rows: Tensor, how: How, classes: RaggedTasks | None = None) -> int:
    """Half of the memory, which is for label distances, Bures' with `classes`. ValueError where it is too little."""
    least = chunk_bytes(rows, LEAST_CHUNK, how.cost) if classes is None else least_bytes(rows, classes)
    return fit_memory(how.settings.memory, 2 * least) // 2


def _bures(some: RaggedTasks, others: RaggedTasks | None, how: How) -> Tensor:
    largest = some.task(int(some.sizes.argmax()))
    return frechet_table(some, others, _half(largest, how, some if others is None else others))


def squares(some: RaggedTasks, others: RaggedTasks, values: Tensor, theirs: Tensor, how: How) -> Tensor:
    """W^2 of each of C classes to each of K others, [C, K] float64.

    `values`, `theirs`: what `with_values` says of the classes, [C], and of the others, [K].
    """
    if how.label_distance == "bures":
        return _bures(some, others, how)
    settings = how.settings._replace(memory=_half(some.features, how))
    sets = Points(others.features, others.offsets)
    table = torch.zeros(len(values), len(theirs), dtype=torch.float64, device=values.device)
    for c in range(len(values)):
        cross = solve(sets, as_points(some.task(c)), how.cost, settings)
        warn_of(cross.errors, settings)
        table[c] = _divergence(cross.values, values[c], theirs)
    return table


def _divergence(cross: Tensor, values: Tensor, theirs: Tensor) -> Tensor:
    """W^2 from OT(x, y), OT(x, x) and OT(y, y): twice the Sinkhorn divergence."""
    return (2 * cross - values - theirs).clamp_(min=0)


def squares_gradient(rows: Tensor, classes: RaggedTasks, weights: Tensor, how: How) -> Tensor:
    """sum_c w_c dW^2_c / d rows of `squares`, like the rows."""
    settings, sets = how.settings, (classes.features, classes.offsets)
    moved: Tensor
    if how.label_distance == "bures":
        moved = frechet_gradient(rows, *sets, weights, _half(rows, how, classes))
    else:
        memory = _half(rows, how)
        epsilon = torch.tensor(settings.epsilon, dtype=torch.float64)
        options = (2, epsilon, settings.tolerance, settings.max_iterations, how.precision, memory, how.centre)
        potentials = transports(rows, *sets, *options)[5:]
        # Of OT(x, x), once in every distance, a half is taken off.
        parts = (2 * weights, -weights.sum())
        moved = sinkhorn_gradient(rows, *sets, *potentials, *parts, 2, epsilon, how.precision, memory, how.centre)
    return moved


def cross_table(own: ClassRows, sources: ClassRows, how: How) -> Tensor:
    """Half of W^2 between the classes of the tasks and those of the target, [C of the tasks, C of the target]."""
    table = own.values.new_empty(sources.num_classes, own.num_classes)
    for a, b, mine in chunks(own, how.settings):
        for low, high, some in chunks(sources, how.settings):
            table[low:high, a:b] = squares(mine, some, own.values[a:b], sources.values[low:high], how).T
    return table.div_(2).to(how.cost.dtype)


def own_table(classes: ClassRows, how: How) -> Tensor:
    """Half of W^2 between the classes of each task, [C, most classes of a task], 0 on the diagonals."""
    table = classes.values.new_zeros(classes.num_classes, int(classes.first.diff().max()))
    if how.label_distance == "bures":
        _fill_bures(table, classes, how)
    else:
        _fill_sinkhorn(table, classes, how)
    return table.div_(2).to(how.cost.dtype)


def _fill_bures(table: Tensor, classes: ClassRows, how: How) -> None:
    """W^2 of the classes of each task."""
    for start, end in pairwise(classes.first.tolist()):
        for a, b, mine in chunks(classes, how.settings, start, end):
            table[a:b, a - start : b - start] = _bures(mine, None, how)
            for low, high, others in chunks(classes, how.settings, b, end):
                found = _bures(mine, others, how)
                table[a:b, low - start : high - start] = found
                table[low:high, a - start : b - start] = found.T


def _fill_sinkhorn(table: Tensor, classes: ClassRows, how: How) -> None:
    """As `_fill_bures`, of the pairs of many tasks at a time: those of one are few, and small."""
    values = classes.values
    places = torch.cat([torch.arange(number) for number in classes.first.diff().tolist()]).to(table.device)
    for left, right in pairs(classes, how.settings):
        sets = classes.some(left), classes.some(right)
        cross = solve(*sets, how.cost, how.settings._replace(memory=_half(sets[0].features, how)))
        warn_of(cross.errors, how.settings)
        found = _divergence(cross.values, values[left], values[right])
        table[left, places[right]] = found
        table[right, places[left]] = found

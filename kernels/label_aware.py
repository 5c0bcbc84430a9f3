"""Label-aware transport distances (OTDD) between a labelled target and many labelled, ragged tasks."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from headstart.kernels.engine.ground_cost import Cost, Points
from headstart.kernels.engine.precision import PRECISIONS
from headstart.kernels.engine.terms import needed_centre
from headstart.kernels.engine.transport import Settings, check_memory, solve
from headstart.kernels.engine.transport_operators import warn_of
from headstart.kernels.frechet import frechet_distances
from headstart.kernels.ragged import RaggedTasks, check_alike, check_finite, check_labels, check_not_negative
from headstart.kernels.sinkhorn import (
    SinkhornResult,
    SinkhornSelfTerms,
    check_self_terms,
    checked_options,
    resolve_epsilon,
    sinkhorn_distances,
)

LabelDistance = Literal["bures", "sinkhorn"]


@torch.no_grad()
def label_aware_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    labels: Tensor,
    label_distance: LabelDistance = "bures",
    epsilon: float | Tensor | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    precision: str | None = None,
    memory: int | None = None,
    self_terms: SinkhornSelfTerms | None = None,
) -> SinkhornResult:
    """Distance of a labelled target x [N, D] to each of T labelled, ragged tasks y [n_t, D]; smaller is closer.

    `sinkhorn_distances` with p = 2 at the cost (|x - y|^2 + W^2(class of x, class of y)) / 2: rows are near where they
    and the rows that share their labels are. Labels are never compared as numbers: tasks may name classes as they like.
    W^2 between the rows of two classes is

    - `bures`: `frechet_distances`, the squared 2-Wasserstein distance of the Gaussians with the classes' moments;
    - `sinkhorn`: twice `sinkhorn_distances` at the same epsilon, which tends to W^2 itself as epsilon gets small.

        label_aware_distances(target, tasks, labels=labels)        # labels [N] int64; tasks.labels are theirs
        kept = label_aware_self_terms(tasks, epsilon=0.7)          # for many targets

    D. Alvarez-Melis and N. Fusi, "Geometric Dataset Distances via Optimal Transport", NeurIPS 2020;
    `naive.label_aware_distances` is the definition. Debiased: a labelled set is at distance 0 from itself. Not
    differentiable. Cost: that of `sinkhorn_distances`, and a label distance for every pair of a class of the target and
    one of a task, and of two classes of one set.

    `epsilon` None is that of `sinkhorn_distances`, from the target's rows alone. `tolerance`, `max_iterations`,
    `precision`, `memory`, `self_terms` and the error are as there, c being the largest cost with its label term;
    `memory` leaves out tables as large as the pairs of classes. A label distance "sinkhorn" has the error of
    `sinkhorn_distances` itself. The value is not clamped at 0: it can be negative by the error, and at a large epsilon
    by more, because Bures distances in two or more dimensions are not negative definite: two crosses at 45 degrees, a
    class an arm of length 1, are at -0.19 at epsilon = 10. At epsilon 0.1 and 1.0 that was never seen.
    ValueError: as for `sinkhorn_distances`; tasks without labels; labels of another length, dtype or device, or
    negative; a label distance that is not accepted; a bound that cannot hold four times the largest class.
    """
    check_alike(target, tasks)
    options = checked_options(target.dtype, 2, tolerance, max_iterations, precision, memory)
    task_labels = _checked_labels(tasks, label_distance)
    check_labels(labels, target)
    at = resolve_epsilon(target, 2, epsilon, options.memory, self_terms)
    kept = check_self_terms(self_terms, tasks, 2, options.precision, label_distance)
    values, errors = (None, None) if kept is None else kept
    centre = needed_centre(tasks, options.precision, "eager") if self_terms is None else self_terms.centre
    how = (label_distance, at, *options, None if centre is None else centre.to(target.device))
    distances, iterations, errors = _distances(
        target, labels, tasks.features, task_labels, tasks.offsets, values, errors, *how
    )
    return SinkhornResult(distances, at, iterations, errors, errors <= tolerance)


@torch.library.custom_op("headstart::label_aware_distances", mutates_args=())
def _distances(
    target: Tensor,
    labels: Tensor,
    features: Tensor,
    task_labels: Tensor,
    offsets: Tensor,
    values: Tensor | None,
    errors: Tensor | None,
    label_distance: str,
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    precision: str,
    memory: int,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(distances, iterations, errors) of T tasks, whose own values and errors are given or computed."""
    check_finite(target)
    check_not_negative(labels)
    settings, cost = Settings(float(epsilon), tolerance, max_iterations, memory), Cost(2, None, precision, centre)
    own = _class_rows(RaggedTasks(target, torch.tensor([0, len(target)]), labels), cost, settings)
    sources = _class_rows(RaggedTasks(features, offsets, task_labels), cost, settings)
    how = (label_distance, precision, settings)
    if values is None or errors is None:
        theirs = solve(sources.points, None, _own_cost(sources, cost, *how), settings)
        values, errors = theirs.values, theirs.errors
    itself = solve(own.points, None, _own_cost(own, cost, *how), settings)
    table = torch.cat([torch.stack([_squares(x, some, *how) for x in _each(own)], 1)
                       for _, some in _chunks(sources, settings)])  # fmt: skip
    cross = solve(sources.points, own.points, cost._replace(labels=table.div_(2).to(cost.dtype)), settings)
    errors = torch.maximum(torch.maximum(cross.errors, itself.errors), errors)
    warn_of(errors, settings)
    return (cross.values - (itself.values + values) / 2).to(cost.dtype), cross.num_iterations, errors


@_distances.register_fake
def _(
    target: Tensor, labels: Tensor, features: Tensor, task_labels: Tensor, offsets: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def new(dtype: torch.dtype) -> Tensor:
        return target.new_empty(len(offsets) - 1, dtype=dtype)

    return new(PRECISIONS[settings[-3]]), new(torch.int64), new(torch.float64)


@torch.no_grad()
def label_aware_self_terms(
    tasks: RaggedTasks,
    *,
    epsilon: float | Tensor,
    label_distance: LabelDistance = "bures",
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    precision: str | None = None,
    memory: int | None = None,
) -> SinkhornSelfTerms:
    """The self terms of T tasks, for `label_aware_distances(..., self_terms=...)` with many targets at one epsilon."""
    _checked_labels(tasks, label_distance)
    options = checked_options(tasks.features.dtype, 2, tolerance, max_iterations, precision, memory)
    at = float(resolve_epsilon(tasks.features, 2, epsilon, options.memory, None))
    settings, centre = (
        Settings(at, tolerance, max_iterations, options.memory),
        needed_centre(tasks, options.precision, "eager"),
    )
    cost = Cost(2, None, options.precision, centre)
    classes = _class_rows(tasks, cost, settings)
    own_cost = _own_cost(classes, cost, label_distance, options.precision, settings)
    solution = solve(classes.points, None, own_cost, settings)
    warn_of(solution.errors, settings)
    return SinkhornSelfTerms(
        values=solution.values,
        errors=solution.errors,
        sizes=tasks.sizes,
        precision=options.precision,
        p=2,
        epsilon=at,
        label_distance=label_distance,
        centre=centre,
    )


def _checked_labels(tasks: RaggedTasks, label_distance: str) -> Tensor:
    """The tasks' labels, [sum n_t]; ValueError where there are none, or the label distance is not accepted."""
    if label_distance not in get_args(LabelDistance):
        raise ValueError(f"label_distance is {label_distance!r}; accepted: {', '.join(get_args(LabelDistance))}")
    if tasks.labels is None:
        raise ValueError("tasks have no labels; accepted: RaggedTasks(features, offsets, labels)")
    return tasks.labels


class _ClassRows(NamedTuple):
    """The classes of T tasks: class c has the rows order[offsets[c]] up to order[offsets[c + 1]]."""

    points: Points
    order: Tensor
    offsets: Tensor
    """[C + 1] int64 on the CPU, over all tasks."""
    first: Tensor
    """[T + 1] int64 on the CPU: the classes of task t are first[t] up to first[t + 1]."""

    def rows(self, low: int, high: int) -> RaggedTasks:
        """Classes low to high, as tasks: a copy of their rows."""
        offsets = self.offsets[low : high + 1]
        index = self.order[int(offsets[0]) : int(offsets[-1])]
        return RaggedTasks(self.points.features[index], offsets - offsets[0])


def _class_rows(tasks: RaggedTasks, cost: Cost, settings: Settings) -> _ClassRows:
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
    if settings.memory < least:
        raise ValueError(f"memory is {settings.memory} bytes; accepted: at least {least}, four times the largest class")
    # Half is for label distances, half for the rows of classes: see `_squares` and `_chunks`.
    check_memory(tasks.features, cost, settings, share=2)
    return _ClassRows(points, classes.argsort(stable=True), offsets, first)


def _each(classes: _ClassRows) -> Iterator[Tensor]:
    """The rows of one class after the other."""
    for c in range(len(classes.offsets) - 1):
        yield classes.rows(c, c + 1).features


def _chunks(classes: _ClassRows, settings: Settings) -> Iterator[tuple[int, RaggedTasks]]:
    """Runs of classes whose rows fill an eighth of the memory, or one class; with the number of the first."""
    most = max(1, settings.memory // 8 // (classes.points.features.shape[1] * classes.points.features.element_size()))
    low, num_classes = 0, len(classes.offsets) - 1
    while low < num_classes:
        high = int(torch.searchsorted(classes.offsets, classes.offsets[low] + most, right=True)) - 1
        high = max(low + 1, high)
        yield low, classes.rows(low, high)
        low = high


def _squares(rows: Tensor, classes: RaggedTasks, label_distance: str, precision: str, settings: Settings) -> Tensor:
    """W^2 of one class's rows to each of C classes, [C] float64."""
    if label_distance == "bures":
        return frechet_distances(rows, classes, precision="fp64", memory=settings.memory // 2)
    result = sinkhorn_distances(
        rows, classes, epsilon=settings.epsilon, tolerance=settings.tolerance, memory=settings.memory // 2,
        max_iterations=settings.max_iterations, precision=precision,
    )  # fmt: skip
    return 2 * result.distances.double()


def _own_cost(classes: _ClassRows, cost: Cost, label_distance: str, precision: str, settings: Settings) -> Cost:
    """The cost within each task: half of W^2 of its classes, [C, most classes of a task], 0 on the diagonals."""
    first, device = classes.first.tolist(), classes.points.features.device
    table = torch.zeros(first[-1], int(classes.first.diff().max()), dtype=torch.float64, device=device)
    for t in range(len(first) - 1):
        low, high = first[t], first[t + 1]
        for c in range(low, high - 1):
            rows = classes.rows(c, c + 1).features
            found = _squares(rows, classes.rows(c + 1, high), label_distance, precision, settings)
            table[c, c + 1 - low : high - low] = found
            table[c + 1 : high, c - low] = found
    return cost._replace(labels=table.div_(2).to(cost.dtype))

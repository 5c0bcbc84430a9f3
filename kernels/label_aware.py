"""Label-aware transport distances (OTDD) between a labelled target and many labelled, ragged tasks."""

from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headstart.kernels.engine.classes import chunks, class_rows, each
from headstart.kernels.engine.precision import PRECISIONS, exact_products
from headstart.kernels.engine.softmin import add_gradient
from headstart.kernels.engine.terms import needed_centre
from headstart.kernels.engine.transport import Settings, solve
from headstart.kernels.engine.transport_operators import warn_of
from headstart.kernels.label_distances import How, cross_table, own_table, sides, squares_gradient, with_values
from headstart.kernels.ragged import RaggedTasks, check_alike, check_finite, check_labels, check_not_negative
from headstart.kernels.sinkhorn import (
    SinkhornResult,
    SinkhornSelfTerms,
    check_self_terms,
    checked_options,
    resolve_epsilon,
)

LabelDistance = Literal["bures", "sinkhorn"]


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
    `naive.label_aware_distances` is the definition. Debiased: a labelled set is at distance 0 from itself. Cost: that
    of `sinkhorn_distances`, and a label distance for every pair of a class of the target and one of a task, and of two
    classes of one set.

    Differentiable by the target, not twice: by the plans, as `sinkhorn_distances`, and by the label distances of what
    they move, as `frechet_distances` where they are Bures'. The label distances are kept for it, but not the plans
    behind those of `sinkhorn`, which are found again. It holds, beside `memory` and what is kept, one array like the
    target and eight float64 ones like its largest class.

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
    options = checked_options(target.dtype, 2, tolerance, max_iterations, precision, memory, self_terms)
    task_labels = _checked_labels(tasks, label_distance)
    check_labels(labels, target)
    at = resolve_epsilon(target, 2, epsilon, options.memory, self_terms)
    kept = check_self_terms(self_terms, tasks, 2, options.precision, label_distance)
    values, errors = (None, None) if kept is None else kept
    centre = needed_centre(tasks, options.precision, "eager") if self_terms is None else self_terms.centre
    how = (label_distance, at, *options, None if centre is None else centre.to(target.device))
    distances, iterations, errors, *_ = _distances(
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
    memory: int | None,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(distances, iterations, errors) of T tasks, whose own values and errors are given or computed, and what their
    gradient takes: the potentials of the tasks' rows [M] and of the target's [N], `cross_table` and `own_table`."""
    check_finite(target)
    check_not_negative(labels)
    how = How(label_distance, precision, centre, Settings(float(epsilon), tolerance, max_iterations, memory))
    own, sources = (with_values(side, how) for side in sides(target, labels, features, task_labels, offsets, how))
    if values is None or errors is None:
        theirs = solve(sources.points, None, how.cost_with(own_table(sources, how)), how.settings)
        values, errors = theirs.values, theirs.errors
    within = own_table(own, how)
    itself = solve(own.points, None, how.cost_with(within), how.settings)
    between = cross_table(own, sources, how)
    cross = solve(sources.points, own.points, how.cost_with(between), how.settings)
    errors = torch.maximum(torch.maximum(cross.errors, itself.errors), errors)
    warn_of(errors, how.settings)
    distances = (cross.values - (itself.values + values) / 2).to(how.cost.dtype)
    return distances, cross.num_iterations, errors, cross.potentials, itself.potentials, between, within


@_distances.register_fake
def _(
    target: Tensor, labels: Tensor, features: Tensor, task_labels: Tensor, offsets: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def new(dtype: torch.dtype, *shape: Any) -> Tensor:
        return target.new_empty(shape, dtype=dtype)

    num_tasks, dtype = offsets.shape[0] - 1, PRECISIONS[settings[-3]]
    numbers = (new(dtype, num_tasks), new(torch.int64, num_tasks), new(torch.float64, num_tasks))
    potentials = (new(dtype, features.shape[0]), new(dtype, target.shape[0]))
    # Of how many classes follows from the labels' values.
    theirs, ours = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return *numbers, *potentials, new(dtype, theirs, ours), new(dtype, ours, ours)


@torch.library.custom_op("headstart::label_aware_gradient", mutates_args=())
def label_aware_gradient(
    target: Tensor,
    labels: Tensor,
    features: Tensor,
    task_labels: Tensor,
    offsets: Tensor,
    potentials: Tensor,
    own_potentials: Tensor,
    between: Tensor,
    within: Tensor,
    weights: Tensor,
    label_distance: str,
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    precision: str,
    memory: int | None,
    centre: Tensor | None,
) -> Tensor:
    """sum_t w_t d distance_t / d target at the potentials of the optimum, [N, D] as the target.

    `between`, `within`: `cross_table` and `own_table` of the target, as the potentials saw them.
    The plans move rows towards what they are matched with, and classes so that the label distances of what is matched
    shrink: of each pair of classes with the mass that is moved between them.
    """
    how = How(label_distance, precision, centre, Settings(float(epsilon), tolerance, max_iterations, memory))
    own, sources = sides(target, labels, features, task_labels, offsets, how)
    cuts, first, at = offsets.tolist(), sources.first.tolist(), how.settings.epsilon
    out = torch.zeros(target.shape, dtype=how.cost.dtype, device=target.device)
    spans = pairwise([*first, first[-1] + own.num_classes])
    masses = [out.new_zeros(own.num_classes, high - low) for low, high in spans]
    with exact_products(target.device):
        cost = how.cost_with(between)
        for t, weight in enumerate(weights.tolist()):
            if weight:
                rows, part = sources.points.only(t), potentials[cuts[t] : cuts[t + 1]]
                add_gradient(out, weight, rows, own.points, part, at, cost, memory, masses[t])
        # Both sides of OT(x, x), of which half is taken off, move: each has the gradient of one.
        cost, whole = how.cost_with(within), own.points
        add_gradient(out, -float(weights.sum()), whole, whole, own_potentials, at, cost, memory, masses[-1])
    # Half of a label distance is in the cost.
    cross, itself = (part.double() / 2 for part in (torch.cat(masses[:-1], 1), masses[-1]))
    members = own.order.split(own.offsets.diff().tolist())
    for table, side in ((cross, sources), (itself, own)):
        for low, high, some in chunks(side, how.settings):  # outside: a chunk is a copy
            for share, index, x in zip(table[:, low:high], members, each(own), strict=True):
                out[index] += squares_gradient(x, some, share, how).to(out.dtype)
    return out.to(target.dtype)


@label_aware_gradient.register_fake
def _(target: Tensor, *_: object) -> Tensor:
    return target.new_empty(target.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    target, labels, features, task_labels, offsets, _, _, ctx.form, epsilon, *ctx.how, centre = inputs
    ctx.save_for_backward(target, labels, features, task_labels, offsets, *output[3:], epsilon, centre)


def _backward(ctx: Any, weights: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, epsilon, centre = ctx.saved_tensors
    return label_aware_gradient(*saved, weights, ctx.form, epsilon, *ctx.how, centre), *[None] * 13


_distances.register_autograd(_backward, setup_context=_context)


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
    centre = needed_centre(tasks, options.precision, "eager")
    how = How(label_distance, options.precision, centre, Settings(at, tolerance, max_iterations, options.memory))
    with torch.device("cpu"):  # of what is given none: operators leave torch.set_default_device out by themselves
        classes = with_values(class_rows(tasks, how.cost, how.settings), how)
        solution = solve(classes.points, None, how.cost_with(own_table(classes, how)), how.settings)
    warn_of(solution.errors, how.settings)
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

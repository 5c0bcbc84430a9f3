"""Sinkhorn divergences between a target and many ragged tasks."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine.median import keeps_digits, median_distance
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.precision import PRECISIONS, resolve_precision
from headstart.kernels.engine.terms import needed_centre, not_negative, terms_of_tasks
from headstart.kernels.engine.transport_operators import self_values, transports
from headstart.kernels.ragged import RaggedTasks, check_alike, check_bytes, check_finite, check_whole

_SAMPLE = 1024
"""Rows of the target that the default epsilon is taken from."""


class SinkhornResult(NamedTuple):
    """Distances to T tasks, and how far the iteration came."""

    distances: Tensor
    """[T], in the dtype of the precision."""
    epsilon: Tensor
    """The regularisation, [] float64 on the CPU, in units of the cost |x - y|^p / p: distances at another cannot be
    compared with these."""
    num_iterations: Tensor
    """Of the cross terms at that epsilon, [T] int64."""
    errors: Tensor
    """L1 distance of a plan's marginal from the weights, whose sum is 1: the largest of the three plans of each task,
    [T] float64."""
    converged: Tensor
    """errors <= tolerance, [T] bool."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SinkhornSelfTerms:
    """OT(y, y) of each task: the part of a Sinkhorn divergence that a task brings by itself."""

    values: Tensor
    """[T] float64."""
    errors: Tensor
    """L1 marginal errors, [T] float64."""
    sizes: Tensor
    """Rows of each task, [T] int64 on the CPU."""
    precision: str
    p: int
    epsilon: float
    """The precision, power and epsilon that they were computed with; others are refused."""
    label_distance: str | None = None
    """That of the label-aware form; None without labels."""
    centre: Tensor | None = None
    """[D], subtracted from all rows before they were rounded; None where nothing was."""


def sinkhorn_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    p: Literal[1, 2] = 2,
    epsilon: float | Tensor | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    precision: str | None = None,
    memory: int | None = None,
    self_terms: SinkhornSelfTerms | None = None,
) -> SinkhornResult:
    """Sinkhorn divergence of a target x [N, D] to each of T ragged tasks y [n_t, D]; smaller is closer.

        OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2,    OT = min over couplings P of <P, C> + epsilon KL(P | a b^T)

    with C = |x - y|^p / p and uniform weights: half the squared 2-Wasserstein distance for p = 2 as epsilon gets small,
    the 1-Wasserstein distance for p = 1. J. Feydy et al., AISTATS 2019; `naive.sinkhorn_distances` is the definition.

        result = sinkhorn_distances(target, tasks)
        result.distances, result.converged          # a warning says so where an iteration did not converge
        sinkhorn_distances(target, tasks, epsilon=result.epsilon)

    `epsilon` None takes that of the self terms or, without them, (median / 10)^p of the target's own pairwise distances
    (`default_epsilon`), one value for all tasks: about a fiftieth of a typical cost for p = 2. The time grows as it
    shrinks. The iteration ends when the L1 error of a plan's marginals is at most `tolerance`, or after
    `max_iterations` at epsilon (those of the annealing, log4(largest cost / epsilon), not counted).
    `precision` is one of `engine.precision.PRECISIONS` (default: fp64 for float64 features, else fp32): that of the
    products behind the costs. Costs, potentials and distances are float64 for fp64, else float32. `memory` bounds, in
    bytes, what is held beside the inputs and what is as long as T, N or the sum of n_t (default 256 MiB, or more where
    less cannot do). Costs that fit are held, others are computed again in every iteration; that changes the result by
    no more than the error. `self_terms` spares the tasks' own part.
    Differentiable by the target, not twice: at the optimum the gradient follows from the potentials, which are kept.
    Where the distance is clamped at 0, it is that of the unclamped value. It holds one array more like the target. It
    is off by some (e + 64 sqrt(D) u c / epsilon) |x - y| / N for a row, with the largest |x - y|, which may be all
    of it for clouds that are nearer than that: there a smaller tolerance helps, and then fp64.

    Error: at most (e + 64 sqrt(D) u) (c + epsilon), with e the marginal error, c the largest cost among and between the
    rows of both, and u = 6e-8 for fp32 and 1.1e-16 for fp64; for p = 1, 512 instead of 64, which only pairs of rows
    attain that are near beside their distance from the others. So d(X, X) is at most that. The former part is far from
    attained, since a value is quadratic in e: at e = 1e-3, 1e-5 of the distance is usual. No value is negative.
    Under bf16, tf32 and bf16x3 a row is rounded by at most h times its distance from the common centre, R at most
    (h = 2^-8, 2^-11, 2^-17): 4 h R (sqrt(2 c) + h R) comes on top for p = 2 and 4 h R for p = 1, and for bf16x3,
    which leaves the product of both low parts out, 2^-14 R^2, or 2^-8 R for p = 1.
    ValueError: a target of another D, dtype or device, without rows, or not finite; p, epsilon, a tolerance, a number
    of iterations or a precision that is not accepted; a bound that is too small; self terms of other tasks, precision,
    p or epsilon; rows so far apart that squares overflow; an epsilon that their dtype cannot divide costs by.
    """
    check_alike(target, tasks)
    options = checked_options(target.dtype, p, tolerance, max_iterations, precision, memory, self_terms)
    at = resolve_epsilon(target, p, epsilon, options.memory, self_terms)
    kept = check_self_terms(self_terms, tasks, p, options.precision)
    centre = needed_centre(tasks, options.precision, "eager") if self_terms is None else self_terms.centre
    how = (p, at, *options, None if centre is None else centre.to(target.device))
    values, errors = self_values(tasks.features.detach(), tasks.offsets, *how) if kept is None else kept
    cross, own, iterations, cross_errors, own_errors, *_ = transports(target, tasks.features, tasks.offsets, *how)
    distances = not_negative(cross - (own + values) / 2)
    errors = torch.maximum(torch.maximum(cross_errors, own_errors), errors)
    return SinkhornResult(distances.to(PRECISIONS[options.precision]), at, iterations, errors, errors <= tolerance)


def sinkhorn_self_terms(
    tasks: RaggedTasks,
    *,
    epsilon: float | Tensor,
    p: Literal[1, 2] = 2,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    precision: str | None = None,
    memory: int | None = None,
) -> SinkhornSelfTerms:
    """The self terms of T tasks, for `sinkhorn_distances(..., self_terms=...)` with many targets at one epsilon."""
    options = checked_options(tasks.features.dtype, p, tolerance, max_iterations, precision, memory)
    at = resolve_epsilon(tasks.features, p, epsilon, options.memory, None)
    centre = needed_centre(tasks, options.precision, "eager")
    values, errors = self_values(tasks.features.detach(), tasks.offsets, p, at, *options, centre)
    return SinkhornSelfTerms(
        values=values,
        errors=errors,
        sizes=tasks.sizes,
        precision=options.precision,
        p=p,
        epsilon=float(at),
        centre=centre,
    )


@torch.no_grad()
def default_epsilon(target: Tensor, p: Literal[1, 2] = 2, memory: int | None = None) -> float:
    """(median / 10)^p of the distances between at most 1,024 evenly spaced rows of the target that lie apart.

    `naive.median_distance` of these rows is the definition of the median: 1 where all rows are equal. ValueError: a
    bound that cannot hold the distances; a target that is not finite, or whose costs overflow or vanish in float64.
    """
    _check_p(p)
    check_bytes(memory)
    check_finite(target)
    num_rows = min(len(target), _SAMPLE)
    dtype = torch.promote_types(target.dtype, torch.float32)
    num_pairs = num_rows * (num_rows - 1) // 2
    least = (num_pairs * 6 + num_rows * target.shape[1] * 2) * dtype.itemsize
    fit_memory(memory, least, ", or an epsilon")
    index = torch.arange(num_rows, device=target.device) * len(target) // num_rows
    sample = target.detach()[index].to(dtype)
    median = median_distance(sample)
    if not keeps_digits(median, dtype):
        return default_epsilon(sample.double(), p, memory)
    scale = median / 10
    epsilon = scale if p == 1 else scale * scale
    if not 0 < epsilon < math.inf:
        what, wanted = ("far apart", "nearer rows") if epsilon else ("near", "rows farther apart")
        raise ValueError(
            f"some rows are so {what} that their costs {'overflow' if epsilon else 'vanish'} in {dtype}; accepted: "
            f"{wanted}, or an epsilon"
        )
    return epsilon


class Options(NamedTuple):
    """What the iteration is told beside p and epsilon, in the order in which operators take it."""

    tolerance: float
    max_iterations: int
    precision: str
    memory: int | None


def checked_options(
    dtype: torch.dtype,
    p: int,
    tolerance: float,
    max_iterations: int,
    precision: str | None,
    memory: int | None,
    self_terms: SinkhornSelfTerms | None = None,
) -> Options:
    """The options as checked, with what None stands for in its place."""
    check_bytes(memory)
    if self_terms is not None and not isinstance(self_terms, SinkhornSelfTerms):
        raise TypeError(
            f"self_terms is a {type(self_terms).__name__}; accepted: SinkhornSelfTerms, as Sinkhorn and the "
            "label-aware form make them"
        )
    _check_p(p)
    check_whole("max_iterations", max_iterations, "a whole number, at least 1")
    precision = resolve_precision(precision, dtype)
    if not isinstance(tolerance, Real):
        raise TypeError(f"tolerance is {tolerance!r}; accepted: a number of more than 0 and less than 1")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; accepted: more than 0 and less than 1, the sum of the weights")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; accepted: at least 1")
    return Options(tolerance, max_iterations, precision, memory)


def _check_p(p: int) -> None:
    check_whole("p", p, "1, 2")
    if p not in (1, 2):
        raise ValueError(f"p is {p!r}; accepted: 1, 2")


def resolve_epsilon(
    target: Tensor, p: int, epsilon: float | Tensor | None, memory: int | None, kept: SinkhornSelfTerms | None
) -> Tensor:
    """Epsilon as given, else that of the self terms, else the target's default; [] float64 on the CPU."""
    if epsilon is None:
        epsilon = _default_epsilon(target.detach(), p, memory) if kept is None else kept.epsilon
    wanted = None if kept is None else kept.epsilon
    checked: Tensor = _checked_epsilon(torch.as_tensor(epsilon, dtype=torch.float64, device="cpu"), wanted)
    return checked


# Operators, because what follows from values would break a compiled graph.
@torch.library.custom_op("headstart::default_epsilon", mutates_args=())
def _default_epsilon(target: Tensor, p: int, memory: int | None) -> Tensor:
    return torch.tensor(default_epsilon(target, 1 if p == 1 else 2, memory), dtype=torch.float64)


@_default_epsilon.register_fake
def _(target: Tensor, p: int, memory: int | None) -> Tensor:
    return torch.empty((), dtype=torch.float64)


@torch.library.custom_op("headstart::checked_epsilon", mutates_args=())
def _checked_epsilon(epsilon: Tensor, wanted: float | None) -> Tensor:
    given = epsilon.to("cpu", copy=True)
    if given.ndim or not (given > 0 and given.isfinite()):
        raise ValueError(f"epsilon is {given.tolist()}; accepted: a positive number, or None to take the target's")
    if wanted is not None and float(given) != wanted:
        raise ValueError(f"epsilon is {float(given)}; accepted: {wanted}, that of the self terms, or None to take it")
    return given


@_checked_epsilon.register_fake
def _(epsilon: Tensor, wanted: float | None) -> Tensor:
    return torch.empty((), dtype=torch.float64)


def check_self_terms(
    kept: SinkhornSelfTerms | None,
    tasks: RaggedTasks,
    p: int,
    precision: str,
    label_distance: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Values and errors of the self terms, [T] each, or a ValueError where they are those of something else."""
    if kept is None:
        return None
    if kept.centre is not None and kept.centre.shape != tasks.features.shape[1:]:
        raise ValueError(f"self terms have a centre {list(kept.centre.shape)}; accepted: [{tasks.num_features}]")
    wanted = (precision, p, label_distance)
    given = (kept.precision, kept.p, kept.label_distance)
    if given != wanted:
        names = "precision {}, p {}, label distance {}"
        raise ValueError(
            f"self terms are those of {len(kept.sizes)} tasks with {names.format(*given)}; accepted: those of these "
            f"{tasks.num_tasks} tasks with {names.format(*wanted)}"
        )
    device = tasks.features.device
    values, errors = (terms_of_tasks(v.to(device), kept.sizes, tasks.offsets) for v in (kept.values, kept.errors))
    return values, errors

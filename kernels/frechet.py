"""Fréchet distances between the Gaussians with the moments of a target and of many ragged tasks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.precision import PRECISIONS, as_result, resolve_precision
from headstart.kernels.ragged import (
    BLOCK_ROWS,
    RaggedTasks,
    block_means,
    check_alike,
    check_bytes,
    check_finite,
    common_centre,
)

_BATCH = 2**22
"""Numbers in the padded rows of a batch of tasks: more would gain nothing on the CPU."""


def frechet_distances(
    target: Tensor, tasks: RaggedTasks, *, precision: str | None = None, memory: int | None = None
) -> Tensor:
    """Squared Fréchet distance of a target [N, D] to each of T ragged tasks [n_t, D], as [T]; smaller is closer.

        |m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2

    with means m, m' and covariances S = X^T X / N, S' = Y^T Y / n_t of the centred rows X, Y: divided by the number of
    rows, so that a task of one row has none. It is the squared 2-Wasserstein distance of the Gaussians
    (Bures-Wasserstein), and FID where the features are Inception's; the root is the metric.

        frechet_distances(target, tasks)

    No covariance is formed and no matrix root is taken: the last trace is the sum of the roots of the eigenvalues of
    Y S Y^T / n_t, which are the singular values of Y X^T / sqrt(N n_t), and X and Y are replaced there by their
    triangular factors when they have more than D rows. So rank-deficient covariances (n_t < D) are the cheap case, and
    an eigenvalue that should be 0 costs u and not, as its root would, sqrt(u) = 1e-8 of the largest.

    D. C. Dowson and B. V. Landau, Journal of Multivariate Analysis 12 (1982) 450-455; `naive.frechet_distances` is the
    definition. Cost: with r = min(N, D) and s = min(n_t, D), for a task s D r for the product, some 4 r s^2 for its
    singular values, and 2 n_t D^2 for the triangle when n_t > D; tasks of like size go together, padded with rows of 0.
    `precision` is one of `engine.precision.PRECISIONS` (default: fp64 for float64 features, else fp32). It decides the
    dtype of the result, float64 for fp64 and else float32; inside all is float64, since products are a small part here.
    `memory` bounds, in bytes, what is held beside the inputs and what is as long as T (default 256 MiB, or more where
    less cannot do).

    Differentiable by the target, not twice: the trace's part is the polar factor of Y X^T, from singular vectors. Where
    some singular value beyond those of the means is 0 (covariances that share no direction) there is no gradient, and
    that of the others is given. Eight float64 arrays like the target are held for it beside `memory`, those that
    LAPACK works in among them.

    Error, and the bound of d(X, X): 8 sqrt(k D) u (tr S + tr S') with k = min(r, s) and u = 1.1e-16, beside some u of
    the result, the rounding to `precision` and, between sets far apart, 2 (512 + n / 512) u |m - m'| times the mean
    distance of n rows from a point amid the target: that of sums (124 u of the result seen, at n = 500).
    Products and triangles move Y X^T by some sqrt(D) u |X|_F |Y|_F, a sum of k singular values moves sqrt(k) times as
    far at most, and |X|_F |Y|_F / sqrt(N n_t) = sqrt(tr S tr S'). Seen in place of the 8: 2.8 at D = 1, 0.3 from D = 64
    and 0.01 at D = 2048, at any rank and for eigenvalues from 1 to 1e-24.
    ValueError: a target of another D, dtype or device, without rows, or not finite; a precision that is not accepted;
    a bound that is too small; features so far apart that squares overflow, or the result.
    """
    check_alike(target, tasks)
    check_bytes(memory)
    precision = resolve_precision(precision, target.dtype)
    distances: Tensor = _distances(target, tasks.features, tasks.offsets, precision, memory)
    return distances


@torch.library.custom_op("headstart::frechet_distances", mutates_args=())
def _distances(target: Tensor, features: Tensor, offsets: Tensor, precision: str, memory: int | None) -> Tensor:
    check_finite(target)
    tasks = RaggedTasks(features, offsets)
    with dispatch.Watch("Fréchet distances", target.device) as watch:
        max_rows, watch.planned = _max_rows(target, tasks, memory)
        centre = common_centre(target).double()
        mean, factor = _moments(target, centre, max_rows)
        one = mean, factor, _trace(factor)
        distances = torch.empty(tasks.num_tasks, dtype=torch.float64, device=target.device)
        for members in _batches(tasks.sizes, min(max_rows, _batch_rows(tasks))):
            found = _distances_to(one, *_batch_moments(tasks, members, centre, max_rows))
            distances[members.to(target.device)] = found
    # What rounding leaves of a value that cannot be negative.
    return as_result(distances.clamp_(min=0), precision)


@_distances.register_fake
def _(target: Tensor, features: Tensor, offsets: Tensor, precision: str, memory: int | None) -> Tensor:
    return target.new_empty(offsets.shape[0] - 1, dtype=PRECISIONS[precision])


def frechet_table(sets: RaggedTasks, others: RaggedTasks | None, memory: int) -> Tensor:
    """`frechet_distances` of each of C sets to each of K others, [C, K] float64; None: to each other.

    The moments of others are made once for each batch of sets, and not for each set. `memory` bounds, in bytes, what is
    held beside the inputs and the table. ValueError: less than `least_bytes` of the largest set; as there, features or
    distances that overflow.
    """
    columns, largest = sets if others is None else others, sets.task(int(sets.sizes.argmax()))
    with dispatch.Watch("Fréchet distances", largest.device) as watch:
        least, moments = least_bytes(largest, columns), 16 * sets.num_features  # bytes of a row's factor, and its mean
        # The moments of a batch of sets stay while those of others are made; those of one set are in `least`.
        few = min((fit_memory(memory, least) - least) // 4 // moments, _batch_rows(sets))
        max_rows, planned = _max_rows(largest, columns, memory - few * moments)
        watch.planned = planned + few * moments
        centre = common_centre(largest).double()
        batches = list(_batches(sets.sizes, few))
        table = torch.zeros(sets.num_tasks, columns.num_tasks, dtype=torch.float64, device=largest.device)
        for number, some in enumerate(batches):
            held = _batch_moments(sets, some, centre, max_rows)
            for members in (
                batches[number:] if others is None else _batches(others.sizes, min(max_rows, _batch_rows(others)))
            ):
                met = held if members is some else _batch_moments(columns, members, centre, max_rows)
                for i, (c, *one) in enumerate(zip(some.tolist(), *held, strict=True)):
                    first = i + 1 if members is some else 0
                    found = _distances_to(one, *(part[first:] for part in met))
                    table[c, members[first:].to(table.device)] = found
    return as_result((table + table.T if others is None else table).clamp_(min=0), "fp64")


@torch.library.custom_op("headstart::frechet_gradient", mutates_args=())
def frechet_gradient(target: Tensor, features: Tensor, offsets: Tensor, weights: Tensor, memory: int | None) -> Tensor:
    """sum_t w_t d distance_t / d target for weights [T], [N, D] as the target.

    With rows X = (x - m) / sqrt(N) and Y X^T = U s V^T, the sum of s moves by <V U^T Y, dX>; where X = Q R is replaced
    by R, by <Q V U^T Y, dX>.
    """
    tasks = RaggedTasks(features, offsets)
    max_rows, _ = _max_rows(target, tasks, memory)
    centre, (num_rows, num_features) = common_centre(target).double(), target.shape
    rows = target.double() - centre  # a copy
    mean = rows.mean(0)
    rows.sub_(mean).div_(num_rows**0.5)
    basis, factor = torch.linalg.qr(rows) if num_rows > num_features else (None, rows)
    moved, shift = torch.zeros_like(factor), torch.zeros_like(mean)
    for members in _batches(tasks.sizes, min(max_rows // 3, _batch_rows(tasks))):  # with both sides' singular vectors
        means, factors, _ = _batch_moments(tasks, members, centre, max_rows)
        chosen = weights[members.to(weights.device)].double()
        shift += chosen @ (mean - means)
        products = factors @ factor.T
        left, values, right = (
            part.to(factors.device) for part in torch.linalg.svd(products.cpu(), full_matrices=False)
        )
        lost = 8 * (values.shape[1] * num_features) ** 0.5 * torch.finfo(values.dtype).eps
        kept = values > lost * values[:, :1]
        polar = right.mT * (kept * chosen[:, None])[:, None, :]
        moved -= polar.transpose(0, 1).flatten(1) @ (left.mT @ factors).flatten(0, 1)
    moved = moved if basis is None else basis @ moved
    moved.add_(rows, alpha=float(weights.sum()))
    return moved.mul_(2 / num_rows**0.5).add_(shift, alpha=2 / num_rows).to(target.dtype).contiguous()


@frechet_gradient.register_fake
def _(target: Tensor, *_: object) -> Tensor:
    return target.new_empty(target.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    target, features, offsets, _, ctx.memory = inputs
    ctx.save_for_backward(target, features, offsets)


def _backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
    return frechet_gradient(*ctx.saved_tensors, weights, ctx.memory), *[None] * 4


_distances.register_autograd(_backward, setup_context=_context)


def _distances_to(one: Sequence[Tensor], means: Tensor, factors: Tensor, variances: Tensor) -> Tensor:
    """The distances [B] of sets with these moments to one set with its own: mean [D], factor [r, D] and variance."""
    mean, factor, variance = one
    return (means - mean).square().sum(1) + (variance + variances - 2 * _fidelity(factors, factor))


def _batch_moments(tasks: RaggedTasks, members: Tensor, centre: Tensor, max_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means less the centre [B, D], factors [B, s, D] and variances tr S [B] of B tasks of like size."""
    if len(members) == 1 and int(tasks.sizes[members[0]]) > tasks.num_features:
        means, factors = (part[None] for part in _moments(tasks.task(int(members[0])), centre, max_rows))
    else:
        means, factors = _padded_moments(tasks, members, centre)
    return means, factors, _trace(factors)


def _fidelity(factors: Tensor, factor: Tensor) -> Tensor:
    """tr (S^1/2 S' S^1/2)^1/2 from S' = Y^T Y of factors Y [B, s, D] and S = X^T X of a factor X [r, D], as [B].

    With polar parts S^1/2 = U X, S'^1/2 = V Y the trace is the sum of the singular values of S'^1/2 S^1/2 =
    V Y X^T U^T, and those of Y X^T are the same. Rows of 0 in Y only add singular values that are 0.
    """
    products = factors @ factor.T
    # Tall matrices: LAPACK takes 0.74 ms for one of 256 x 112 and 0.96 for 112 x 256 (one core). Always LAPACK: beyond
    # 32 x 32 cuSOLVER goes through a batch one by one, by Jacobi's method, and warns where that does not converge.
    tall = products.mT if products.shape[1] < products.shape[2] else products
    values: Tensor = torch.linalg.svdvals(tall.cpu())
    return values.sum(1).to(factors.device)


def _trace(factor: Tensor) -> Tensor:
    """tr S of S = Y^T Y for factors Y [..., s, D], as [...]; ValueError where it overflows."""
    # Not vector_norm, which adds in one go: 2,300 u off for 1000 x 2048 numbers of falling size, where this is 3 u off.
    trace = factor.square().sum((-2, -1))
    if not bool(torch.isfinite(trace).all()):
        raise ValueError("features are so far apart that squares overflow; accepted: variances that sum below 1.7e308")
    return trace


def _moments(x: Tensor, centre: Tensor, max_rows: int) -> tuple[Tensor, Tensor]:
    """Mean of x - centre for x [n, D], and a factor Y [min(n, D), D] of its covariance Y^T Y; both float64.

    More rows than `max_rows` go through one triangle, chunk by chunk: the triangle of a chunk below the triangle of
    all before it is that of all so far.
    """
    num_rows, num_features = x.shape
    offsets = torch.tensor([0, num_rows])
    mean = block_means(x, offsets, centre, torch.float64, min(max_rows, 8 * BLOCK_ROWS))[0]
    shift = centre + mean
    if num_rows <= max_rows:
        factor = x.double().sub(shift)
        return mean, (torch.linalg.qr(factor, mode="r").R if num_rows > num_features else factor) / num_rows**0.5
    stack, start = x.new_zeros((max_rows, num_features), dtype=torch.float64), 0
    while start < num_rows:
        rows = x[start : start + max_rows - num_features]
        torch.sub(rows, shift, out=stack[num_features : num_features + len(rows)])
        stack[num_features + len(rows) :] = 0
        stack[:num_features] = torch.linalg.qr(stack, mode="r").R
        start += len(rows)
    return mean, stack[:num_features] / num_rows**0.5


def _padded_moments(tasks: RaggedTasks, members: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `_moments`, for B tasks at once: means [B, D] and factors [B, min(n, D), D] with n the largest of n_t."""
    device, starts = tasks.features.device, tasks.offsets[members]
    sizes = tasks.sizes[members]
    height = int(sizes.max())
    places = torch.arange(height)
    index = starts[:, None] + places.clamp(max=sizes[:, None] - 1)
    weights = (places < sizes[:, None]).double().to(device)[:, :, None]
    counts = sizes.to(device, torch.float64)[:, None]
    rows = tasks.features[index.to(device)].double().sub_(centre).mul_(weights)
    means = rows.sum(1).div_(counts)
    rows.sub_(means[:, None]).mul_(weights.div_(counts.sqrt()[:, :, None]))
    return means, torch.linalg.qr(rows, mode="r").R if height > tasks.num_features else rows


def _batches(sizes: Tensor, max_rows: int) -> Iterator[Tensor]:
    """The tasks in batches of like size, as int64 [B]: at most `max_rows` rows when all are padded to the largest.

    A task is at most a sixteenth and 4 rows smaller than the largest of its batch, so padding costs little.
    """
    order = sizes.argsort(descending=True, stable=True)
    ordered = sizes[order]
    low = 0
    while low < len(order):
        largest = int(ordered[low])
        alike = int((ordered[low:] >= largest - largest // 16 - 4).sum())
        high = low + max(1, min(alike, max_rows // largest))
        yield order[low:high]
        low = high


def _batch_rows(tasks: RaggedTasks) -> int:
    """Rows of a batch of small tasks."""
    return max(1, _BATCH // tasks.num_features)


def _bytes(target: Tensor, tasks: RaggedTasks) -> tuple[int, int, int]:
    """Bytes that a row takes while it is worked on, that the target's factor takes, and the fewest rows at a time."""
    num_features = tasks.num_features
    # Rows, LAPACK's copy of them and the triangle; or rows, their products with the target's factor and a copy.
    row_bytes = 24 * num_features + 64
    factor_bytes = 8 * num_features * (min(len(target), num_features) + 4)
    # A triangle and a quarter of it: smaller chunks would spend most of the time on the triangle.
    largest = max(len(target), int(tasks.sizes.max()))
    return row_bytes, factor_bytes, min(largest, max(BLOCK_ROWS, num_features + num_features // 4 + 1))


def least_bytes(target: Tensor, tasks: RaggedTasks) -> int:
    """The least memory that is accepted."""
    row_bytes, factor_bytes, least_rows = _bytes(target, tasks)
    return factor_bytes + least_rows * row_bytes


def _max_rows(target: Tensor, tasks: RaggedTasks, memory: int | None) -> tuple[int, int]:
    """Rows of float64 that are worked on at a time under a bound of so many bytes, and the bytes that these take.

    ValueError where the bound is too small.
    """
    memory = fit_memory(memory, least_bytes(target, tasks))
    row_bytes, factor_bytes, least_rows = _bytes(target, tasks)
    # Half of what would fit: the allocator keeps up to as much again of what was freed.
    max_rows = max(least_rows, (memory - factor_bytes) // (2 * row_bytes))
    largest = max(len(target), int(tasks.sizes.max()), _batch_rows(tasks))
    return max_rows, factor_bytes + min(max_rows, largest) * row_bytes

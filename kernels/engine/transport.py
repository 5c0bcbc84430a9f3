"""Entropic optimal transport of many ragged pairs of point sets at once, iterated until its marginals hold.

For rows y_i of a task (weights 1/M) and columns x_j (weights 1/N) at costs C, potentials f [M] and g [N] are improved
in turn, in the log domain:

    f_i = softmin_j(C_ij - g_j) = -epsilon log sum_j 1/N exp((g_j - C_ij) / epsilon),    g likewise from f

until the plan exp((f_i + g_j - C_ij) / epsilon) / (M N) has the marginals 1/M and 1/N; the value is mean f + mean g.
Two things make that fast, beside what `softmin` does:

- Epsilon is annealed from the largest cost, a quarter of it at a time, with the symmetric step
  f, g = (f + softmin(g)) / 2, (g + softmin(f)) / 2, which leaves f = g where both sides are the same rows.
- At the last epsilon a step is over-relaxed, f + w (softmin - f), by 1.5 at first and then by what the errors of each
  pair say: 42 iterations instead of 177 between sets of digits (D = 64, tolerance 1e-3). After an error that grew
  comes the plain step, w = 1, which always converges.

Sources: J. Feydy, "Geometric data analysis, beyond convolutions" (2020), section 3.3, for annealing and the symmetric
step; A. Thibault et al., "Overrelaxed Sinkhorn-Knopp algorithm", Algorithms 14 (2021) 143.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.ground_cost import LEAST_CHUNK, Cost, Points, chunk_bytes, held_bytes
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.precision import exact_products, nearer_rows
from headstart.kernels.engine.softmin import Batch, Costs, choose_path, make_costs

_ANNEALING = 0.25
_RELAXATION = 1.5
"""Of the first round; afterwards it follows from how the errors shrank."""
_MOST_RELAXATION = 1.9

_BATCH = defaultdict(lambda: 2**27, cpu=2**19)
"""Numbers in the costs of the sets that are solved together. On the CPU these and their plans stay in the cache."""


class Settings(NamedTuple):
    """What the iteration is told."""

    epsilon: float
    """The regularisation, in units of the cost."""
    tolerance: float
    """L1 marginal error at which a problem is solved."""
    max_iterations: int
    """At the last epsilon."""
    memory: int | None
    """Bytes that may be held beside inputs and what is as long as they are; None: `fit_memory` says."""


class Solution(NamedTuple):
    """Of T problems."""

    values: Tensor
    """OT of each, [T] float64: the dual's, so below the optimum, by at most the error times the largest cost."""
    num_iterations: Tensor
    """At the last epsilon, [T] int64."""
    errors: Tensor
    """sum_j |1/N - sum_i plan_ij| (the other marginal is exact) and what rounding adds to it, [T] float64."""
    potentials: Tensor
    """f of the rows, [sum n_t]; g = softmin(f) is the other."""


@torch.no_grad()
def solve(rows: Points, columns: Points | None, cost: Cost, settings: Settings) -> Solution:
    """Transport of each of T sets of rows to the one set of columns, to its own of T, or, where that is None, to
    itself."""
    memory = fit_memory(settings.memory, chunk_bytes(rows.features, LEAST_CHUNK, cost))
    device, num_sets = rows.features.device, len(rows.offsets) - 1
    solution = Solution(
        torch.zeros(num_sets, dtype=torch.float64, device=device),
        torch.zeros(num_sets, dtype=torch.int64, device=device),
        torch.zeros(num_sets, dtype=torch.float64, device=device),
        torch.zeros(len(rows.features), dtype=cost.dtype, device=device),
    )
    # What each path takes is watched, and reported, by itself.
    paths: dict[tuple[str, str], list[Batch]] = {}
    for members, widths in _batches(rows, columns, cost, memory):
        batch = Batch(rows, columns, members, widths, cost, memory)
        paths.setdefault(choose_path(batch), []).append(batch)
    for (path, reason), batches in paths.items():
        with dispatch.Watch("transports", device, path, reason, cost.precision) as watch, exact_products(device):
            for batch in batches:
                costs = make_costs(batch, path)
                watch.planned = max(watch.planned, costs.planned)
                _iterate(costs, rows.offsets, torch.tensor(batch.members), columns is None, settings, solution)
                del costs  # before its successor is there
    return solution


def _batches(
    rows: Points, columns: Points | None, cost: Cost, memory: int
) -> Iterator[tuple[list[int], tuple[int, int] | None]]:
    """Sets to solve together and the widths that they are padded to; None for one whose costs cannot be held."""
    widths = [_padded(size) for size in rows.offsets.diff().tolist()]
    if columns is None:
        others = widths
    elif columns.is_one:
        others = [len(columns.features)] * len(widths)
    else:
        others = [_padded(size) for size in columns.offsets.diff().tolist()]
    groups: dict[tuple[int, int], list[int]] = {}
    for t, key in enumerate(zip(widths, others, strict=True)):
        groups.setdefault(key, []).append(t)
    for key, members in groups.items():
        fixed, each = held_bytes(rows.features, key, columns, cost)
        if fixed + each > memory:
            yield from (([t], None) for t in members)
            continue
        fits = _BATCH[rows.features.device.type] // (key[0] * key[1])
        most = max(1, min((memory - fixed) // each, fits))
        for low in range(0, len(members), most):
            yield members[low : low + most], key


def _padded(size: int) -> int:
    """A width for sets of that size: at most a quarter is padding, beyond 8 rows."""
    step = max(8, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def _iterate(
    costs: Costs, offsets: Tensor, members: Tensor, same: bool, settings: Settings, solution: Solution
) -> None:
    """Iterate a batch to the end, and write each set's solution where it ends."""
    epsilon, tolerance = settings.epsilon, settings.tolerance
    f, g = _anneal(costs, epsilon, same)
    relaxation, last, iterations = torch.full_like(f[:, :1], _RELAXATION), torch.full_like(f[:, 0], math.inf), 0
    while True:
        count = min(costs.sweeps, settings.max_iterations - iterations)
        if same:
            f, errors = _symmetric(costs, f, epsilon)
            iterations += 1
        else:
            f, g, errors = costs.sweep(f, g, epsilon, relaxation, count)
            iterations += count
            relaxation = _relaxation(relaxation, (errors / last) ** (1 / count))
            last = errors
        over = iterations >= settings.max_iterations
        if not over and not bool((errors <= tolerance).any()):
            continue
        # One plain step: then the plan's mass is 1, so that mean f + mean g is the dual's value, a lower bound.
        if not same:
            f = costs.rows(g, epsilon)
        ended = costs.columns(f, epsilon)
        errors = _mean((f - ended if same else g - ended).div_(epsilon).expm1_().abs_(), costs.column_log_weights)
        g = ended
        # Potentials, and exponents of their size, are rounded by u, and the plan by that over epsilon (eps is 2 u).
        # Where that is much, the iteration stands still and looks converged: so it is part of the error.
        sizes = _mean(f.abs(), costs.row_log_weights) + _mean(g.abs(), costs.column_log_weights)
        rounding = torch.finfo(costs.dtype).eps * sizes / epsilon
        done = (errors + rounding <= tolerance) | (errors <= rounding) | over
        indices = done.nonzero().flatten().cpu()
        where = members[indices].to(f.device)
        values = _mean(f, costs.row_log_weights) + _mean(g, costs.column_log_weights)
        solution.values[where], solution.errors[where] = values[done], (errors + rounding)[done]
        solution.num_iterations[where] = iterations
        for b, t in zip(indices.tolist(), members[indices].tolist(), strict=True):
            low, high = int(offsets[t]), int(offsets[t + 1])
            solution.potentials[low:high] = f[b, : high - low]
        if len(indices) == len(members):
            return
        left = (~done).nonzero().flatten()
        f, g, relaxation, last, members = f[left], g[left], relaxation[left], last[left], members[left.cpu()]
        costs.keep(left)


def _anneal(costs: Costs, epsilon: float, same: bool) -> tuple[Tensor, Tensor]:
    """Potentials at epsilon, from one symmetric step at each level above it."""
    level = costs.largest()
    if not bool(level.isfinite().all()):
        raise ValueError(
            f"some rows are so far apart that their costs overflow in {costs.dtype}; accepted: "
            + nearer_rows(costs.dtype)
        )
    _check_epsilon(epsilon, float(level.amax()), costs.dtype)
    level = level.clamp(min=epsilon)[:, None]
    g = torch.zeros_like(costs.column_log_weights)
    f = costs.rows(g, level)
    g = f if same else costs.columns(torch.zeros_like(f), level)
    while bool((level > epsilon).any()):
        level = (level * _ANNEALING).clamp(min=epsilon)
        new = costs.rows(g, level)
        g = (g + (new if same else costs.columns(f, level))) / 2
        f = g if same else (f + new) / 2
    if not same:
        f = costs.rows(g, epsilon)
        g = costs.columns(f, epsilon)
    return f, g


def _check_epsilon(epsilon: float, largest: float, dtype: torch.dtype) -> None:
    """Refuse, with a ValueError, an epsilon by which costs up to `largest` cannot be divided in a dtype."""
    limits = torch.finfo(dtype)
    # (f + g - C) / epsilon is made of three terms of the size of the largest cost, and potentials are halved and added.
    least, most = max(limits.tiny, largest / (limits.max / 8)), 1 / limits.tiny
    if not least <= epsilon <= most:
        raise ValueError(
            f"epsilon is {epsilon:.1e}; accepted: {least:.1e} to {most:.1e} for costs up to {largest:.1e} in {dtype}, "
            "or features of another scale, or precision='fp64'"
        )


def _relaxation(now: Tensor, rate: Tensor) -> Tensor:
    """The relaxation for the next round, [B, 1], from that of the last and the factor of its errors a step, [B].

    With m^2 the factor of a plain step, one at relaxation w has the factor l of (l + w - 1)^2 = l w^2 m^2, and the best
    w is 2 / (1 + sqrt(1 - m^2)) (D. M. Young, "Iterative Solution of Large Linear Systems" (1971), chapter 6). Beyond
    the best, l = w - 1 whatever m is: then w stays. Where errors grew it is 1, the plain step.
    """
    rate = rate[:, None].clamp(min=1e-6)
    plain = ((rate + now - 1).square() / (rate * now.square())).clamp(max=1)
    best = torch.maximum(2 / (1 + (1 - plain).sqrt()), now).clamp(max=_MOST_RELAXATION)
    return torch.where(rate < 1, torch.where(rate > now - 0.95, best, now), 1)


def _symmetric(costs: Costs, f: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(f + softmin(f)) / 2, which converges by a half each time, and the marginal error of f."""
    new = costs.rows(f, epsilon)
    return (f + new) / 2, _mean(((f - new) / epsilon).expm1_().abs_(), costs.row_log_weights)


def _mean(values: Tensor, log_weights: Tensor) -> Tensor:
    """sum_i weight_i values_i, [B] float64, whatever the values in the padding."""
    return (values.double() * log_weights.double().exp()).masked_fill_(log_weights == -math.inf, 0).sum(1)

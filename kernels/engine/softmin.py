"""Softmin over the costs between ragged sets of rows, which is all that transport asks of them.

    f_i = softmin_j(C_ij - g_j) = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)

Costs are of two kinds: held, built once for many sets and read in every step, and recomputed, for one pair, chunk by
chunk in every step. Rows of padding have weight 0 and so no part in any sum. With held costs ten iterations at a time
are products with the plan itself: scaling, absorbed into the potentials after them, in a sixth of the time of softmin
(B. Schmitzer, SIAM J. Sci. Comput. 41 (2019) A1443-A1481).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.ground_cost import (
    LEAST_CHUNK,
    Block,
    Cost,
    Points,
    centre_of,
    chunk_bytes,
    held_bytes,
    make_block,
    pair_costs,
    take_near,
)
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.precision import ROUNDED

_MOST = 40.0
"""Logarithms of a scaled plan and its scaling stay below this, so that no product of two overflows: what is beyond
comes with the next absorption. An error, of three, that overflows has grown: a plain step follows."""

_CHUNK_ROWS = 1024
"""Rows of the largest chunks in which costs are recomputed."""


class Costs(ABC):
    """The costs of B problems, of M rows and N columns each, as the iteration sees them: softmin over either side."""

    row_log_weights: Tensor
    column_log_weights: Tensor
    dtype: torch.dtype
    sweeps: int
    """Iterations worth doing before the error is looked at."""
    planned: int
    """Bytes that they will hold at most, beside what is as long as the sets."""

    @abstractmethod
    def largest(self) -> Tensor:
        """The largest cost, [B]."""

    @abstractmethod
    def rows(self, g: Tensor, epsilon: Tensor | float) -> Tensor:
        """f = softmin_j(C - g), [B, M]; epsilon is a number or [B, 1]."""

    @abstractmethod
    def columns(self, f: Tensor, epsilon: Tensor | float) -> Tensor:
        """g = softmin_i(C - f), [B, N]."""

    @abstractmethod
    def keep(self, left: Tensor) -> None:
        """Go on with the problems `left` (ascending) alone."""

    @abstractmethod
    def sweep(
        self, f: Tensor, g: Tensor, epsilon: float, relaxation: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`count` over-relaxed iterations: f, g, and the sum of both marginal errors as the last one found it, [B]."""


class Batch(NamedTuple):
    """Sets whose costs are made together."""

    rows: Points
    columns: Points | None
    """The one set that all meet, or one for each; None: each meets itself."""
    members: list[int]
    """Which sets of rows."""
    widths: tuple[int, int] | None
    """Rows and columns that each is padded to, where their costs are held; None where those of the one member are
    recomputed."""
    cost: Cost
    memory: int

    def pair(self) -> tuple[Points, Points]:
        """The one member and what it meets."""
        rows, columns = self.rows.only(self.members[0]), self.columns
        if columns is None:
            return rows, rows
        return rows, columns if columns.is_one else columns.only(self.members[0])


def choose_path(batch: Batch) -> tuple[str, str]:
    """The path of `dispatch` on which the costs of these sets are made, and the reason."""
    if batch.widths is not None:
        return "eager", "costs fit in the memory"
    # The rule of what is recomputed: with D below it, products in registers are cheaper than what they would be read.
    features = batch.rows.features
    path, reason = dispatch.choose(features.device, "bf16", features.shape[1])
    if path == "fused":
        from headstart.kernels.engine.fused_cost import FusedCosts  # Triton, which other paths do not need

        if not FusedCosts.fit(*batch.pair(), batch.cost, batch.memory):
            return "eager", "costs do not fit in the memory; fused has none of p = 1, labels, fp64 or so many rows"
    elif path == "streamed":
        path, reason = "eager", f"streamed has no costs; {reason}"
    return path, f"costs do not fit in the memory; {reason}"


def make_costs(batch: Batch, path: str = "eager") -> Costs:
    """The costs of a batch, on the path of `choose_path`: held, or recomputed within the memory."""
    if batch.widths is not None:
        return _Held(batch, batch.widths)
    if path == "fused":
        from headstart.kernels.engine.fused_cost import FusedCosts

        return FusedCosts(*batch.pair(), batch.cost, batch.memory)
    return Recomputed(*batch.pair(), batch.cost, batch.memory)


def add_gradient(
    out: Tensor,
    weight: float,
    rows: Points,
    columns: Points,
    potentials: Tensor,
    epsilon: float,
    cost: Cost,
    memory: int | None,
    masses: Tensor | None = None,
) -> None:
    """Add weight times the gradient of OT(rows, columns), by the columns [N, D], to out [N, D] of the working dtype.

    With labels the gradient is that of the distances of rows alone, and `masses` [columns of the table, rows of the
    table that the rows have] gets weight times what the plan moves between classes: the gradient by the table.

    At the optimum only the cost moves (envelope theorem): sum_i plan_ij d C(y_i, x_j) / d x_j, with the plan of the
    rows' potentials. Of a set with itself that is half of the gradient, since it stands on both sides.
    """
    Recomputed(rows, columns, cost, fit_memory(memory, 0)).add_gradient(out, weight, potentials[None], epsilon, masses)


class _Held(Costs):
    """Costs [B, M, N] in memory, built once."""

    sweeps = 10

    def __init__(self, batch: Batch, widths: tuple[int, int]) -> None:
        rows, columns, members, _, cost, _ = batch
        self.dtype = cost.dtype
        fixed, each = held_bytes(rows.features, widths, columns, cost)
        self.planned = fixed + len(members) * each
        runs = _runs(rows, members)
        if columns is None:
            y = x = make_block(rows, *runs, widths[0], _centres(rows, *runs, cost), cost)
        else:
            its = _runs(columns, [0] if columns.is_one else members)
            centres = _centres(columns, *its, cost)
            y = make_block(rows, *runs, widths[0], centres.expand(len(members), -1), cost)
            x = make_block(columns, *its, widths[1], centres, cost)
        self._costs = pair_costs(y, x, cost, same=columns is None)
        self._scratch = torch.empty_like(self._costs)
        self.row_log_weights = y.log_weights
        self.column_log_weights = x.log_weights.expand(len(members), -1)

    def largest(self) -> Tensor:
        # Of the padding too, which is at the centre: no more than a first level of the annealing.
        return self._costs.amax((1, 2))

    def rows(self, g: Tensor, epsilon: Tensor | float) -> Tensor:
        return self._softmin(2, (g / epsilon + self.column_log_weights)[:, None, :], epsilon)

    def columns(self, f: Tensor, epsilon: Tensor | float) -> Tensor:
        return self._softmin(1, (f / epsilon + self.row_log_weights)[:, :, None], epsilon)

    def _softmin(self, dim: int, exponents: Tensor, epsilon: Tensor | float) -> Tensor:
        # By hand and in place: torch.logsumexp makes two more arrays of this size and takes four times as long.
        factors = -1 / (epsilon[:, None] if isinstance(epsilon, Tensor) else epsilon)
        terms = torch.mul(self._costs, factors, out=self._scratch).add_(exponents)
        most = terms.amax(dim, keepdim=True)
        sums = terms.sub_(most).exp_().sum(dim)
        return (sums.log_() + most.squeeze(dim)) * -epsilon

    def keep(self, left: Tensor) -> None:
        for to, at in enumerate(left.tolist()):  # ascending: nothing is overwritten that is still to be moved
            if to != at:
                self._costs[to].copy_(self._costs[at])
        self._costs, self._scratch = self._costs[: len(left)], self._scratch[: len(left)]
        self.row_log_weights = self.row_log_weights[left]
        self.column_log_weights = self.column_log_weights[left]

    def sweep(
        self, f: Tensor, g: Tensor, epsilon: float, relaxation: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = torch.sub(f[:, :, None], self._costs, out=self._scratch).add_(g[:, None, :])
        plan.mul_(1 / epsilon).clamp_(max=_MOST).exp_()
        a, b = self.row_log_weights.exp(), self.column_log_weights.exp()
        log_u, log_v = torch.zeros_like(f), torch.zeros_like(g)
        errors = torch.zeros_like(f[:, 0])

        def step(scale: Tensor, sums: Tensor) -> Tensor:
            new = (1 - relaxation) * scale - relaxation * sums.clamp_(min=math.exp(-_MOST)).log_()
            return new.clamp_(-_MOST, _MOST)

        for _ in range(count):
            sums = torch.bmm(plan, (b * log_v.exp())[:, :, None]).squeeze(2)
            errors = (log_u.exp().mul_(sums).sub_(1).abs_() * a).sum(1)
            log_u = step(log_u, sums)
            sums = torch.bmm((a * log_u.exp())[:, None, :], plan).squeeze(1)
            errors += (log_v.exp().mul_(sums).sub_(1).abs_() * b).sum(1)
            log_v = step(log_v, sums)
        return f + epsilon * log_u, g + epsilon * log_v, errors


def _runs(points: Points, members: list[int]) -> tuple[list[int], list[int]]:
    """Where the sets of these numbers start, and how many rows they have."""
    offsets = points.offsets.tolist()
    return [offsets[t] for t in members], [offsets[t + 1] - offsets[t] for t in members]


def _centres(points: Points, starts: list[int], sizes: list[int], cost: Cost) -> Tensor:
    """A centre for each run, [B, D]."""
    runs = zip(starts, sizes, strict=True)
    return torch.stack([centre_of(points.features[start : start + size], cost) for start, size in runs])


class Recomputed(Costs):
    """One pair whose costs do not fit in memory: computed again, chunk by chunk, in every half step."""

    sweeps = 5

    def __init__(self, rows: Points, columns: Points, cost: Cost, memory: int) -> None:
        self.dtype, self._cost = cost.dtype, cost
        self._sides = (rows, columns)
        self._centre = centre_of(columns.features, cost)[None]
        if cost.labels is not None and rows.classes is not None:  # the pair's own part of the table
            low, high = int(rows.classes.min()), int(rows.classes.max()) + 1
            self._cost = cost._replace(labels=cost.labels[low:high])
            self._sides = (rows._replace(classes=rows.classes - low), columns)
        self._size = _CHUNK_ROWS
        while self._size > LEAST_CHUNK and chunk_bytes(rows.features, self._size, self._cost) > memory:
            self._size //= 2
        self.planned = chunk_bytes(rows.features, self._size, self._cost)
        counts, device = [len(side.features) for side in self._sides], rows.features.device
        weights = [torch.full((1, n), -math.log(n), dtype=self.dtype, device=device) for n in counts]
        self.row_log_weights, self.column_log_weights = weights

    def _blocks(self, side: int) -> Iterator[tuple[slice, Block]]:
        points = self._sides[side]
        for low in range(0, len(points.features), self._size):
            high = min(low + self._size, len(points.features))
            yield slice(low, high), make_block(points, [low], [high - low], high - low, self._centre, self._cost)

    def _tile(self, out: Block, over: Block, side: int) -> Tensor:
        return pair_costs(out, over, self._cost, transposed=side == 1)[0]

    def largest(self) -> Tensor:
        """See `Costs`, as for the rest."""
        pairs = product(self._blocks(0), self._blocks(1))
        return torch.stack([self._tile(y, x, 0).amax() for (_, y), (_, x) in pairs]).amax()[None]

    def rows(self, g: Tensor, epsilon: Tensor | float) -> Tensor:
        """Softmin over the columns."""
        return self._softmin(0, g / epsilon + self.column_log_weights, epsilon)

    def columns(self, f: Tensor, epsilon: Tensor | float) -> Tensor:
        """Softmin over the rows."""
        return self._softmin(1, f / epsilon + self.row_log_weights, epsilon)

    def _softmin(self, side: int, exponents: Tensor, epsilon: Tensor | float) -> Tensor:
        """Softmin for the points of one side, over those of the other: log-sums of chunks, and their log-sum."""
        found = []
        for _, out in self._blocks(side):
            total: Tensor | None = None
            for where, over in self._blocks(1 - side):
                terms = self._tile(out, over, side).mul_(-1 / epsilon).add_(exponents[:, where])
                most = terms.amax(1)
                part = terms.sub_(most[:, None]).exp_().sum(1).log_().add_(most)
                total = part if total is None else torch.logaddexp(total, part)
            assert total is not None
            found.append(total)
        return torch.cat(found)[None] * -epsilon

    def keep(self, left: Tensor) -> None:
        """One problem is kept or done."""

    def sweep(
        self, f: Tensor, g: Tensor, epsilon: float, relaxation: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Plain steps, over-relaxed."""
        errors = torch.zeros_like(f[:, 0])
        for _ in range(count):
            change = self.rows(g, epsilon) - f
            errors = (change / -epsilon).expm1_().abs_().mean(1)
            f = f + relaxation * change
            change = self.columns(f, epsilon) - g
            errors = errors + (change / -epsilon).expm1_().abs_().mean(1)
            g = g + relaxation * change
        return f, g, errors

    def add_gradient(self, out: Tensor, weight: float, f: Tensor, epsilon: float, masses: Tensor | None = None) -> None:
        """See the function of that name."""
        g = self.columns(f, epsilon)
        scale = weight / f.shape[1] / g.shape[1]
        for place, x in self._blocks(1):
            columns = x.whole[0]
            for where, y in self._blocks(0):
                tile = self._tile(x, y, 1)
                plan = (f[:, where] - tile).add_(g[0, place, None]).mul_(1 / epsilon).exp_().mul_(scale)
                if masses is not None:
                    to, of = (_one_hot(v, n, plan) for v, n in zip((x.columns, y.classes), masses.shape, strict=True))
                    masses += to.T @ (plan @ of)
                if self._cost.p == 1:
                    # d |x - y| = (x - y) / |x - y|, and 0 where they are equal
                    given = self._sides[1].features[place], self._sides[0].features[where]
                    if self._cost.precision in ROUNDED:
                        given = x.whole[0], y.whole[0]
                    out[place] += take_near(plan, tile, x, y, given)
                    plan.div_(tile).masked_fill_(tile == 0, 0)
                out[place] += plan.sum(1, keepdim=True) * columns
                out[place].addmm_(plan, y.whole[0], alpha=-1)


def _one_hot(indices: Tensor | None, size: int, like: Tensor) -> Tensor:
    """[n, size] from indices [1, n], in another tensor's dtype."""
    assert indices is not None
    return like.new_zeros(indices.shape[1], size).scatter_(1, indices.T, 1)

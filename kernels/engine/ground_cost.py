"""The costs |y - x|^p / p between ragged sets of rows, as transport sees them: softmin over either side.

    f_i = softmin_j(C_ij - g_j) = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)

There are two kinds: held, built once for many sets and read in every step, and recomputed, for one pair, chunk by chunk
in every step. Sets are padded with rows of weight 0 (log weight -inf), which so have no part in any sum. With held
costs ten iterations at a time are products with the plan itself: scaling, absorbed into the potentials after them, in
a sixth of the time of softmin (B. Schmitzer, SIAM J. Sci. Comput. 41 (2019) A1443-A1481).

Costs come from products of centred rows, |y|^2 + |x|^2 - 2 x.y, and where |y - x|^2 is less than 2^-10 (fp64: 2^-20) of
|y|^2 + |x|^2 again from the difference of the rows: equal rows cost exactly 0. Under a precision that rounds, rows are
rounded about one centre for all sets, and costs are those of the rounded rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.precision import PRECISIONS, ROUNDED, exact_products, rounded

_MOST = 40.0
"""Logarithms of a scaled plan and its scaling stay below this, so that no product of three overflows: what is beyond
comes with the next absorption."""

_CHUNK_ROWS = 1024
LEAST_CHUNK = 64
"""Rows of the largest and of the smallest chunks in which costs are recomputed."""
_AGAIN = 2**16
"""Numbers of the rows whose differences are taken together, and 8 times the pairs that are looked at for it."""


class Points(NamedTuple):
    """T ragged sets of rows, one after the other."""

    features: Tensor
    """[sum n_t, D] as given."""
    offsets: Tensor
    """[T + 1] int64 on the CPU."""
    classes: Tensor | None = None
    """[sum n_t] int64: the row of `Cost.labels` that a row has; None without labels."""
    columns: Tensor | None = None
    """[sum n_t] int64: the column of `Cost.labels` that it has, as the other side of a pair."""

    def only(self, t: int) -> "Points":
        """Set t alone."""
        low, high = int(self.offsets[t]), int(self.offsets[t + 1])
        classes, columns = (None if v is None else v[low:high] for v in (self.classes, self.columns))
        return Points(self.features[low:high], torch.tensor([0, high - low]), classes, columns)


class Cost(NamedTuple):
    """C(y, x) = |y - x|^p / p + labels[class of y, column of x]."""

    p: int
    labels: Tensor | None = None
    precision: str = "fp32"
    """Of the products of rows."""
    centre: Tensor | None = None
    """[D], subtracted from all rows before they are rounded; None where nothing is, and each set may have its own."""

    @property
    def dtype(self) -> torch.dtype:
        """Of costs and potentials."""
        return PRECISIONS[self.precision]


class _Block(NamedTuple):
    """B runs of rows, each padded to R, less a centre."""

    rows: Tensor
    """[B, R, D], zeros in the padding."""
    low: Tensor | None
    """What rounding left of them, for bf16x3."""
    squares: Tensor
    """[B, R]."""
    log_weights: Tensor
    """log(1/n), and -inf in the padding, which so has no part in any sum; [B, R]."""
    classes: Tensor | None
    columns: Tensor | None

    @property
    def whole(self) -> Tensor:
        """The rows with what rounding left."""
        return self.rows if self.low is None else self.rows + self.low


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


def choose_path(
    rows: Points,
    columns: Points | None,
    members: list[int],
    width: int | None,
    cost: Cost,
    memory: int,
) -> tuple[str, str]:
    """The path of `dispatch` on which the costs of these sets are made, and the reason."""
    if width is not None:
        return "eager", "costs fit in the memory"
    # The rule of what is recomputed: with D below it, products in registers are cheaper than what they would be read.
    path, reason = dispatch.choose(rows.features.device, "bf16", rows.features.shape[1])
    if path == "fused":
        from headstart.kernels.engine.fused_cost import FusedCosts  # Triton, which other paths do not need

        pair = rows.only(members[0])
        if not FusedCosts.fit(pair, columns or pair, cost, memory):
            return (
                "eager",
                "costs do not fit in the memory; fused has none of p = 1, labels, fp64 or so many rows",
            )
    elif path == "streamed":
        path, reason = "eager", f"streamed has no costs; {reason}"
    return path, f"costs do not fit in the memory; {reason}"


def make_costs(
    rows: Points,
    columns: Points | None,
    members: list[int],
    width: int | None,
    cost: Cost,
    memory: int,
    path: str = "eager",
) -> Costs:
    """Costs of the sets `members` to the one set of columns (None: each to itself), on the path of `choose_path`.

    Held and padded to `width` rows; or, where that is None, of the one member, recomputed within the memory.
    """
    if width is not None:
        return _Held(rows, columns, members, width, cost)
    pair = rows.only(members[0])
    if path == "fused":
        from headstart.kernels.engine.fused_cost import FusedCosts

        return FusedCosts(pair, columns or pair, cost, memory)
    return Recomputed(pair, columns or pair, cost, memory)


def add_gradient(
    out: Tensor,
    weight: float,
    rows: Points,
    columns: Points,
    potentials: Tensor,
    epsilon: float,
    cost: Cost,
    memory: int,
) -> None:
    """Add weight times the gradient of OT(rows, columns), by the columns [N, D], to out [N, D] of the working dtype.

    At the optimum only the cost moves (envelope theorem): sum_i plan_ij d C(y_i, x_j) / d x_j, with the plan of the
    rows' potentials. Of a set with itself that is half of the gradient, since it stands on both sides.
    """
    Recomputed(rows, columns, cost, memory).add_gradient(out, weight, potentials[None], epsilon)


class _Held(Costs):
    """Costs [B, M, N] in memory, built once."""

    sweeps = 10

    def __init__(self, rows: Points, columns: Points | None, members: list[int], width: int, cost: Cost) -> None:
        self.dtype = cost.dtype
        fixed, each = held_bytes(rows.features, width, None if columns is None else len(columns.features), cost)
        self.planned = fixed + len(members) * each
        offsets = rows.offsets.tolist()
        starts, sizes = [offsets[t] for t in members], [offsets[t + 1] - offsets[t] for t in members]
        if columns is None:
            sets = [rows.features[s : s + n] for s, n in zip(starts, sizes, strict=True)]
            y = x = _block(rows, starts, sizes, width, torch.stack([_centre(some, cost) for some in sets]), cost)
        else:
            centre, num_columns = _centre(columns.features, cost)[None], len(columns.features)
            y = _block(rows, starts, sizes, width, centre.expand(len(starts), -1), cost)
            x = _block(columns, [0], [num_columns], num_columns, centre, cost)
        self._costs = _pair_costs(y, x, cost, same=columns is None)
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


class Recomputed(Costs):
    """One pair whose costs do not fit in memory: computed again, chunk by chunk, in every half step."""

    sweeps = 5

    def __init__(self, rows: Points, columns: Points, cost: Cost, memory: int) -> None:
        self.dtype, self._cost = cost.dtype, cost
        self._sides = (rows, columns)
        self._centre = _centre(columns.features, cost)[None]
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

    def _blocks(self, side: int) -> Iterator[tuple[slice, _Block]]:
        points = self._sides[side]
        for low in range(0, len(points.features), self._size):
            high = min(low + self._size, len(points.features))
            yield slice(low, high), _block(points, [low], [high - low], high - low, self._centre, self._cost)

    def _tile(self, out: _Block, over: _Block, side: int) -> Tensor:
        return _pair_costs(out, over, self._cost, transposed=side == 1)[0]

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

    def add_gradient(self, out: Tensor, weight: float, f: Tensor, epsilon: float) -> None:
        """See the function of that name."""
        g = self.columns(f, epsilon)
        scale = weight / f.shape[1] / g.shape[1]
        for place, x in self._blocks(1):
            columns = x.whole[0]
            for where, y in self._blocks(0):
                tile = self._tile(x, y, 1)
                plan = (f[:, where] - tile).add_(g[0, place, None]).mul_(1 / epsilon).exp_().mul_(scale)
                if self._cost.p == 1:
                    # d |x - y| = (x - y) / |x - y|, and 0 where they are equal
                    plan.div_(tile).masked_fill_(tile == 0, 0)
                out[place] += plan.sum(1, keepdim=True) * columns
                out[place].addmm_(plan, y.whole[0], alpha=-1)


def _block(points: Points, starts: list[int], sizes: list[int], width: int, centres: Tensor, cost: Cost) -> _Block:
    """The rows of B runs, padded to `width`, less their centres [B, D], rounded as the cost's precision says."""
    device, (num_sets, num_features) = points.features.device, centres.shape
    rows = torch.zeros(num_sets, width, num_features, dtype=cost.dtype, device=device)
    low = torch.zeros_like(rows) if cost.precision == "bf16x3" else None
    log_weights = torch.full((num_sets, width), -math.inf, dtype=cost.dtype, device=device)
    given = (points.classes, points.columns)
    labels = [None if v is None else torch.zeros(num_sets, width, dtype=torch.int64, device=device) for v in given]
    for b, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        high, rest = rounded((points.features[start : start + size] - centres[b]).to(cost.dtype), cost.precision)
        rows[b, :size] = high
        if low is not None and rest is not None:
            low[b, :size] = rest
        log_weights[b, :size] = -math.log(size)
        for to, at in zip(labels, given, strict=True):
            if to is not None and at is not None:
                to[b, :size] = at[start : start + size]
    squares = torch.linalg.vector_norm(rows, dim=2).square_()
    if low is not None:
        squares += 2 * torch.linalg.vecdot(rows, low)
    return _Block(rows, low, squares, log_weights, *labels)


def _pair_costs(y: _Block, x: _Block, cost: Cost, *, same: bool = False, transposed: bool = False) -> Tensor:
    """Costs [B, M, N] of blocks y [B, M, D] and x [B or 1, N, D].

    `same`: x is y; `transposed`: y is the side of the columns, so that the classes are those of x.
    """
    costs = y.squares[:, :, None] + x.squares[:, None, :]
    with exact_products(costs.device, cost.precision):
        for left, right in ((y.rows, x.rows), (y.rows, x.low), (y.low, x.rows)):
            if left is None or right is None:
                continue
            if len(right) == 1:  # one product, with no copy of x for each set
                costs.view(-1, costs.shape[2]).addmm_(left.flatten(0, 1), right[0].T, alpha=-2)
            else:
                costs.baddbmm_(left, right.mT, alpha=-2)
    itself = costs.diagonal(0, 1, 2)
    if same:
        itself.fill_(math.inf)
    _again(costs, y, x)
    if same:
        itself.fill_(0)
    costs.clamp_(min=0)
    if cost.p == 1:
        costs.sqrt_()
    else:
        costs.mul_(0.5)
    if cost.labels is not None:
        one, other = (y.columns, x.classes) if transposed else (y.classes, x.columns)
        assert one is not None
        assert other is not None
        table = cost.labels.T if transposed else cost.labels
        costs += table[one].gather(2, other[:, None, :].expand(costs.shape))
    return costs


def _again(squares: Tensor, y: _Block, x: _Block) -> None:
    """Write |y - x|^2 from the difference of the rows over every pair whose product cancelled."""
    share = 2.0**-10 if squares.dtype == torch.float32 else 2.0**-20
    num_columns = squares.shape[2]
    lost = (squares.amin(2) < share * (y.squares + x.squares.amax(1, keepdim=True))).nonzero()
    for some in lost.split(max(1, _AGAIN // 8 // num_columns)):
        b, i = some.unbind(1)
        its = b % len(x.rows)
        near = squares[b, i] < share * (x.squares[its] + y.squares[b, i, None])
        at, j = near.nonzero().unbind(1)
        for part in torch.arange(len(at), device=at.device).split(max(1, _AGAIN // y.rows.shape[2])):
            which, column = at[part], j[part]
            difference = y.rows[b[which], i[which]] - x.rows[its[which], column]
            if y.low is not None and x.low is not None:
                difference += y.low[b[which], i[which]] - x.low[its[which], column]
            squares[b[which], i[which], column] = difference.square_().sum(1)


def chunk_bytes(features: Tensor, size: int, cost: Cost) -> int:
    """Most memory that recomputed costs take with chunks of `size` rows, beside potentials."""
    item, num_features = cost.dtype.itemsize, features.shape[1]
    tables = 0 if cost.labels is None else size * (sum(cost.labels.shape) * item + 8)
    blocks, tile = 2 * size * (num_features * sum(_row_bytes(cost)) + 32), 3 * size * size * item
    return blocks + tile + tables + _again_bytes(num_features, size, item)


def held_bytes(features: Tensor, width: int, num_columns: int | None, cost: Cost) -> tuple[int, int]:
    """Memory that held costs take for sets padded to `width` rows: (whatever their number, for each of them).

    `num_columns` is the number of the columns that they share, None where each meets itself.
    """
    item, num_features = cost.dtype.itemsize, features.shape[1]
    kept, making = _row_bytes(cost)
    row = num_features * kept + 64
    fixed = 0 if num_columns is None else num_columns * (row + num_features * making)
    columns = width if num_columns is None else num_columns
    tables = 0 if cost.labels is None else cost.labels.shape[1] * item + 16
    each = width * columns * item * 2 + width * (row + tables) + 12 * item * (width + columns)
    return fixed + width * num_features * making + _again_bytes(num_features, columns, item), each


def _row_bytes(cost: Cost) -> tuple[int, int]:
    """Bytes for each number of a row: (as it is kept, while it is centred and rounded)."""
    copies = 2 if cost.precision == "bf16x3" else 1
    return copies * cost.dtype.itemsize, 28 if cost.precision in ROUNDED else 8


def _again_bytes(num_features: int, num_columns: int, item: int) -> int:
    """Memory that `_again` takes."""
    return 3 * item * max(_AGAIN, num_features) + 64 * max(_AGAIN // 8, num_columns)


def _centre(features: Tensor, cost: Cost) -> Tensor:
    """The cost's centre [D], or else a point amid rows [N, D]: exactly the row where all are equal."""
    if cost.centre is not None:
        return cost.centre
    sample = features[:: max(1, len(features) // 64)].to(torch.promote_types(features.dtype, cost.dtype))
    return (sample - sample[0]).mean(0).add_(sample[0])

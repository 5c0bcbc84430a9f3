"""The costs |y - x|^p / p (+ those of labels) between blocks of rows, from products, and the memory that they take.

They come from products of centred rows, |y|^2 + |x|^2 - 2 x.y, and where |y - x|^2 is less than 2^-10 (fp64: 2^-20) of
|y|^2 + |x|^2 again from the difference of the rows: equal rows cost exactly 0. Under a precision that rounds, rows are
rounded about one centre for all sets, and costs are those of the rounded rows. Sets are padded with rows of weight 0
(log weight -inf).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine.precision import PRECISIONS, ROUNDED, exact_products, rounded

LEAST_CHUNK = 64
"""Rows of the smallest chunks in which costs are recomputed."""
_AGAIN = 2**16
"""Twice the numbers of the rows whose differences, in float64 for gradients, are taken together, and 8 times the pairs
that are looked at for it."""


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

    @property
    def is_one(self) -> bool:
        """Whether T is 1: as columns, a set that all sets of rows meet."""
        return len(self.offsets) == 2

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


class Block(NamedTuple):
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


def make_block(points: Points, starts: list[int], sizes: list[int], width: int, centres: Tensor, cost: Cost) -> Block:
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
    return Block(rows, low, squares, log_weights, *labels)


def pair_costs(y: Block, x: Block, cost: Cost, *, same: bool = False, transposed: bool = False) -> Tensor:
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


def _again(squares: Tensor, y: Block, x: Block) -> None:
    """Write |y - x|^2 from the difference of the rows over every pair whose product cancelled."""
    for b, i, j in _near_pairs(squares, y, x):
        its = b % len(x.rows)
        difference = y.rows[b, i] - x.rows[its, j]
        if y.low is not None and x.low is not None:
            difference += y.low[b, i] - x.low[its, j]
        squares[b, i, j] = difference.square_().sum(1)


def _near_pairs(squares: Tensor, y: Block, x: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The pairs whose product cancels, some at a time: of which set, row and column, [P] each."""
    share = 2.0**-10 if squares.dtype == torch.float32 else 2.0**-20
    num_columns = squares.shape[2]
    lost = (squares.amin(2) < share * (y.squares + x.squares.amax(1, keepdim=True))).nonzero()
    for some in lost.split(max(1, _AGAIN // 8 // num_columns)):
        b, i = some.unbind(1)
        near = squares[b, i] < share * (x.squares[b % len(x.rows)] + y.squares[b, i, None])
        at, j = near.nonzero().unbind(1)
        for part in torch.arange(len(at), device=at.device).split(max(1, _AGAIN // 2 // y.rows.shape[2])):
            yield b[at[part]], i[at[part]], j[part]


def take_near(plan: Tensor, distances: Tensor, y: Block, x: Block, rows: tuple[Tensor, Tensor]) -> Tensor:
    """sum_j plan_ij (y_i - x_j) / |y_i - x_j| over the near pairs of one set, [M, D] float64; their plan becomes 0.

    `rows`: y [M, D] and x [N, D] with all of their digits. Centred ones have lost some, and a slope of 1 / |y_i - x_j|
    makes that much.
    """
    moved = torch.zeros(rows[0].shape, dtype=torch.float64, device=plan.device)
    for _, i, j in _near_pairs(distances.square()[None], y, x):
        difference = rows[0][i].double().sub_(rows[1][j])
        length = torch.linalg.vector_norm(difference, dim=1)
        slopes = (plan[i, j] / length).masked_fill_(length == 0, 0)
        # Not index_add_, whose order is open on CUDA.
        moved.index_put_((i,), difference.mul_(slopes[:, None]), accumulate=True)
        plan[i, j] = 0
    return moved


def chunk_bytes(features: Tensor, size: int, cost: Cost) -> int:
    """Most memory that recomputed costs take with chunks of `size` rows, beside potentials."""
    item, num_features = cost.dtype.itemsize, features.shape[1]
    tables = 0 if cost.labels is None else size * (sum(cost.labels.shape) * item + 8)
    blocks, tile = 2 * size * (num_features * sum(_row_bytes(cost)) + 32), 3 * size * size * item
    return blocks + tile + tables + _again_bytes(num_features, size, item)


def held_bytes(features: Tensor, widths: tuple[int, int], columns: Points | None, cost: Cost) -> tuple[int, int]:
    """Memory that held costs take for sets padded to so many rows and columns: (whatever their number, for each).

    `columns`: the one set that all meet, or one for each; None where each meets itself.
    """
    item, num_features = cost.dtype.itemsize, features.shape[1]
    kept, making = _row_bytes(cost)
    row = num_features * kept + 64
    width, num_columns = widths
    tables = 0 if cost.labels is None else cost.labels.shape[1] * item + 16
    each = width * num_columns * item * 2 + width * (row + tables) + 12 * item * (width + num_columns)
    fixed, widest = _again_bytes(num_features, num_columns, item), width
    if columns is not None and columns.is_one:
        fixed += num_columns * (row + num_features * making)
    elif columns is not None:
        each, widest = each + num_columns * row, max(width, num_columns)
    return fixed + widest * num_features * making, each


def _row_bytes(cost: Cost) -> tuple[int, int]:
    """Bytes for each number of a row: (as it is kept, while it is centred and rounded)."""
    copies = 2 if cost.precision == "bf16x3" else 1
    return copies * cost.dtype.itemsize, 28 if cost.precision in ROUNDED else 8


def _again_bytes(num_features: int, num_columns: int, item: int) -> int:
    """Memory that `_again` takes."""
    return 3 * item * max(_AGAIN, num_features) + 64 * max(_AGAIN // 8, num_columns)


def centre_of(features: Tensor, cost: Cost) -> Tensor:
    """The cost's centre [D], or else a point amid rows [N, D]: exactly the row where all are equal."""
    if cost.centre is not None:
        return cost.centre
    sample = features[:: max(1, len(features) // 64)].to(torch.promote_types(features.dtype, cost.dtype)).contiguous()
    return (sample - sample[0]).mean(0).add_(sample[0])

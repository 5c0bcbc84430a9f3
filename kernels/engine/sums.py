"""Sums of values over the pairs of ragged tasks, tile by tile, and what they change by with the target."""

from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor

from headstart.kernels.engine.precision import PRECISIONS
from headstart.kernels.engine.sweep import PANEL, Sweep
from headstart.kernels.engine.tile import Panels, Value
from headstart.kernels.ragged import sums_of_runs

OWN_ROWS = 256
"""Tasks of at most so many rows meet themselves in batches, larger ones in stripes."""

GRADIENT_BYTES = defaultdict(lambda: 2**28, cpu=2**24)
"""What sums of gradients take at once: a target's rows are taken some at a time."""


@torch.no_grad()
def cross_sums(
    sweep: Sweep, target: Tensor, features: Tensor, offsets: Tensor, *, own: bool
) -> tuple[Tensor, Tensor | None]:
    """sum_ij v(x_i, y_j) over the target x [N, D] and each task y [n_t, D], [T] float64.

    With `own` also the sum over the target with itself, [1], as `own_sums` has it: its rows are at hand here.
    """
    totals = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    panels = sweep.panels(target)
    for tile in sweep.tiles(target, features, panels):
        totals[tile.row : tile.row + tile.squares.shape[0]].add_(sweep.value.apply_(tile.squares).sum(1))
    sums = sums_of_runs(totals, offsets.diff()).to(features.device)
    if not own:
        return sums, None
    if panels.held is None:
        sweep.clear()
    return sums, own_sums(sweep, target, torch.tensor([0, len(target)]), panels)


@torch.no_grad()
def own_sums(sweep: Sweep, features: Tensor, offsets: Tensor, panels: Panels | None = None) -> Tensor:
    """sum_ij v(y_i, y_j) over each task y [n_t, D], a row with itself included; [T] float64.

    `panels`: those of the one task, where they are made already.
    """
    value = sweep.value
    sums = value.at_zero * offsets.diff().double()
    cuts: list[int] = offsets.tolist()
    groups: dict[int, list[int]] = {}
    for t, (start, end) in enumerate(pairwise(cuts)):
        if end - start > OWN_ROWS:
            for squares, once in sweep.own_tiles(features[start:end], panels):
                values = value.apply_(squares)
                if once:
                    values.diagonal().fill_(0)
                    values[:, :once].mul_(0.5)  # these stand for themselves alone
                sums[t] += 2 * float(values.sum(1).double().sum())
        elif end - start > 1:  # one row has no pairs
            groups.setdefault((end - start + 15) // 16 * 16, []).append(t)
    for width, members in groups.items():
        done = 0
        for squares in sweep.own_batches(features, cuts, members, width):
            beyond = squares >= sweep.far
            rows = value.apply_(squares).masked_fill_(beyond, 0).sum(2).double()
            # Added on the host: on CUDA the order of a row's sum depends on how many rows there are.
            sums[members[done : done + len(rows)]] += rows.cpu().sum(1)
            done += len(rows)
    return sums.to(features.device)


def gradient_sweep(
    features: Tensor, num_columns: int, value: Value, precision: str, memory: int | None, centre: Tensor | None
) -> Sweep:
    """The sweep that `cross_gradient` takes; the arguments are those of `Sweep`, and so is the ValueError."""
    dim, dtype = features.shape[1], PRECISIONS[precision]
    columns = min(num_columns, PANEL, max(16, GRADIENT_BYTES[features.device.type] // (16 * dim)))
    per_row = dim * (2 * torch.promote_types(features.dtype, dtype).itemsize + dtype.itemsize)
    return Sweep(features, columns, value, precision, memory, centre, per_row, 16 * columns * dim)


@torch.no_grad()
def cross_gradient(sweep: Sweep, target: Tensor, features: Tensor, row_weights: Tensor, out: Tensor) -> None:
    """Write sum_j w_j dv(x_i, y_j)/dx_i for weights w [M] of the rows y [M, D] of features to out [N, D].

    With the slopes s_ij of a tile, sum_j s_ij (x_i - y_j) is one product more. It cancels where the tile's did, and so
    near pairs are added one by one, from the difference of their rows. Rows at distance 0 add nothing.
    """
    weights = row_weights.to(sweep.dtype)
    for columns, moved_columns in zip(target.split(sweep.panel), out.split(sweep.panel), strict=True):
        origin = sweep.centre_of(columns)
        total = torch.zeros(len(columns), 1, dtype=torch.float64, device=target.device)
        moved = torch.zeros(columns.shape, dtype=torch.float64, device=target.device)

        def take(row: Tensor, column: Tensor, difference: Tensor, moved: Tensor = moved) -> None:
            difference = difference.double()
            slopes = sweep.value.slope_(torch.linalg.vector_norm(difference, dim=1).square_())
            # Not index_add_, whose order is open on CUDA.
            moved.index_put_((column,), difference.mul_(slopes.mul_(-row_weights[row])[:, None]), accumulate=True)

        for tile in sweep.tiles(columns, features, take=take):
            rows = slice(tile.row, tile.row + len(tile.squares))
            slopes = sweep.value.slope_(tile.squares).mul_(weights[rows, None])
            total[:, 0] += slopes.sum(0)
            moved -= slopes.T @ (features[rows].to(sweep.wide) - origin).to(sweep.dtype)
        moved.addcmul_(columns.to(torch.float64, copy=True).sub_(origin), total)
        moved_columns.copy_(moved)

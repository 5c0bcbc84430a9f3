"""The host side of the Triton programs: sums and searches over pairs of operands, on either path.

`fused` launches a table of tiles, `streamed` a product and a pass over it at a time. On both, `memory` sets how much is
launched at once, and no bit: cuts into tiles and units follow from shapes alone, and so does the order of every sum.

A task's own sum depends on its rows alone, on neither their place among the others nor these: a block, a unit and a
sum's order start at the task's first row, and whether a task is streamed or fused there is a matter of its own size.
So the target's own sum and that of a task which equals it agree in every bit, streamed as far as cuBLAS keeps its
promise of the same bits for the same call on one device and stream. Cross sums agree with own ones in no more than
what they are accurate to: `pairs.pair_sums` takes the own sum where task and target are equal.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.kernels.engine.fused import Fused
from headstart.kernels.engine.precision import Operand
from headstart.kernels.engine.streamed import Streamed, own_rows, task_sums
from headstart.kernels.engine.units import (
    Job,
    byte_chunks,
    check_squares,
    finish_config,
    logsumexp_runs,
    tile_config,
    whole,
)

Path = Literal["fused", "streamed"]


class Value(NamedTuple):
    """What is summed over pairs."""

    kind: Literal["sqrt", "rbf"]
    """sqrt: the distance. rbf: mean_b exp(-c_b d2)."""
    coefficients: Tensor | None = None
    """For rbf c_b = 1 / (2 sigma_b^2), [B] float32 on the operands' device."""


def cross_sums(
    x: Operand, y: Operand, offsets: Tensor, *, precision: str, value: Value, path: Path, memory: int
) -> Tensor:
    """Sum of `value` over all pairs of a target x [N] and each task of y [offsets[-1]], [T] float64 on the CPU.

    offsets [T + 1] int64 on the CPU, from 0. ValueError: a bound that cannot hold one unit of y, said with the least
    accepted; rows so far out that squares overflow.
    """
    if path == "fused":
        job = Job(value.kind, precision, coefficients=value.coefficients)
        return Fused(x, y, offsets[:-1], offsets.diff(), job, memory).sums()
    totals = torch.zeros(len(y.squares), dtype=torch.float64, device=y.high.device)
    add_row_sums(x, y, totals, precision=precision, value=value, memory=memory)
    sums = task_sums(totals, offsets.diff())
    check_squares(x.squares.amax(), y.squares.amax())
    return sums


def add_row_sums(x: Operand, y: Operand, totals: Tensor, *, precision: str, value: Value, memory: int) -> None:
    """Add the sum of `value` over a target x [N] for each row of y [M] to totals [M] float64 on y's device: `streamed`.

    `task_sums` of totals to which all of x was added, in order, are `cross_sums`. Nothing here waits for the device,
    so that squares are for the caller to check (`check_squares`) before a total is used.
    """
    job = Job(value.kind, precision, coefficients=value.coefficients)
    Streamed(x, y, *whole(y), job, memory).add_row_sums(totals)


def own_sums(y: Operand, offsets: Tensor, *, precision: str, value: Value, path: Path, memory: int) -> Tensor:
    """Sum of `value` over all n_t^2 pairs of each task of y with itself, [T] float64 on the CPU.

    On `streamed` too, tasks of fewer than `streamed.own_rows` rows are summed by the fused program.
    """
    job = Job(value.kind, precision, coefficients=value.coefficients)
    starts, sizes = offsets[:-1], offsets.diff()
    sums = torch.empty(len(sizes), dtype=torch.float64)
    fused = sizes < (own_rows(precision) if path == "streamed" else torch.inf)
    if fused.any():
        sums[fused] = Fused(y, y, starts[fused], sizes[fused], job, memory, own=True).sums()
    if not fused.all():
        large = sizes[~fused]
        totals = torch.zeros(int(large.sum()), dtype=torch.float64, device=y.high.device)
        Streamed(y, y, starts[~fused], large, job, memory, own=True).add_row_sums(totals)
        sums[~fused] = task_sums(totals, large)
        check_squares(y.squares.amax())
    return sums


def nearest_blocks(
    x: Operand, y: Operand, offsets: Tensor, *, precision: str, path: Path, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of x [N] and each of R blocks of y the least d2 and the row of y that has it, the lowest if several.

    Gives (d2 [N, R] float32, rows [N, R] int64, first [T + 1]): task t has the blocks first[t] up to first[t + 1], of
    `block_rows` rows each but the last.
    """
    first = F.pad((-(-offsets.diff() // block_rows(x, precision, path))).cumsum(0), (1, 0))
    d2 = torch.empty(int(first[-1]), len(x.squares), dtype=torch.float32, device=x.high.device)
    rows = torch.empty_like(d2, dtype=torch.int64)
    _sweep(path)(x, y, offsets[:-1], offsets.diff(), Job("nearest", precision), memory).rows(d2, rows)
    return d2.T, rows.T, first


def row_logsumexp(
    x: Operand, y: Operand, offsets: Tensor, h: Tensor, *,
    inv_epsilon: float, p: Literal[1, 2], precision: str, path: Path, memory: int,
) -> Tensor:  # fmt: skip
    """log sum_j exp(h_j - cost_ij inv_epsilon) over the rows j of each task of y for each row i of x, [T, N] float32.

    cost = d2 / 2 for p = 2 and sqrt(d2) for p = 1; h [offsets[-1]] float32 may be -inf, and so may the result.
    """
    job = Job("lse", precision, h=h.contiguous(), inv_epsilon=inv_epsilon, p=p)
    starts, sizes = offsets[:-1], offsets.diff()
    num_blocks = -(-sizes // block_rows(x, precision, path))
    results = []
    for low, high in byte_chunks(num_blocks * len(x.squares) * 16, memory, 2):
        values = torch.empty(int(num_blocks[low:high].sum()), len(x.squares), dtype=torch.float32, device=h.device)
        _sweep(path)(x, y, starts[low:high], sizes[low:high], job, memory, share=2).rows(values)
        results.append(logsumexp_runs(values, num_blocks[low:high]))
    return torch.cat(results)


def block_rows(operand: Operand, precision: str, path: Path) -> int:
    """Rows of y in a tile, over which one result of a row of x reaches."""
    return (tile_config(operand, precision) if path == "fused" else finish_config()).bn


def _sweep(path: Path) -> type[Fused] | type[Streamed]:
    return Fused if path == "fused" else Streamed

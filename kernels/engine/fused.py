"""The fused path: one launch of `tile_kernel` for a table of tiles, each a block of x against a block of one task of y.

The grid is plain, one program a tile, not a persistent loop: with nothing of one tile to overlap with the next inside a
program, the hardware's own scheduler fills the multiprocessors as well, and small tiles put two programs on each, one's
epilogue beside the other's products. Consecutive tiles take one block of y against a group of blocks of x that stay in
the L2 cache, so that x is read from memory once and y once for each group.

Blocks are cut from a task's first row, and a result is stored where it belongs whatever is launched when.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from headstart.kernels.engine.layouts import cancellation
from headstart.kernels.engine.precision import Operand
from headstart.kernels.engine.programs import tile_kernel
from headstart.kernels.engine.units import (
    INTERPRETED,
    Job,
    byte_chunks,
    check_operands,
    check_squares,
    cut,
    met_units,
    on,
    tile_config,
    whole,
)
from headstart.kernels.ragged import sums_of_runs

GROUP_BYTES = 16 * 2**20
"""Of x that stay in the L2 cache, which has 40 MB or more on A100 and H100."""

TILE_BYTES = 128
"""A tile's row of the table, and what it takes to make it."""


class Fused:
    """x against tasks of y: all of x against every task, or (`own`, x being y) each task against itself."""

    def __init__(
        self, x: Operand, y: Operand, starts: Tensor, sizes: Tensor, job: Job, memory: int,
        *, share: int = 1, own: bool = False,
    ) -> None:  # fmt: skip
        """`starts` and `sizes` [T] of the tasks; one part in `share` of the memory is for this."""
        check_operands(x, y)
        check_squares(x.squares.amax(), y.squares.amax())
        self.x, self.y, self.job = x, y, job
        self.memory, self.share = memory, share
        self.device, self.pitch = x.high.device, x.high.shape[1]
        self.config = tile_config(x, job.precision)
        self.tau = cancellation(job.precision, self.pitch)
        x_tasks = (starts, sizes) if own else whole(x)
        self.x_units, self.y_units = cut(*x_tasks, self.config.bm), cut(starts, sizes, self.config.bn)
        self.firsts, self.counts = met_units(self.x_units, self.y_units, own)

    def sums(self) -> Tensor:
        """[T] float64 on the CPU: a unit of y adds its tiles' float32 sums in order, a task its units'."""
        sums = []
        with on(self.device):
            for low, high in self._unit_chunks():
                lengths = self.counts[low:high]
                values = torch.empty(int(lengths.sum()), dtype=torch.float32, device=self.device)
                places = torch.zeros_like(self.counts)
                places[low:high] = lengths.cumsum(0) - lengths
                for table in self._tables(low, high, places.to(self.device)):
                    self._launch(table, values, None)
                sums.append(sums_of_runs(values.cpu().double(), lengths))
        return sums_of_runs(torch.cat(sums), self.y_units.first_of_task.diff())

    def rows(self, values: Tensor, indices: Tensor | None = None) -> None:
        """A number for each unit of y and row of x, all of them, into values [U, N]."""
        places = torch.arange(len(self.y_units.starts), device=self.device) * len(self.x.squares)
        with on(self.device):
            for low, high in self._unit_chunks():
                for table in self._tables(low, high, places):
                    self._launch(table, values, indices)

    def _unit_chunks(self) -> Iterator[tuple[int, int]]:
        """Runs of units of y that fit the memory, as (first, last + 1)."""
        return byte_chunks(self.counts * TILE_BYTES, self.memory, self.share)

    def _tables(self, low: int, high: int, places: Tensor) -> Iterator[Tensor]:
        """The tiles of units low up to high of y, [num_tiles, 5] int64, one table for each group of x in the cache.

        `places` [U]: where the results of a unit of y start.
        """
        x, y, firsts = self.x_units.to(self.device), self.y_units.to(self.device), self.firsts.to(self.device)
        row_bytes = self.pitch * self.x.high.element_size() * (1 if self.x.low is None else 2)
        most = max(1, GROUP_BYTES // (self.config.bm * row_bytes))
        counts = self.counts[low:high]
        num_groups = -(-counts // most)
        sizes = -(-counts // num_groups)  # groups of about equal size
        sums = self.job.epilogue in ("sqrt", "rbf")
        for group in range(int(num_groups.max())):
            held = (counts - group * sizes).clamp(min=0).minimum(sizes)
            total = int(held.sum())
            if total == 0:
                continue
            starts = (held.cumsum(0) - held - group * sizes).to(self.device)
            unit = torch.repeat_interleave(held.to(self.device), output_size=total)
            number = torch.arange(total, device=self.device) - starts[unit]  # of x among those that this unit meets
            unit += low
            other = firsts[unit] + number
            table = torch.empty(total, 5, dtype=torch.int64, device=self.device)
            table[:, 0], table[:, 1] = x.starts[other], x.sizes[other]
            table[:, 2], table[:, 3] = y.starts[unit], y.sizes[unit]
            table[:, 4] = places[unit] + (number if sums else x.starts[other])
            yield table

    def _launch(self, table: Tensor, values: Tensor, indices: Tensor | None) -> None:
        x, y, job, config = self.x, self.y, self.job, self.config
        tile_kernel[(len(table),)](
            x.high, x.low, x.squares, y.high, y.low, y.squares, table, job.h, job.coefficients, values, indices,
            self.tau, job.inv_epsilon, **job.constants(), PITCH=self.pitch, BM=config.bm, BN=config.bn, BK=config.bk,
            INPUT_PRECISION="tf32" if job.precision == "tf32" else "ieee", INTERPRET=INTERPRETED,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

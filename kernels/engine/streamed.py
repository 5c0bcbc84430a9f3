"""The streamed path: cuBLAS multiplies a unit of x with a unit of y into a buffer, `finish_kernel` reads that once.

Sums of the target over every task know no tasks before the end: each row y_j gets r_j = sum_i v(x_i, y_j), over all of
x, and a task the sum of its rows. So the units of y are stripes of all rows, whatever task these belong to, and ten
thousand small tasks cost as many products as one large one. Own sums pair a task with itself: units are cut from the
task's first row.

Every sum has an order that nothing but the row's place in its task and x decides. r_j: float32 over 128 rows of x,
then float64, groups of x in order (`add_kernel`). A task: float64 over BLOCK rows from its first, then its blocks in
order (`task_kernel`). What `memory` sets is how many rows are at hand at a time, in multiples of a stripe, so that it
changes neither an order nor the shape of a product.

The host takes some 70 microseconds a product (PyTorch's call, Triton's, and the loop; estimated) and 400 a share of the
features in `gpu`, and waits for nothing before the end. The device takes for X rows of x and Y of y in bf16 on an H100
2 X Y D / 798 TFLOP/s to multiply, 8 X Y / 3.0 TB/s to write and read the products, and 8 Y D / 3.0 TB/s to make the
operand of y. Microseconds a product, and milliseconds for 512 tasks of 2,048 rows within 4 GiB:

| D | Y | X = 4,096 | X = 512 | all, X = 4,096 | host | shares |
| --- | --- | --- | --- | --- | --- | --- |
| 512 | 16,384 | 86 + 179 + 22 | 11 + 22 + 22 | 18 | 4.5 + 2.4 | 6 |
| 1,024 | 16,384 | 172 + 179 + 45 | 22 + 22 + 45 | 25 | 4.5 + 4.4 | 11 |
| 2,048 | 8,192 | 172 + 89 + 45 | 22 + 11 + 45 | 39 | 9 + 9 | 22 |

So the device is what is waited for, down to targets of some 1,000 rows. Below, 16,384 rows take the host 100, 140 and
270 microseconds; where an operand is made by one operation of PyTorch after another, 32 bytes a number, the device
takes 90, 180 and 360 for that alone. Units of y that end with a task would take the host 36 ms for these 512, and as
much for 512 tasks of any fewer rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.kernels.engine.layouts import cancellation
from headstart.kernels.engine.precision import Operand, exact_products
from headstart.kernels.engine.programs import add_kernel, finish_kernel, task_kernel
from headstart.kernels.engine.units import (
    INTERPRETED,
    Job,
    Units,
    check_operands,
    check_squares,
    chunks,
    cut,
    finish_config,
    met_units,
    on,
    whole,
)
from headstart.kernels.ragged import sums_of_runs

STEPS = 2 if INTERPRETED else 4
"""Tiles of `finish_kernel` that one program adds: 128 rows of x, so that what is written is a 128th of what is
read, and enough programs for a target of 512 rows."""

BLOCK = 16 if INTERPRETED else 1024
"""Rows of a task that one program of `task_kernel` adds."""

PARTIALS = 2**22
"""Float32 sums of groups that are held before they are added, at least those of one stripe."""


def stripes(pitch: int) -> tuple[int, int]:
    """Rows of a product, of x and of y, multiples of any tile: 268 MB up to D = 1024.

    Fewer where rows are long, so that the operand of a stripe stays below 134 MB, and bf16x3's copies below 151.
    """
    if INTERPRETED:
        return 32, 32
    doublings = (pitch - 1).bit_length()
    return 4096 >> min(3, max(0, doublings - 11)), 16384 >> min(4, max(0, doublings - 10))


def least_memory(
    device: torch.device, precision: str, pitch: int, x_rows: int, y_rows: int, num_groups: int = 0
) -> int:
    """Bytes of the largest product, of the copies of its operands and of the sums of its groups of rows of x."""
    # bf16x3: three parts in one row. On the CPU, where bfloat16 is multiplied as float32, as many copies of that.
    row_bytes = 6 * pitch if precision == "bf16x3" else 0
    if device.type == "cpu":
        row_bytes = 3 * row_bytes + 4 * pitch
    return 4 * x_rows * _padded(y_rows) + (x_rows + y_rows) * row_bytes + 4 * max(PARTIALS, num_groups * y_rows)


def own_rows(precision: str) -> int:
    """Rows of a task from which on its own sum is streamed; below that it is `fused`, one launch for all such tasks.

    A task's own products are its alone. At D = 2048 in bf16 those of 2,048 rows take 32 microseconds streamed, or
    fused at 70% of the rate 31, and 4,096 rows 131 or 123: less than the host takes for each, or no more than cuBLAS.
    Without tensor cores 512 rows take 18 at the peak rate.
    """
    if INTERPRETED:
        return 20
    return 512 if precision == "fp32" else 4096


class Streamed:
    """x against tasks of y: all of x against every task or stripe, or (`own`) each task against itself."""

    def __init__(
        self, x: Operand, y: Operand, starts: Tensor, sizes: Tensor, job: Job, memory: int,
        *, share: int = 1, own: bool = False,
    ) -> None:  # fmt: skip
        """`starts` and `sizes` [T] of the tasks, or of all rows; one part in `share` of the memory is for this."""
        check_operands(x, y)
        self.x, self.y, self.job = x, y, job
        self.device, self.pitch = x.high.device, x.high.shape[1]
        self.config = finish_config()
        self.tau = cancellation(job.precision, self.pitch)
        x_rows, y_rows = stripes(self.pitch)
        self.x_units: Units = cut(*((starts, sizes) if own else whole(x)), x_rows)
        self.y_units: Units = cut(starts, sizes, y_rows)
        self.firsts, self.counts = met_units(self.x_units, self.y_units, own)
        # Groups of x before each of its units.
        self.groups = F.pad((-(-self.x_units.sizes // (STEPS * self.config.bm))).cumsum(0), (1, 0))
        met = self.groups[self.firsts + self.counts] - self.groups[self.firsts]
        self.num_groups = int(met.max())
        x_rows, y_rows = int(self.x_units.sizes.max()), int(self.y_units.sizes.max())
        self.buffer_size = x_rows * _padded(y_rows)
        least = share * least_memory(self.device, job.precision, self.pitch, x_rows, y_rows, self.num_groups)
        if memory < least:
            raise ValueError(f"memory is {memory} bytes; accepted: at least {least}, which one product takes")

    def add_row_sums(self, totals: Tensor) -> None:
        """Add sum_i v(x_i, y_j) to totals [sum of sizes] float64 on the device, for the rows j of the units in order.

        Nothing here waits for the device: squares are for the caller to check.
        """
        places = F.pad(self.y_units.sizes.cumsum(0), (1, 0)).tolist()
        groups, firsts = self.groups.tolist(), self.firsts.tolist()
        with on(self.device):
            for low, high in chunks(self.num_groups * self.y_units.sizes, PARTIALS):
                start, width = places[low], places[high] - places[low]
                # Zeros, because a smaller task has fewer groups.
                partials = torch.zeros(self.num_groups, width, dtype=torch.float32, device=self.device)
                for product in self._products(low, high):
                    group = groups[product.x_unit] - groups[firsts[product.y_unit]]
                    place = group * width + places[product.y_unit] - start
                    self._finish(product, partials.view(-1)[place:], None, width)
                columns = 16 if INTERPRETED else 256
                add_kernel[(-(-width // columns),)](
                    partials, totals[start:], self.num_groups, width, BLOCK=columns, num_warps=4, enable_fp_fusion=True
                )

    def rows(self, values: Tensor, indices: Tensor | None = None) -> None:
        """A number for each tile of columns of y and row of x, all of them, into values [tiles, N]."""
        first = F.pad((-(-self.y_units.sizes // self.config.bn)).cumsum(0), (1, 0)).tolist()
        num_rows = len(self.x.squares)
        with on(self.device):
            for product in self._products(0, len(self.y_units.starts)):
                start = first[product.y_unit] * num_rows + product.x_start
                # A slice, because the program adds offsets from where its result starts.
                into = None if indices is None else indices.flatten()[start:]
                self._finish(product, values.flatten()[start:], into, num_rows)
        check_squares(self.x.squares.amax(), self.y.squares.amax())

    def _products(self, low: int, high: int) -> Iterator["_Product"]:
        """The products of units low up to high of y: each good until the next is asked for."""
        x_starts, x_sizes = (part.tolist() for part in self.x_units[:2])
        y_starts, y_sizes = (part.tolist() for part in self.y_units[:2])
        firsts, counts = self.firsts.tolist(), self.counts.tolist()
        buffer = torch.empty(self.buffer_size, dtype=torch.float32, device=self.device)
        held, x_side = -1, self.x.high
        with exact_products(self.device, self.job.precision):
            for b in range(low, high):
                y_side = _side(self.y, y_starts[b], y_sizes[b], last=True).T
                # Rows as long as the second kernel's tiles reach, in places that follow from the shape alone.
                stride = _padded(y_sizes[b])
                for i in range(firsts[b], firsts[b] + counts[b]):
                    if i != held:
                        held, x_side = i, _side(self.x, x_starts[i], x_sizes[i], last=False)
                    values = buffer.as_strided((x_sizes[i], y_sizes[b]), (stride, 1))
                    if x_side.dtype == torch.bfloat16:
                        torch.mm(x_side, y_side, out_dtype=torch.float32, out=values)
                    else:
                        torch.mm(x_side, y_side, out=values)
                    yield _Product(values, stride, i, b, x_starts[i], y_starts[b])

    def _finish(self, product: "_Product", values: Tensor, indices: Tensor | None, out_stride: int) -> None:
        """The tiles of one product into values, which start at its first result."""
        job, config = self.job, self.config
        num_rows, num_columns = product.values.shape
        rows = config.bm * STEPS if job.epilogue in ("sqrt", "rbf") else config.bm
        h = None if job.h is None else job.h[product.y_start :]
        finish_kernel[(-(-num_rows // rows), -(-num_columns // config.bn))](
            product.values, self.x.squares[product.x_start :], self.y.squares[product.y_start :], h, job.coefficients,
            values, indices, num_rows, num_columns, product.y_start, product.stride // 256, out_stride, self.tau,
            job.inv_epsilon, **job.constants(), BM=config.bm, BN=config.bn, STEPS=STEPS,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def task_sums(totals: Tensor, sizes: Tensor) -> Tensor:
    """Sums of totals [sum of sizes] float64 over consecutive tasks of these sizes, [T] float64 on the CPU."""
    blocks = cut(sizes.cumsum(0) - sizes, sizes, BLOCK)
    table = torch.stack([blocks.starts, blocks.sizes], 1).to(totals.device)
    sums = torch.empty(len(table), dtype=torch.float64, device=totals.device)
    with on(totals.device):
        task_kernel[(len(table),)](totals, table, sums, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
    return sums_of_runs(sums, blocks.first_of_task.diff())


class _Product(NamedTuple):
    """The products of a unit of x with a unit of y."""

    values: Tensor
    """[rows of x, rows of y] float32."""
    stride: int
    """Numbers from row to row, a multiple of 256."""
    x_unit: int
    y_unit: int
    x_start: int
    y_start: int


def _padded(size: int) -> int:
    """Numbers from row to row of a product: a multiple of 256, which `finish_kernel` counts them in."""
    return -(-size // 256) * 256


def _side(operand: Operand, start: int, size: int, last: bool) -> Tensor:
    """One side of a product: rows [size, pitch], or for bf16x3 its three parts beside each other, [size, 3 pitch].

    high low + low high + high high is one product of three times the depth; `last`: this is the right side.
    """
    high = operand.high[start : start + size]
    if operand.low is not None:
        low = operand.low[start : start + size]
        high = torch.cat([low, high, high] if last else [high, low, high], 1)
    return high if high.device.type == "cuda" else high.float()

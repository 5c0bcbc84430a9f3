"""The host side of the Triton programs: which tile runs when, within what memory, and in what order results are added.

Rows are cut into units: blocks (BM rows of x, BN of y) for the fused path, one program for each pair of them; stripes
(up to 4,096 rows of x, 2,048 of y) for the streamed one, one cuBLAS product for each pair, finished by a second kernel.
A unit starts at its task's first row and every so many rows after, and each result is stored where it belongs whatever
is launched when: `memory` sets how much is launched at once, and no bit.

Cross and self terms are the same calls over other lists of pairs. Fused, that makes d(X, X) of a V-statistic exactly 0.
Streamed, both are the same cuBLAS calls of the same shape, strides and 128-byte alignment; they agree as far as cuBLAS
keeps its promise of the same bits for the same call on one device and stream.

The grid is plain, one program a tile, not a persistent loop: with nothing of one tile to overlap with the next inside a
program, the hardware's own scheduler fills the multiprocessors as well, and small tiles put two programs on each, one's
epilogue beside the other's products. Consecutive tiles take one block of y against a group of blocks of x that stay in
the L2 cache, so that x is read from memory once and y once for each group.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from headstart.kernels.engine.layouts import FINISH, Config, cancellation, choose_config
from headstart.kernels.engine.precision import Operand, exact_products
from headstart.kernels.engine.programs import finish_kernel, tile_kernel

Path = Literal["fused", "streamed"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the programs run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 before the first import."""


_SMALL = Config(16, 16, 64, 1, 1)  # under the interpreter, where small inputs are to have ragged tiles
_STRIPES = (48, 32) if INTERPRETED else (4096, 2048)  # rows of x and y, multiples of any tile; see _stripes
_GROUP_BYTES = 16 * 2**20  # of x that stay in the L2 cache, which has 40 MB or more on A100 and H100
_TILE_BYTES = 128  # a tile's row of the table, and what it takes to make it
_PARTIALS = 2**20  # sums of the streamed path that are held before they are added
_FAR = 2.0**122  # what no square may reach, so that two and their products can be added in float32


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

    offsets [T + 1] int64 on the CPU. ValueError: a bound that cannot hold one unit of y, said with the least accepted;
    rows so far out that squares overflow.
    """
    job = _Job(value.kind, precision, coefficients=value.coefficients)
    return _Sweep(x, y, _whole(x), offsets, job, path, memory).sums()


def own_sums(y: Operand, offsets: Tensor, *, precision: str, value: Value, path: Path, memory: int) -> Tensor:
    """Sum of `value` over all n_t^2 pairs of each task of y with itself, [T] float64 on the CPU."""
    job = _Job(value.kind, precision, coefficients=value.coefficients)
    return _Sweep(y, y, offsets, offsets, job, path, memory, own=True).sums()


def nearest_blocks(
    x: Operand, y: Operand, offsets: Tensor, *, precision: str, path: Path, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of x [N] and each of R blocks of y the least d2 and the row of y that has it, the lowest if several.

    Gives (d2 [N, R] float32, rows [N, R] int64, first [T + 1]): task t has the blocks first[t] up to first[t + 1].
    """
    sweep = _Sweep(x, y, _whole(x), offsets, _Job("nearest", precision), path, memory)
    d2 = torch.empty(sweep.num_blocks, len(x.squares), dtype=torch.float32, device=x.high.device)
    rows = torch.empty_like(d2, dtype=torch.int64)
    sweep.rows(d2, rows)
    return d2.T, rows.T, sweep.first_block


def row_logsumexp(
    x: Operand, y: Operand, offsets: Tensor, h: Tensor, *,
    inv_epsilon: float, p: Literal[1, 2], precision: str, path: Path, memory: int,
) -> Tensor:  # fmt: skip
    """log sum_j exp(h_j - cost_ij inv_epsilon) over the rows j of each task of y for each row i of x, [T, N] float32.

    cost = d2 / 2 for p = 2 and sqrt(d2) for p = 1; h [offsets[-1]] float32 may be -inf, and so may the result.
    """
    job = _Job("lse", precision, inv_epsilon=inv_epsilon, p=p)
    num_blocks = (offsets.diff() + _bn(x, job, path) - 1) // _bn(x, job, path)
    results = []
    for low, high in _byte_chunks(num_blocks * len(x.squares) * 16, memory, 2):
        some = offsets[low : high + 1]
        sweep = _Sweep(x, y, _whole(x), some, job._replace(h=h.contiguous()), path, memory, share=2)
        values = torch.empty(sweep.num_blocks, len(x.squares), dtype=torch.float32, device=h.device)
        sweep.rows(values)
        results.append(_logsumexp_runs(values, num_blocks[low:high]))
    return torch.cat(results)


class _Job(NamedTuple):
    """An epilogue with its parameters."""

    epilogue: str
    precision: str
    coefficients: Tensor | None = None
    h: Tensor | None = None
    inv_epsilon: float = 0.0
    p: int = 2

    def constants(self) -> dict[str, object]:
        """What both programs take as constants."""
        return {
            "EPILOGUE": self.epilogue,
            "P": self.p,
            "B": 0 if self.coefficients is None else len(self.coefficients),
        }


class _Units(NamedTuple):
    """Runs of rows inside tasks, U of them."""

    starts: Tensor
    """[U] int64, like the rest on one device."""
    sizes: Tensor
    tasks: Tensor
    first_of_task: Tensor
    """[T + 1]: the units of task t are first_of_task[t] up to first_of_task[t + 1]."""

    def to(self, device: torch.device) -> "_Units":
        return _Units(*(part.to(device) for part in self))


def _cut(offsets: Tensor, rows: int) -> _Units:
    counts = -(-offsets.diff() // rows)
    first = F.pad(counts.cumsum(0), (1, 0))
    tasks = torch.repeat_interleave(torch.arange(len(counts)), counts)
    starts = offsets[tasks] + rows * (torch.arange(len(tasks)) - first[tasks])
    return _Units(starts, (offsets[tasks + 1] - starts).clamp(max=rows), tasks, first)


class _Sweep:
    """x against y: either all of x against every task, or (`own`) each task of x against the same one of y."""

    def __init__(
        self, x: Operand, y: Operand, x_offsets: Tensor, y_offsets: Tensor, job: _Job, path: Path, memory: int,
        *, share: int = 1, own: bool = False,
    ) -> None:  # fmt: skip
        self.x, self.y, self.job, self.path = x, y, job, path
        self.memory, self.share = memory, share  # of the memory, one part in `share` is for this
        self.device, self.pitch = x.high.device, x.high.shape[1]
        self.config = _config(x, job.precision, path)
        self.tau = cancellation(job.precision, self.pitch)
        for operand in (x, y):
            if self.pitch % 64 or operand.high.shape[1] != self.pitch or not operand.high.is_contiguous():
                raise ValueError(
                    f"operands are {list(x.high.shape)} and {list(y.high.shape)}; accepted: rows of equal length, a "
                    "multiple of 64, with nothing between them"
                )
        if not float(x.squares.amax()) < _FAR or not float(y.squares.amax()) < _FAR:
            raise ValueError(
                f"some rows are {_FAR**0.5:.0e} or more from the centre, so far that squares overflow in float32; "
                "accepted: nearer rows, or precision='fp64'"
            )
        rows = (self.config.bm, self.config.bn) if path == "fused" else _stripes(self.pitch)
        self.x_units, self.y_units = _cut(x_offsets, rows[0]), _cut(y_offsets, rows[1])
        self.blocks_of_unit = rows[1] // self.config.bn
        self.first_block = _cut(y_offsets, self.config.bn).first_of_task
        self.num_blocks = int(self.first_block[-1])
        # Which units of x a unit of y meets: `counts` of them from `firsts` on.
        if own:
            tasks, units_of_task = self.y_units.tasks, self.x_units.first_of_task
            self.firsts, self.counts = units_of_task[tasks], units_of_task.diff()[tasks]
        else:
            self.firsts = torch.zeros_like(self.y_units.starts)
            self.counts = torch.full_like(self.firsts, len(self.x_units.starts))

    def sums(self) -> Tensor:
        """[T] float64 on the CPU: a unit of y adds its tiles' float32 sums in order, a task its units'."""
        sums = []
        with _on(self.device):
            run = self._fused_sums if self.path == "fused" else self._streamed_sums
            for low, high in self._unit_chunks():
                values, lengths = run(low, high)
                sums.append(_run_sums(values.cpu().double(), lengths))
        return _run_sums(torch.cat(sums), self.y_units.first_of_task.diff())

    def rows(self, values: Tensor, indices: Tensor | None = None) -> None:
        """A number for each block of y and row of x, all of them, into values [num_blocks, N]."""
        # The row of `values` at which a unit's first block belongs.
        units = self.y_units
        within = (torch.arange(len(units.starts)) - units.first_of_task[units.tasks]) * self.blocks_of_unit
        places = (within + self.first_block[units.tasks]) * len(self.x.squares)
        with _on(self.device):
            if self.path == "fused":
                places = places.to(self.device)
                for low, high in self._unit_chunks():
                    for table in self._tables(low, high, places):
                        self._launch(table, values, indices)
                return
            starts = places.tolist()
            for product in self._products(0, len(starts)):
                start = starts[product.y_unit] + product.x_start
                # A slice, because the program adds offsets from where its result starts.
                into = None if indices is None else indices.flatten()[start:]
                self._finish(product, values.flatten()[start:], into)

    def _unit_chunks(self) -> Iterator[tuple[int, int]]:
        """Runs of units of y that fit the memory, as (first, last + 1)."""
        if self.path == "fused":
            return _byte_chunks(self.counts * _TILE_BYTES, self.memory, self.share)
        return _chunks(self._tiles_of_units(), _PARTIALS)

    # --- fused ---

    def _fused_sums(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        lengths = self.counts[low:high]
        values = torch.empty(int(lengths.sum()), dtype=torch.float32, device=self.device)
        places = torch.zeros_like(self.counts)
        places[low:high] = lengths.cumsum(0) - lengths
        for table in self._tables(low, high, places.to(self.device)):
            self._launch(table, values, None)
        return values, lengths

    def _tables(self, low: int, high: int, places: Tensor) -> Iterator[Tensor]:
        """The tiles of units low up to high of y, [num_tiles, 5] int64, one table for each group of x in the cache.

        `places` [U]: where the results of a unit of y start.
        """
        x, y, firsts = self.x_units.to(self.device), self.y_units.to(self.device), self.firsts.to(self.device)
        row_bytes = self.pitch * self.x.high.element_size() * (1 if self.x.low is None else 2)
        most = max(1, _GROUP_BYTES // (self.config.bm * row_bytes))
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

    # --- streamed ---

    def _tiles_of_units(self) -> Tensor:
        """Tiles of `finish_kernel` for each unit of y, [U]."""
        tiles = F.pad((-(-self.x_units.sizes // self.config.bm)).cumsum(0), (1, 0))
        met = tiles[self.firsts + self.counts] - tiles[self.firsts]
        return met * -(-self.y_units.sizes // self.config.bn)

    def _streamed_sums(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        lengths = self._tiles_of_units()[low:high]
        values = torch.empty(int(lengths.sum()), dtype=torch.float32, device=self.device)
        place = 0
        for product in self._products(low, high):
            self._finish(product, values[place:], None)
            num_rows, num_columns = product.values.shape
            place += -(-num_rows // self.config.bm) * -(-num_columns // self.config.bn)
        return values, lengths

    def _products(self, low: int, high: int) -> Iterator["_Product"]:
        """The products of units low up to high of y: each good until the next is asked for."""
        x_starts, x_sizes = (part.tolist() for part in self.x_units[:2])
        y_starts, y_sizes = (part.tolist() for part in self.y_units[:2])
        firsts, counts = self.firsts.tolist(), self.counts.tolist()
        buffer = torch.empty(self._buffer_size(), dtype=torch.float32, device=self.device)
        held, x_side = -1, self.x.high
        with exact_products(self.device, self.job.precision):
            for b in range(low, high):
                y_side = _side(self.y, y_starts[b], y_sizes[b], last=True)
                for i in range(firsts[b], firsts[b] + counts[b]):
                    if i != held:
                        held, x_side = i, _side(self.x, x_starts[i], x_sizes[i], last=False)
                    # Rows as long as the second kernel's tiles reach, in places that follow from the shape alone.
                    stride = _padded(y_sizes[b])
                    values = buffer[: x_sizes[i] * stride].view(-1, stride)[:, : y_sizes[b]]
                    if x_side.dtype == torch.bfloat16:
                        torch.mm(x_side, y_side.T, out_dtype=torch.float32, out=values)
                    else:
                        torch.mm(x_side, y_side.T, out=values)
                    yield _Product(values, b, x_starts[i], y_starts[b])

    def _buffer_size(self) -> int:
        """Numbers in the largest product; ValueError if that and the operands beside it pass the bound."""
        x_rows, y_rows = int(self.x_units.sizes.max()), int(self.y_units.sizes.max())
        numbers = x_rows * _padded(y_rows)
        # bf16x3: three parts in one row. On the CPU, where bfloat16 is multiplied as float32, as many copies of that.
        row_bytes = 6 * self.pitch if self.job.precision == "bf16x3" else 0
        if self.device.type == "cpu":
            row_bytes = 3 * row_bytes + 4 * self.pitch
        least = self.share * (4 * numbers + (x_rows + y_rows) * row_bytes + 4 * _PARTIALS)
        if self.memory < least:
            raise ValueError(f"memory is {self.memory} bytes; accepted: at least {least}, which one product takes")
        return numbers

    def _finish(self, product: "_Product", values: Tensor, indices: Tensor | None) -> None:
        """The tiles of one product into values, which start at its first result."""
        job, config = self.job, self.config
        num_rows, num_columns = product.values.shape
        h = None if job.h is None else job.h[product.y_start :]
        finish_kernel[(-(-num_rows // config.bm), -(-num_columns // config.bn))](
            product.values, self.x.squares[product.x_start :], self.y.squares[product.y_start :], h, job.coefficients,
            values, indices, num_rows, num_columns, product.y_start, product.values.stride(0) // 256,
            len(self.x.squares), self.tau, job.inv_epsilon, **job.constants(), BM=config.bm, BN=config.bn,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


class _Product(NamedTuple):
    """The products of a unit of x with a unit of y."""

    values: Tensor
    """[rows of x, rows of y] float32, rows a multiple of 256 numbers apart."""
    y_unit: int
    x_start: int
    y_start: int


def _config(operand: Operand, precision: str, path: Path) -> Config:
    if INTERPRETED:
        return _SMALL
    if path == "streamed":
        return FINISH
    return choose_config(precision, operand.high.shape[1], torch.cuda.get_device_capability(operand.high.device))


def _bn(operand: Operand, job: _Job, path: Path) -> int:
    return _config(operand, job.precision, path).bn


def _stripes(pitch: int) -> tuple[int, int]:
    """Rows of a product: fewer where rows are long, so that bf16x3's copies of both sides stay below 80 MB."""
    scale = min(8, 1 << max(0, (pitch - 1).bit_length() - 11))
    return _STRIPES[0] // scale, _STRIPES[1] // scale


def _whole(operand: Operand) -> Tensor:
    """Offsets of all rows as one task, [2]."""
    return torch.tensor([0, len(operand.squares)])


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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


def _chunks(costs: Tensor, bound: int) -> Iterator[tuple[int, int]]:
    """Runs (first, last + 1) of costs [U] that add up to no more than the bound, or of one that passes it."""
    ends, low = costs.cumsum(0), 0
    while low < len(costs):
        done = int(ends[low] - costs[low])
        high = max(low + 1, int(torch.searchsorted(ends, done + bound, right=True)))
        yield low, high
        low = high


def _byte_chunks(costs: Tensor, memory: int, share: int) -> Iterator[tuple[int, int]]:
    """The same for bytes and a `share`-th part of the memory, with a ValueError where one cost passes that."""
    largest = int(costs.max())
    if largest > memory // share:
        raise ValueError(f"memory is {memory} bytes; accepted: at least {largest * share}")
    return _chunks(costs, memory // share)


def _run_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs of float64 values on the CPU, each in its own order, [len(lengths)]."""
    sums: Tensor = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
    return sums


def _logsumexp_runs(values: Tensor, lengths: Tensor) -> Tensor:
    """log sum exp over consecutive runs of rows of values [R, N], [len(lengths), N]; -inf where all are."""
    if len(lengths) == len(values):
        return values
    lengths = lengths.to(values.device)
    largest: Tensor = torch.segment_reduce(values, "max", lengths=lengths, axis=0, unsafe=True)
    largest = torch.where(largest == float("-inf"), 0, largest)
    of_row = torch.repeat_interleave(lengths, output_size=len(values))
    sums: Tensor = torch.segment_reduce((values - largest[of_row]).exp(), "sum", lengths=lengths, axis=0, unsafe=True)
    return sums.log_() + largest

"""Features to operands and on to the Triton programs, a bounded share of them at a time.

What `launch` needs as operands, centred and rounded, would be a copy of all features. Here it is made for as many rows
as the memory bound has room for: whole tasks where they fit, pieces of PIECE rows where one does not. Tiles are cut
from a task's first row, and PIECE is a multiple of every tile, so pieces change no tile. Sums of a target over streamed
tasks know no tasks: there a share is as many stripes of rows as there is room for.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine import launch, streamed
from headstart.kernels.engine.precision import Operand, make_operand
from headstart.kernels.engine.tile import Value
from headstart.kernels.engine.units import check_squares

PIECE = 4096
"""Rows of a piece of a task."""

MEMORY = 4 * 2**30
"""Bytes that a call may hold where the caller does not say: a share takes the host up to a millisecond whatever its
size, in which an H100 multiplies 45,000 rows of 2,048 numbers with 4,096 in bfloat16."""

_ROW_BYTES = {"bf16": 6, "fp32": 8}
"""A number of an operand and, where features are narrower than float32, its copy in that. 20 in tf32 and bf16x3: five
of float32 at the worst moment of rounding."""


class _Chunk(NamedTuple):
    """Rows start up to end of the features: whole tasks, or a piece of one."""

    start: int
    end: int
    tasks: slice
    offsets: Tensor
    """[tasks + 1] int64, from 0."""


def pair_sums(setting: "Setting", target: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    """sum_ij v(x_i, y_j) over the target x [N, D] and each task y, [T] float64 on the target's device."""
    if setting.streamed:
        return _streamed_sums(setting, target, features, offsets)
    sums = torch.zeros(len(offsets) - 1, dtype=torch.float64)
    for part in setting.chunks(torch.tensor([0, len(target)])):
        x = setting.operand(target[part.start : part.end])
        for chunk in setting.chunks(offsets):
            y = setting.operand(features[chunk.start : chunk.end])
            sums[chunk.tasks] += setting.cross(x, y, chunk.offsets)
    return sums.to(target.device)


def _streamed_sums(setting: "Setting", target: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    totals = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    largest = []
    for part in setting.chunks(torch.tensor([0, len(target)])):
        x = setting.operand(target[part.start : part.end])
        largest.append(x.squares.amax())
        for chunk in setting.stripes(len(features)):
            y = setting.operand(features[chunk.start : chunk.end])
            largest.append(y.squares.amax())
            setting.add_rows(x, y, totals[chunk.start : chunk.end])
    sums = streamed.task_sums(totals, offsets.diff())
    # Last, so that until here the host is ahead of the device.
    check_squares(*largest)
    return sums.to(target.device)


def own_sums(setting: "Setting", features: Tensor, offsets: Tensor) -> Tensor:
    """sum_ij v(y_i, y_j) over each task y with itself, [T] float64 on the features' device."""
    sums = torch.zeros(len(offsets) - 1, dtype=torch.float64)
    pieces = list(setting.chunks(offsets))
    for chunk in pieces:
        y = setting.operand(features[chunk.start : chunk.end])
        others = [other for other in pieces if other.tasks == chunk.tasks]
        if len(others) == 1:
            sums[chunk.tasks] += setting.own(y, chunk.offsets)
            continue
        for other in others:  # the pieces of one task, each against each
            x = setting.operand(features[other.start : other.end])
            sums[chunk.tasks] += setting.cross(x, y, chunk.offsets)
    return sums.to(features.device)


def nearest_rows(
    target: Tensor, features: Tensor, centre: Tensor, precision: str, memory: int | None, wanted: int, path: str
) -> tuple[Tensor, Tensor, int]:
    """For each row of a target [N, D] the nearest blocks of features, nearest first.

    Gives (the nearest row of each block, [N, K]; the first row of each block, [N, K]; the rows of a block, of which the
    last may have fewer). K is `wanted`, or the number of blocks if that is less.
    """
    setting = Setting(features, max(len(target), len(features)), centre, Value("squared"), precision, path, memory)
    rows, starts, height = [], [], 0
    for part in setting.chunks(torch.tensor([0, len(target)])):
        x = setting.operand(target[part.start : part.end])
        best = torch.empty(len(x.squares), 0, device=target.device)
        nearest = torch.empty(len(x.squares), 0, dtype=torch.int64, device=target.device)
        firsts = torch.empty_like(nearest)
        for chunk in setting.chunks(torch.tensor([0, len(features)])):
            y = setting.operand(features[chunk.start : chunk.end])
            squares, found, height = setting.nearest(x, y, chunk.offsets)
            # A share begins at a multiple of a block.
            first = (chunk.start + height * torch.arange(found.shape[1], device=target.device)).expand_as(found)
            best, kept = torch.cat([best, squares], 1).topk(
                min(wanted, best.shape[1] + squares.shape[1]), dim=1, largest=False
            )
            nearest = torch.cat([nearest, found + chunk.start], 1).gather(1, kept)
            firsts = torch.cat([firsts, first], 1).gather(1, kept)
        rows.append(nearest)
        starts.append(firsts)
    return torch.cat(rows), torch.cat(starts), height


class Setting:
    """What one call computes with."""

    def __init__(
        self,
        features: Tensor,
        num_rows: int,
        centre: Tensor | None,
        value: Value,
        precision: str,
        path: str,
        memory: int | None,
    ) -> None:
        """`num_rows`: of the longer side."""
        if centre is None:
            raise ValueError(f"no centre was given; accepted on path {path!r}: one [{features.shape[1]}] for all rows")
        self._centre, self._precision = centre, precision
        self._pitch = (features.shape[1] + 63) // 64 * 64
        # Half for the operands of two sides, half for tables, products and results.
        row_bytes = self._pitch * _ROW_BYTES.get(precision, 20) + features.element_size() * features.shape[1]
        self.streamed, piece = path == "streamed", PIECE
        if self.streamed:
            sides = streamed.stripes(self._pitch)
            piece = max(PIECE, sides[1])  # both powers of two, so a multiple of a tile, of a stripe and of PIECE
        least = min(piece, num_rows) * row_bytes * 4
        if self.streamed:
            sides = min(sides[0], num_rows), min(sides[1], num_rows)
            least = max(least, 2 * streamed.least_memory(features.device, precision, self._pitch, *sides))
        memory = max(MEMORY, least) if memory is None else memory
        self.memory = memory // 2
        if memory < least:
            raise ValueError(f"memory is {memory} bytes; accepted on path {path!r}: at least {least}")
        self._piece, self._room = piece, memory // 4 // row_bytes
        # A streamed product of a stripe with more rows of x has more partial sums than `least_memory` counts.
        self._rows = min(self._room, 8 * PIECE) if self.streamed else self._room
        coefficients = torch.tensor(value.coefficients, dtype=torch.float32, device=features.device)
        self._value = launch.Value("rbf", coefficients) if value.kind == "rbf" else launch.Value("sqrt")
        self._path: launch.Path = "streamed" if self.streamed else "fused"

    def operand(self, rows: Tensor) -> Operand:
        """Rows [M, D] as an operand."""
        return make_operand(rows, self._centre, self._precision, self._pitch)

    def cross(self, x: Operand, y: Operand, offsets: Tensor) -> Tensor:
        """Sums over x and each task of y, [T] float64 on the CPU."""
        return launch.cross_sums(
            x, y, offsets, precision=self._precision, value=self._value, path=self._path, memory=self.memory
        )

    def add_rows(self, x: Operand, y: Operand, totals: Tensor) -> None:
        """Add the sum over x for each row of y to totals, streamed."""
        launch.add_row_sums(x, y, totals, precision=self._precision, value=self._value, memory=self.memory)

    def own(self, y: Operand, offsets: Tensor) -> Tensor:
        """Sums over each task of y with itself, [T] float64 on the CPU."""
        return launch.own_sums(
            y, offsets, precision=self._precision, value=self._value, path=self._path, memory=self.memory
        )

    def nearest(self, x: Operand, y: Operand, offsets: Tensor) -> tuple[Tensor, Tensor, int]:
        """For each row of x and block of y the least square and the row that has it, and the rows of a block."""
        squares, rows, _ = launch.nearest_blocks(
            x, y, offsets, precision=self._precision, path=self._path, memory=self.memory
        )
        return squares, rows, launch.block_rows(x, self._precision, self._path)

    def stripes(self, num_rows: int) -> Iterator[_Chunk]:
        """Rows, whatever task they belong to: as many stripes as there is room for."""
        return self._chunks(torch.tensor([0, num_rows]), self._room)

    def chunks(self, offsets: Tensor) -> Iterator[_Chunk]:
        """Consecutive tasks of at most as many rows as fit, or pieces of a task that does not."""
        return self._chunks(offsets, self._rows)

    def _chunks(self, offsets: Tensor, rows: int) -> Iterator[_Chunk]:
        low, num_tasks = 0, len(offsets) - 1
        while low < num_tasks:
            start = int(offsets[low])
            high = int(torch.searchsorted(offsets, start + rows, right=True)) - 1
            if high > low:
                yield _Chunk(start, int(offsets[high]), slice(low, high), offsets[low : high + 1] - start)
                low = high
                continue
            end, step = int(offsets[low + 1]), rows // self._piece * self._piece
            for first in range(start, end, step):
                last = min(first + step, end)
                yield _Chunk(first, last, slice(low, low + 1), torch.tensor([0, last - first]))
            low += 1

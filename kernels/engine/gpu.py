"""Features to operands and on to the Triton programs, a bounded share of them at a time.

What `launch` needs as operands, centred and rounded, would be a copy of all features. Here it is made for as many rows
as the memory bound has room for: whole tasks where they fit, pieces of PIECE rows where one does not. Tiles are cut
from a task's first row, and PIECE is a multiple of every tile, so pieces change no tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine import launch
from headstart.kernels.engine.precision import Operand, make_operand
from headstart.kernels.engine.sweep import Value

PIECE = 4096
"""Rows of a piece of a task."""

MEMORY = 4 * 2**30
"""Bytes that a call may hold where the caller does not say: a share takes some 60 launches and 10 copies whatever its
size, a millisecond, in which an H100 multiplies 45,000 rows of 2,048 numbers with 4,096 in bfloat16."""


class _Chunk(NamedTuple):
    """Rows start up to end of the features: whole tasks, or a piece of one."""

    start: int
    end: int
    tasks: slice
    offsets: Tensor
    """[tasks + 1] int64, from 0."""


def pair_sums(setting: "Setting", target: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    """sum_ij v(x_i, y_j) over the target x [N, D] and each task y, [T] float64 on the target's device."""
    sums = torch.zeros(len(offsets) - 1, dtype=torch.float64)
    whole = torch.tensor([0, len(target)])
    for part in setting.chunks(whole):
        x = setting.operand(target[part.start : part.end])
        for chunk in setting.chunks(offsets):
            y = setting.operand(features[chunk.start : chunk.end])
            sums[chunk.tasks] += setting.cross(x, y, chunk.offsets)
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
    target: Tensor, features: Tensor, centre: Tensor, precision: str, memory: int | None, wanted: int
) -> Tensor:
    """For each row of a target [N, D] the nearest row of each of the nearest blocks of features, [N, K] row numbers.

    K is `wanted`, or the number of blocks if that is less.
    """
    setting = Setting(features, max(len(target), len(features)), centre, Value("squared"), precision, "fused", memory)
    rows = []
    for part in setting.chunks(torch.tensor([0, len(target)])):
        x = setting.operand(target[part.start : part.end])
        best = torch.empty(len(x.squares), 0, device=target.device)
        numbers = torch.empty(len(x.squares), 0, dtype=torch.int64, device=target.device)
        for chunk in setting.chunks(torch.tensor([0, len(features)])):
            y = setting.operand(features[chunk.start : chunk.end])
            squares, found, _ = launch.nearest_blocks(
                x, y, chunk.offsets, precision=precision, path="fused", memory=setting.memory
            )
            best, numbers = torch.cat([best, squares], 1), torch.cat([numbers, found + chunk.start], 1)
            best, kept = best.topk(min(wanted, best.shape[1]), dim=1, largest=False)
            numbers = numbers.gather(1, kept)
        rows.append(numbers)
    return torch.cat(rows)


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
        # Half for the operands of two sides, half for tables, products and results. While an operand is made, its rows
        # are held as float32 three times.
        row_bytes = self._pitch * 20 + features.element_size() * features.shape[1]
        least = min(PIECE, num_rows) * row_bytes * 4
        memory = max(MEMORY, least) if memory is None else memory
        self.memory = memory // 2
        self._rows = memory // 4 // row_bytes
        if memory < least:
            raise ValueError(f"memory is {memory} bytes; accepted on path {path!r}: at least {least}")
        coefficients = torch.tensor(value.coefficients, dtype=torch.float32, device=features.device)
        self._value = launch.Value("rbf", coefficients) if value.kind == "rbf" else launch.Value("sqrt")
        self._path: launch.Path = "fused" if path == "fused" else "streamed"

    def operand(self, rows: Tensor) -> Operand:
        """Rows [M, D] as an operand."""
        return make_operand(rows, self._centre, self._precision, self._pitch)

    def cross(self, x: Operand, y: Operand, offsets: Tensor) -> Tensor:
        """Sums over x and each task of y, [T] float64 on the CPU."""
        return launch.cross_sums(
            x, y, offsets, precision=self._precision, value=self._value, path=self._path, memory=self.memory
        )

    def own(self, y: Operand, offsets: Tensor) -> Tensor:
        """Sums over each task of y with itself, [T] float64 on the CPU."""
        return launch.own_sums(
            y, offsets, precision=self._precision, value=self._value, path=self._path, memory=self.memory
        )

    def chunks(self, offsets: Tensor) -> Iterator[_Chunk]:
        """Consecutive tasks of at most as many rows as fit, or pieces of a task that does not."""
        low, num_tasks = 0, len(offsets) - 1
        while low < num_tasks:
            start = int(offsets[low])
            high = int(torch.searchsorted(offsets, start + self._rows, right=True)) - 1
            if high > low:
                yield _Chunk(start, int(offsets[high]), slice(low, high), offsets[low : high + 1] - start)
                low = high
                continue
            end, step = int(offsets[low + 1]), self._rows // PIECE * PIECE
            for first in range(start, end, step):
                last = min(first + step, end)
                yield _Chunk(first, last, slice(low, low + 1), torch.tensor([0, last - first]))
            low += 1

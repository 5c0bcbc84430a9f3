"""Sums of Euclidean distances over ragged tasks, tile by tile, without the N x M matrix.

A tile is one block of at most `block` rows of a task against one such block of another (or the same) task. Every
tile is one matrix product, |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, and three things make it exact enough to rank by:

- One centre is subtracted first: a point amid the target's rows for cross terms, amid a task's own for its self term.
- Where |x - y|^2 is at most `cancelled` times |x|^2 + |y|^2, the product has lost its digits, and the pair is computed
  again from the difference of its rows: equal rows are at distance 0 exactly, near ones as exact as far ones.
- d(X, X) must be 0, so cross terms and self terms of the same rows must agree in every bit. The product of a tile is
  therefore a call of its own whose shape, strides and 64-byte alignment follow from the two blocks alone (a batched
  product may round by the size of its batch and the place in it), blocks start at fixed rows of a task, row sums have
  a fixed order, and what is added across rows is added in float64 in a fixed order. Only the number of tiles that
  are finished together (square root, row sums) follows from `memory`, and that changes no bit.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.kernels.ragged import Blocks, RaggedTasks, make_blocks

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
"""What `precision` may be, and the dtype of products, norms and row sums under it."""

DEFAULT_MEMORY = 256 * 2**20
"""Bytes that a call may hold beside its inputs and its result, where the caller does not say."""

_LANE = 16
"""Rows of operands and tiles are padded to this many numbers, so that each starts on 64 bytes."""


class _Sizes(NamedTuple):
    """What fits a device. Only `block` has a part in the result's bits."""

    block: int
    """Rows of a block: the side of the largest tile."""
    tiles: int
    """Numbers in the tiles that are finished together."""
    operand: int
    """Numbers in the centred rows that are held for them."""
    again: int
    """Numbers that are looked at together where pairs are computed again."""


# CPU: tiles of 2 MiB beside 4 MiB of rows; larger and smaller ones are slower. CUDA: few launches, 128 MiB of tiles.
_CPU = _Sizes(block=1024, tiles=2**19, operand=2**20, again=2**18)
_CUDA = _Sizes(block=2048, tiles=2**25, operand=2**24, again=2**20)


def resolve_precision(precision: str | None, dtype: torch.dtype) -> str:
    """The precision asked for, or where none is: fp64 for float64 features, else fp32."""
    if precision is None:
        return "fp64" if dtype == torch.float64 else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is {precision!r}; accepted: {', '.join(PRECISIONS)}, or None to follow the features"
        )
    return precision


def check_memory(features: Tensor, largest: int, precision: str, memory: int | None) -> None:
    """Refuse, with a ValueError, a bound that cannot hold one tile of tasks of at most `largest` rows."""
    _Engine(features, largest, precision, memory)


@torch.no_grad()
def cross_sums(target: Tensor, tasks: RaggedTasks, *, precision: str, memory: int | None) -> Tensor:
    """sum_ij |x_i - y_j| over the target x [N, D] and each task y [n_t, D]; [T] float64."""
    engine = _Engine(tasks.features, max(len(target), int(tasks.sizes.max())), precision, memory)
    with _exact_products(engine.device):
        sums = engine.cross(target, tasks.features, make_blocks(tasks.offsets, engine.sizes.block))
    return sums.to(engine.device)


@torch.no_grad()
def self_sums(features: Tensor, offsets: Tensor, *, precision: str, memory: int | None) -> Tensor:
    """sum_ij |y_i - y_j| over each task y [n_t, D], a row with itself included; [T] float64."""
    engine = _Engine(features, int(offsets.diff().max()), precision, memory)
    with _exact_products(engine.device):
        return engine.within(features, offsets.tolist()).to(engine.device)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Keep float32 products in float32, whatever the process has set.

    torch.set_float32_matmul_precision("medium") makes them bfloat16 on the CPU (error 0.24 in a product of 512 x 512
    normal numbers, torch 2.15) and "high" TF32 on CUDA. Autocast leaves products in place, as here, alone.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    if before != "ieee":
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if before != "ieee":
            matmul.fp32_precision = before


class _Side(NamedTuple):
    """B blocks of rows, each padded to R rows: one side of B tiles."""

    features: Tensor
    """The features as given, [*, D]."""
    starts: list[int]
    """The row of `features` at which each block starts, B of them."""
    squares: Tensor
    """|row - centre|^2, [B, R], and `far` in the padding."""
    largest: float
    """The largest of the squares that is not padding."""
    valid: Tensor | None = None
    """1 where there is a row and 0 in the padding, [B, R]; None where there is no padding."""


class _Scratch:
    """Memory that is used again and again: for 512 small tasks 27,000 page faults less, a third of the time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape in the place of the one of that name before."""
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held.pop(name, None)  # before its successor is there
            self._held[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._held[name][:size].view(shape)


class _Engine:
    """One sweep's sizes and passes."""

    def __init__(self, features: Tensor, largest: int, precision: str, memory: int | None) -> None:
        self.dtype = PRECISIONS[precision]
        self.wide = torch.promote_types(features.dtype, self.dtype)  # of centres and differences
        self.converts = features.dtype != self.dtype
        self.device = features.device
        self.sizes = _CPU if self.device.type == "cpu" else _CUDA
        self.pitch = _padded(features.shape[1])
        self.scratch = _Scratch(self.device, self.dtype)
        # Pairs at or below this share of |x|^2 + |y|^2 are computed again. With g the relative error of a product, some
        # sqrt(D) u, the error of any other d is g (|x|^2 + |y|^2) / 2d, at most 16 g sqrt(|x|^2 + |y|^2) for fp32 and
        # 512 g for fp64.
        self.cancelled = 2.0**-10 if self.dtype == torch.float32 else 2.0**-20
        # A square that no pair reaches and that can still be added to others: marks what is not a pair.
        self.far = torch.finfo(self.dtype).max / 32
        self.memory = DEFAULT_MEMORY if memory is None else memory
        largest = _padded(min(self.sizes.block, largest))
        self.again = 2**12
        smallest = self._bytes(largest, largest)
        if self.memory < smallest:
            raise ValueError(f"memory is {memory} bytes; accepted: at least {smallest}, which one tile takes")
        self.spare = self.memory - smallest
        self.again = min(self.sizes.again, max(self.again, self.spare // 1024))

    @property
    def pairs(self) -> int:
        """Pairs that are computed again together."""
        # On CUDA the order of a sum follows from the shape that is reduced: so that is fixed, whatever the memory.
        return max(16, (min(self.again, 2**16) if self.device.type == "cpu" else 2**16) // self.pitch)

    def cross(self, target: Tensor, features: Tensor, blocks: Blocks, same: bool = False) -> Tensor:
        """Sums over the target and each task of `blocks`, [T] float64 on the CPU; `same`: features are the target."""
        centre = self._centre(target)
        held = len(target) * self.pitch * self.dtype.itemsize
        hold = held <= self.spare // 2
        panels = list(self._panels(target, centre, hold)) if hold else []
        width = _padded(min(len(target), self.sizes.block))
        chunk_rows = self._max_rows(width, max(blocks.sizes), held if hold else 0)
        sums, low = [], 0
        while low < len(blocks.starts):
            start, high, end = blocks.starts[low], low, blocks.starts[low]
            while high < len(blocks.starts) and (high == low or end + blocks.sizes[high] - start <= chunk_rows):
                end += blocks.sizes[high]
                high += 1
            columns = panels if hold else self._panels(target, centre, hold)
            sums.append(self._stripe(features, start, blocks.sizes[low:high], centre, columns, same))
            low = high
        return _run_sums(torch.cat(sums), blocks.first_of_task.diff())

    def _stripe(
        self,
        features: Tensor,
        start: int,
        sizes: list[int],
        centre: Tensor,
        panels: Iterable[tuple[Tensor, _Side]],
        same: bool,
    ) -> Tensor:
        """Sums over the target and each of some blocks that follow each other from row `start`, float64 on the CPU."""
        rows = self.scratch.take("rows", sum(sizes), self.pitch)
        self._subtract(features[start : start + len(rows)], centre, rows)
        squares = _square_norms(rows)
        y = _Side(features, [start], squares[None], float(squares.amax()))
        totals = torch.zeros(1, len(rows), dtype=torch.float64, device=self.device)
        for columns, x in panels:
            tile = self._new_tiles(y, x)
            for part, block in zip(tile[0, :, : columns.shape[1]].split(sizes), rows.split(sizes), strict=True):
                part.addmm_(block, columns, alpha=-2)
            totals += self._finish(tile, y, x, x.starts[0] - start if same else None)
        return _run_sums(totals, torch.tensor(sizes))

    def within(self, features: Tensor, offsets: list[int]) -> Tensor:
        """Sums over each task with itself, [T] float64 on the CPU."""
        sums = torch.zeros(len(offsets) - 1, dtype=torch.float64)
        groups: dict[int, list[int]] = {}
        for t, (start, end) in enumerate(pairwise(offsets)):
            if end - start > self.sizes.block:
                rows = features[start:end]
                blocks = make_blocks(torch.tensor([0, len(rows)]), self.sizes.block)
                sums[t] = self.cross(rows, rows, blocks, same=True)[0]
            elif end - start > 1:  # one row has no pairs
                groups.setdefault(_padded(end - start), []).append(t)
        # Tasks that are one block each: those of one padded width are finished together.
        for width, members in groups.items():
            most = self._max_rows(width, width) // width
            chunks = (members[i : i + most] for i in range(0, len(members), most))
            runs = ([(offsets[t], offsets[t + 1]) for t in chunk] for chunk in chunks)
            totals = [self._diagonal(features, chunk, width) for chunk in runs]
            # Added up as in `cross`: zeros at the end change nothing.
            sums[members] = _run_sums(torch.cat(totals).double(), torch.full((len(members),), width))
        return sums

    def _diagonal(self, features: Tensor, runs: list[tuple[int, int]], width: int) -> Tensor:
        """For each row of B runs of at most `width` rows the sum of distances to its run, [B width], 0 in padding."""
        cuts = [cut for start, end in runs for cut in (end - start, width - (end - start))]
        rows = self.scratch.take("rows", len(runs) * width, self.pitch)
        blocks = rows.split(cuts)[::2]  # every other one is padding
        for block, (start, end) in zip(blocks, runs, strict=True):
            self._subtract(features[start:end], self._centre(features[start:end]), block)
        squares = _square_norms(rows).view(-1, width)
        valid = (torch.arange(width) < torch.tensor(cuts[::2])[:, None]).to(self.device)
        largest = float(torch.where(valid, squares, 0).amax())
        marked, starts = torch.where(valid, squares, self.far), [start for start, _ in runs]
        side = _Side(features, starts, marked, largest, valid.to(self.dtype))
        tiles = self._new_tiles(side, side)
        for part, block in zip(tiles.flatten(0, 1).split(cuts)[::2], blocks, strict=True):
            part[:, : len(block)].addmm_(block, block.T, alpha=-2)
        return self._finish(tiles, side, side, 0).flatten()

    def _panels(self, target: Tensor, centre: Tensor, hold: bool) -> Iterator[tuple[Tensor, _Side]]:
        """The target's blocks: their rows as columns for products, [pitch, R], and the side of tiles, [1, padded R].

        Each is good until the next is asked for, or with `hold` for ever.
        """
        for start in range(0, len(target), self.sizes.block):
            raw = target[start : start + self.sizes.block]
            scratch = _Scratch(self.device, self.dtype) if hold else self.scratch
            rows = scratch.take("columns", len(raw), self.pitch)
            self._subtract(raw, centre, rows)
            squares = _square_norms(rows)
            largest, padding = float(squares.amax()), (0, _padded(len(raw)) - len(raw))
            valid = F.pad(torch.ones_like(squares), padding)[None] if padding[1] else None
            yield rows.T, _Side(target, [start], F.pad(squares, padding, value=self.far)[None], largest, valid)

    def _new_tiles(self, y: _Side, x: _Side) -> Tensor:
        """|y|^2 + |x|^2 for every pair, [B, R, W]: `far` or more in the padding."""
        tiles = self.scratch.take("tiles", *y.squares.shape, x.squares.shape[1])
        return torch.add(y.squares[:, :, None], x.squares[:, None, :], out=tiles)

    def _finish(self, tiles: Tensor, y: _Side, x: _Side, own: int | None) -> Tensor:
        """From |y - x|^2 in [B, R, W] to the sum of each row's distances, [B, R]; overwrites the tiles.

        `own`: row own + i of a tile and its column i are the same row of a task; None: there is none.
        """
        itself = None if own is None else tiles[:, max(own, 0) :, max(-own, 0) :].diagonal(0, 1, 2)
        if itself is not None:
            itself.fill_(self.far)
        # So written that a NaN, from an overflow, is looked into.
        if not (float(tiles.amin()) > self.cancelled * (y.largest + x.largest) and y.largest + x.largest < self.far):
            self._again(tiles, y, x)
        tiles.sqrt_()
        if itself is not None:
            itself.fill_(0)
        if x.valid is not None:
            tiles.mul_(x.valid[:, None, :])
        totals = _row_totals(tiles)
        return totals if y.valid is None else totals.mul_(y.valid)

    def _again(self, tiles: Tensor, y: _Side, x: _Side) -> None:
        """Write |y - x|^2 from the difference of the rows over every pair whose product cancelled."""
        if not y.largest + x.largest < self.far:
            raise ValueError(
                f"some rows are more than {self.far**0.5:.0e} from the rows about them, so far that "
                f"squares overflow in {self.dtype}; accepted: nearer rows, or precision='fp64'"
            )
        y_squares, x_squares = (v.squares if v.valid is None else v.squares * v.valid for v in (y, x))
        y_starts, x_starts = (torch.tensor(v.starts, device=self.device) for v in (y, x))
        limit = self.cancelled * (y_squares + x_squares.amax(1, keepdim=True))
        lost = (tiles.amin(2) < limit).nonzero()
        for some in lost.split(max(1, self.again // tiles.shape[2])):
            which, row = some.unbind(1)
            near = tiles[which, row] < self.cancelled * (x_squares[which] + y_squares[which, row, None])
            number, column = near.nonzero().unbind(1)
            which, row = which[number], row[number]
            pairs = (x.features, x_starts[which] + column, y.features, y_starts[which] + row)
            tiles[which, row, column] = self._differences(*pairs)

    def _differences(self, x: Tensor, x_rows: Tensor, y: Tensor, y_rows: Tensor) -> Tensor:
        """|x_i - y_j|^2 of P pairs of rows, [P]."""
        squares = [x.new_zeros(0, dtype=self.wide)]
        for i, j in zip(x_rows.split(self.pairs), y_rows.split(self.pairs), strict=True):
            i, j = (F.pad(index, (0, self.pairs - len(index))) for index in (i, j))
            difference = x[i].to(self.wide) - y[j].to(self.wide)
            squares.append(difference.square_().sum(1))
        return torch.cat(squares)[: len(x_rows)].to(self.dtype)

    def _centre(self, rows: Tensor) -> Tensor:
        """A point amid rows [N, D], [D]: the mean of 16 to 31 of them, evenly spaced.

        It only has to be near, and to follow from the rows alone. Of equal rows it is exactly the row.
        """
        sample = rows[:: max(1, len(rows) // 16)].to(self.wide)
        return (sample - sample[0]).mean(0).add_(sample[0])

    def _subtract(self, raw: Tensor, centre: Tensor, out: Tensor) -> None:
        """raw [M, D] less the centre [D], padded with zeros to [M, pitch]."""
        num_features = raw.shape[1]
        if num_features < self.pitch:
            out[:, num_features:] = 0
            out = out[:, :num_features]
        torch.sub(raw, centre, out=out)

    def _bytes(self, num_rows: int, width: int) -> int:
        """Most memory held while `num_rows` rows y meet blocks x of `width` columns."""
        item, wide = self.dtype.itemsize, self.wide.itemsize
        copies = (item if self.device.type == "cpu" else 2 * item) + (2 * wide if self.converts else 0)
        operands = (num_rows + width) * self.pitch * copies
        tiles = num_rows * width * item
        again = max(self.again, self.pairs * self.pitch) * (100 + 6 * wide)
        return operands + tiles + again + 64 * (num_rows + width)

    def _max_rows(self, width: int, block: int, held: int = 0) -> int:
        """Rows y to take together against blocks of `width` columns: as memory has it, but at least one block."""
        fixed = self._bytes(0, width) + held
        bound = (self.memory - fixed) // (self._bytes(1, width) - self._bytes(0, width))
        return max(block, min(bound, self.sizes.tiles // width, self.sizes.operand // self.pitch))


def _padded(size: int) -> int:
    return (size + _LANE - 1) // _LANE * _LANE


def _run_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs of values, float64 [len(lengths)] on the CPU, each run in its own order."""
    sums: Tensor = torch.segment_reduce(values.flatten().cpu(), "sum", lengths=lengths, unsafe=True)
    return sums


def _square_norms(rows: Tensor) -> Tensor:
    """|x|^2 of rows [M, pitch], [M]."""
    if rows.device.type == "cpu":
        # No array of squares: 2 ms for 51k rows of 256 where (rows * rows).sum(1) takes 29 (torch 2.15, one core).
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms.square_()
    return _fold(rows * rows)


def _row_totals(tiles: Tensor) -> Tensor:
    """Sum of each row of tiles [B, R, W], [B, R]; overwrites the tiles."""
    # On the CPU every row is summed alone, in an order that follows from W.
    return tiles.sum(2) if tiles.device.type == "cpu" else _fold(tiles)


def _fold(values: Tensor) -> Tensor:
    """Sum over the last dimension of values [..., W], by a tree that follows from W alone; overwrites the values.

    CUDA's own reduction picks its order by the number of rows too: equal rows would differ in the last bit.
    """
    width = values.shape[-1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., 0].clone()

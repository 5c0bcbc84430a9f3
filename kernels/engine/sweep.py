"""The plain-PyTorch engine: |x - y|^2 over ragged tasks in tiles, without the N x M matrix, on any device.

A tile is a stripe of the tasks' rows against a panel of the target's rows, one matrix product:
|x - y|^2 = |x|^2 + |y|^2 - 2 x.y. Three things make it exact enough to rank by:

- A centre is subtracted first, near which the digits are.
- Where |x - y|^2 is at most `cancelled` times |x|^2 + |y|^2 the product has lost its digits, and the pair is computed
  again from the difference of its rows: equal rows are at distance 0 exactly, near ones as exact as far ones.
- What is added across tiles is added in float64 in a fixed order, and the size of a tile follows from N and D alone:
  the memory bound decides whether the target's rows are kept or made again, which changes no bit.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.precision import (
    PRECISIONS,
    ROUNDED,
    exact_products,
    nearer_rows,
    round_tf32,
    summed_alike,
)
from headstart.kernels.engine.tile import Panels, Rows, Scratch, Take, Tile, Value

PANEL = 1024
"""Rows of a target that are one side of a product, where it has so many."""

OWN_STRIPE = 256
"""Rows of a stripe of a panel that meets itself: of more, more pairs are computed twice."""


class Sweep:
    """Tiles of squared distances at one precision, around one centre.

    `per_row`, `beside`: bytes that the caller holds beside a tile, for each of its rows and for all of it. `num_kept`:
    rows that are kept from tile to tile where the memory holds them, by default those of the columns.
    """

    def __init__(
        self,
        features: Tensor,
        num_columns: int,
        value: Value,
        precision: str,
        memory: int | None,
        centre: Tensor | None = None,
        per_row: int = 0,
        beside: int = 0,
        num_kept: int | None = None,
    ) -> None:
        self.value, self._per_row, self._beside = value, per_row, beside
        self.precision, self.dtype = precision, PRECISIONS[precision]
        self.wide = torch.promote_types(features.dtype, self.dtype)  # of centres and differences
        self.device, self.dim = features.device, features.shape[1]
        self.centre = centre
        # Every row and so every run starts on 64 bytes: products do not depend on what lies before them.
        self._pitch = (self.dim + 2 + 15) // 16 * 16
        self._bits = torch.int64 if self.dtype == torch.float64 else torch.int32
        self._scratch = Scratch(self.device, self.dtype)
        # With g the relative error of a product, some sqrt(D) u, the error of any other d is g (|x|^2 + |y|^2) / 2d, at
        # most 16 g sqrt(|x|^2 + |y|^2) for float32 and 512 g for float64.
        self.cancelled = 2.0**-10 if self.dtype == torch.float32 else 2.0**-20
        # A square that no pair reaches and that can still be added to others: marks what is not to be looked at.
        self.far = torch.finfo(self.dtype).max / 32
        if self.device.type == "cpu":
            # A tile and the rows that it comes from take 5 MiB together, and a tile 2 where more is held beside it.
            # Half as much is slower; twice as much at most 3% faster, a quarter slower where others use the cache too.
            tile, both, callers = 2**19 if value.kind == "rbf" else 2**20, 5 * 2**18, 2**23
            near, pairs = 2**12, 2**16
        else:  # fewer launches
            tile, both, callers, near, pairs = 2**22, 2**23, 2**27, 2**15, 2**19
        self.panel = min(num_columns, PANEL)
        most = min(4096, tile // self.panel, both // (self.panel + self.dim), callers // max(1, per_row))
        self.stripe = max(64, most // 64 * 64)
        # What is looked at for near pairs together, and the pairs that are computed again together.
        self.looked_at, self.pairs = near, max(16, pairs // self.dim)
        least = self.least
        self.memory = fit_memory(memory, least, ", which one tile takes")
        kept = (num_columns if num_kept is None else num_kept) * (self.dim + 17) * self._copies * self.dtype.itemsize
        self._hold = least + kept <= self.memory
        self.planned = least + kept if self._hold else least
        """Bytes that it will hold at most."""

    @property
    def _copies(self) -> int:
        return 2 if self.precision == "bf16x3" else 1

    @property
    def least(self) -> int:
        """Most bytes that are held while one tile is worked on."""
        item, wide = self.dtype.itemsize, self.wide.itemsize
        rounding = 2 * item if self.precision in ("bf16", "tf32", "bf16x3") else 0
        converting = 2 * wide if self.wide != self.dtype else 0
        operands = (self.stripe + self.panel) * (self.dim + 17) * (self._copies * item + rounding + converting)
        again = self.pairs * self.dim * 3 * wide + self.looked_at * 128
        tiles = int(self.value.buffers * self.stripe * self.panel) * item
        callers = self._per_row * self.stripe + self._beside
        return operands + tiles + again + callers + 64 * (self.stripe + self.panel) + 2**16

    def panels(self, target: Tensor) -> Panels:
        """All rows of a target [N, D] as one side of products."""
        centre = self.centre_of(target) if self.centre is None else self.centre
        if not self._hold:
            return Panels(centre, None)
        starts = range(0, len(target), self.panel)
        with exact_products(self.device, self.precision):
            return Panels(centre, [self._panel(target, centre, start, True) for start in starts])

    def tiles(
        self, target: Tensor, features: Tensor, panels: Panels | None = None, take: Take | None = None
    ) -> Iterator[Tile]:
        """Every pair of a row y of features [M, D] and x of target [N, D], stripe by stripe of y.

        `panels`: those of the target, where they are made already. `take` is given the pairs whose product cancelled,
        which the tile then has at inf.
        """
        centre, held = self.panels(target) if panels is None else panels
        with exact_products(self.device, self.precision):
            for start in range(0, len(features), self.stripe):
                y = self._rows(features, [start], min(self.stripe, len(features) - start), [centre], "rows", "y")
                for number, column in enumerate(range(0, len(target), self.panel)):
                    x = self._panel(target, centre, column, False) if held is None else held[number]
                    yield Tile(start, column, self._squares(y, x, take=take)[0])

    def tiles_by_panel(self, target: Tensor, features: Tensor) -> Iterator[Tile]:
        """Every pair of a row y of target [N, D] and x of features [M, D], panel by panel of x: M may be large."""
        centre = self.centre_of(features) if self.centre is None else self.centre
        size = -(-len(target) // -(-len(target) // self.stripe))  # as even as they can be
        starts = range(0, len(target), size)

        def stripe(start: int, name: str) -> Rows:
            return self._rows(target, [start], min(size, len(target) - start), [centre], name, "y")

        held = [stripe(start, f"rows {start}") for start in starts] if self._hold else None
        with exact_products(self.device, self.precision):
            for column in range(0, len(features), self.panel):
                x = self._panel(features, centre, column, False)
                for number, start in enumerate(starts):
                    y = stripe(start, "rows") if held is None else held[number]
                    yield Tile(start, column, self._squares(y, x)[0])

    def own_tiles(self, rows: Tensor, panels: Panels | None = None) -> Iterator[tuple[Tensor, int]]:
        """Half of the pairs of rows [n, D], n > 1, with themselves: (squares [R, W], columns that count once).

        A tile's columns begin at its first row; those after the first R stand for their mirror images too. A row is at
        `far` from itself, where the value at zero is meant. `panels`: those of the rows, where they are made already.
        """
        if panels is None:
            panels = Panels(self.centre_of(rows) if self.centre is None else self.centre, None)
        centre, held = panels
        num_rows, stripe = len(rows), min(OWN_STRIPE, self.stripe)
        with exact_products(self.device, self.precision):
            for number, column in enumerate(range(0, num_rows, self.panel)):
                x = self._panel(rows, centre, column, False) if held is None else held[number]
                for start in range(0, column, self.stripe):
                    y = self._rows(rows, [start], min(self.stripe, column - start), [centre], "rows", "y")
                    yield self._squares(y, x)[0], 0
                for start in range(0, x.sizes[0], stripe):  # of the panel itself: centred and rounded already
                    size = min(stripe, x.sizes[0] - start)
                    rest = x.part(start, x.sizes[0])
                    yield self._squares(self._left(rest.part(0, size)), rest, True)[0], size

    def own_batches(self, features: Tensor, offsets: list[int], members: list[int], width: int) -> Iterator[Tensor]:
        """Tasks of at most `width` rows, some at a time: squares [B, width, width], `far` on and beyond diagonals.

        The squares are of the tasks in the order of `members`.
        """
        most = max(1, min(self.stripe * self.panel // width**2, self.stripe // width))
        with exact_products(self.device, self.precision):
            for low in range(0, len(members), most):
                chosen = members[low : low + most]
                starts, ends = [offsets[t] for t in chosen], [offsets[t + 1] for t in chosen]
                centres = [
                    self.centre_of(features[a:b]) if self.centre is None else self.centre
                    for a, b in zip(starts, ends, strict=True)
                ]
                sizes = [b - a for a, b in zip(starts, ends, strict=True)]
                y = self._rows(features, starts, width, centres, "rows", "both", sizes)
                yield self._squares(y, y, True)

    def clear(self) -> None:
        """Let go of what is held, panels too."""
        self._scratch.clear()

    def centre_of(self, rows: Tensor) -> Tensor:
        """A point amid rows [N, D], [D]: the mean of 16 to 31 of them, evenly spaced.

        It only has to be near, and to follow from the rows alone. Of equal rows it is exactly the row.
        """
        sample = rows[:: max(1, len(rows) // 16)].to(self.wide).contiguous()  # or the sum's order is that of strides
        return (sample - sample[0]).mean(0).add_(sample[0])

    def _panel(self, target: Tensor, centre: Tensor, start: int, keep: bool) -> Rows:
        name = f"panel {start}" if keep else "columns"
        return self._rows(target, [start], min(self.panel, len(target) - start), [centre], name, "x")

    def _rows(
        self,
        raw: Tensor,
        starts: list[int],
        size: int,
        centres: list[Tensor],
        name: str,
        side: Literal["y", "x", "both"],
        sizes: list[int] | None = None,
    ) -> Rows:
        """Runs of `size` rows from each start, or of their own sizes and `far` after them."""
        sizes = [size] * len(starts) if sizes is None else sizes
        numbers = self._scratch.take(name, len(starts), size, self._pitch)
        high = numbers[:, :, : self.dim]
        for number, (start, length, centre) in enumerate(zip(starts, sizes, centres, strict=True)):
            torch.sub(raw[start : start + length], centre, out=high[number, :length])
            if length < size:
                high[number, length:] = 0
        low = None
        if self.precision == "bf16x3":
            low = self._scratch.take(f"{name}, low", len(starts), size, self._pitch)[:, :, : self.dim]
            rounded = high.bfloat16()
            torch.sub(high, rounded, out=low)
            low.copy_(low.bfloat16())
            high.copy_(rounded)
        elif self.precision == "bf16":
            high.copy_(high.bfloat16())
        elif self.precision == "tf32":
            high.copy_(round_tf32(high))
        # No array of squares: 2 ms for 51k rows of 256 where (rows * rows).sum(1) takes 29 (torch 2.15, one core).
        squares = torch.linalg.vector_norm(high, dim=2).square_()
        if low is not None:
            squares += 2 * torch.linalg.vecdot(high, low)
        largest = float(squares.amax())
        if min(sizes) < size:
            inside = torch.arange(size) < torch.tensor(sizes)[:, None]
            squares.masked_fill_(~inside.to(self.device), self.far)
        if side == "both" or self.precision in ROUNDED:
            return Rows(high, low, None, squares, raw, starts, sizes, largest)
        extended = numbers[0, :, : self.dim + 2]
        self._extend(extended, squares[0], side)
        return Rows(high, low, extended, squares, raw, starts, sizes, largest)

    def _extend(self, extended: Tensor, squares: Tensor, side: Literal["y", "x"]) -> None:
        """y = [y, -|y|^2 / 2, -1 / 2] and x = [x, 1, |x|^2]: -2 y.x is |y - x|^2, and saves a pass over the tile."""
        first, second = (squares * -0.5, -0.5) if side == "y" else (1.0, squares)
        extended[:, self.dim], extended[:, self.dim + 1] = first, second

    def _left(self, rows: Rows) -> Rows:
        """Rows that were made as x's, to stand on the left of a product with x's."""
        if rows.extended is None:
            return rows
        copy = self._scratch.take("rows", len(rows.extended), self._pitch)[:, : self.dim + 2]
        copy.copy_(rows.extended)
        self._extend(copy, rows.squares[0], "y")
        return rows._replace(extended=copy)

    def _squares(self, y: Rows, x: Rows, itself: bool = False, take: Take | None = None) -> Tensor:
        """|y - x|^2, [B, R, W], never negative; `itself`: row i of y is row i of x, and at `far`.

        To be called under `exact_products`, which costs too much to be entered for each tile.
        """
        tiles = self._scratch.take("tiles", *y.squares.shape, x.squares.shape[1])
        if y.extended is not None and x.extended is not None:
            torch.addmm(tiles[0], y.extended, x.extended.T, beta=0, alpha=-2, out=tiles[0])
        else:
            self._add_products(tiles, y, x)
        if itself:
            tiles.diagonal(0, 1, 2).fill_(self.far)
        largest = y.largest + x.largest
        # The least of each row, as whole numbers: among floats of 0 or more the order is the same, and any below 0 is
        # found. Three times as fast as the least of all floats (2 MiB, two cores).
        least = tiles.view(self._bits).amin(2).view(self.dtype)
        # So written that a NaN, from an overflow, is looked into.
        if not (float(least.amin()) > self.cancelled * largest and largest < self.far):
            self._again(tiles, y, x, least, largest, take)
        return tiles

    def _add_products(self, tiles: Tensor, y: Rows, x: Rows) -> None:
        torch.add(y.squares[:, :, None], x.squares[:, None, :], out=tiles)
        for left, right in ((y.high, x.high), (y.high, x.low), (y.low, x.high)):
            if left is not None and right is not None:
                # One call a run: a batched product may round by the size of its batch and the place in it.
                for tile, rows, columns, n, m in zip(tiles, left, right, y.sizes, x.sizes, strict=True):
                    tile[:n, :m].addmm_(rows[:n], columns[:m].T, alpha=-2)

    def _again(self, tiles: Tensor, y: Rows, x: Rows, least: Tensor, largest: float, take: Take | None) -> None:
        """Write |y - x|^2 from the difference of the rows over every pair whose product cancelled.

        `least` [B, R] is the least of each row of the tiles, `largest` the most that two squares are together.
        """
        if not largest < self.far:
            raise ValueError(
                f"some rows are more than {self.far**0.5:.0e} from the rows about them, so far that "
                f"squares overflow in {self.dtype}; accepted: {nearer_rows(self.dtype)}"
            )
        lost = (least <= self.cancelled * (y.squares + x.largest)).nonzero()
        for some in lost.split(max(1, self.looked_at // tiles.shape[2])):
            which, row = some.unbind(1)
            limit = self.cancelled * (x.squares[which] + y.squares[which, row, None])
            number, column = (tiles[which, row] <= limit).nonzero().unbind(1)
            for which_, row_, column_ in zip(
                which[number].split(self.pairs), row[number].split(self.pairs), column.split(self.pairs), strict=True
            ):
                difference = self._differences(y, x, which_, row_, column_)
                if take is None:
                    squares = summed_alike(difference.square_()).sum(1)[: len(difference)]
                    tiles[which_, row_, column_] = squares.to(self.dtype)
                else:
                    take(y.starts[0] + row_, x.starts[0] + column_, difference)
                    tiles[which_, row_, column_] = math.inf
                del difference  # before its successor is there

    def _differences(self, y: Rows, x: Rows, which: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """y_i - x_j of P pairs, [P, D]: of the rows as given, or as rounded where they are."""
        if self.precision in ("fp32", "fp64"):
            sides = []
            for rows, index in ((y, row), (x, column)):
                starts = torch.tensor(rows.starts, device=self.device)
                sides.append(rows.raw[starts[which] + index].to(self.wide))
            return sides[0].sub_(sides[1])
        difference = y.high[which, row] - x.high[which, column]
        if y.low is not None and x.low is not None:
            difference += y.low[which, row] - x.low[which, column]
        return difference

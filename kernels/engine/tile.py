"""What a sweep works on: values of squared distances, rows as a side of products, tiles, and memory used again."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Take = Callable[[Tensor, Tensor, Tensor], None]
"""Takes pairs out of a tile, some at a time: given their rows y and x [P], and y - x [P, D]."""


class Value(NamedTuple):
    """What is made of a squared distance: itself, its root, or the mean over b of exp(-c_b d^2)."""

    kind: Literal["squared", "distance", "rbf"]
    coefficients: tuple[float, ...] = ()
    """c_b = 1 / (2 sigma_b^2), for rbf."""

    @property
    def at_zero(self) -> float:
        """The value of a row and itself."""
        return 1.0 if self.kind == "rbf" else 0.0

    @property
    def buffers(self) -> float:
        """Arrays as large as a tile held while it is worked on: itself and a mask of bytes, but for mixtures."""
        return 4 if self.kind == "rbf" else 1.25

    def apply_(self, squares: Tensor) -> Tensor:
        """The values of d^2 >= 0, in the place of `squares` but for mixtures."""
        if self.kind == "squared":
            return squares
        if self.kind == "distance":
            return squares.sqrt_()
        if len(self.coefficients) == 1:
            return squares.mul_(-self.coefficients[0]).exp_()
        total = torch.zeros_like(squares)
        scratch = torch.empty_like(squares)
        for c in self.coefficients:
            total += torch.mul(squares, -c, out=scratch).exp_()
        return total.div_(len(self.coefficients))

    def slope_(self, squares: Tensor) -> Tensor:
        """2 dv/d(d^2), which times (x - y) is the gradient of v with respect to x; 0 where d is inf, or 0."""
        if self.kind == "squared":
            return squares.ne_(math.inf).mul_(2.0)
        if self.kind == "distance":
            slopes = squares.rsqrt_()
            return slopes.masked_fill_(slopes == math.inf, 0)
        total = torch.zeros_like(squares)
        for c in self.coefficients:
            total += torch.exp(squares * -c).mul_(-2 * c)
        # Where x - y is 0 a product would take it from what is x times as large; where it is inf, c may be next to 0.
        return total.div_(len(self.coefficients)).masked_fill_((squares == 0) | (squares == math.inf), 0)


class Rows(NamedTuple):
    """Some rows as one side of products."""

    high: Tensor
    """Rows less the centre, rounded, [B, R, D] in the dtype of the products."""
    low: Tensor | None
    """What rounding left, for bf16x3."""
    extended: Tensor | None
    """`high` of one run with two columns more that bring the squares into the product, [R, D + 2]; None where it is
    rounded, and in batches."""
    squares: Tensor
    """Squared norms of the rounded rows, [B, R]."""
    raw: Tensor
    """The features that the rows are from, [*, D]."""
    starts: list[int]
    """The row of `raw` at which each of B runs starts."""
    sizes: list[int]
    """The rows of each run; the rest of its R is padding, at `far`."""
    largest: float
    """The largest of the squares that belong to rows."""

    def part(self, first: int, end: int) -> "Rows":
        """Rows first up to end of the one run."""
        return self._replace(
            high=self.high[:, first:end],
            low=None if self.low is None else self.low[:, first:end],
            extended=None if self.extended is None else self.extended[first:end],
            squares=self.squares[:, first:end],
            starts=[self.starts[0] + first],
            sizes=[end - first],
        )


class Panels(NamedTuple):
    """All rows of a target as one side of products."""

    centre: Tensor
    """[D], subtracted from them."""
    held: list[Rows] | None
    """One panel after the other; None where the memory does not hold them, and they are made again and again."""


class Tile(NamedTuple):
    """Squared distances of a stripe of y to a panel of x."""

    row: int
    """First row of y."""
    column: int
    """First row of x."""
    squares: Tensor
    """[R, W]; to be used up before the next tile is asked for."""


class Scratch:
    """Memory that is used again and again: page faults are a third of the time of 512 small tasks."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape in the place of the one of that name before."""
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            if name not in self._held or self._held[name].numel() < size:
                # Before its successor is there.
                self._held.pop(name, None)
                self._views.clear()
                self._held[name] = torch.empty(size, dtype=self._dtype, device=self._device)
            view = self._views[name, shape] = self._held[name][:size].view(shape)
        return view

    def clear(self) -> None:
        """Let go of all of it."""
        self._held.clear()
        self._views.clear()

"""Precisions: what products are computed in, and how rows are rounded to operands for them.

| precision | operands | products per pair and feature | error of a product, relative to the norms |
| --- | --- | --- | --- |
| bf16 | 8 bits | 1 | 2^-8, of the rounding of the rows |
| tf32 | 11 bits | 1 | 2^-11 |
| bf16x3 | 8 + 8 bits: high and low part | 3: high high + high low + low high | 2^-16 |
| fp32 | 24 bits | 1 | sqrt(D) 2^-24 |
| fp64 | 53 bits | 1 | sqrt(D) 2^-53 |

Sums are float32 (float64 for fp64). Squared norms are always those of the rounded values, summed from the same
products, so that a row is at distance 0 from itself.
"""

import math
import threading
from collections import defaultdict
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PRECISIONS = {
    "bf16": torch.float32,
    "tf32": torch.float32,
    "bf16x3": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""What `precision` may be, and the dtype of norms, row sums and results under it."""

ROUNDED = ("bf16", "tf32", "bf16x3")
"""Precisions under which rows are rounded: one centre must serve cross and self terms, or the roundings differ."""


def resolve_precision(precision: str | None, dtype: torch.dtype) -> str:
    """The precision asked for, or where none is: fp64 for float64 features, else fp32."""
    if precision is None:
        return "fp64" if dtype == torch.float64 else "fp32"
    if not isinstance(precision, str) or precision not in PRECISIONS:
        accepted = ", ".join(PRECISIONS)
        raise ValueError(f"precision is {precision!r}; accepted: {accepted}, or None to follow the features")
    return precision


def nearer_rows(dtype: torch.dtype) -> str:
    """What is accepted where rows are so far apart that something overflows in a dtype."""
    return "nearer rows" if dtype == torch.float64 else "nearer rows, or precision='fp64'"


def as_result(distances: Tensor, precision: str) -> Tensor:
    """Distances in the dtype of a precision; ValueError where that does not hold them."""
    result = distances.to(PRECISIONS[precision])
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"some rows are so far apart that distances overflow in {result.dtype}; accepted: "
            + nearer_rows(result.dtype)
        )
    return result


def round_tf32(values: Tensor) -> Tensor:
    """float32 values rounded to TF32's 10 stored bits of mantissa, ties to even, as float32."""
    bits = values.contiguous().view(torch.int32)
    # Half of the last kept bit, less one where that bit is even, is added before the tail is cut off.
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


def split_bf16(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 values as (high, low) in bfloat16: high + low has 16 bits of mantissa."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def rounded(rows: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """Centred rows as the products of a precision have them: (high, low), low for bf16x3 alone, in the rows' dtype."""
    if precision == "bf16":
        return rows.bfloat16().to(rows.dtype), None
    if precision == "tf32":
        return round_tf32(rows), None
    if precision == "bf16x3":
        high, low = split_bf16(rows)
        return high.to(rows.dtype), low.to(rows.dtype)
    return rows, None


class exact_products:  # noqa: N801 - a context manager is called like a function
    """Keep float32 products in what `precision` says, whatever the process has set.

    torch.set_float32_matmul_precision("medium") makes them bfloat16 on the CPU (error 0.24 in a product of 512 x 512
    normal numbers, torch 2.15) and "high" TF32 on CUDA. Autocast makes all but products in place bfloat16, so it is off
    in here (a gradient was off by 4e-3 of itself, a transport never converged). On the CPU "bf16" lets operands that
    are rounded already use the processor's bfloat16 products where it has them: the same products, four to six times as
    fast on a processor with AMX. On CUDA float32 operands that are rounded, to whatever, are multiplied by the tensor
    cores as TF32, which holds all of their digits.

    The setting is the process's. Of threads that compute at once the most exact one decides, since operands that are
    rounded have the same products in float32; within a thread the innermost does. The last one out restores it.
    """

    _lock = threading.Lock()
    _open: ClassVar[dict[str, dict[int, "list[exact_products]"]]] = defaultdict(dict)  # by device and thread
    _outside: ClassVar[dict[str, str]] = {}
    _now: ClassVar[dict[str, str]] = {}  # asking torch each time takes as long as all else here

    # A class, because a generator's context takes a fifth of a millisecond of ten for the tiles of one small pair.
    def __init__(self, device: torch.device, precision: str = "fp32") -> None:
        self._matmul: Any = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
        self._device, self._wanted = device.type, "ieee"
        if device.type == "cpu" and precision in ("bf16", "bf16x3"):
            self._wanted = "bf16"
        elif device.type == "cuda" and precision in ROUNDED:
            self._wanted = "tf32"

    def __enter__(self) -> None:
        self._thread = threading.get_ident()  # a generator may be closed in another one
        with self._lock:
            threads = self._open[self._device]
            if not threads:
                self._outside[self._device] = self._now[self._device] = self._matmul.fp32_precision
            threads.setdefault(self._thread, []).append(self)
            self._settle(threads)
        self._autocast = torch.is_autocast_enabled(self._device)
        if self._autocast:  # a twentieth of the time of torch.autocast, which is entered for every tile
            torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            threads = self._open[self._device]
            threads[self._thread].remove(self)
            if not threads[self._thread]:
                del threads[self._thread]
            self._settle(threads)
        if self._autocast:
            torch.set_autocast_enabled(self._device, True)

    def _settle(self, threads: dict[int, "list[exact_products]"]) -> None:
        wanted = {inside[-1]._wanted for inside in threads.values()}
        setting = self._outside[self._device] if not wanted else "ieee" if "ieee" in wanted else wanted.pop()
        if setting != self._now[self._device]:
            self._matmul.fp32_precision = self._now[self._device] = setting


class Operand(NamedTuple):
    """Rows less a centre, rounded: one side of the products."""

    high: Tensor
    """[M, pitch], bfloat16 for bf16 and bf16x3, else float32 (float64 for fp64); zeros beyond D."""
    low: Tensor | None
    """[M, pitch] bfloat16: what `high` leaves, for bf16x3 alone."""
    squares: Tensor
    """Squared norms of the rounded rows as the products have them, [M] float32 (float64 for fp64)."""


_LEAST_ROWS = 16
"""Rows that are summed together at least. Of fewer CUDA lets more threads share a row and adds it in another order
(`setReduceConfig` in PyTorch's Reduce.cuh), so that a set of few rows would not have the own sum that it has among
others."""


def summed_alike(rows: Tensor) -> Tensor:
    """Rows [P, D] with zeros beside and below them, so that the sum of each follows from its numbers alone.

    Above D = 128 CUDA's order follows from where a row begins, too: all begin on four numbers then.
    """
    beside, below = -rows.shape[1] % 4, max(0, _LEAST_ROWS - len(rows))
    return F.pad(rows, (0, beside, 0, below)) if beside or below else rows


def make_operand(rows: Tensor, centre: Tensor, precision: str, pitch: int) -> Operand:
    """Rows [M, D] less a centre [D] as an operand with rows of `pitch` >= D numbers."""
    dtype = PRECISIONS[precision]
    wide = torch.promote_types(rows.dtype, dtype)
    num_rows, dim = rows.shape
    # Rounded as they are written: on a GPU this is bound by what it reads and writes, 8 bytes a number in bfloat16.
    held = torch.bfloat16 if precision == "bf16" else dtype
    centred = torch.empty(max(num_rows, _LEAST_ROWS), pitch, dtype=held, device=rows.device)
    centred[num_rows:], centred[:, dim:] = 0, 0
    torch.sub(rows.to(wide), centre.to(wide), out=centred[:num_rows, :dim])
    if precision == "bf16x3":
        high, low = split_bf16(centred)
        squares = (high.float() * (high.float() + 2 * low.float())).sum(1)
        return Operand(high[:num_rows], low[:num_rows], squares[:num_rows])
    if precision == "tf32":
        centred = round_tf32(centred)
    squares = torch.linalg.vector_norm(centred, dim=1, dtype=dtype).square_()
    return Operand(centred[:num_rows], None, squares[:num_rows])


_HALF_STEP = {"bf16": 2.0**-8, "tf32": 2.0**-11, "bf16x3": 2.0**-17, "fp32": 2.0**-24, "fp64": 2.0**-53}


def square_error(dim: int, precision: str) -> float:
    """The most by which |x - y|^2 by products of D terms is off, relative to (|x| + |y|)^2 about their centre.

    Rounded rows are off by h |x| and h |y|, so their distance d <= |x| + |y| by h (|x| + |y|) at most; `bf16x3` leaves
    out the products of low parts, 2^-8 of the rows each; the product of D terms is rounded as in `stated_error`.
    """
    half, u = _HALF_STEP[precision], 2.0**-53 if precision == "fp64" else 2.0**-24
    left_out = _HALF_STEP["bf16"] ** 2 if precision == "bf16x3" else 0.0
    return 2 * half + half**2 + left_out + (6 * math.sqrt(dim) + 8) * u


@torch.no_grad()  # or numbers taken from rows that require a gradient warn
def stated_error(
    x: Tensor, y: Tensor, distance: float, precision: str, *, num_means: int = 4, centre: Tensor | None = None
) -> float:
    """The most by which a mean of distances between rows x [N, D] and y [M, D] is off at `precision`.

    `distance` is the mean of |x_i - y_j|; an energy distance is made of num_means = 4 such means, 2 of the cross terms
    and one of each self term. Two tasks whose distances differ by more than the sum of their errors are in order.
    `centre` [D]: what is subtracted before rows are rounded, `common_centre` of the features of all tasks or of self
    terms; None where it is near both rows. One far from them, amid other tasks, is all of the error.

    A rounded row is off by e, whose coordinates are independent and at most h |x - c| each, so of variance h^2 / 3 at
    most. To first order a mean of distances moves by sum_i g_i.e_i with |g_i| <= 1 / N, whose standard deviation is
    h / sqrt(3) times the root mean square of a coordinate over sqrt(N): six of them. To second order a distance d
    grows by |e|^2 / (2 d) for each row. The product of D terms is rounded by 6 sqrt(D) u of the norms (Higham and
    Mary, SIAM J. Sci. Comput. 41 (2019) A2815, theorem 2.4), which the root divides by 2 d.

    Not for rows whose roundings are not independent or not alike. One mean was 2.9 times as far off as this says for
    binary rows (800, D = 30), whose equal numbers are rounded alike, 4.1 times beside sparse ones (D = 2), 3.6 times
    for 800 equal rows, 3.9 times where one of 17 columns is nearly all, 2.7 times for tight clusters far apart and 1.65
    times for heavy tails; it grows with the root of the number of equal numbers. An energy distance of the binary
    rows, where they cancel, a fiftieth, but twice where one side alone is such: binary beside sparse, or equal rows.
    """
    half, u = _HALF_STEP[precision], 2.0**-53 if precision == "fp64" else 2.0**-24
    c = (torch.cat([x, y]).double().mean(0) if centre is None else centre).double()
    dim, total, squares = x.shape[1], 0.0, 0.0
    for rows in (x, y):
        # Twice the distance, since one centre of a sample is not another.
        norm = 2 * float((rows.double() - c).square().sum(1).mean().sqrt())
        total += 6 * half / math.sqrt(3 * len(rows) * dim) * norm
        squares += norm**2
    again = max(distance, 2.0**-5 * math.sqrt(squares), 1e-300)  # nearer pairs are computed from their differences
    total += (half**2 / 3 + 2 * (6 * math.sqrt(dim) + 8) * u) * squares / (2 * again) + 16 * u * distance
    return num_means * total

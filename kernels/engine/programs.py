# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads these signatures itself: pointers and tensors in them have no Python type.
"""The Triton programs: a tile of products of rows x and y, and what an epilogue makes of it, in one pass.

A tile is BM rows of x against BN rows of y, all of y's in one task. Its products stay in registers; an epilogue turns
them into squared distances d2 = |x|^2 + |y|^2 - 2 x.y and reduces those:

| EPILOGUE | result of a tile |
| --- | --- |
| sqrt | sum over its pairs of sqrt(d2), one float32 |
| rbf | sum over its pairs of mean_b exp(-c_b d2), one float32 |
| nearest | for each row of x the least d2 and the number of that row of y, the lowest where several tie |
| lse | for each row of x log sum_j exp(h_j - cost inv_epsilon), cost = d2 / 2 (P = 2) or sqrt(d2) (P = 1) |

`tile_kernel` computes the products, `finish_kernel` takes products that cuBLAS has written, and gives no sum of a tile
but one for each of its columns, rows of y: there a tile may lie across tasks. `add_kernel` and `task_kernel` add those.
Own sums of the same rows go through the same binary, tile by tile, and so agree in every bit: only constants choose
the binary (no pointer's alignment and no integer's value does), and inside a tile the order of every sum is fixed.

tau: tensor cores cut, not round. Each product is cut at 2^-24 of the running sum (Ampere; Hopper keeps more bits), and
the sum itself at 2^-23 after each step of 4 to 16 products (Fasi, Higham, Mikaitis and Pranesh, PeerJ Computer
Science 7 (2021) e330). A row against itself has K positive products and a running sum that is half of the final one on
average, so it comes out short by about K 2^-26 + K 2^-28 of |x|^2. With d2 below tau (|x|^2 + |y|^2) no digit is left
and the pair is at distance 0; tau is about twice that loss, so that equal rows are at distance 0 on either generation.

This file imports nothing but Triton, so that it compiles where there is no PyTorch.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What is not to choose a binary. Operands and products are always aligned: their rows are multiples of 64 numbers.
UNALIGNED = ["x_squares", "y_squares", "table", "h", "coefficients", "values", "indices"]
UNALIGNED_SUMS = ["partials", "totals", "table", "sums"]


@triton.jit
def _load_squares(squares, num_rows, EPILOGUE: tl.constexpr, BLOCK: tl.constexpr):
    """Squares of a block's rows, [BLOCK]. That of a row that is not there is so chosen that its pairs drop out without
    a mask of their own: at distance 0 for a sum of distances, and infinitely far for all else."""
    ABSENT: tl.constexpr = float("-inf") if EPILOGUE == "sqrt" else float("inf")
    rows = tl.arange(0, BLOCK)
    return tl.load(squares + rows, mask=rows < num_rows, other=ABSENT)


@triton.jit
def _squared(products, xs, ys, tau, EPILOGUE: tl.constexpr):
    """Squared distances of a tile, 0 where no digit is left; [BM] and [BN] of `_load_squares`."""
    norms = xs[:, None] + ys[None, :]
    d2 = norms - 2.0 * products
    # Of a row that is not there d2 and the norms are infinite, of one sign: 0 for a sum of distances, else infinite.
    return tl.where(d2 > tau * norms, d2, 0.0) if EPILOGUE == "sqrt" else tl.where(d2 < tau * norms, 0.0, d2)


@triton.jit
def _epilogue(
    products,  # [BM, BN] float32
    xs,  # [BM] and [BN] of _load_squares
    ys,
    weights,  # [BN] of h, -inf where there is no row
    coefficients,
    values,  # these two stand at the tile's first result
    indices,
    x_rows,
    y_rows,
    y_start,
    tau,
    inv_epsilon,
    EPILOGUE: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reduce the products of one tile to its result."""
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    d2 = _squared(products, xs, ys, tau, EPILOGUE)
    if EPILOGUE == "sqrt":
        tl.store(values, tl.sum(tl.sum(tl.sqrt(d2), 1), 0))
    else:
        if EPILOGUE == "rbf":
            total = tl.zeros([BM], tl.float32)
            # Not unrolled: with 16 bandwidths at once in flight registers spill (triton 3.6).
            for b in tl.range(0, B, num_stages=1, loop_unroll_factor=1):
                factor = -LOG2_E * tl.load(coefficients + b)
                total += tl.sum(tl.exp2(d2 * factor), 1)
            tl.store(values, tl.sum(total, 0) / B)
        elif EPILOGUE == "nearest":
            least = tl.min(d2, 1)
            which = tl.min(tl.where(d2 == least[:, None], columns[None, :], BN), 1)
            tl.store(values + rows, least, mask=rows < x_rows)
            tl.store(indices + rows, y_start + which.to(tl.int64), mask=rows < x_rows)
        else:
            # In powers of two: exp2 and log2 are what the hardware has.
            scale = inv_epsilon * LOG2_E
            cost = d2 * 0.5 if P == 2 else tl.sqrt(d2)
            exponents = weights[None, :] * LOG2_E - cost * scale
            largest = tl.max(exponents, 1)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(tl.exp2(exponents - largest[:, None]), 1)
            tl.store(values + rows, (largest + tl.log2(total)) * LN_2, mask=rows < x_rows)


@triton.jit(do_not_specialize=["tau", "inv_epsilon"], do_not_specialize_on_alignment=UNALIGNED)
def tile_kernel(
    x_high,  # [N, PITCH], zeros beyond D
    x_low,  # [N, PITCH], what x_high leaves; None but for bf16x3
    x_squares,  # [N] float32
    y_high,
    y_low,
    y_squares,
    table,  # [num_tiles, 5] int64: start and rows in x, start and rows in y (and in h), start in the result
    h,
    coefficients,
    values,
    indices,
    tau,
    inv_epsilon,
    EPILOGUE: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    PITCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program a tile. PITCH is a multiple of BK."""
    table += tl.program_id(0).to(tl.int64) * 5
    # int64, all of them: a start times PITCH passes 2^31 at 2 million rows of 1024.
    x_start, x_rows = tl.load(table), tl.load(table + 1).to(tl.int32)
    y_start, y_rows = tl.load(table + 2), tl.load(table + 3).to(tl.int32)
    out_start = tl.load(table + 4)

    # A row beyond the block is read as the block's last one, so that no load leaves the tensor and none has a mask.
    rows = tl.minimum(tl.arange(0, BM), x_rows - 1)
    columns = tl.minimum(tl.arange(0, BN), y_rows - 1)
    depth = tl.arange(0, BK)
    x_offsets = rows[:, None] * PITCH + depth[None, :]
    y_offsets = columns[:, None] * PITCH + depth[None, :]
    x_pointers = x_high + x_start * PITCH + x_offsets
    y_pointers = y_high + y_start * PITCH + y_offsets
    if x_low is not None:
        x_low_pointers = x_low + x_start * PITCH + x_offsets
        y_low_pointers = y_low + y_start * PITCH + y_offsets

    # Before the products, so that these loads are not waited for after them.
    xs = _load_squares(x_squares + x_start, x_rows, EPILOGUE, BM)
    ys = _load_squares(y_squares + y_start, y_rows, EPILOGUE, BN)
    weights = None
    if h is not None:
        every = tl.arange(0, BN)
        weights = tl.load(h + y_start + every, mask=every < y_rows, other=float("-inf"))
    products = tl.zeros([BM, BN], tl.float32)
    for k in range(0, PITCH, BK):
        x, y = tl.load(x_pointers + k), tl.load(y_pointers + k)
        if INTERPRET:  # products of bfloat16 are wrong under the interpreter, by a factor of 1e9 (triton 3.5 to 3.9)
            x, y = x.to(tl.float32), y.to(tl.float32)
        if x_low is not None:
            x_rest, y_rest = tl.load(x_low_pointers + k), tl.load(y_low_pointers + k)
            if INTERPRET:
                x_rest, y_rest = x_rest.to(tl.float32), y_rest.to(tl.float32)
            products = tl.dot(x, tl.trans(y_rest), products, input_precision=INPUT_PRECISION)
            products = tl.dot(x_rest, tl.trans(y), products, input_precision=INPUT_PRECISION)
        products = tl.dot(x, tl.trans(y), products, input_precision=INPUT_PRECISION)
    _epilogue(
        products, xs, ys, weights, coefficients,
        values + out_start, indices if indices is None else indices + out_start,
        x_rows, y_rows, y_start, tau, inv_epsilon, EPILOGUE, P, B, BM, BN,
    )  # fmt: skip


@triton.jit
def _column_sums(d2, coefficients, EPILOGUE: tl.constexpr, B: tl.constexpr, BN: tl.constexpr):
    """Sums of a tile's values over its rows, [BN]."""
    if EPILOGUE == "sqrt":
        total = tl.sum(tl.sqrt(d2), 0)
    else:
        total = tl.zeros([BN], tl.float32)
        for b in tl.range(0, B, num_stages=1, loop_unroll_factor=1):
            factor = -LOG2_E * tl.load(coefficients + b)
            total += tl.sum(tl.exp2(d2 * factor), 0)
    return total


@triton.jit(
    do_not_specialize=["tau", "inv_epsilon", "x_rows", "y_rows", "y_start", "stride", "out_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def finish_kernel(
    products,  # [x_rows, y_rows] float32, 256 `stride` numbers from row to row, a multiple of BN
    x_squares,  # [x_rows]
    y_squares,  # [y_rows]
    h,  # [y_rows]
    coefficients,
    values,  # sqrt, rbf: a number for each row of y, out_stride on those of the next block; else out_stride a tile of y
    indices,
    x_rows,
    y_rows,
    y_start: tl.int64,
    stride: tl.int64,
    out_stride: tl.int64,
    tau,
    inv_epsilon,
    EPILOGUE: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Products that are written already; grid (blocks of rows, tiles of BN columns).

    A block is BM rows, all columns being of one task, or where values are summed STEPS times that.
    """
    column = tl.program_id(1) * BN
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    # Loads have no mask, which would keep them from being 16 bytes wide: they stay among the rows, and a row is padded
    # as far as a tile reaches. What is there beyond y_rows, perhaps NaN, is dropped after.
    if EPILOGUE == "sqrt" or EPILOGUE == "rbf":
        row = tl.program_id(0) * (BM * STEPS)
        ys = tl.load(y_squares + column + columns, mask=(column + columns) < y_rows, other=0.0)
        total = tl.zeros([BN], tl.float32)
        first, end = row, tl.minimum(row + BM * STEPS, x_rows)
        while first < end:  # a range takes no bounds that are tensors in the interpreter (triton 3.6 with numpy 2.4)
            offsets = tl.minimum(first + rows, x_rows - 1)[:, None] * (stride * 256) + (column + columns)[None, :]
            tile = tl.load(products + offsets)
            xs = _load_squares(x_squares + first, x_rows - first, EPILOGUE, BM)
            total += _column_sums(_squared(tile, xs, ys, tau, EPILOGUE), coefficients, EPILOGUE, B, BN)
            first += BM
        out_start = tl.program_id(0).to(tl.int64) * out_stride + column
        mean = total if EPILOGUE == "sqrt" else total / B
        tl.store(values + out_start + columns, mean, mask=(column + columns) < y_rows)
    else:
        row = tl.program_id(0) * BM
        offsets = tl.minimum(row + rows, x_rows - 1)[:, None] * (stride * 256) + (column + columns)[None, :]
        tile = tl.load(products + offsets)
        tile = tl.where(((column + columns) < y_rows)[None, :], tile, 0.0)
        out_start = tl.program_id(1).to(tl.int64) * out_stride + row
        xs = _load_squares(x_squares + row, x_rows - row, EPILOGUE, BM)
        ys = _load_squares(y_squares + column, y_rows - column, EPILOGUE, BN)
        weights = None
        if h is not None:
            weights = tl.load(h + column + columns, mask=(column + columns) < y_rows, other=float("-inf"))
        _epilogue(
            tile, xs, ys, weights, coefficients,
            values + out_start, indices if indices is None else indices + out_start,
            x_rows - row, y_rows - column, y_start + column, tau, inv_epsilon, EPILOGUE, P, B, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_groups", "width"], do_not_specialize_on_alignment=UNALIGNED_SUMS)
def add_kernel(
    partials,  # [num_groups, width] float32
    totals,  # [width] float64
    num_groups,
    width: tl.int64,
    BLOCK: tl.constexpr,
):
    """Add groups to totals, one after another: as many calls with some of them give the same bits."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(totals + columns, mask=columns < width, other=0.0)
    while num_groups > 0:
        total += tl.load(partials + columns, mask=columns < width, other=0.0).to(tl.float64)
        partials += width
        num_groups -= 1
    tl.store(totals + columns, total, mask=columns < width)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED_SUMS)
def task_kernel(
    totals,  # [M] float64
    table,  # [num_blocks, 2] int64: start and rows
    sums,  # [num_blocks] float64
    BLOCK: tl.constexpr,
):
    """One program a block of rows of one task."""
    table += tl.program_id(0).to(tl.int64) * 2
    start, size = tl.load(table), tl.load(table + 1)
    rows = tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(totals + start + rows, mask=rows < size, other=0.0), 0))

"""What holds for the Triton programs, on CUDA or, under TRITON_INTERPRET=1, on the CPU: run by test_programs.py.

References are float64, from the same rounded operands, so that what is left is the error of the sums, which
`cancellation` bounds: a share of |x|^2 + |y|^2 in each squared distance.
"""

import math
from itertools import pairwise

import pytest
import torch

from headstart.kernels.engine import fused, launch, streamed, units
from headstart.kernels.engine.launch import Value
from headstart.kernels.engine.layouts import cancellation
from headstart.kernels.engine.precision import Operand, make_operand
from tests.kernels.cases import held
from tests.kernels.other_device import DEVICE

# Tiles are 16 x 16 under the interpreter, and stripes of the streamed path 32 x 32; the third task is in two of these,
# and tasks begin at odd rows. The own sums of tasks of 20 rows and more are streamed there.
SIZES = (1, 16, 35, 2) if units.INTERPRETED else (1, 128, 257, 2100, 63, 1, 600)
N, D, PITCH = (33 if units.INTERPRETED else 517), 70, 128
MEMORY = 512 * 2**20
# The interpreter multiplies all in float32 and takes 3 ms a tile: there tf32 is fp32, of rows rounded before, and where
# the precision is not what is looked at, two that differ in their program will do.
PRECISIONS = ("fp32", "bf16", "bf16x3") if units.INTERPRETED else ("fp32", "bf16", "bf16x3", "tf32")
DISTINCT = ("fp32", "bf16x3") if units.INTERPRETED else PRECISIONS
PATHS = ("fused", "streamed")
BANDWIDTHS = (3.0, 9.0, 30.0)


def offsets_of(sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def features(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE) + 0.3


def operand(rows: torch.Tensor, precision: str, pitch: int = PITCH) -> Operand:
    """Rows amid a tensor of NaN, so that a read beyond them shows; squares start on no round address."""
    plain = make_operand(rows, rows.new_full((rows.shape[1],), 0.1), precision, pitch)
    parts = []
    for part in plain:
        if part is not None:
            held = part.new_full((len(part) + 8, *part.shape[1:]), math.nan)
            held[3 : 3 + len(part)] = part
            part = held[3 : 3 + len(part)]
        parts.append(part)
    return Operand(*parts)


def squares(x: Operand, y: Operand, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances of the rounded rows in float64 and the error that sums may have, both [N, M]."""
    products = x.high.double() @ y.high.double().T
    if x.low is not None:
        products += x.high.double() @ y.low.double().T + x.low.double() @ y.high.double().T
    norms = x.squares.double()[:, None] + y.squares.double()
    share = cancellation(precision, x.high.shape[1])
    d2 = norms - 2 * products
    return torch.where(d2 <= share * norms, 0, d2), share * norms


def value_of(kind: str) -> Value:
    return Value("sqrt") if kind == "sqrt" else Value("rbf", torch.tensor([0.5 / s**2 for s in BANDWIDTHS]).to(DEVICE))


def expected(kind: str, d2: torch.Tensor, error: torch.Tensor) -> tuple[float, float]:
    """The sum over pairs and its error: d2's times the slope, and 2^-20 for a root or power and its sum in float32."""
    if kind == "sqrt":
        total = d2.sqrt().sum()
        return float(total), float((error / (2 * d2.sqrt().clamp(min=1e-30)))[d2 > 0].sum() + 2**-20 * total)
    total = torch.stack([torch.exp(-d2 / (2 * s**2)) for s in BANDWIDTHS]).mean(0).sum()
    return float(total), float((error / (2 * min(BANDWIDTHS) ** 2)).sum() + 2**-20 * total)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["sqrt", "rbf"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sums_over_pairs(precision: str, kind: str, path: str):
    offsets = offsets_of(SIZES)
    x, y = operand(features(N), precision), operand(features(sum(SIZES), seed=1) * 1.5, precision)
    options = {"precision": precision, "value": value_of(kind), "path": path, "memory": MEMORY}
    cross = launch.cross_sums(x, y, offsets, **options)
    own = launch.own_sums(y, offsets, **options)
    assert cross.dtype == own.dtype == torch.float64
    for t, (low, high) in enumerate(pairwise(offsets.tolist())):
        task = Operand(*(part if part is None else part[low:high] for part in y))
        for found, side in ((cross, x), (own, task)):
            total, error = expected(kind, *squares(side, task, precision))
            assert abs(float(found[t]) - total) <= error, (t, found is own)


@pytest.mark.parametrize("n", [1, 16, 33])
def test_one_row_and_one_task(n: int):
    x, y = operand(features(1), "fp32"), operand(features(n, seed=1), "fp32")
    total, error = expected("sqrt", *squares(x, y, "fp32"))
    for path in PATHS:
        found = launch.cross_sums(
            x, y, torch.tensor([0, n]), precision="fp32", value=Value("sqrt"), path=path, memory=MEMORY
        )
        assert found.shape == (1,)
        assert abs(float(found[0]) - total) <= error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16x3"])
def test_the_nearest_row_of_each_block(precision: str, path: str):
    offsets = offsets_of(SIZES)
    rows = features(sum(SIZES), seed=1)
    rows[31:33] = rows[30]  # copies: the lowest row of a block is to be named
    target = features(N)
    target[5] = rows[30]
    x, y = operand(target, precision), operand(rows, precision)
    d2, which, first = launch.nearest_blocks(x, y, offsets, precision=precision, path=path, memory=MEMORY)
    exact, error = squares(x, y, precision)
    cuts = [int(low) for low in offsets[:-1]]
    width = launch.block_rows(x, precision, path)
    block = 0
    for t, low in enumerate(cuts):
        assert first[t] == block
        for start in range(low, int(offsets[t + 1]), width):
            end = min(start + width, int(offsets[t + 1]))
            chosen = which[:, block]
            assert bool(((chosen >= start) & (chosen < end)).all())
            least = exact[:, start:end].amin(1)
            allowed = error[:, start:end].amax(1)
            assert bool(((d2[:, block].double() - least).abs() <= allowed).all())
            assert bool((exact.gather(1, chosen[:, None])[:, 0] - least <= 2 * allowed).all())
            if start <= 30 < end:
                assert chosen[5] == 30
                assert d2[5, block] == 0
            block += 1
    assert first[-1] == block == d2.shape[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("precision", "p", "epsilon"), [("fp32", 2, 5.0), ("bf16", 1, 0.7)])
def test_logsumexp_over_the_rows_of_each_task(precision: str, p: int, epsilon: float, path: str):
    offsets = offsets_of(SIZES)
    x, y = operand(features(N), precision), operand(features(sum(SIZES), seed=1), precision)
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(sum(SIZES), 2, generator=generator).to(DEVICE)[:, 0]  # not one beside the other
    h[3:7] = -math.inf
    h[0] = -math.inf  # all that the first task has
    options = {"inv_epsilon": 1 / epsilon, "p": p, "precision": precision, "path": path}

    def agrees(found: torch.Tensor, d2: torch.Tensor, error: torch.Tensor, weights: torch.Tensor) -> None:
        cost = d2 / 2 if p == 2 else d2.sqrt()
        exact = torch.logsumexp(weights.double() - cost / epsilon, 1)
        slope = 0.5 if p == 2 else float(0.5 / torch.where(d2 > 0, d2, math.inf).amin().sqrt())
        # Exponents of up to 2^7 in float32 are off by 2^-17.
        allowed = float(error.amax()) * slope / epsilon + 2**-15
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=allowed)

    # Task by task, where the bound allows no more: 3 tiles of columns times 33 rows times 16 bytes, and a table, twice.
    memory = 2 * 3 * 33 * 16 if path == "fused" and units.INTERPRETED else MEMORY
    forward = launch.row_logsumexp(x, y, offsets, h, **options, memory=memory)
    assert bool((forward[0] == -math.inf).all())
    for t, (low, high) in enumerate(pairwise(offsets.tolist())):
        task = Operand(*(part if part is None else part[low:high] for part in y))
        agrees(forward[t], *squares(x, task, precision), h[low:high])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["sqrt", "rbf"])
@pytest.mark.parametrize("precision", DISTINCT)
@pytest.mark.parametrize("n", [1, 33], ids="N{}".format)
def test_own_sums_of_the_same_rows_agree_in_every_bit(n: int, precision: str, kind: str, path: str):
    """Whatever stands before and beside them; and cross sums too where a tile is in one task."""
    rows = features(n)
    parts = [rows, features(3, seed=1), rows]
    offsets = offsets_of(tuple(map(len, parts)))
    x, y = operand(rows, precision), operand(torch.cat(parts), precision)
    options = {"precision": precision, "value": value_of(kind), "path": path, "memory": MEMORY}
    cross, own = launch.cross_sums(x, y, offsets, **options), launch.own_sums(y, offsets, **options)
    alone = launch.own_sums(x, torch.tensor([0, n]), **options)
    assert len({float(value) for value in (*own[[0, 2]], *alone)}) == 1
    if path == "fused":
        assert len({float(value) for value in (*cross[[0, 2]], *alone)}) == 1
    if n == 1:
        assert cross[0] == cross[2] == alone[0] == (0 if kind == "sqrt" else 1)


@pytest.mark.parametrize("kind", ["sqrt", "rbf"])
@pytest.mark.parametrize("precision", DISTINCT)
def test_streamed_sums_do_not_know_how_rows_are_cut_into_tasks(precision: str, kind: str):
    """One-row tasks, tasks across stripes and one of all: the same total for each row, and sums of these in order."""
    n = sum(SIZES)
    x, y = operand(features(N), precision), operand(features(n, seed=1), precision)
    options = {"precision": precision, "value": value_of(kind), "memory": MEMORY}
    totals = torch.zeros(n, dtype=torch.float64, device=DEVICE)
    launch.add_row_sums(x, y, totals, **options)
    block = streamed.BLOCK
    for sizes in ([1] * n, SIZES, [31, 2, n - 33], [n]):
        found = launch.cross_sums(x, y, offsets_of(tuple(sizes)), **options, path="streamed")
        # The order of a block's sum is the program's own, and 2^-44 is above its error in float64.
        for task, value in zip(totals.cpu().split(list(sizes)), found, strict=True):
            assert float(value) == pytest.approx(float(task.sum()), rel=2**-44)
            assert len(task) > 1 or value == task[0]
            assert len(sizes) > 1 or len(task) > block  # some task has several blocks


@pytest.mark.parametrize("kind", ["sqrt", "rbf"])
def test_rows_of_x_are_added_one_group_after_another(kind: str):
    """In parts that are multiples of a unit, each in its own call, as all at once."""
    rows = streamed.stripes(PITCH)[0]
    n = rows + 5
    x, y = operand(features(n), "fp32"), operand(features(20, seed=1), "fp32")
    options = {"precision": "fp32", "value": value_of(kind), "memory": 2 * MEMORY}
    once, twice = (torch.zeros(20, dtype=torch.float64, device=DEVICE) for _ in range(2))
    launch.add_row_sums(x, y, once, **options)
    for part in (slice(rows), slice(rows, n)):
        some = Operand(x.high[part], None, x.squares[part])
        launch.add_row_sums(some, y, twice, **options)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", DISTINCT)
@pytest.mark.parametrize("pitch", [64, 576], ids="K{}".format)
def test_equal_rows_are_at_distance_zero(pitch: int, precision: str, path: str):
    n = 35
    rows = features(1, d=pitch).abs().expand(n, -1).contiguous()
    x, offsets = operand(rows, precision, pitch), torch.tensor([0, 17, n])
    for kind, each in (("sqrt", 0), ("rbf", 1)):
        options = {"precision": precision, "value": value_of(kind), "path": path, "memory": MEMORY}
        assert launch.cross_sums(x, x, offsets, **options).tolist() == pytest.approx(
            [each * n * 17, each * n * 18], rel=2**-22
        )
        assert launch.own_sums(x, offsets, **options).tolist() == pytest.approx(
            [each * 17**2, each * 18**2], rel=2**-22
        )


@pytest.mark.parametrize("kind", ["sqrt", "rbf"])
def test_neither_the_memory_nor_the_order_of_tiles_changes_a_bit(kind: str, monkeypatch: pytest.MonkeyPatch):
    offsets = offsets_of(SIZES)
    x, y = operand(features(N), "fp32"), operand(features(sum(SIZES), seed=1), "fp32")
    options = {"precision": "fp32", "value": value_of(kind)}
    cross = launch.cross_sums(x, y, offsets, **options, path="fused", memory=MEMORY)
    own = launch.own_sums(y, offsets, **options, path="fused", memory=MEMORY)
    streamed_cross = launch.cross_sums(x, y, offsets, **options, path="streamed", memory=MEMORY)
    least = max(-(-n // 16) for n in (*SIZES, N)) * fused.TILE_BYTES
    for memory in (least, 2 * least + 1):
        assert torch.equal(launch.cross_sums(x, y, offsets, **options, path="fused", memory=memory), cross)
        assert torch.equal(launch.own_sums(y, offsets, **options, path="fused", memory=memory), own)
    streamed_own = launch.own_sums(y, offsets, **options, path="streamed", memory=MEMORY)
    monkeypatch.setattr(streamed, "PARTIALS", 1)
    assert torch.equal(launch.cross_sums(x, y, offsets, **options, path="streamed", memory=MEMORY), streamed_cross)
    assert torch.equal(launch.own_sums(y, offsets, **options, path="streamed", memory=MEMORY), streamed_own)
    block = 16 if units.INTERPRETED else 128
    monkeypatch.setattr(fused, "GROUP_BYTES", 2 * block * PITCH * 4)
    assert torch.equal(launch.cross_sums(x, y, offsets, **options, path="fused", memory=MEMORY), cross)
    assert torch.equal(launch.own_sums(y, offsets, **options, path="fused", memory=MEMORY), own)


def test_the_least_memory_that_is_told_holds_the_results_of_one_task():
    """And the table of its tiles, half of the bound each."""
    n = 5 * N
    offsets = torch.tensor([0, n, 2 * n])
    x, y = operand(features(N), "fp32"), operand(features(2 * n, seed=1), "fp32")
    h = torch.zeros(2 * n, device=DEVICE)
    options = {"inv_epsilon": 1.0, "p": 2, "precision": "fp32", "path": "fused"}
    with pytest.raises(ValueError, match="at least") as refused:
        launch.row_logsumexp(x, y, offsets, h, **options, memory=1)
    least = int(str(refused.value).split()[-1])
    found, most = held(lambda: launch.row_logsumexp(x, y, offsets, h, **options, memory=least))
    # Of another device's memory this tells nothing.
    assert DEVICE != "cpu" or most <= least + found.nbytes
    assert torch.equal(found, launch.row_logsumexp(x, y, offsets, h, **options, memory=MEMORY))


@pytest.mark.parametrize("path", PATHS)
def test_too_little_memory_is_refused(path: str):
    x = operand(features(40), "fp32")
    options = {"precision": "fp32", "value": Value("sqrt"), "path": path}
    with pytest.raises(ValueError, match="at least") as refused:
        launch.own_sums(x, torch.tensor([0, 40]), **options, memory=1)
    least = int(str(refused.value).split()[-1].rstrip(",")) if path == "fused" else MEMORY
    launch.own_sums(x, torch.tensor([0, 40]), **options, memory=least)


@pytest.mark.skipif(units.INTERPRETED, reason="takes 5 GB; that starts are multiplied in 64 bits is read off the code")
@pytest.mark.parametrize("path", PATHS)
def test_rows_beyond_two_to_the_31_numbers(path: str):
    few = make_operand(features(300, 64), torch.zeros(64, device=DEVICE), "bf16", 64)
    num_rows = 2**31 // 64 + 600
    high = torch.zeros(num_rows, 64, dtype=torch.bfloat16, device=DEVICE)
    squares = torch.zeros(num_rows, device=DEVICE)
    high[-300:], squares[-300:] = few.high, few.squares
    offsets = torch.tensor([0, num_rows - 300, num_rows])
    options = {"precision": "bf16", "value": Value("sqrt"), "path": path, "memory": MEMORY}
    found = launch.cross_sums(few, Operand(high, None, squares), offsets, **options)
    own = launch.own_sums(few, torch.tensor([0, 300]), **options)[0]
    # Below 4,096 rows own sums are fused, whatever the path: of streamed products each is off by its own rounding.
    assert found[1] == (own if path == "fused" else pytest.approx(float(own), rel=cancellation("bf16", 64)))


def test_rows_of_another_length_are_refused():
    x, y = operand(features(3), "fp32"), operand(features(3), "fp32", pitch=100)
    apart = x._replace(high=x.high.new_zeros(3, 2 * PITCH)[:, :PITCH])  # rows with others between them
    for one, other in ((x, y), (x, operand(features(3), "fp32", pitch=192)), (x, apart), (y, y)):
        with pytest.raises(ValueError, match="multiple of 64"):
            launch.cross_sums(
                one, other, torch.tensor([0, 3]), precision="fp32", value=Value("sqrt"), path="fused", memory=MEMORY
            )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # as it is refused, in the end
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("precision", "scale"), [("fp32", 1e20), ("fp32", 1e18), ("bf16x3", math.inf)], ids=str)
def test_rows_so_far_out_that_squares_overflow_are_refused(precision: str, scale: float, path: str):
    n = 20 if units.INTERPRETED else 4096  # as many as are streamed
    x = operand(features(n) * scale, precision)  # of infinite ones, squares are NaN
    options = {"precision": precision, "value": Value("sqrt"), "path": path, "memory": MEMORY}
    for call in (
        lambda: launch.own_sums(x, torch.tensor([0, n]), **options),
        lambda: launch.cross_sums(operand(features(1), precision), x, torch.tensor([0, n]), **options),
    ):
        with pytest.raises(ValueError, match="overflow"):
            call()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("precision", "bound"), [("fp32", 2.0**-17), ("bf16x3", 2.0**-15), ("tf32", 2.0**-10), ("bf16", 2.0**-7)]
)
def test_the_error_in_a_distance(precision: str, bound: float, path: str):
    """At D = 2048, of features as a ReLU leaves them, less their mean: relative to the distance, pair by pair.

    Rounding its numbers by u moves a row by at most u |x| and d by u (|x| + |y|), about 1.5 u d here: 2^-8 for bf16,
    2^-11 for tf32; 2^-16 for bf16x3, as much again for the products of two low parts that are left out. fp32: six
    standard deviations of a sum of D rounded terms, 6 sqrt(D) 2^-24 (|x|^2 + |y|^2) in d^2, half as much in d.
    """
    count, d = 12, 2048
    rows = features(count + 1, d).relu()
    centre = rows.mean(0)
    x, y = (make_operand(part, centre, precision, d) for part in (rows[:1], rows[1:]))
    found = launch.cross_sums(
        x, y, torch.arange(count + 1), precision=precision, value=Value("sqrt"), path=path, memory=MEMORY
    )
    exact = torch.cdist(rows[:1].double(), rows[1:].double())[0].cpu()
    assert float(((found - exact) / exact).abs().max()) <= bound

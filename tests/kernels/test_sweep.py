"""The tile sweep itself: how exact it is, which bits follow from what, and how much it holds."""

import gc
import re
from contextlib import nullcontext

import pytest
import torch

from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine import sums
from headstart.kernels.engine.pairs import own_sums, pair_sums
from headstart.kernels.engine.precision import square_error
from headstart.kernels.engine.sweep import Sweep
from headstart.kernels.engine.terms import NONE
from headstart.kernels.engine.tile import Value
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.ragged import RaggedTasks
from tests.kernels.cases import HALF_STEP, AddedAsOnCuda, held

U = {"fp32": 2.0**-24, "fp64": 2.0**-53}


def rows(n: int, d: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def allowed(x: torch.Tensor, y: torch.Tensor, precision: str) -> float:
    """Largest error of mean |x - y|, from the arithmetic.

    A centred row is rounded by u, a product of D terms by 6 sqrt(D) u of the norms (Higham and Mary, SIAM J. Sci.
    Comput. 41 (2019) A2815, theorem 2.4: six standard deviations), so d^2 is off by at most
    (6 sqrt(D) + 8) u (|x|^2 + |y|^2), with norms from a point amid x; d by that over 2 d, or over what a pair is
    computed again below; a sum by 16 u.
    """
    x, y = x.double(), y.double()
    centre = x.mean(0)
    # The centre is the mean of a sample of the rows: it may lie a third of their spread from their mean.
    norms = 1.25 * ((x - centre).square().sum(1)[:, None] + (y - centre).square().sum(1)) + 1e-300
    d = torch.maximum(naive.pairwise(x, y), (norms * (2.0**-10 if precision == "fp32" else 2.0**-20)).sqrt())
    error = (6 * x.shape[1] ** 0.5 + 8) * U[precision] * norms / (2 * d) + 16 * U[precision] * d
    return float(error.mean())


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(("d", "offset"), [(3, 0.0), (3, 1e5), (64, 1e3), (512, 0.0)])
def test_the_error_is_that_of_the_centred_arithmetic(d: int, offset: float, precision: str, device: str):
    # Where it is cheap, more rows than a block has on the CPU (1,024) or on CUDA (2,048).
    sizes = (1, 2, 63, 123) if d > 64 else (1, 2, 63, 123, 1030 if device == "cpu" else 2100)
    x = rows(257, d, 1, device) + offset
    tasks = [rows(n, d, n, device) * 1.5 + offset for n in sizes]
    ragged = RaggedTasks.from_list(tasks)
    exact = RaggedTasks(ragged.features.double(), ragged.offsets)
    errors = [allowed(x, y, precision) for y in tasks]
    own = [allowed(y, y, precision) for y in tasks]
    pairs = euclidean_distances(x, ragged, form="pairs", precision=precision).double()
    energy = energy_distances(x, ragged, precision=precision).double()
    pairs_off = (pairs - naive.euclidean_distances(x.double(), exact, form="pairs")).abs().tolist()
    energy_off = (energy - naive.energy_distances(x.double(), exact)).abs().tolist()
    for t, n in enumerate(sizes):
        last = U[precision] * float(pairs[t])
        assert pairs_off[t] <= errors[t] + last, n
        assert energy_off[t] <= 2 * errors[t] + own[t] + allowed(x, x, precision) + last, n


@pytest.mark.parametrize("gap", [1e-5, 1e-2, 1.0, 30.0], ids="gap{:g}".format)
def test_near_pairs_far_from_the_rest_keep_their_distance(gap: float, device: str):
    # pytorch issue 42479: torch.cdist gives 0 where the distance is 109, because the rows lie far out together.
    far = torch.zeros(2, 64, device=device)
    far[:, 0] = 2.0**20
    far[1, 1] = gap
    x, tasks = torch.cat([rows(100, 64, 1, device), far[:1]]), RaggedTasks.from_list([far[1:]])
    exact = naive.euclidean_distances(x.double(), RaggedTasks(far[1:].double(), tasks.offsets), form="pairs")
    found = pair_sums(far[:1], tasks.features, tasks.offsets, None, NONE, "distance", "fp32", None, False)[0]
    assert float(found[0]) == pytest.approx(gap, rel=4 * U["fp32"])
    assert float(euclidean_distances(x, tasks, form="pairs")[0]) == pytest.approx(float(exact[0]), rel=1e-6)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 2.0**-10), ("fp64", 2.0**-20), ("bf16x3", 2.0**-10)])
def test_pairs_whose_product_cancels_are_computed_again(precision: str, share: float, device: str):
    dtype = torch.float64 if precision == "fp64" else torch.float32
    x = rows(1, 64, 1, device, dtype)
    # One pair a task, of nine tenths of that share of |x|^2 + |y|^2: the product is off by more than 1 / share u.
    moved = torch.nn.functional.normalize(rows(50, 64, 2, device, dtype)) * (1.8 * share) ** 0.5 * x.norm()
    y, centre = x + moved, torch.zeros(64, dtype=dtype, device=device)
    found = pair_sums(x, y, torch.arange(51), centre, NONE, "distance", precision, None, False)[0]
    exact = (y.double() - x.double()).norm(dim=1)
    # From differences: rounded by u a coordinate and by the sum of D squares, and as both rows are.
    rounded = HALF_STEP.get(precision, 0.0) * (x.double().norm() + y.double().norm(dim=1)) / exact
    allowed = 4 * 64**0.5 * U["fp64" if precision == "fp64" else "fp32"] + float(rounded.amax())
    torch.testing.assert_close(found, exact, rtol=allowed, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 16, 17, 200, 1024, 2100], ids="N{}".format)
def test_cross_and_self_terms_of_the_same_rows_agree_in_every_bit(n: int, dtype: torch.dtype, device: str):
    if n > 1024 and dtype != torch.float32:
        pytest.skip("more than one block is tried in float32")
    d = (5, 64, 100)[n % 3]
    x = rows(n, d, n, device, dtype)
    # Among others, at several places, and behind an odd number of rows.
    tasks = RaggedTasks.from_list([x, rows(3, d, 1, device, dtype), x, rows(n, d, 2, device, dtype), x])
    precision = "fp64" if dtype == torch.float64 else "fp32"
    cross, itself = pair_sums(x, tasks.features, tasks.offsets, None, NONE, "distance", precision, None, True)
    own = own_sums(tasks.features, tasks.offsets, None, NONE, "distance", precision, None)
    alone = own_sums(x, torch.tensor([0, n]), None, NONE, "distance", precision, None)
    assert len({float(value) for value in (*cross[[0, 2, 4]], *own[[0, 2, 4]], *itself, *alone)}) == 1


def test_own_sums_with_near_pairs_follow_from_the_rows_alone(device: str):
    """Whatever other near pairs are computed again beside them."""
    x, y = (rows(1, 333, n, device) + 1e-2 * rows(n, 333, n + 1, device) for n in (4, 8))
    tasks = RaggedTasks.from_list([y, x])
    with nullcontext() if device == "cuda" else AddedAsOnCuda():
        engine = Sweep(tasks.features, 16, Value("distance"), "fp32", None, torch.zeros(333, device=device))
        own = sums.own_sums(engine, tasks.features, tasks.offsets)
        alone = sums.own_sums(engine, x, torch.tensor([0, len(x)]))
    assert own[1] == alone[0]


def test_a_task_that_begins_as_the_target_does_is_not_taken_for_it(device: str):
    x = rows(30, 8, 1, device)
    tasks = RaggedTasks.from_list([torch.cat([x[:29], 3 * x[29:]])])
    found = euclidean_distances(x, tasks, form="pairs").double()
    exact = naive.euclidean_distances(x.double(), RaggedTasks(tasks.features.double(), tasks.offsets), form="pairs")
    torch.testing.assert_close(found, exact, rtol=0, atol=allowed(x, tasks.features, "fp32") + U["fp32"] * float(exact))


def test_a_distance_follows_from_its_own_task_alone(device: str):
    x, tasks = rows(123, 100, 0, device), [rows(n, 100, n, device) for n in (1, 300, 17, 16, 1030, 40, 31)]
    together = energy_distances(x, RaggedTasks.from_list(tasks)).double()
    alone = torch.cat([energy_distances(x, RaggedTasks.from_list([y])) for y in tasks]).double()
    # Stripes of products are cut from all tasks together: the last bits may follow from the neighbours, no more.
    torch.testing.assert_close(together, alone, rtol=0, atol=8 * U["fp32"] * 100**0.5 * 15)


@pytest.mark.parametrize(
    "kind", ["plain", "near and equal rows", "half precision", "tf32", "float64 in float32", "mixture"]
)
def test_memory_is_held_to(kind: str):
    d, precision = (400 if kind in ("tf32", "float64 in float32") else 40), ("tf32" if kind == "tf32" else "fp32")
    x, tasks = rows(1030, d, 1), [rows(n, d, n) for n in (1100, 1, *[300] * 10)]
    if kind == "near and equal rows":
        tasks.append(x[:1].expand(300, d).contiguous())
        tasks.append(x[:1].expand(100, d) + 1e-4 * rows(100, d, 3))
    if kind == "half precision":
        x, tasks = x.half(), [y.half() for y in tasks]
    if kind == "float64 in float32":
        x, tasks = x.double(), [y.double() for y in tasks]
    ragged = RaggedTasks.from_list(tasks)
    sigma = torch.tensor([1.0, 3.0, 9.0])

    def call(memory: int | None) -> torch.Tensor:
        if kind == "mixture":
            return mmd_distances(x, ragged, bandwidths=sigma, memory=memory).distances
        return energy_distances(x, ragged, precision=precision, memory=memory)

    plain = call(None)
    whole = len(x) * len(ragged.features) * 4
    with pytest.raises(ValueError, match="at least") as refused:
        call(1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert d > 40 or least < whole * (2 if kind == "mixture" else 1) / 2  # of which a mixture takes four arrays
    for memory in (least, 2 * least):
        found, most = held(lambda memory=memory: call(memory))
        assert torch.equal(found, plain)
        assert most <= memory


def test_small_tasks_beside_a_large_one_meet_themselves_within_the_memory():
    tasks = RaggedTasks.from_list([rows(1100, 1000, 1), *rows(3000, 1000, 2).split(10)])
    with pytest.raises(ValueError, match="at least") as refused:
        energy_self_terms(tasks, memory=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    _, most = held(lambda: energy_self_terms(tasks, memory=least))
    assert most <= least + 80 * tasks.num_tasks  # and what is as long as the tasks


def test_many_tasks_as_long_as_the_target_are_compared_with_it_within_the_memory():
    num_tasks, d = 6000, 512
    y = rows(2 * num_tasks, d, 1)
    places = torch.tensor([0, 511, 512, 4321, num_tasks - 1])  # about the end of what is compared at a time, too
    x = rows(2, d, 2)
    y.view(num_tasks, 2, d)[places] = x
    tasks = RaggedTasks(y, torch.arange(0, len(y) + 1, 2))
    with pytest.raises(ValueError, match="at least") as refused:
        energy_distances(x, tasks, memory=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert least < y.nbytes / 2  # what the first rows of all take
    found, most = held(lambda: energy_distances(x, tasks, memory=least))
    assert found.eq(0).nonzero().flatten().equal(places)
    assert most <= least + 80 * len(y)  # and what is as long as the rows


@pytest.mark.parametrize("sizes", [(2000, (5, 9)), (5, (2000, 9)), (300, (300, 2))], ids=str)
@pytest.mark.parametrize("distance", ["energy", "mmd"])
def test_the_least_bound_that_is_told_is_enough(distance: str, sizes: tuple[int, tuple[int, ...]], device: str):
    x, tasks = rows(sizes[0], 40, 1, device), RaggedTasks.from_list([rows(n, 40, n, device) for n in sizes[1]])
    sigma = torch.tensor([1.0, 3.0])

    def call(memory: int | None) -> torch.Tensor:
        if distance == "energy":
            return energy_distances(x, tasks, memory=memory)
        return mmd_distances(x, tasks, bandwidths=sigma, memory=memory).distances

    with pytest.raises(ValueError, match="at least") as refused:
        call(1)
    assert torch.equal(call(int(re.search(r"at least (\d+)", str(refused.value))[1])), call(None))


@pytest.mark.parametrize("stripe", [100, 256, 1000])
def test_half_of_the_pairs_are_all_of_them(stripe: int, monkeypatch: pytest.MonkeyPatch, device: str):
    # Stripes that do not divide a panel of 1,024 rows.
    monkeypatch.setattr(sums, "OWN_ROWS", stripe)
    x = rows(2100, 3, 1, device, torch.float64)
    found = own_sums(x, torch.tensor([0, len(x)]), None, NONE, "distance", "fp64", None)
    assert float(found[0]) == pytest.approx(float(naive.pairwise(x, x).sum()), rel=1e-13)


@pytest.mark.parametrize("precision", HALF_STEP)
def test_pairs_of_rows_with_themselves_are_as_near_as_the_precision_says(precision: str):
    x, first = rows(600, 64, 1), 0  # three stripes
    exact, norms = naive.pairwise(x.double(), x.double()).square(), x.double().norm(dim=1)
    allowed = square_error(64, precision) * (norms[:, None] + norms).square()
    engine = Sweep(x, len(x), Value("squared"), precision, None, torch.zeros(64))
    for squares, size in engine.own_tiles(x):
        part = slice(first, first + size), slice(first, None)
        off = (squares - exact[part]).abs().fill_diagonal_(0)  # where each row is at `far` from itself
        assert bool((off <= allowed[part]).all())
        first += size
    assert first == len(x)


def test_products_stay_in_float32_whatever_the_process_has_set(device: str):
    x, tasks = rows(257, 512, 1, device), RaggedTasks.from_list([rows(300, 512, 2, device)])
    before, plain = torch.get_float32_matmul_precision(), energy_distances(x, tasks)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(energy_distances(x, tasks), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for precision in ("fp32", "bf16x3"):
        plain = energy_distances(x, tasks, precision=precision)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(energy_distances(x, tasks, precision=precision), plain)


@pytest.mark.parametrize("scale", [1e19, 2.5e18], ids=str)  # of squares beyond float32, and beyond a 32nd of it
def test_squares_that_overflow_are_refused(scale: float, device: str):
    x, tasks = rows(20, 8, 1, device), rows(20, 8, 2, device) * scale
    with pytest.raises(ValueError, match="precision='fp64'"):
        energy_distances(x, RaggedTasks.from_list([tasks]))
    assert float(energy_distances(x, RaggedTasks.from_list([tasks]), precision="fp64")[0]) > scale


def test_self_terms_of_other_tasks_are_refused(device: str):
    x, tasks = rows(5, 4, 1, device), RaggedTasks.from_list([rows(3, 4, 2, device), rows(4, 4, 3, device)])
    kept = energy_self_terms(RaggedTasks.from_list([rows(4, 4, 2, device), rows(3, 4, 3, device)]))
    with pytest.raises(ValueError, match="task 0 is that of 4 rows; accepted: of its 3"):
        energy_distances(x, tasks, self_terms=kept)


def test_the_centre_of_equal_rows_is_exactly_the_row():
    same = (rows(1, 64, 0, dtype=torch.float64) / 3).expand(17, 64).contiguous()
    assert not torch.equal(same.mean(0), same[0])
    engine = Sweep(same, len(same), Value("squared"), "fp64", None)
    assert torch.equal(engine.centre_of(same), same[0])


def test_what_is_held_does_not_count_garbage_of_before():
    class Ring:
        def __init__(self) -> None:
            self.myself, self.rows = self, torch.zeros(1_000_000)

    gc.collect()
    assert held(Ring)[1] == 4_000_000  # left to the collector, which knows its size
    _, most = held(lambda: ([{} for _ in range(100_000)], torch.zeros(1000)))  # enough for it to begin
    assert most == 4000

"""Fréchet distances against their definition, closed forms, and others' code; the stated error is what is allowed."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.kernels import naive
from headstart.kernels.frechet import frechet_distances, frechet_table
from headstart.kernels.ragged import RaggedTasks
from tests.kernels.cases import CASES, KINDS, SIZES, Case, by_singular_values, change, held, picked
from tests.kernels.cases import U as HALF_STEPS

U = HALF_STEPS["fp64"]

pytestmark = pytest.mark.usefixtures("one_thread")


def features(n: int, d: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.clamp_min(-0.5).to(device, dtype)


def ragged(sizes: tuple[int, ...], d: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> RaggedTasks:
    return RaggedTasks.from_list([features(n, d, 100 + i, device, dtype) * (1 + i % 3) for i, n in enumerate(sizes)])


def one(x: torch.Tensor, y: torch.Tensor, **options: int) -> float:
    return float(frechet_distances(x, RaggedTasks.from_list([y]), precision="fp64", **options)[0])


def variance(x: torch.Tensor) -> float:
    return float((x.double() - x.double().mean(0)).square().sum() / len(x))


def stated(x: torch.Tensor, y: torch.Tensor) -> float:
    """The error that the docstring states, and the least number where all is 0."""
    rank = min(len(x), len(y), x.shape[1])
    return 8 * math.sqrt(rank * x.shape[1]) * U * (variance(x) + variance(y)) + 1e-300


def assert_as_stated(found: torch.Tensor, target: torch.Tensor, tasks: RaggedTasks, half_step: float = 0) -> None:
    """The stated error, that of singular values of all rows and not of triangles, and the rounding of the result."""
    for t, expected in enumerate(by_singular_values(target, tasks).tolist()):
        source = tasks.task(t)
        dim = max(len(target), len(source), target.shape[1])
        its_own = 8 * math.sqrt(min(len(target), len(source), target.shape[1]) * dim) * U
        allowed = stated(target, source) + its_own * (variance(target) + variance(source))
        # Beside a large distance of the means its rounding.
        assert abs(float(found[t]) - expected) <= allowed + (64 * U + half_step) * expected, f"task {t}"


def by_definition(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """The definition for rows x [N, D] and y [n, D], and its error.

    It is taken in the space of the N + n rows less x's first where that has fewer than D dimensions: what follows from
    distances stays, and matrices [D, D] of so few eigenvalues get small. Householder's turn moves a row by
    2 sqrt((N + n) D) u of its length, and a squared distance by four times that of the mean squared lengths at most.

    A covariance is a product of N terms, and LAPACK's eigenvalues are those of a matrix near it: both are off by
    e = (6 sqrt(m) + 8) u tr S at most, m the largest of N, n, k and k the dimensions; the root of an eigenvalue by
    sqrt(e), which one that should be 0 attains. A root of S that is off by that moves the last trace by
    sqrt(e) tr S'^1/2 <= sqrt(k e tr S'), the k roots of the product's eigenvalues by k sqrt(e tr S'); it counts twice.
    """
    y, x = y.double() - x[0].double(), x.double() - x[0].double()
    rows = torch.cat([x, y])
    turn = 8 * math.sqrt(rows.numel()) * U * float(x.square().sum(1).mean() + y.square().sum(1).mean())
    if len(rows) < x.shape[1]:
        basis = torch.linalg.qr(rows.T).Q
        x, y = x @ basis, y @ basis
    dim = x.shape[1]
    error = (6 * math.sqrt(max(len(x), len(y), dim)) + 8) * U * variance(x) * variance(y)
    distance = float(naive.frechet_distances(x, RaggedTasks.from_list([y]))[0])
    return distance, turn + 2 * (math.sqrt(dim) + dim) * math.sqrt(error)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_with_the_definition(case: Case, device: str):
    target, tasks = case.make(device)
    found = frechet_distances(target, tasks, precision="fp64")
    assert found.dtype == torch.float64
    assert_as_stated(found, target, tasks)
    single = frechet_distances(target, tasks)
    assert single.dtype == torch.float32
    assert_as_stated(single, target, tasks, half_step=HALF_STEPS["fp32"])
    chosen, some = picked(tasks)
    for t, source in zip(chosen, (some.task(i) for i in range(some.num_tasks)), strict=True):
        expected, error = by_definition(target, source)
        allowed = stated(target, source) + error + 64 * U * expected
        assert abs(float(found[t]) - expected) <= allowed, f"task {t}"


@pytest.mark.slow
def test_parity_at_full_rank_in_many_dimensions(device: str):
    target, tasks = features(2500, 2048, 1, device), ragged((2300,), 2048, device)
    found = frechet_distances(target, tasks)
    assert_as_stated(found, target, tasks)
    torch.testing.assert_close(found, naive.frechet_distances(target, tasks), rtol=1e-7, atol=0)


HARD = {
    **{kind: partial(change, kind) for kind in KINDS},
    "dead": lambda x: x * (torch.arange(x.shape[1], device=x.device) % 2),
    "decaying": lambda x: x * torch.logspace(0, -12, x.shape[1], dtype=x.dtype, device=x.device),
}


# In float32 the others are among the cases.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float64) for kind in HARD), ("dead", torch.float32), ("decaying", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_hard_inputs(kind: str, dtype: torch.dtype, device: str):
    target, tasks = HARD[kind](features(63, 64, 1, device, dtype)), ragged((1, 2, 63, 123), 64, device, dtype)
    tasks = RaggedTasks.from_list([HARD[kind](tasks.task(t)) for t in range(4)])
    exact = frechet_distances(target, tasks, precision="fp64")
    assert_as_stated(exact, target, tasks)
    single = frechet_distances(target, tasks, precision="fp32")
    assert single.dtype == torch.float32
    assert torch.equal(single, exact.float())


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("n", SIZES, ids="N{}".format)
def test_the_distance_to_itself_is_below_the_stated_error(n: int, kind: str, device: str):
    for d in (3, 100):
        target = HARD[kind](features(n, d, 3, device))
        tasks = RaggedTasks.from_list([target.clone(), target[: n // 2 + 1] * 3 + 1, target.clone()])
        found = frechet_distances(target, tasks)
        assert float(found[[0, 2]].max()) <= stated(target, target)
        assert one(target, target, memory=least_memory(target, RaggedTasks.from_list([target]))) <= stated(
            target, target
        )
        assert float(found.min()) >= 0  # what cannot be negative is not so by rounding
        assert found[1] > 0


def test_closed_forms(device: str):
    x, y = features(123, 1, 1, device), features(257, 1, 2, device) * 3
    means, deviations = (x.mean() - y.mean()).square(), (x.std(correction=0) - y.std(correction=0)).square()
    assert one(x, y) == pytest.approx(float(means + deviations), rel=1e-14)
    for n, d in ((63, 100), (257, 64)):  # a scaled and moved copy: a^2 + (1 - s)^2 tr S for means a apart
        x = features(n, d, 1, device)
        moved = 3 * (x - x.mean(0)) + x.mean(0) + 2
        assert one(x, moved) == pytest.approx(4 * d + 4 * variance(x), rel=1e-13)
        rotation = torch.linalg.qr(features(d, d, 5, device)).Q
        assert one(x @ rotation, moved @ rotation) == pytest.approx(4 * d + 4 * variance(x), rel=1e-13)
    single, other = features(1, 64, 1, device), features(63, 64, 2, device)
    assert one(single, other) == pytest.approx(float((single - other).square().sum() / 63), rel=1e-14)


def test_means_far_apart_are_off_by_the_rounding_of_sums(device: str):
    x = features(20, 3, 1, device)
    far = features(500, 3, 2, device) + 1e3 * torch.tensor([0.3, 0.7, 0.9], dtype=torch.float64, device=device)
    expected = float(by_singular_values(x, RaggedTasks.from_list([far])))
    # A sum of 500 numbers, one after the other, of rows so far from the target's mean; and some u of the result.
    apart = float((far - x.mean(0)).norm(dim=1).mean())
    allowed = stated(x, far) + (2 * (512 + 1) * apart * math.sqrt(expected) + 64 * expected) * U
    assert one(x, far) == pytest.approx(expected, rel=0, abs=allowed)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 40), st.integers(1, 20))
def test_symmetry_order_and_the_triangle(seed: int, n: int, m: int, d: int):
    x, y, z = features(n, d, seed), features(m, d, seed + 1) * 2, features(n + 3, d, seed + 2) + 1
    allowed = 2 * (stated(x, y) + stated(y, z) + stated(x, z)) + 64 * U * (one(x, y) + one(y, z) + one(x, z))
    shuffled = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    assert one(x, y) == pytest.approx(one(y, x), abs=allowed)
    assert one(shuffled, y) == pytest.approx(one(x, y), abs=allowed)
    assert math.sqrt(one(x, z)) <= math.sqrt(one(x, y)) + math.sqrt(one(y, z)) + math.sqrt(allowed)
    tasks, order = [x, y, z, y[:1]], [2, 0, 3, 1]
    found = frechet_distances(x, RaggedTasks.from_list(tasks))
    moved = frechet_distances(x, RaggedTasks.from_list([tasks[i] for i in order]))
    torch.testing.assert_close(moved, found[order], rtol=64 * U, atol=allowed)


def least_memory(target: torch.Tensor, tasks: RaggedTasks) -> int:
    with pytest.raises(ValueError, match="accepted: at least") as refused:
        frechet_distances(target, tasks, memory=1)
    return int(str(refused.value).split()[-1])


@pytest.mark.parametrize("d", [3, 64, 420], ids="D{}".format)
def test_any_memory_gives_the_same_within_the_stated_error(d: int, device: str):
    target, tasks = features(900, d, 1, device), ragged((1000, 1, 800, 63, 1100), d, device)
    least, expected = least_memory(target, tasks), frechet_distances(target, tasks)
    for memory in (least, 2 * least):
        found = frechet_distances(target, tasks, memory=memory)
        for t in range(tasks.num_tasks):
            allowed = 2 * stated(target, tasks.task(t)) + 64 * U * float(expected[t])
            assert float(found[t]) == pytest.approx(float(expected[t]), rel=0, abs=allowed)
    with pytest.raises(ValueError, match=f"at least {least}"):
        frechet_distances(target, tasks, memory=least - 1)


@pytest.mark.parametrize("d", [3, 64, 420], ids="D{}".format)
def test_a_table_has_the_distances_of_each_set_and_keeps_to_the_memory(d: int, device: str):
    sets, others = ragged((70, 1, 9, 9, 12, 400), d, device), ragged((30, 2, 300), d, device)
    for columns, side in ((others, others), (sets, None)):
        least = least_memory(sets.task(5), columns)
        for memory in (least, 2 * least, 2**26):
            table, most = held(lambda memory=memory, side=side: frechet_table(sets, side, memory))
            for c in range(sets.num_tasks):
                assert_as_stated(table[c], sets.task(c), columns)
            # Beside it the table, which is added to its transpose, and some numbers a set.
            assert device != "cpu" or most <= memory + 2 * table.nbytes + 80 * (sets.num_tasks + columns.num_tasks)
    assert torch.equal(table, table.T)
    assert not table.diagonal().any()
    again = frechet_table(sets, sets, 2**26)  # what cannot be negative is not so by rounding
    assert float(again.min()) >= 0


def test_against_the_fid_formula_and_pot(device: str):
    linalg, target, tasks = pytest.importorskip("scipy.linalg"), features(257, 64, 1, device), ragged((123, 400), 64)
    tasks = RaggedTasks(tasks.features.to(device), tasks.offsets)
    found = frechet_distances(target, tasks).tolist()
    x = target.cpu()
    for t, y in enumerate(tasks.task(t).cpu() for t in range(2)):
        s, its = x.T.cov(correction=0), y.T.cov(correction=0)
        root = linalg.sqrtm((s @ its).numpy())
        expected = (x.mean(0) - y.mean(0)).square().sum() + s.trace() + its.trace() - 2 * root.trace().real
        # Full rank, condition about 100: sqrtm is good to some 1e-12.
        assert found[t] == pytest.approx(float(expected), rel=1e-11)
    gaussian = pytest.importorskip("ot.gaussian")
    for t, y in enumerate(tasks.task(t).cpu() for t in range(2)):
        moments = (x.mean(0), y.mean(0), x.T.cov(correction=0), y.T.cov(correction=0))
        theirs = gaussian.bures_wasserstein_distance(*(moment.numpy() for moment in moments))  # the root
        assert found[t] == pytest.approx(float(theirs) ** 2, rel=1e-11)


def test_digits_of_the_same_kind_are_nearest(device: str):
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    rows, labels = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    halves = [(rows[labels == c][::2], rows[labels == c][1::2]) for c in range(10)]  # 90 rows of rank below 64
    tasks = RaggedTasks.from_list([half for _, half in halves])
    for c, (half, _) in enumerate(halves):
        found = frechet_distances(half, tasks)
        assert int(found.argmin()) == c
        assert_as_stated(found, half, tasks)


def test_16_bit_features_give_float32(device: str):
    target, tasks = features(63, 64, 1, device, torch.bfloat16), ragged((5, 63), 64, device, torch.bfloat16)
    found = frechet_distances(target, tasks)
    wide = RaggedTasks(tasks.features.double(), tasks.offsets)
    assert found.dtype == torch.float32
    assert torch.equal(found, frechet_distances(target.double(), wide, precision="fp32"))


def test_bad_input_is_refused(device: str):
    tasks, bad = ragged((3, 5), 4, device), features(3, 4, 0, device)
    bad[1, 2] = float("nan")
    for target, said in (
        (features(3, 5, 0, device), r"\[N, 4\]"),
        (features(3, 4, 0, device)[:0], "no rows"),
        (features(3, 4, 0, device, torch.float32), "float"),
        (bad, "row 1"),
        (features(3, 4, 0, device) * 1e200, "squares overflow; accepted: variances that sum below 1.7e308"),
    ):
        with pytest.raises(ValueError, match=said):
            frechet_distances(target, tasks)
    far = RaggedTasks(tasks.features * 1e200, tasks.offsets)
    for target in (features(3, 4, 0, device), features(3, 4, 0, device) * 1e200):
        with pytest.raises(ValueError, match="squares overflow"):
            frechet_distances(target, far)
    with pytest.raises(ValueError, match=r"precision is 'double'; accepted: bf16, tf32, bf16x3, fp32, fp64"):
        frechet_distances(features(3, 4, 0, device), tasks, precision="double")


def by_nuclear_norms(target: torch.Tensor, tasks: RaggedTasks) -> torch.Tensor:
    """`by_singular_values` in torch, for its gradient; sets less the target's first row."""
    first, distances = target.detach()[0], []
    for t in range(tasks.num_tasks):
        x, y = target - first, tasks.task(t) - first
        (m, x), (n, y) = ((v.mean(0), v - v.mean(0)) for v in (x, y))
        shared = torch.linalg.svdvals(x @ y.T).sum() / (len(x) * len(y)) ** 0.5
        distances.append((m - n).square().sum() + x.square().sum() / len(x) + y.square().sum() / len(y) - 2 * shared)
    return torch.stack(distances)


@pytest.mark.parametrize("kind", ["as they are", "shifted"])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (20, 64), (63, 17), (300, 40)], ids=str)
def test_gradients_are_those_of_singular_values(n: int, d: int, kind: str, device: str):
    target, tasks = features(n, d, 1, device), ragged((1, 12, 40, 200, 41), d, device)
    if kind == "shifted":
        target, tasks = target + 1e3, RaggedTasks(tasks.features + 1e3, tasks.offsets)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5], dtype=torch.float64, device=device)
    exact = target.clone().requires_grad_()
    (by_nuclear_norms(exact, tasks) * weights).sum().backward()
    assert exact.grad is not None
    scale = float(exact.grad.abs().max())
    for memory in (None, least_memory(target, tasks)):
        x = target.clone().requires_grad_()
        (frechet_distances(x, tasks, memory=memory) * weights).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.detach(), target)
        # A polar factor turns by some sqrt(D) u over its least singular value, here .01 of the largest or more.
        torch.testing.assert_close(x.grad, exact.grad, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("n", "sizes", "times"),
    [(100, (60,) * 200, 12), (64, (64,) * 3, 1)],  # room for some dozen tasks at a time; no room but for one
    ids=["batches", "one by one"],
)
def test_gradients_keep_to_the_memory(n: int, sizes: tuple[int, ...], times: int):
    x, tasks = features(n, 64, 1).requires_grad_(), ragged(sizes, 64)
    memory = times * least_memory(x.detach(), tasks)
    _, most = held(lambda: frechet_distances(x, tasks, memory=memory).sum().backward())
    # Eight arrays like the target, the result among them, and some numbers a task.
    assert most <= memory + 8 * x.nbytes + 80 * tasks.num_tasks


def test_a_set_is_at_rest_beside_itself(device: str):
    for n, d in ((7, 30), (50, 6)):
        x = features(n, d, 1, device).requires_grad_()
        (gradient,) = torch.autograd.grad(frechet_distances(x, RaggedTasks.from_list([x.detach().clone()])).sum(), x)
        # 2 / root(N) times the difference of X, of norm root(D) or so, and the product of its own polar factor with it.
        assert float(gradient.abs().max()) < 16 * d * n**0.5 * U


def test_the_gradient_of_another_precision_has_its_dtype(device: str):
    x = features(30, 8, 1, device, torch.float32).requires_grad_()
    tasks = ragged((9, 40), 8, device, torch.float32)
    frechet_distances(x, tasks).sum().backward()
    exact = x.detach().double().requires_grad_()
    frechet_distances(exact, RaggedTasks(tasks.features.double(), tasks.offsets)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, exact.grad.float())

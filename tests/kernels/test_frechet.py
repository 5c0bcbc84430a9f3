"""Fréchet distances against their definition, closed forms, and others' code; the stated error is what is allowed."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.kernels import naive
from headstart.kernels.frechet import frechet_distances
from headstart.kernels.ragged import RaggedTasks

SIZES = (1, 2, 63, 123, 257, 1000)
DIMENSIONS = (1, 3, 64, 100, 512, 2048)
TASKS = (1, 5, 300)
U = 2.0**-53
# A Latin square of N and D against n_t, and T so that it meets each of them: every value and every pair of values.
CASES = [
    pytest.param(n, d, SIZES[(i + j) % 6], TASKS[(i + 2 * j) % 3], id=f"N{n}-D{d}-n{SIZES[(i + j) % 6]}"
                 f"-T{TASKS[(i + 2 * j) % 3]}")
    for i, n in enumerate(SIZES) for j, d in enumerate(DIMENSIONS)
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """LAPACK on two threads that share their cores with others takes up to 20 times as long as on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def by_singular_values(x: torch.Tensor, tasks: RaggedTasks) -> list[float]:
    """The definition in the form that loses no digits, by scipy and without triangles, from rows less x's first."""
    linalg = pytest.importorskip("scipy.linalg")
    first = x[0].double()
    a = (x.double() - first).cpu().numpy()
    mean, a = a.mean(0), a - a.mean(0)
    distances = []
    for t in range(tasks.num_tasks):
        b = (tasks.task(t).double() - first).cpu().numpy()
        apart, b = ((mean - b.mean(0)) ** 2).sum(), b - b.mean(0)
        # At most D of the min(N, n) are not 0 but for rounding.
        common = linalg.svdvals(a @ b.T)[: a.shape[1]].sum() / math.sqrt(len(a) * len(b))
        distances.append(float(apart + (a**2).sum() / len(a) + (b**2).sum() / len(b) - 2 * common))
    return distances


def assert_as_stated(found: torch.Tensor, target: torch.Tensor, tasks: RaggedTasks) -> None:
    """The stated error, and that of the reference: the same with its [N, n] in place of our [min(N, D), min(n, D)]."""
    for t, expected in enumerate(by_singular_values(target, tasks)):
        source = tasks.task(t)
        its_own = 8 * math.sqrt(len(target) * len(source)) * U * (variance(target) + variance(source))
        # Beside a large distance of the means its rounding.
        allowed = stated(target, source) + its_own + 64 * U * expected
        assert abs(float(found[t]) - expected) <= allowed, f"task {t}"


@pytest.mark.parametrize(("n", "d", "largest", "num_tasks"), CASES)
def test_parity(n: int, d: int, largest: int, num_tasks: int, device: str):
    sizes = (largest, *(1 + (7 * i) % 3 for i in range(num_tasks - 1)))  # at most 2.7 million numbers
    target, tasks = features(n, d, 1, device), ragged(sizes, d, device)
    found = frechet_distances(target, tasks)
    assert found.dtype == torch.float64
    assert_as_stated(found, target, tasks)
    if d <= 100:
        # Each of the definition's D roots of an eigenvalue that rounding left of 0 is off by up to sqrt(8 u) of the
        # largest, a thousand times what is allowed above at D = 100.
        scale = math.sqrt(variance(target) * max(variance(tasks.task(t)) for t in range(num_tasks)))
        torch.testing.assert_close(
            found, naive.frechet_distances(target, tasks), rtol=64 * U, atol=2 * d * math.sqrt(8 * U) * scale + 1e-300
        )


@pytest.mark.slow
def test_parity_at_full_rank_in_many_dimensions(device: str):
    target, tasks = features(2500, 2048, 1, device), ragged((2300,), 2048, device)
    found = frechet_distances(target, tasks)
    assert_as_stated(found, target, tasks)
    torch.testing.assert_close(found, naive.frechet_distances(target, tasks), rtol=1e-7, atol=0)


HARD = {
    "plain": lambda x: x,
    "shifted": lambda x: x + 1e3,
    "small": lambda x: x * 1e-4,
    "large": lambda x: x * 1e4,
    "duplicates": lambda x: x.repeat_interleave(2, 0)[: len(x)],
    "all-equal": lambda x: x[:1].expand_as(x).contiguous(),
    "dead": lambda x: x * (torch.arange(x.shape[1], device=x.device) % 2),
    "decaying": lambda x: x * torch.logspace(0, -12, x.shape[1], dtype=x.dtype, device=x.device),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs(kind: str, dtype: torch.dtype, device: str):
    target, tasks = HARD[kind](features(63, 64, 1, device, dtype)), ragged((1, 2, 63, 123), 64, device, dtype)
    tasks = RaggedTasks.from_list([HARD[kind](tasks.task(t)) for t in range(4)])
    assert_as_stated(frechet_distances(target, tasks, precision="fp64"), target, tasks)
    exact = frechet_distances(target, tasks, precision="fp64")
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
        (features(3, 4, 0, device) * 1e200, "overflow"),
    ):
        with pytest.raises(ValueError, match=said):
            frechet_distances(target, tasks)
    with pytest.raises(ValueError, match="overflow"):
        frechet_distances(features(3, 4, 0, device), RaggedTasks(tasks.features * 1e200, tasks.offsets))
    with pytest.raises(ValueError, match=r"precision is 'double'; accepted: bf16, tf32, bf16x3, fp32, fp64"):
        frechet_distances(features(3, 4, 0, device), tasks, precision="double")

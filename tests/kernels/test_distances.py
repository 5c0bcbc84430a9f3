"""Energy and Euclidean distances against their definitions in float64, at odd sizes and where arithmetic is hard."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.euclidean import euclidean_distances, topk
from headstart.kernels.ragged import RaggedTasks
from tests.kernels.cases import FUNCTIONS, held, thirds

SIZES = (1, 2, 63, 123, 257)
U = {"fp32": 2.0**-24, "fp64": 2.0**-53}


def features(n: int, d: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).clamp_min(-0.5).to(device, dtype)


def ragged(sizes: tuple[int, ...], d: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> RaggedTasks:
    return RaggedTasks.from_list([features(n, d, 100 + i, device, dtype) * (1 + i % 3) for i, n in enumerate(sizes)])


def double(tasks: RaggedTasks) -> RaggedTasks:
    return RaggedTasks(tasks.features.double(), tasks.offsets)


def bound(target: torch.Tensor, tasks: RaggedTasks, precision: str) -> float:
    """Rounding of a mean of distances: sqrt(D) u relative from the squares, in each of up to four means; 8 covers the
    constants of the sums. The offset from the origin is not in it, because a common centre is subtracted first."""
    spread = float(naive.euclidean_distances(target.double(), double(tasks), form="pairs").max())
    inner = float(naive.pairwise(target.double(), target.double()).mean())
    return 8 * U[precision] * (target.shape[1] ** 0.5) * (spread + inner) + 1e-300


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("d", [1, 3, 64, 100, 512], ids="D{}".format)
@pytest.mark.parametrize("n", SIZES, ids="N{}".format)
def test_parity_with_the_definition(n: int, d: int, precision: str, device: str):
    target, tasks = features(n, d, 1, device), ragged((*SIZES, 1, 1), d, device)
    allowed = bound(target, tasks, precision)
    for ours, theirs, form in (
        (energy_distances, naive.energy_distances, {}),
        (euclidean_distances, naive.euclidean_distances, {"form": "pairs"}),
        (euclidean_distances, naive.euclidean_distances, {"form": "mean"}),
    ):
        found = ours(target, tasks, precision=precision, **form)
        assert found.dtype == (torch.float64 if precision == "fp64" else torch.float32)
        torch.testing.assert_close(
            found.double(), theirs(target.double(), double(tasks), **form), rtol=0, atol=allowed + U["fp32"] * 8
            if precision == "fp32" else allowed,
        )  # fmt: skip


@pytest.mark.parametrize("num_tasks", [1, 5, 300], ids="T{}".format)
def test_many_tasks_of_few_rows(num_tasks: int, device: str):
    tasks = ragged(tuple(1 + (7 * i) % 11 for i in range(num_tasks)), 17, device)
    target = features(40, 17, 1, device)
    torch.testing.assert_close(
        energy_distances(target, tasks).double(),
        naive.energy_distances(target.double(), double(tasks)),
        rtol=0, atol=bound(target, tasks, "fp32"),
    )  # fmt: skip


def hard(kind: str, device: str) -> tuple[torch.Tensor, RaggedTasks]:
    target, tasks = features(63, 64, 1, device), ragged((1, 63, 123), 64, device)
    change = {
        "shifted": lambda x: x + 1e3,
        "small": lambda x: x * 1e-4,
        "large": lambda x: x * 1e4,
        "duplicates": lambda x: x.repeat_interleave(2, 0)[: len(x)],
        "all-equal": lambda x: x[:1].expand_as(x).contiguous(),
    }[kind]
    return change(target), RaggedTasks.from_list([change(tasks.task(t)) for t in range(tasks.num_tasks)])


@pytest.mark.parametrize("kind", ["shifted", "small", "large", "duplicates", "all-equal"])
def test_hard_inputs(kind: str, device: str):
    target, tasks = hard(kind, device)
    allowed = bound(target, tasks, "fp32")
    for form in ("mean", "pairs"):
        expected = naive.euclidean_distances(target.double(), double(tasks), form=form)
        found = euclidean_distances(target, tasks, form=form).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
    expected = naive.energy_distances(target.double(), double(tasks))
    torch.testing.assert_close(energy_distances(target, tasks).double(), expected, rtol=0, atol=2 * allowed)


@pytest.mark.parametrize("kind", ["plain", "shifted", "small", "large", "duplicates", "all-equal"])
@pytest.mark.parametrize("n", SIZES, ids="N{}".format)
def test_the_distance_to_itself_is_exactly_zero(n: int, kind: str, device: str):
    target = features(n, 100, 3, device)
    if kind != "plain":
        target = hard(kind, device)[0]
    tasks = RaggedTasks.from_list([target.clone(), features(5, target.shape[1], 4, device), target.clone()])
    for memory in (None, 64 * 2**20, 512 * 2**20):
        for found in (
            energy_distances(target, tasks, memory=memory),
            euclidean_distances(target, tasks, memory=memory),
        ):
            assert found[0] == 0
            assert found[2] == 0
            assert found[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_how_rows_lie_in_memory_changes_no_bit(name: str, dtype: torch.dtype):
    x, y = features(123, 70, 1, dtype=dtype), features(300, 70, 2, dtype=dtype)
    offsets, labels = torch.tensor([0, 1, 180, 300]), thirds(y)
    expected = FUNCTIONS[name](x, RaggedTasks(y, offsets, labels))
    found = FUNCTIONS[name](x.T.contiguous().T, RaggedTasks(y.T.contiguous().T, offsets, labels))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mean distances", "energy", "mmd", "prototype distances"])
def test_the_distance_to_itself_is_exactly_zero_however_its_rows_lie(name: str):
    x = features(123, 70, 1)
    found = FUNCTIONS[name](x, RaggedTasks(x.T.contiguous().T, torch.tensor([0, 123]), thirds(x)))
    assert (found if isinstance(found, torch.Tensor) else found.distances).tolist() == [0.0]


def test_the_memory_bound_changes_no_bit_and_is_refused_when_too_small(device: str):
    target, tasks = features(257, 64, 1, device), ragged(SIZES, 64, device)
    with pytest.raises(ValueError, match="at least") as refused:
        energy_distances(target, tasks, memory=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])  # more on a GPU, whose tiles are larger
    one, other = (energy_distances(target, tasks, memory=m) for m in (least, 256 * 2**20))
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1, 3000], ids="n{}".format)
def test_mean_distances_keep_to_the_memory(size: int):
    target, tasks = features(2000, 200, 1), RaggedTasks.from_list(list(features(3000, 200, 2).split(size)))
    with pytest.raises(ValueError, match="at least") as refused:
        euclidean_distances(target, tasks, memory=1)
    least = int(str(refused.value).split()[-1])
    _, most = held(lambda: euclidean_distances(target, tasks, memory=least))
    assert most <= least + 80 * tasks.num_tasks  # and what is as long as the tasks


def test_self_terms_can_be_kept(device: str):
    target, tasks = features(63, 64, 1, device), ragged(SIZES, 64, device)
    kept = energy_self_terms(tasks)
    assert torch.equal(energy_distances(target, tasks, self_terms=kept), energy_distances(target, tasks))
    with pytest.raises(ValueError, match="self terms"):
        energy_distances(target, tasks, self_terms=kept, precision="fp64")


def test_unbiased_is_the_u_statistic(device: str):
    target, tasks = features(63, 3, 1, device), ragged((2, 63, 257), 3, device)
    tasks = RaggedTasks.from_list([target[::2], *(tasks.task(t) for t in range(3))])
    found = energy_distances(target, tasks, unbiased=True, precision="fp64")
    expected = naive.energy_distances(target.double(), double(tasks), unbiased=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found[0] < 0  # of the target's own rows: not clamped
    with pytest.raises(ValueError, match="task 0 has one row"):
        energy_distances(target, ragged((1, 5), 3, device), unbiased=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 70), st.integers(1, 20))
def test_symmetry_order_and_the_triangle(seed: int, n: int, d: int):
    x, y, z = (features(n + i, d, seed + i, dtype=torch.float64) for i in range(3))

    def energy(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(energy_distances(a, RaggedTasks.from_list([b]))[0])

    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    assert energy(x, y) == pytest.approx(energy(y, x), abs=1e-12)
    assert energy(shuffled, y) == pytest.approx(energy(x, y), abs=1e-12)
    # The root of the energy distance is a metric; 1e-6 is the root of the rounding of a zero.
    assert energy(x, z) ** 0.5 <= energy(x, y) ** 0.5 + energy(y, z) ** 0.5 + 1e-6
    tasks, order = [x, y, z], [2, 0, 1]
    found = energy_distances(x, RaggedTasks.from_list(tasks))
    moved = energy_distances(x, RaggedTasks.from_list([tasks[i] for i in order]))
    torch.testing.assert_close(moved, found[order], rtol=0, atol=1e-12)


def test_topk_takes_ties_by_index(device: str):
    values, indices = topk(torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0], device=device), 4)
    assert values.tolist() == [1, 1, 1, 2]
    assert indices.tolist() == [1, 3, 4, 2]
    many = torch.arange(500, device=device) * 7 % 5  # a hundred of each, which a sort of a few keeps in order by chance
    assert torch.equal(topk(many.float(), 250)[1], many.argsort(stable=True)[:250])
    for k in (0, 6):
        with pytest.raises(ValueError, match="accepted"):
            topk(torch.arange(5.0, device=device), k)
    with pytest.raises(ValueError, match="distance 2 is NaN"):
        topk(torch.tensor([1.0, 0.0, float("nan"), float("nan")], device=device), 1)

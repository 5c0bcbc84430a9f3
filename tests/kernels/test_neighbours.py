"""Nearest rows: ties, tasks apart, precisions, and a library's answer."""

import pytest
import torch

from headstart.kernels import naive
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks, common_centre
from tests.kernels.cases import HALF_STEP, held


def rows(n: int, d: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ragged(device: str, d: int = 32, dtype: torch.dtype = torch.float32) -> RaggedTasks:
    return RaggedTasks.from_list([rows(n, d, n, device, dtype) for n in (7, 2100, 63, 900)])


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16", "tf32", "bf16x3"])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_over_all_tasks(k: int, precision: str, device: str):
    x, tasks = rows(123, 32, 1, device), ragged(device)
    found = nearest_neighbours(x, tasks, k, precision=precision)
    distances, numbers = naive.nearest_neighbours(x.double(), tasks.features.double(), k)
    # The re-rank is exact: with 4 k + 32 candidates, bfloat16's error of 2^-8 in d loses no row here.
    assert torch.equal(found.rows, numbers)
    # From differences: rounded by u a coordinate and by the sum of D squares.
    torch.testing.assert_close(found.distances.double(), distances, rtol=4 * 32**0.5 * 2.0**-24, atol=0)
    starts = tasks.offsets.to(device)
    assert bool(((found.rows >= starts[found.tasks]) & (found.rows < starts[found.tasks + 1])).all())


def test_for_each_task(device: str):
    x, tasks = rows(40, 32, 1, device), ragged(device)
    found = nearest_neighbours(x, tasks, 7, per_task=True)
    assert found.distances.shape == found.rows.shape == found.tasks.shape == (4, 40, 7)
    for t in range(tasks.num_tasks):
        _, numbers = naive.nearest_neighbours(x.double(), tasks.task(t).double(), 7)
        assert torch.equal(found.rows[t], numbers + int(tasks.offsets[t]))
        assert bool((found.tasks[t] == t).all())


@pytest.mark.parametrize("k", [4, 12])  # topk keeps the first of equal values, but of 17 and more among 1,024 any
def test_ties_go_to_the_lowest_row(k: int, device: str):
    tasks = RaggedTasks.from_list([rows(1, 8, 1, device).expand(700, 8).contiguous(), rows(1, 8, 1, device) + 1] * 2)
    found = nearest_neighbours(rows(3, 8, 2, device), tasks, k)
    expected = naive.nearest_neighbours(rows(3, 8, 2, device).double(), tasks.features.double(), k)
    assert torch.equal(found.rows, expected[1])


@pytest.mark.parametrize("k", [1, 7, 70])
def test_ties_in_several_tiles_go_to_the_lowest_rows(k: int, device: str):
    # Each of 40 rows 60 times: more equal values in a tile and at the k-th place than are kept as candidates.
    tasks = RaggedTasks.from_list([rows(40, 16, 1, device).repeat(60, 1)])
    x = rows(70, 16, 2, device)
    expected = naive.nearest_neighbours(x.double(), tasks.features.double(), k)
    assert torch.equal(nearest_neighbours(x, tasks, k).rows, expected[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_at_one_distance_are_in_order_though_their_products_round_apart(precision: str, device: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-500, 500, (1, 24), generator=generator).float()
    step = torch.randint(1, 9, (24,), generator=generator).float()  # whole numbers: squares and their sums are exact
    signs = torch.randint(0, 2, (20, 24), generator=generator) * 2.0 - 1
    steps = torch.stack([step[torch.randperm(24, generator=generator)] for _ in range(20)]) * signs
    tasks = RaggedTasks.from_list([(x + steps).to(device)])
    found = nearest_neighbours(x.to(device), tasks, 12, precision=precision)  # of 20, all of them candidates
    assert len(found.distances.unique()) == 1
    assert found.rows.tolist() == [list(range(12))]


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_more_rows_than_k_within_the_products_error(k: int, shift: float, device: str):
    # The first row of all and others about it are near every target, by less than products tell apart.
    x = rows(90, 64, 2, device, torch.float64)
    y = torch.cat([rows(3, 64, 5, device, torch.float64) * 1e-3, rows(2500, 64, 3, device, torch.float64) * 2])
    y[1000:1020:4] = y[0] + rows(5, 64, 4, device, torch.float64) * 1e-5
    x, y = (x + shift).float(), (y + shift).float()
    found = nearest_neighbours(x, RaggedTasks.from_list([y]), k)
    distances, _ = naive.nearest_neighbours(x.double(), y.double(), k)
    rounding = 4 * 64**0.5 * 2.0**-24
    torch.testing.assert_close(found.distances.double(), distances, rtol=rounding, atol=0)
    assert all(len(set(numbers)) == k for numbers in found.rows.tolist())  # none twice
    chosen = (x.double()[:, None] - y.double()[found.rows]).norm(dim=2)
    torch.testing.assert_close(chosen, distances, rtol=2 * rounding, atol=0)


@pytest.mark.parametrize("moved", [0.0, 1.0], ids=["target at the centre", "target among the rows"])
@pytest.mark.parametrize("count", [1, 35])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_rows_that_are_rounded_as_far_as_can_be(precision: str, count: int, moved: float, device: str):
    half, tiny = HALF_STEP[precision], 2.0**-16
    # The nearest row is rounded away from the target, others, up to as many as are candidates beside it, towards it.
    y = torch.zeros(count + 2, 65, dtype=torch.float64)
    y[:count, :64], y[count, :64] = 1 + half - tiny - moved, 1 + half + tiny - moved
    gap = y[count].square().sum() - y[0].square().sum()
    y[:count, 64] = ((torch.linspace(1.1, 1.5, count) * gap).sqrt() / tiny).round() * tiny
    y[-1, :64] = -moved * len(y)  # so that the centre, the mean of all rows, is at -moved
    y[-1] -= y[:-1].sum(0)
    x, tasks = torch.zeros(1, 65, device=device), RaggedTasks.from_list([y.float().to(device)])
    assert float((common_centre(tasks.features)[:64] + moved).abs().amax()) == 0
    assert nearest_neighbours(x, tasks, precision=precision).rows.tolist() == [[count]]


def test_tasks_whose_centres_are_far_from_that_of_all(device: str):
    # Eight rows 60 from the target, at distances that products of rows 1,000 from the task's centre do not tell apart.
    x, steps = torch.zeros(1, 16, device=device), 1 + 2.0**-19 * torch.arange(8, device=device)[:, None]
    for t in range(6):
        far = rows(1592, 16, t, device)
        far[:, t] += 1000.0
        ring = torch.nn.functional.normalize(rows(8, 16, 10 + t, device)) * 60 * steps
        tasks = RaggedTasks.from_list([torch.cat([far, ring]), torch.cat([-far, ring])])
        assert nearest_neighbours(x, tasks, per_task=True).rows.flatten().tolist() == [1592, 1600 + 1592]


@pytest.mark.parametrize("n", [5, 63, 1100])
def test_all_rows_in_order(n: int, device: str):
    x, y = rows(9, 32, 1, device), rows(n, 32, 2, device)
    found = nearest_neighbours(x, RaggedTasks.from_list([y]), n)
    distances, _ = naive.nearest_neighbours(x.double(), y.double(), n)
    torch.testing.assert_close(found.distances.double(), distances, rtol=4 * 32**0.5 * 2.0**-24, atol=0)
    assert torch.equal(found.rows.sort(1).values, torch.arange(n, device=device).expand(9, n))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_changes_no_bit(precision: str, device: str):
    x, tasks = rows(700, 64, 1, device), ragged(device, 64)
    with pytest.raises(ValueError, match="at least") as refused:
        nearest_neighbours(x, tasks, 10, precision=precision, memory=1)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    for found, plain in zip(
        nearest_neighbours(x, tasks, 10, precision=precision, memory=least),
        nearest_neighbours(x, tasks, 10, precision=precision),
        strict=True,
    ):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("k", [1, 10, 170, 700])
def test_memory_is_held_to(k: int, precision: str):
    dtype = torch.float64 if precision == "fp64" else torch.float32
    # Each row of y is nearer than those before it, so that every tile brings new candidates.
    y = rows(3000, 100, 2, "cpu", dtype) * torch.linspace(30, 0.01, 3000, dtype=dtype)[:, None]
    # In several stripes, of which lists for many neighbours make smaller ones.
    x, tasks = rows(2100 if k < 100 else 450, 100, 1, "cpu", dtype), RaggedTasks.from_list([y])
    with pytest.raises(ValueError, match="at least") as refused:
        nearest_neighbours(x, tasks, k, precision=precision, memory=1)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    found, most = held(lambda: nearest_neighbours(x, tasks, k, precision=precision, memory=least))
    wanted = min(len(y), 4 * k + 32 if precision == "bf16" else k + 8)
    of_each = found.distances.element_size() + found.rows.element_size()
    assert most <= least + len(x) * (wanted * of_each + k * (of_each + 8))


def test_one_row_with_many_near_rows_takes_no_memory_of_all():
    # Of a second panel all rows are nearer to one row of the target than the first panel's, and none to the others.
    x, y = rows(1100, 32, 1, "cpu"), rows(2048, 32, 2, "cpu")
    x[0] = 100.0
    y[1024:] += 100.0
    tasks = RaggedTasks.from_list([y])
    with pytest.raises(ValueError, match="at least") as refused:
        nearest_neighbours(x, tasks, memory=1)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    found, most = held(lambda: nearest_neighbours(x, tasks, memory=least))
    assert most <= least + len(x) * (9 * 12 + 20)  # k + 8 candidates and the result, as above
    assert torch.equal(found.rows, naive.nearest_neighbours(x.double(), y.double())[1])


def test_a_row_finds_itself_at_distance_zero_far_out(device: str):
    tasks = ragged(device)
    far = RaggedTasks(tasks.features + 1e4, tasks.offsets)
    found = nearest_neighbours(far.features[::7], far)
    assert torch.equal(found.rows[:, 0], torch.arange(0, len(far.features), 7, device=device))
    assert bool((found.distances == 0).all())


def test_faiss_finds_the_same(device: str):
    faiss = pytest.importorskip("faiss")
    x, tasks = rows(200, 32, 1, device), ragged(device)
    index = faiss.IndexFlatL2(32)
    index.add(tasks.features.cpu().numpy())
    squares, numbers = index.search(x.cpu().numpy(), 10)
    found = nearest_neighbours(x, tasks, 10)
    assert torch.equal(found.rows.cpu(), torch.from_numpy(numbers))
    torch.testing.assert_close(found.distances.square().cpu(), torch.from_numpy(squares), rtol=1e-5, atol=1e-4)


def test_bad_input_is_refused(device: str):
    x, tasks = rows(4, 32, 1, device), ragged(device)
    for k, per_task, said in (
        (0, False, "1 to 3070"),
        (3071, False, "1 to 3070"),
        (8, True, "1 to 7, the rows in the"),
    ):
        with pytest.raises(ValueError, match=said):
            nearest_neighbours(x, tasks, k, per_task=per_task)
    with pytest.raises(ValueError, match="at least"):
        nearest_neighbours(x, tasks, memory=10)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match="row 2"):
        nearest_neighbours(x, tasks)

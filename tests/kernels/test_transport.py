"""What sinkhorn_distances promises of memory and of its gradient, and what others' code says."""

import math
import re

import pytest
import torch
from torch import Tensor

from headstart.kernels import dispatch, naive
from headstart.kernels.engine.ground_cost import LEAST_CHUNK, Cost, Points, chunk_bytes, held_bytes
from headstart.kernels.engine.transport import Settings, solve
from headstart.kernels.engine.transport_operators import as_points
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import default_epsilon, sinkhorn_distances
from tests.kernels.cases import held
from tests.kernels.test_sinkhorn import bound, costs, features, largest


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_a_small_memory_recomputes_the_costs_and_is_held_to(p: int):
    x = features(600, 24, 1, dtype=torch.float32)
    near = x[:1] + 1e-4 * features(100, 24, 5, dtype=torch.float32)  # all of its products cancel
    sets = [features(n, 24, n, dtype=torch.float32) for n in (1, 700, 64)]
    tasks = RaggedTasks.from_list([*sets, x[:300], near])
    epsilon = default_epsilon(x, p) * 10
    plain = sinkhorn_distances(x, tasks, p=p, epsilon=epsilon)
    with pytest.raises(ValueError, match="at least") as refused:
        sinkhorn_distances(x, tasks, p=p, epsilon=epsilon, memory=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert least < 4 * 600 * 700  # less than the costs of one pair
    allowed = bound(largest(x, tasks, p), epsilon, 24, p, "fp32", 1e-3)
    for memory in (least + 2**18, 2 * least, 5 * least):
        found, most = held(lambda memory=memory: sinkhorn_distances(x, tasks, p=p, epsilon=epsilon, memory=memory))
        assert most <= memory
        assert bool(found.converged.all())
        torch.testing.assert_close(found.distances, plain.distances, rtol=0, atol=allowed)


@pytest.mark.parametrize("share", [1, 2, 3], ids="{} times the least".format)
def test_what_recomputed_costs_take_is_planned_for(share: int):
    x, y = features(600, 24, 1, dtype=torch.float32), features(700, 24, 2, dtype=torch.float32)
    memory = share * chunk_bytes(x, LEAST_CHUNK, Cost(2))
    tasks = RaggedTasks.from_list([y])
    with dispatch.report() as reports:
        _, most = held(
            lambda: solve(Points(y, tasks.offsets), as_points(x), Cost(2), Settings(20.0, 1e-2, 100, memory))
        )
    assert [each.reason for each in reports] == ["costs do not fit in the memory; on cpu"]
    assert most - 80 * (len(x) + len(y)) <= reports[0].peak_bytes <= memory
    assert reports[0].peak_bytes > memory / 4  # a chunk of twice the rows takes up to four times as much


def test_many_near_rows_are_looked_at_some_at_a_time():
    # Two clouds on either side of the centre, a tenth of the rows in one: four fifths of all pairs cancel.
    side = torch.where(torch.arange(400) % 10 == 0, -9.0, 1.0)[:, None]
    x, y = (side + 1e-4 * features(400, 24, seed, dtype=torch.float32) for seed in (1, 2))
    tasks = RaggedTasks.from_list([y])
    with dispatch.report() as reports:
        _, most = held(lambda: sinkhorn_distances(x, tasks, epsilon=1.0))
    assert {each.reason for each in reports} == {"costs fit in the memory"}
    # The differences of all of them would be 12 MB.
    assert most <= max(each.peak_bytes for each in reports) + 80 * (len(x) + len(y))


@pytest.mark.parametrize("share", [1.0, 0.2], ids=["held", "some recomputed"])
def test_sets_that_each_meet_their_own(share: float):
    sizes = ((1, 30, 3, 300, 30, 31, 300), (1, 1, 300, 300, 29, 30, 280))
    rows, columns = (
        Points(side.features, side.offsets)
        for side in (RaggedTasks.from_list([features(n, 5, seed + n) for n in part]) for seed, part in enumerate(sizes))
    )
    cost = Cost(2, precision="fp64")
    least = chunk_bytes(rows.features, LEAST_CHUNK, cost)
    fixed, each = held_bytes(rows.features, (320, 320), columns, cost)
    memory = max(least, int((fixed + 7 * each) * share))
    assert (fixed + each > memory) == (share < 1)  # those of 300 rows are met by 300
    settings = Settings(2.0, 1e-9, 10000, memory)
    found, most = held(lambda: solve(rows, columns, cost, settings))
    assert most <= memory
    allowed = 2 * bound(float(costs(rows.features, columns.features, 2).amax()), 2.0, 5, 2, "fp64", 1e-9)
    for t in range(7):
        alone = solve(rows.only(t), columns.only(t), cost, settings._replace(memory=None))
        torch.testing.assert_close(found.values[t : t + 1], alone.values, rtol=0, atol=allowed)
        assert float(found.errors[t]) <= 1e-9


def test_batch_after_batch_memory_is_held_to():
    x = features(500, 32, 1, dtype=torch.float32)
    tasks = RaggedTasks.from_list([x[i : i + 40] for i in range(100)])
    for memory in (3 * 2**20, 6 * 2**20):  # a few batches of the 100 tasks, whose costs alone are 8 MB
        _, most = held(lambda memory=memory: sinkhorn_distances(x, tasks, epsilon=20.0, memory=memory))
        assert memory / 3 < most <= memory


@pytest.mark.slow
def test_five_thousand_rows_in_32_mib():
    x, y = features(5000, 64, 1, dtype=torch.float32), features(5000, 64, 2, dtype=torch.float32)
    found, most = held(lambda: sinkhorn_distances(x, RaggedTasks.from_list([y, x]), memory=32 * 2**20))
    assert most <= 32 * 2**20
    assert bool(found.converged.all())
    allowed = bound(float(costs(x[:1000], y, 2).amax()) * 1.5, found.epsilon, 64, 2, "fp32", float(found.errors[1]))
    assert float(found.distances[1]) <= allowed


@pytest.mark.parametrize("memory", [None, 2_300_000], ids=["held", "recomputed"])
@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_the_gradient_is_that_of_the_definition(p: int, memory: int | None, device: str):
    num = 23 if memory is None else 260
    x = features(num, 5, 1, device).requires_grad_()
    tasks = RaggedTasks.from_list([features(n, 5, n, device) for n in (7, 30, 1)] + [x.detach()[:10].clone()])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, device=device)
    epsilon = 0.5
    found = sinkhorn_distances(x, tasks, p=p, epsilon=epsilon, tolerance=1e-11, max_iterations=20000, memory=memory)
    (ours,) = torch.autograd.grad(found.distances @ weights, x)
    expected = naive.sinkhorn_distances(x, tasks, epsilon=epsilon, p=p, num_iterations=400)
    (theirs,) = torch.autograd.grad(expected @ weights, x)
    # A gradient is linear in the error of the plan, which 400 plain iterations leave at some 1e-8 here.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().amax()))
    with torch.no_grad():
        assert not sinkhorn_distances(x, tasks, p=p, epsilon=epsilon).distances.requires_grad


def test_the_gradient_in_single_precision_and_of_half_precision_rows(device: str):
    x, y = features(40, 8, 1, device), RaggedTasks.from_list([features(33, 8, 2, device)])
    exact = x.clone().requires_grad_()
    sinkhorn_distances(exact, y, epsilon=1.0, tolerance=1e-9).distances.sum().backward()
    for dtype in (torch.float32, torch.float16):
        rough = x.to(dtype).requires_grad_()
        found = sinkhorn_distances(rough, RaggedTasks(y.features.to(dtype), y.offsets), epsilon=1.0, tolerance=1e-5)
        found.distances.sum().backward()
        assert rough.grad.dtype == dtype
        # Rows rounded by 2^-11 of at most 4, and as much again in the plan at |x - y| / epsilon of some 4.
        allowed = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(rough.grad.double() * 40, exact.grad * 40, rtol=0, atol=allowed)


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_against_geomloss(p: int):
    geomloss = pytest.importorskip("geomloss")
    x, tasks = features(63, 8, 1), RaggedTasks.from_list([features(n, 8, n) * (1 + n % 2) for n in (1, 40, 123)])
    blur = default_epsilon(x, 1) * 4
    # Slow annealing, because geomloss takes one step at a level and does not look at the marginals.
    loss = geomloss.SamplesLoss("sinkhorn", p=p, blur=blur, scaling=0.98, debias=True, backend="tensorized")
    expected = torch.stack([loss(x, tasks.task(t)) for t in range(3)])
    found = sinkhorn_distances(x, tasks, p=p, epsilon=blur**p, tolerance=1e-6)
    torch.testing.assert_close(found.distances, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_against_pots_plans(p: int):
    ot = pytest.importorskip("ot")
    x, y = features(40, 4, 1), features(33, 4, 2) * 1.5
    epsilon = default_epsilon(x, p) * 16

    def transport(a: Tensor, b: Tensor) -> Tensor:
        c = costs(a, b, p)
        plan = ot.sinkhorn([], [], c.numpy(), epsilon, method="sinkhorn_log", stopThr=1e-12, numItermax=10000)
        plan = torch.as_tensor(plan)
        # POT's regulariser is the entropy, ours the divergence from a b^T: the same plan, another constant.
        return (plan * c).sum() + epsilon * (plan * (plan * len(a) * len(b)).log()).nan_to_num().sum()

    expected = transport(x, y) - (transport(x, x) + transport(y, y)) / 2
    found = sinkhorn_distances(x, RaggedTasks.from_list([y]), p=p, epsilon=epsilon, tolerance=1e-10)
    assert float(found.distances[0]) == pytest.approx(float(expected), abs=1e-8)


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_a_small_epsilon_tends_to_pots_exact_transport(p: int):
    ot = pytest.importorskip("ot")
    x, y = features(40, 4, 1), features(33, 4, 2) * 1.5
    exact = float(ot.emd2([], [], costs(x, y, p).numpy()))
    for share in (1, 0.3, 0.1):
        epsilon = default_epsilon(x, p) * share
        found = sinkhorn_distances(x, RaggedTasks.from_list([y]), p=p, epsilon=epsilon, max_iterations=20000)
        assert bool(found.converged.all())
        # <P, C> <= OT <= <P, C> + epsilon KL(P | a b^T), which is at most the log of the smaller number of rows.
        allowed = bound(largest(x, RaggedTasks.from_list([y]), p), epsilon, 4, p, "fp64", 1e-3)
        assert abs(float(found.distances[0]) - exact) <= epsilon * math.log(40) + allowed

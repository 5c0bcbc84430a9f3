"""Gradients with respect to the target, and what torch.compile needs of the operators."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine import pairs
from headstart.kernels.engine.terms import NONE
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.frechet import frechet_distances
from headstart.kernels.label_aware import label_aware_distances, label_aware_self_terms
from headstart.kernels.mmd import median_bandwidths, mmd_distances, mmd_self_terms
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.prototype import prototype_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances, sinkhorn_self_terms
from tests.kernels.cases import double, gradient_error, held, near_rows

SIGMA = torch.tensor([0.8, 3.0], dtype=torch.float64)


def rows(n: int, d: int, seed: int, device: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def problem(n: int, d: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, RaggedTasks]:
    return rows(n, d, 1, device, dtype), RaggedTasks.from_list(
        [rows(m, d, m, device, dtype) + 0.3 for m in (1, 40, 300)]
    )


FUNCTIONS = {
    "energy": (energy_distances, naive.energy_distances),
    "energy, unbiased": (
        lambda x, t: energy_distances(x, _two(t), unbiased=True),
        lambda x, t: naive.energy_distances(x, _two(t), unbiased=True),
    ),
    "pairs": (
        lambda x, t: euclidean_distances(x, t, form="pairs"),
        lambda x, t: naive.euclidean_distances(x, t, form="pairs"),
    ),
    "mmd": (
        lambda x, t: mmd_distances(x, t, bandwidths=SIGMA).distances,
        lambda x, t: naive.mmd_distances(x, t, SIGMA.to(x)),
    ),
}


def classes(n: int, device: str) -> torch.Tensor:
    return torch.arange(n, device=device) % 3


def _two(tasks: RaggedTasks) -> RaggedTasks:
    return RaggedTasks.from_list([tasks.task(1), tasks.task(2)])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (63, 17), (300, 64), (1100, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_gradients_are_those_of_the_definition(name: str, n: int, d: int, dtype: torch.dtype, device: str):
    if n == 1 and "unbiased" in name:
        pytest.skip("one row")
    ours, definition = FUNCTIONS[name]
    x, tasks = problem(n, d, device, dtype)
    weights = rows(1, 3, 5, device)[0, : 2 if "unbiased" in name else 3]
    x.requires_grad_()
    (ours(x, tasks).double() * weights).sum().backward()
    exact = x.detach().double().requires_grad_()
    (definition(exact, RaggedTasks(tasks.features.double(), tasks.offsets)) * weights).sum().backward()
    # A gradient is a difference x sum s - sum s y around a centre: rounded by some sqrt(n) u of what is subtracted,
    # whose size is that of the slopes' sum, 1 / N of it for each row.
    u = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    scale = float(weights.abs().sum()) * (d**0.5 + 3) / n
    allowed = 64 * u * scale * (n + 300) ** 0.5
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=allowed)
    assert float(exact.grad.abs().max()) > 5 * allowed  # which could hide nothing


@pytest.mark.parametrize("name", ["energy", "pairs", "mmd"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_gradients_of_near_pairs_keep_their_digits(name: str, distance: float, device: str):
    agree_near(name, *near_rows(distance, 1000, device))


@pytest.mark.parametrize("name", ["energy", "pairs"])
def test_gradients_beside_a_copy_of_the_target_keep_their_digits(name: str, device: str):
    y = rows(20, 32, 1, device, torch.float32)  # one cloud: its far pairs almost cancel, and leave the near ones
    agree_near(name, y + 1e-6 * rows(20, 32, 2, device, torch.float32), RaggedTasks.from_list([y]))


def agree_near(name: str, x: torch.Tensor, tasks: RaggedTasks) -> None:
    ours, definition = FUNCTIONS[name]
    x.requires_grad_()
    ours(x, tasks).sum().backward()
    exact = x.detach().double().requires_grad_()
    definition(exact, double(tasks)).sum().backward()
    # At most 2 mean_ij of the target and the task, and mean_ij of the target twice, since a pair has two sides.
    allowed = 2 * (gradient_error(x.detach(), tasks.features) + gradient_error(x.detach(), x.detach())) / len(x)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=allowed)
    assert float(exact.grad.abs().max()) > 1000 * allowed


def test_equal_rows_give_no_gradient_and_no_nan(device: str):
    x = rows(9, 4, 1, device).requires_grad_()
    energy_distances(x, RaggedTasks.from_list([x.detach().clone()])).sum().backward()
    assert float(x.grad.abs().max()) < 1e-14


@pytest.mark.parametrize("name", ["energy", "mmd", "sinkhorn"])
def test_gradients_keep_to_the_memory(name: str):
    num_target = 150 if name == "sinkhorn" else 1500  # a small bound makes many steps of its iterations
    x = rows(num_target, 512, 1, "cpu", torch.float32).requires_grad_()
    tasks = RaggedTasks.from_list([rows(n, 512, n, "cpu", torch.float32) for n in (200, 1, 400)])

    def distances(memory: int) -> torch.Tensor:
        if name == "energy":
            return energy_distances(x, tasks, memory=memory)
        if name == "mmd":
            return mmd_distances(x, tasks, bandwidths=torch.tensor([20.0, 40.0]), memory=memory).distances
        return sinkhorn_distances(x, tasks, epsilon=500.0, tolerance=0.3, max_iterations=20, memory=memory).distances

    with pytest.raises(ValueError, match="at least") as refused:
        distances(1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    for memory in (least, 2**25):
        x.grad = None
        _, most = held(lambda memory=memory: distances(memory).sum().backward())
        plain, x.grad = x.grad, None
        # The result, one array more like it, and what is as long as N and the rows of the tasks.
        assert most <= memory + 2 * x.nbytes + 80 * (len(x) + len(tasks.features))
        distances(2**28).sum().backward()
        # Costs that are held or computed again are off by some sqrt(D) u of two squares of 512, a plan by as much of
        # epsilon, and a gradient by that share of itself for each of four plans.
        share = 8 * 512**0.5 * 2.0**-24 * 1024 / 500 if name == "sinkhorn" else 0.0
        torch.testing.assert_close(x.grad, plain, rtol=0, atol=share * float(plain.abs().max()))


@pytest.mark.parametrize("name", ["energy", "sinkhorn"])
def test_gradients_of_near_pairs_keep_to_the_memory(name: str):
    x = 1e-2 * rows(400, 64, 1, "cpu", torch.float32)
    x[::2] += 100
    tasks = RaggedTasks.from_list([x[:300] + 1e-2 * rows(300, 64, 2, "cpu", torch.float32)])  # 80,000 near pairs: 40 MB
    x.requires_grad_()

    def distances(memory: int) -> torch.Tensor:
        if name == "energy":
            return energy_distances(x, tasks, memory=memory)
        return sinkhorn_distances(x, tasks, p=1, epsilon=100.0, tolerance=0.1, memory=memory).distances

    with pytest.raises(ValueError, match="at least") as refused:
        distances(1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    _, most = held(lambda: distances(least).sum().backward())
    assert most <= least + 2 * x.nbytes + 80 * (len(x) + len(tasks.features)) < 2**24


def test_gradients_reach_through_what_made_the_target(device: str):
    start, tasks = problem(20, 6, device, torch.float64)
    layer = torch.nn.Linear(6, 6, dtype=torch.float64, device=device)
    before = energy_distances(layer(start), tasks)
    optimiser = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(50):
        optimiser.zero_grad()
        energy_distances(layer(start), tasks)[1].backward()
        optimiser.step()
    assert energy_distances(layer(start), tasks)[1].item() < 0.5 * before[1].item()


@pytest.mark.parametrize("operator", ["pair_sums", "pair_sums, own", "own_sums", "pair_gradient", "own_gradient"])
@pytest.mark.parametrize("kind", ["distance", "rbf"])
def test_operators_pass_opcheck(operator: str, kind: str, device: str):
    operator, _, own = operator.partition(", ")
    x, tasks = problem(7, 5, device, torch.float32)
    coefficients = torch.tensor([0.5, 2.0], dtype=torch.float64) if kind == "rbf" else NONE
    tail = (None, coefficients, kind, "fp32", None)
    arguments = {
        "pair_sums": (x.requires_grad_(), tasks.features, tasks.offsets, *tail, bool(own)),
        "own_sums": (x.detach(), torch.tensor([0, 3, 7]), *tail),
        "pair_gradient": (x.detach(), tasks.features, torch.ones(len(tasks.features), device=device), *tail),
        "own_gradient": (x.detach(), torch.tensor([0, 3, 7]), torch.ones(2, device=device), *tail),
    }[operator]
    torch.library.opcheck(getattr(pairs, operator), arguments)


def test_the_others_pass_opcheck(device: str):
    x, tasks = problem(7, 5, device, torch.float32)
    rest = (tasks.features, tasks.offsets)
    labels, own = classes(len(tasks.features), device), classes(7, device)
    epsilon = torch.tensor(3.0, dtype=torch.float64)
    how = (2, epsilon, 1e-3, 1000, "fp32", 2**24, None)
    rounded = (*how[:4], "tf32", 2**24, x.mean(0))
    for operator, arguments in (
        (torch.ops.headstart.mean_distances, (x, *rest, "fp32", None)),
        (torch.ops.headstart.frechet_distances, (x.clone().requires_grad_(), *rest, "fp32", None)),
        (torch.ops.headstart.frechet_gradient, (x.double(), *rest, torch.ones(3, device=device), None)),
        (
            torch.ops.headstart.prototype_distances,
            (x, own, tasks.features, labels, tasks.offsets, "nearest", "fp32", None),
        ),
        (torch.ops.headstart.nearest_neighbours, (x, *rest, 2, False, "fp32", None)),
        (torch.ops.headstart.median_bandwidths, (x,)),
        (torch.ops.headstart.checked_bandwidths, (SIGMA, None)),
        (torch.ops.headstart.terms_of_tasks, (SIGMA, torch.tensor([2, 5]), torch.tensor([0, 2, 7]))),
        (torch.ops.headstart.default_epsilon, (x, 2, 2**24)),
        (torch.ops.headstart.checked_epsilon, (epsilon, None)),
        (torch.ops.headstart.sinkhorn_self_values, (*rest, *how)),
        (torch.ops.headstart.sinkhorn_transports, (x.clone().requires_grad_(), *rest, *how)),
        (torch.ops.headstart.sinkhorn_transports, (x.clone().requires_grad_(), *rest, *rounded)),
        (
            torch.ops.headstart.label_aware_distances,
            (x.clone().requires_grad_(), own, tasks.features, labels, tasks.offsets, None, None, "bures", *how[1:]),
        ),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("d", [5, 9])
def test_gradients_have_the_strides_that_a_compiled_graph_expects(d: int, device: str):
    x, tasks = problem(7, d, device, torch.float32)
    x, features = x.T.contiguous().T, tasks.features
    potentials, one = (features.new_zeros(len(features)), x.new_zeros(7)), torch.ones((), dtype=torch.float64)
    weights, tables = one.expand(3).to(device), (x.new_zeros(1 + 3 + 3, 3), x.new_zeros(3, 3))
    labels, ours, more = classes(len(features), device), torch.ops.headstart, (1e-3, 9, "fp32", None, None)
    sets = (x, classes(7, device), features, labels, tasks.offsets)
    for operator, arguments in (
        (ours.frechet_gradient, (x, features, tasks.offsets, weights, None)),
        (
            ours.sinkhorn_gradient,
            (x, features, tasks.offsets, *potentials, weights, one[None], 2, one, "fp32", None, None),
        ),
        (
            ours.label_aware_gradient,
            (*sets, *potentials, *tables, weights, "bures", one, *more),
        ),
    ):
        with FakeTensorMode() as mode:
            told = operator(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments))
        assert operator(*arguments).stride() == told.stride(), operator


def labelled(function, **options):
    return lambda x, t: function(x, t, labels=classes(len(x), str(x.device)), **options)


OTHERS = {
    "neighbours": lambda x, t: nearest_neighbours(x, t, 2).distances,
    "mean": euclidean_distances,
    "frechet": frechet_distances,
    "prototypes": labelled(prototype_distances),
    "median mmd": lambda x, t: mmd_distances(x, t).distances,
    "sinkhorn": lambda x, t: sinkhorn_distances(x, t, epsilon=3.0).distances,
    "sinkhorn, default epsilon": lambda x, t: torch.stack(
        [*(r := sinkhorn_distances(x, t)).distances, r.epsilon.to(x.device)]
    ),
    "label-aware": lambda x, t: labelled(label_aware_distances)(x, t).distances,
}
DIFFERENTIABLE = (*FUNCTIONS, "median mmd", "sinkhorn", "sinkhorn, default epsilon", "frechet", "label-aware")


# An epsilon that follows from rows so unlike the tasks' makes for a long way.
@pytest.mark.filterwarnings("ignore:.*did not converge")
@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_compiled_without_a_break_they_give_the_same(name: str, device: str):
    x, tasks = problem(30, 8, device, torch.float32)
    function = OTHERS[name] if name in OTHERS else FUNCTIONS[name][0]
    if name == "energy, unbiased":
        tasks, function = _two(tasks), lambda x, t: energy_distances(x, t, unbiased=True)
    tasks = RaggedTasks(tasks.features, tasks.offsets, classes(len(tasks.features), device))
    agree_compiled(lambda x: function(x, tasks) * 2, x, name in DIFFERENTIABLE)


def agree_compiled(function, x: torch.Tensor, differentiable: bool) -> None:
    torch._dynamo.reset()
    # The compiler's front and middle; its back would need a C++ compiler on the CPU and adds nothing to ours.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    if differentiable:
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        (plain,) = torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(gradient, plain)


KEPT = ["energy", "mmd", "mmd, bandwidths", "sinkhorn", "sinkhorn, epsilon", "label-aware"]


@pytest.mark.parametrize("name", KEPT)
def test_compiled_without_a_break_with_kept_self_terms(name: str, device: str):
    x, tasks = problem(30, 8, device, torch.float32)
    tasks = RaggedTasks(tasks.features, tasks.offsets, classes(len(tasks.features), device))
    function, kept = {
        "energy": (energy_distances, energy_self_terms(tasks)),
        "mmd": (lambda x, t, **how: mmd_distances(x, t, **how).distances, mmd_self_terms(tasks, SIGMA)),
        "mmd, bandwidths": (  # as a result has them
            lambda x, t, **how: mmd_distances(x, t, bandwidths=SIGMA, **how).distances,
            mmd_self_terms(tasks, SIGMA.clone()),
        ),
        "sinkhorn": (
            lambda x, t, **how: sinkhorn_distances(x, t, **how).distances,
            sinkhorn_self_terms(tasks, epsilon=3.0),
        ),
        "sinkhorn, epsilon": (  # a tensor, as a result has it
            lambda x, t, **how: sinkhorn_distances(x, t, epsilon=torch.tensor(3.0), **how).distances,
            sinkhorn_self_terms(tasks, epsilon=3.0),
        ),
        "label-aware": (
            lambda x, t, **how: labelled(label_aware_distances, **how)(x, t).distances,
            label_aware_self_terms(tasks, epsilon=3.0),
        ),
    }[name]
    agree_compiled(lambda x: function(x, tasks, self_terms=kept), x, True)


def test_kept_self_terms_take_part_in_gradients(device: str):
    x, tasks = problem(30, 8, device, torch.float64)
    x.requires_grad_()
    kept = energy_self_terms(tasks)
    (one,) = torch.autograd.grad(energy_distances(x, tasks, self_terms=kept).sum(), x)
    (two,) = torch.autograd.grad(energy_distances(x, tasks).sum(), x)
    assert torch.equal(one, two)


def sinkhorn(x: torch.Tensor, tasks: RaggedTasks) -> torch.Tensor:
    return sinkhorn_distances(x, tasks, epsilon=1.0).distances


@pytest.mark.parametrize("name", ["energy", "mmd", "sinkhorn"])
def test_a_distance_that_rounding_clamps_at_0_keeps_its_gradient(name: str, device: str):
    function, definition = (sinkhorn, None) if name == "sinkhorn" else FUNCTIONS[name]
    # An energy distance goes with what they are apart, the others with its square: some 1e-8 and 1e-10, beside means of
    # about 1 in float32. So many are rounded below 0.
    step = 1e-7 if name == "energy" else 1e-5
    y, clamped = rows(20, 8, 1, device, torch.float32), 0
    for seed in range(2, 22):
        x = (y + step * rows(20, 8, seed, device, torch.float32)).requires_grad_()
        found = function(x, RaggedTasks.from_list([y]))
        (moved,) = torch.autograd.grad(found.sum(), x)
        assert found.item() >= 0
        assert float(moved.abs().amax()) > 0
        clamped += found.item() == 0
        if definition is not None:  # a transport's is within its tolerance, which is more than all of this one
            exact = x.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(definition(exact, RaggedTasks.from_list([y.double()])).sum(), exact)
            # Two means of slopes of about 1 at most, counted twice, each off by some 4 u, over the N rows.
            assert float((moved - expected).abs().amax()) <= 16 * 2.0**-24 / len(x) < float(expected.abs().amax()) / 2
    assert clamped > 0


@pytest.mark.parametrize("name", [*FUNCTIONS, "sinkhorn"])
def test_no_gradient_reaches_the_tasks(name: str, device: str):
    function = sinkhorn if name == "sinkhorn" else FUNCTIONS[name][0]
    x, tasks = problem(30, 8, device, torch.float64)
    layer = torch.eye(8, dtype=torch.float64, device=device).requires_grad_()
    made = RaggedTasks(tasks.features @ layer, tasks.offsets)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    function(one, tasks).sum().backward()
    function(two, made).sum().backward()
    assert layer.grad is None  # not that of the tasks' own terms alone
    assert torch.equal(one.grad, two.grad)


def test_the_default_device_has_no_part_in_what_runs_outside_operators():
    tasks = RaggedTasks(torch.randn(600, 5), torch.tensor([0, 591, 600]), classes(600, "cpu"))
    with torch.device("meta"):  # as torch.set_default_device: where the tasks are does not change
        terms, kept = (make(tasks, epsilon=9.0) for make in (label_aware_self_terms, sinkhorn_self_terms))
        found = (tasks.means(), median_bandwidths(tasks.features), terms.values, kept.values)
        mmd = mmd_distances(tasks.features[:50], tasks, bandwidths=[1.0, 2.0])
    assert all(values.device.type == "cpu" for values in found)
    assert mmd.bandwidths.tolist() == [1.0, 2.0]
    assert torch.equal(mmd.distances, mmd_distances(tasks.features[:50], tasks, bandwidths=[1.0, 2.0]).distances)

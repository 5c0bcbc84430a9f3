"""Gradients with respect to the target, and what torch.compile needs of the operators."""

import pytest
import torch

from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine import pairs
from headstart.kernels.engine.terms import NONE
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.frechet import frechet_distances
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.prototype import prototype_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances

SIGMA = torch.tensor([0.8, 3.0], dtype=torch.float64)


def rows(n: int, d: int, seed: int, device: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def problem(n: int, d: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, RaggedTasks]:
    return rows(n, d, 1, device, dtype), RaggedTasks.from_list(
        [rows(m, d, m, device, dtype) + 0.3 for m in (1, 40, 300)]
    )


def sinkhorn(x: torch.Tensor, tasks: RaggedTasks) -> torch.Tensor:
    return sinkhorn_distances(x, tasks, epsilon=3.0).distances


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


def test_equal_rows_give_no_gradient_and_no_nan(device: str):
    x = rows(9, 4, 1, device).requires_grad_()
    energy_distances(x, RaggedTasks.from_list([x.detach().clone()])).sum().backward()
    assert float(x.grad.abs().max()) < 1e-14


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


@pytest.mark.parametrize("operator", ["pair_sums", "own_sums", "pair_gradient", "own_gradient"])
@pytest.mark.parametrize("kind", ["distance", "rbf"])
def test_operators_pass_opcheck(operator: str, kind: str, device: str):
    x, tasks = problem(7, 5, device, torch.float32)
    coefficients = torch.tensor([0.5, 2.0], dtype=torch.float64) if kind == "rbf" else NONE
    tail = (None, coefficients, kind, "fp32", None)
    arguments = {
        "pair_sums": (x.requires_grad_(), tasks.features, tasks.offsets, *tail),
        "own_sums": (x.clone().detach().requires_grad_(), torch.tensor([0, 3, 7]), *tail),
        "pair_gradient": (x.detach(), tasks.features, torch.ones(len(tasks.features), device=device), *tail),
        "own_gradient": (x.detach(), torch.tensor([0, 3, 7]), torch.ones(2, device=device), *tail),
    }[operator]
    torch.library.opcheck(getattr(pairs, operator), arguments)


def test_the_others_pass_opcheck(device: str):
    x, tasks = problem(7, 5, device, torch.float32)
    rest = (tasks.features, tasks.offsets)
    labels, own = classes(len(tasks.features), device), classes(7, device)
    for operator, arguments in (
        (torch.ops.headstart.mean_distances, (x, *rest, "fp32", None)),
        (torch.ops.headstart.frechet_distances, (x, *rest, "fp32", None)),
        (
            torch.ops.headstart.prototype_distances,
            (x, own, tasks.features, labels, tasks.offsets, "nearest", "fp32", None),
        ),
        (torch.ops.headstart.nearest_neighbours, (x, *rest, 2, False, "fp32", None)),
        (torch.ops.headstart.median_bandwidths, (x,)),
        (torch.ops.headstart.sinkhorn_self_values, (*rest, 2, 3.0, 1e-3, 1000, "fp32", 2**24)),
        (
            torch.ops.headstart.sinkhorn_transports,
            (x.clone().requires_grad_(), *rest, 2, 3.0, 1e-3, 1000, "fp32", 2**24),
        ),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("name", [*FUNCTIONS, "neighbours", "mean", "median mmd", "frechet", "prototypes", "sinkhorn"])
def test_compiled_without_a_break_they_give_the_same(name: str, device: str):
    x, tasks = problem(30, 8, device, torch.float32)
    others = {
        "neighbours": lambda x, t: nearest_neighbours(x, t, 2).distances,
        "mean": euclidean_distances,
        "frechet": frechet_distances,
        "sinkhorn": sinkhorn,
        "prototypes": lambda x, t: prototype_distances(x, t, labels=classes(len(x), device)),
        "median mmd": lambda x, t: mmd_distances(x, t).distances,
    }
    function = others[name] if name in others else FUNCTIONS[name][0]
    if name == "energy, unbiased":
        tasks, function = _two(tasks), lambda x, t: energy_distances(x, t, unbiased=True)
    tasks = RaggedTasks(tasks.features, tasks.offsets, classes(len(tasks.features), device))
    torch._dynamo.reset()
    # The compiler's front and middle; its back would need a C++ compiler on the CPU and adds nothing to ours.
    compiled = torch.compile(lambda x: function(x, tasks) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x, tasks) * 2)
    if name in FUNCTIONS or name == "sinkhorn":
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        (plain,) = torch.autograd.grad((function(x, tasks) * 2).sum(), x)
        torch.testing.assert_close(gradient, plain)


def test_kept_self_terms_take_part_in_gradients(device: str):
    x, tasks = problem(30, 8, device, torch.float64)
    x.requires_grad_()
    kept = energy_self_terms(tasks)
    (one,) = torch.autograd.grad(energy_distances(x, tasks, self_terms=kept).sum(), x)
    (two,) = torch.autograd.grad(energy_distances(x, tasks).sum(), x)
    assert torch.equal(one, two)

"""Inputs at odd sizes and where arithmetic is hard, and a list of cases that holds every pair of their values."""

import gc
from collections.abc import Callable
from itertools import combinations, product
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._profiler import RecordScope
from torch.autograd import profiler
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from headstart.kernels.energy import energy_distances
from headstart.kernels.engine.precision import stated_error
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.frechet import frechet_distances
from headstart.kernels.label_aware import label_aware_distances
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.prototype import prototype_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances

SIZES = (1, 2, 63, 123, 257, 1000)
DIMS = (1, 3, 64, 100, 512, 2048)
COUNTS = (1, 5, 300)
KINDS = ("plain", "shifted", "small", "large", "duplicates", "all-equal")

NAMES = torch.tensor([7, 0, 2**63 - 1, 10**12])
"""Labels: far apart, up to the largest int64, and not in order."""

U = {"fp32": 2.0**-24, "fp64": 2.0**-53}


class Case(NamedTuple):
    """A target of N rows, T tasks of which one has n rows and the others one to three, D features."""

    target: int
    rows: int
    dim: int
    tasks: int
    kind: str

    def __str__(self) -> str:
        return f"N{self.target}-n{self.rows}-D{self.dim}-T{self.tasks}-{self.kind}"

    def make(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, RaggedTasks]:
        generator = torch.Generator().manual_seed(self.target + 1000 * self.rows + self.dim)

        def rows(n: int) -> Tensor:
            # Like features after a ReLU: not centred, and of uneven spread.
            values = torch.randn(n, self.dim, generator=generator).clamp_min(-0.5)
            return change(self.kind, values * torch.linspace(0.5, 1.5, self.dim)).to(device, dtype)

        target = rows(self.target)
        sizes = [self.rows, *(1 + t % 3 for t in range(1, self.tasks))]
        return target, RaggedTasks.from_list([rows(n) for n in sizes])

    def make_labelled(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, RaggedTasks]:
        """The same target and tasks, and the labels of both: of up to two, three or four classes a set of rows."""
        target, tasks = self.make(device, dtype)
        generator = torch.Generator().manual_seed(self.target + 1000 * self.rows + self.dim)

        def labels(n: int, seed: int) -> Tensor:
            return NAMES[torch.randint(0, 2 + seed % 3, (n,), generator=generator)].to(device)

        its = torch.cat([labels(n, self.rows + t) for t, n in enumerate(tasks.sizes.tolist())])
        return target, labels(self.target, self.target + self.dim), RaggedTasks(tasks.features, tasks.offsets, its)


def change(kind: str, x: Tensor) -> Tensor:
    return {
        "plain": lambda: x,
        "shifted": lambda: x + 1e3,
        "small": lambda: x * 1e-4,
        "large": lambda: x * 1e4,
        "duplicates": lambda: x.repeat_interleave(2, 0)[: len(x)],
        "all-equal": lambda: x[:1].expand_as(x).contiguous(),
    }[kind]()


def pairwise_cases() -> list[Case]:
    """Cases that hold every pair of values of every two factors: greedily, the case with most new pairs first."""
    factors = (SIZES, SIZES, DIMS, COUNTS, KINDS)
    places = list(combinations(range(len(factors)), 2))
    missing = {(a, b, x, y) for a, b in places for x, y in product(factors[a], factors[b])}
    cases = []
    while missing:
        a, b, x, y = min(missing, key=str)
        case = [None] * len(factors)
        case[a], case[b] = x, y
        for place, values in enumerate(factors):
            if case[place] is None:
                case[place] = max(values, key=lambda v, place=place: _gain(case, place, v, missing))
        cases.append(Case(*case))
        missing -= {(i, j, case[i], case[j]) for i, j in places}
    return cases


def _gain(case: list, place: int, value: object, missing: set) -> int:
    gain = 0
    for other, held in enumerate(case):
        if held is not None and other != place:
            i, j = sorted((place, other))
            x, y = (value, held) if i == place else (held, value)
            gain += (i, j, x, y) in missing
    return gain


def double(tasks: RaggedTasks) -> RaggedTasks:
    return RaggedTasks(tasks.features.double(), tasks.offsets, tasks.labels)


def picked(tasks: RaggedTasks) -> tuple[list[int], RaggedTasks]:
    """Some of the tasks, where the definition takes its time: the first, which may be large, the last, and others."""
    chosen = sorted({*range(0, tasks.num_tasks, 61), tasks.num_tasks - 1})
    sizes = tasks.sizes.tolist()
    labels = None if tasks.labels is None else [tasks.labels.split(sizes)[t] for t in chosen]
    return chosen, RaggedTasks.from_list([tasks.task(t) for t in chosen], labels)


CASES = pairwise_cases()

SOME_SLOW = [
    pytest.param(case, id=str(case), marks=pytest.mark.slow if 1000 in (case.target, case.rows) else ())
    for case in CASES
]
"""The same for what iterates over N n_t numbers."""


def norms(x: Tensor, y: Tensor, centre: Tensor | None = None) -> Tensor:
    """|x_i - c|^2 + |y_j - c|^2 in float64 [N, M], for the centre c that errors are relative to.

    The centre is the mean of a sample of x, which may lie a third of the spread from the mean, or it is given.
    """
    x, y = x.double(), y.double()
    centre = x.mean(0) if centre is None else centre.double()
    return 1.25 * ((x - centre).square().sum(1)[:, None] + (y - centre).square().sum(1)) + 1e-300


def square_error(x: Tensor, y: Tensor, precision: str, centre: Tensor | None = None) -> Tensor:
    """Largest error of |x - y|^2 by a product of centred rows, [N, M].

    A centred row is rounded by u, a product of D terms by 6 sqrt(D) u of the norms (Higham and Mary, SIAM J. Sci.
    Comput. 41 (2019) A2815, theorem 2.4: six standard deviations).
    """
    return (6 * x.shape[1] ** 0.5 + 8) * U[precision] * norms(x, y, centre)


def distance_error(x: Tensor, y: Tensor, precision: str) -> float:
    """Largest error of mean |x - y|: that of the square over 2 d, or over what a pair is computed again below."""
    again = norms(x, y) * (2.0**-10 if precision == "fp32" else 2.0**-20)
    d = torch.maximum(torch.cdist(x.double(), y.double()), again.sqrt())
    return float((square_error(x, y, precision) / (2 * d) + 16 * U[precision] * d).mean())


def near_rows(distance: float, apart: float, device: str) -> tuple[Tensor, RaggedTasks]:
    """A target and a task of 10 float32 rows each, D = 16, in two groups that are `apart` in each coordinate.

    Five rows of the target are about `distance` from five of the task's in each coordinate.
    """
    generator = torch.Generator().manual_seed(3)
    y, x, moved = (torch.randn(10, 16, generator=generator).to(device) for _ in range(3))
    x[5:] += apart
    y[5:] += apart
    x[:5] = y[:5] + distance * moved[:5]
    return x, RaggedTasks.from_list([y])


def gradient_error(x: Tensor, y: Tensor) -> float:
    """Largest error of the gradient of mean_j |x_i - y_j| by x_i, of one row, in float32.

    A slope is off by half of what its square is off by, and s x - s y, from a product, by some u of both rows times s;
    where the product cancelled both are from the difference, and only the result is rounded. No more for a kernel of
    sigma > 0.6, whose slope s = exp(-t) / sigma^2, t = d^2 / 2 sigma^2, is off by t times what t is: s d t < 1.
    """
    ratio = norms(x, y) / torch.cdist(x.double(), y.double()).square().clamp(min=1e-300)
    products = ((3 * x.shape[1] ** 0.5 + 4) * ratio + 8 * (2 * ratio).sqrt()).masked_fill_(ratio > 2.0**10, 0)
    return float((products + 8).mean(1).amax()) * U["fp32"]


def by_singular_values(target: Tensor, tasks: RaggedTasks) -> Tensor:
    """`naive.frechet_distances` in the form that loses no digits, by numpy and without triangles, [T] float64.

    The last trace is the sum of the singular values of X Y^T / sqrt(N n_t), for centred rows X and Y: less the target's
    first row, which float64 holds exactly where they are float32 and near each other.
    """
    first, distances = target[0].double(), []
    a = (target.double() - first).cpu().numpy()
    mean, a = a.mean(0), a - a.mean(0)
    for t in range(tasks.num_tasks):
        b = (tasks.task(t).double() - first).cpu().numpy()
        apart, b = ((mean - b.mean(0)) ** 2).sum(), b - b.mean(0)
        # At most D of the min(N, n) are not 0 but for rounding.
        common = np.linalg.svd(a @ b.T, compute_uv=False)[: a.shape[1]].sum() / (len(a) * len(b)) ** 0.5
        distances.append(float(apart + (a**2).sum() / len(a) + (b**2).sum() / len(b) - 2 * common))
    return torch.tensor(distances, dtype=torch.float64, device=target.device)


HALF_STEP = {"bf16": 2.0**-8, "tf32": 2.0**-11, "bf16x3": 2.0**-17}
"""Largest relative change of a number that is rounded."""


def rounding_error(x: Tensor, y: Tensor, precision: str, num_means: int) -> float:
    """The stated error, from the exact mean distance."""
    return stated_error(x, y, float(torch.cdist(x.double(), y.double()).mean()), precision, num_means=num_means)


def held(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the most bytes that it holds on the CPU."""
    # Of the CPU alone: on a GPU machine the default would start CUPTI, which takes seconds and is not always allowed.
    # And of memory alone: events of operators, which none is of that scope, would take longer than the call.
    enable, scopes = profiler._enable_profiler, {RecordScope.LITE_INTERPRETER}
    with (
        mock.patch.object(profiler, "_enable_profiler", lambda config, activities: enable(config, activities, scopes)),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        was_enabled = gc.isenabled()
        gc.disable()  # garbage of an earlier call of this, if it were collected now, would count as freed by this one
        try:
            result = call()
        finally:
            if was_enabled:
                gc.enable()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return result, most


class AddedAsOnCuda(TorchFunctionMode):
    """What CUDA's reductions do: the numbers of a row are added in another order where there are fewer than 16 rows."""

    def __torch_function__(self, function: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = named or {}
        of_rows = function is torch.linalg.vector_norm or (function is torch.Tensor.sum and given[1:] == (1,))
        if of_rows and given[0].ndim == 2 and len(given[0]) < 16:
            given = (given[0].flip(1), *given[1:])
        return function(*given, **named)


def thirds(x: Tensor) -> Tensor:
    """Labels of three classes in turn, [N]."""
    return torch.arange(len(x), device=x.device) % 3


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mean distances": euclidean_distances,
    "pair sums": lambda x, t, **how: euclidean_distances(x, t, form="pairs", **how),
    "energy": energy_distances,
    "mmd": mmd_distances,
    "neighbours": nearest_neighbours,
    "prototype distances": lambda x, t, **how: prototype_distances(x, t, labels=thirds(x), **how),
    "Fréchet distances": frechet_distances,
    "transports": sinkhorn_distances,
    "label-aware": lambda x, t, **how: label_aware_distances(x, t, labels=thirds(x), **how),
}
"""All of them, by what they report where that is one thing; tasks need labels for the two that take any."""

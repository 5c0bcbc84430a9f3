"""Distances over pairs of rows against their definitions, at every pair of values of sizes, D, T and hard inputs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from headstart.kernels import dispatch, naive
from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import BLOCK_ROWS, common_centre
from tests.kernels.cases import CASES, Case, U, distance_error, double, square_error

PATHS = [
    pytest.param(("cpu", "eager"), id="cpu"),
    *(pytest.param(("cuda", path), id=f"cuda-{path}", marks=pytest.mark.gpu) for path in dispatch.PATHS),
]


@pytest.fixture(params=PATHS)
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    device, path = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with dispatch.override(path):
        yield device


# Many stripes, panels and batches.
LARGE = pytest.param(Case(1500, 2500, 64, 300, "plain"), marks=pytest.mark.slow)


def kept(pairwise: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Four definitions ask for the distances of the same rows, which take their time where D is 2048."""
    found: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def once(x: Tensor, y: Tensor) -> Tensor:
        key = (x.data_ptr(), y.data_ptr(), len(x), len(y))
        if key not in found:
            found[key] = (pairwise(x, y), x, y)  # with the rows, so that no others come to lie where these did
        return found[key][0]

    return once


@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_fp32_against_the_definitions(case: Case, where: str, monkeypatch: pytest.MonkeyPatch):
    target, tasks = case.make(where)
    if case.tasks <= 5:
        monkeypatch.setattr(naive, "pairwise", kept(naive.pairwise))
    x, exact = target.double(), double(tasks)
    eager = dispatch.choose(target.device, "fp32", case.dim)[0] == "eager"
    sources = [tasks.task(t) for t in range(tasks.num_tasks)]
    # Beside eager, one centre serves all, which may be far from a pair of rows that are near each other, and pairs too
    # near for their product are at 0: their root is off by the root of the square's error.
    centre = None if eager else common_centre(tasks.features)
    cross = [_distance_error(target, y, centre) for y in sources]
    own = [_distance_error(y, y, centre) for y in sources]
    inner = _distance_error(target, target, centre)

    found = euclidean_distances(target, tasks, form="pairs").double()
    _close(found, naive.euclidean_distances(x, exact, form="pairs"), cross)
    found = energy_distances(target, tasks).double()
    _close(found, naive.energy_distances(x, exact), [2 * a + b + inner for a, b in zip(cross, own, strict=True)])
    found = euclidean_distances(target, tasks).double()
    spread = [float((y.double() - x.mean(0)).norm(dim=1).mean() + (x - x.mean(0)).norm(dim=1).mean()) for y in sources]
    _close(found, naive.euclidean_distances(x, exact), [BLOCK_ROWS * U["fp32"] * s for s in spread])

    found, bandwidths = mmd_distances(target, tasks)
    smallest = 1 / (2 * float(bandwidths.min()) ** 2)
    itself = _kernel_error(target, target, smallest, centre)
    errors = [
        2 * _kernel_error(target, y, smallest, centre) + _kernel_error(y, y, smallest, centre) + itself for y in sources
    ]
    _close(found.double(), naive.mmd_distances(x, exact, bandwidths), errors)


@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_neighbours_against_the_definition(case: Case, where: str):
    target, tasks = case.make(where)
    k = min(3, len(tasks.features))
    found = nearest_neighbours(target, tasks, k)
    distances, _ = naive.nearest_neighbours(target.double(), tasks.features.double(), k)
    # Distances come from differences: rounded by u a coordinate and by the sum of D squares.
    allowed = 4 * case.dim**0.5 * U["fp32"] * distances
    if dispatch.choose(target.device, "fp32", case.dim)[0] != "eager":
        # Squares below tau tie there, and so a row may be missed that is nearer by less than the error of a product.
        lost = _wide(target) * square_error(target, tasks.features, "fp32", common_centre(tasks.features))
        allowed = allowed + ((distances**2 + lost.amax(1, keepdim=True)).sqrt() - distances)
    assert bool(((found.distances.double() - distances).abs() <= allowed + 1e-300).all())
    chosen = (target.double()[:, None] - tasks.features.double()[found.rows]).norm(dim=2)
    assert bool(((chosen - distances).abs() <= 2 * allowed + 1e-300).all())


def _distance_error(x: torch.Tensor, y: torch.Tensor, centre: torch.Tensor | None) -> float:
    """Of the mean distance; a centre is given beside eager."""
    if centre is None:
        return distance_error(x, y, "fp32")
    lost = _wide(x) * square_error(x, y, "fp32", centre)
    return float(torch.minimum(lost / torch.cdist(x.double(), y.double()), lost.sqrt()).mean())


def _kernel_error(x: torch.Tensor, y: torch.Tensor, smallest: float, centre: torch.Tensor | None) -> float:
    """|k(a) - k(b)| <= c |a - b| and <= 1 for squares a, b, and a few roundings of k."""
    wide = 1.0 if centre is None else _wide(x)
    return float((wide * smallest * square_error(x, y, "fp32", centre)).clamp(max=1).mean()) + 16 * U["fp32"]


def _wide(x: torch.Tensor) -> float:
    """A square is off by its rounding, by at most (D / 8 + 8) 2^-23 where it is set to 0: so is the root by at most."""
    return (x.shape[1] / 8 + 8) * 2.0**-23 / (6 * x.shape[1] ** 0.5 + 8) / U["fp32"] + 1


def _close(found: torch.Tensor, expected: torch.Tensor, allowed: list[float]) -> None:
    allowed = torch.tensor(allowed, dtype=torch.float64, device=found.device) + 4 * U["fp32"] * expected.abs()
    off = (found - expected).abs()
    worst = int((off - allowed).argmax())
    assert bool((off <= allowed).all()), f"task {worst}: {off[worst]:.3g} above {allowed[worst]:.3g}"

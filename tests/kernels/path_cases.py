"""The public functions over the fused and the streamed path: on CUDA, or on the CPU in Triton's interpreter.

Collected by test_programs.py in a child process where there is no CUDA device, because the interpreter is chosen when
Triton is imported.
"""

import re

import pytest
import torch

from headstart.kernels import dispatch, naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine import gpu, streamed, units
from headstart.kernels.engine.ground_cost import Cost, Points
from headstart.kernels.engine.pairs import pair_sums
from headstart.kernels.engine.softmin import Batch, choose_path, make_costs
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks, common_centre
from tests.kernels.cases import HALF_STEP, double, gradient_error, near_rows, rounding_error
from tests.kernels.other_device import DEVICE

# In the interpreter tf32 is fp32, of rows that were rounded before.
ROUNDED = ("bf16", "bf16x3") if units.INTERPRETED else ("bf16", "bf16x3", "tf32")


@pytest.fixture(params=["fused", "streamed"], autouse=True)
def path(request: pytest.FixtureRequest):
    with dispatch.override(request.param):
        yield request.param


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).relu().to(DEVICE)


def problem(d: int) -> tuple[torch.Tensor, RaggedTasks]:
    """Of two units of 16 rows, and tasks of part of one, of three and of two, which the interpreter takes 3 ms each."""
    return rows(20, d, 1), RaggedTasks.from_list([rows(n, d, n) + 0.1 for n in (1, 35, 17)])


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("d", [3, 100])
def test_energy_and_pairs(d: int, precision: str):
    x, tasks = problem(d)
    sources = [tasks.task(t) for t in range(3)]
    for ours, definition, slope in (
        (energy_distances(x, tasks, precision=precision), naive.energy_distances, 4),
        (
            euclidean_distances(x, tasks, form="pairs", precision=precision),
            lambda *given: naive.euclidean_distances(*given, form="pairs"),
            1,
        ),
    ):
        off = (ours.double() - definition(x.double(), double(tasks))).abs().cpu()
        assert bool((off <= torch.tensor([rounding_error(x, y, precision, slope) for y in sources])).all())


@pytest.mark.parametrize("n", [5, 20], ids="N{}".format)
@pytest.mark.parametrize("precision", ["fp32", *ROUNDED])
def test_the_distance_to_itself_is_exactly_zero(precision: str, n: int):
    x, tasks = problem(20)
    x = x[:n]
    among = RaggedTasks.from_list([tasks.task(1), x.clone(), tasks.task(2)])
    assert energy_distances(x, among, precision=precision)[1] == 0
    assert mmd_distances(x, among, precision=precision).distances[1] == 0
    kept = energy_self_terms(among, precision=precision)
    assert energy_distances(x, among, precision=precision, self_terms=kept)[1] == 0


def test_mmd_in_fp32():
    x, tasks = problem(20)
    found, bandwidths = mmd_distances(x, tasks)
    expected = naive.mmd_distances(x.double(), double(tasks), bandwidths)
    # Squares of about 20 off by 20 * 2^-21, over twice the square of a bandwidth above 1, in four means.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * 20 * 2.0**-21)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # exp2 of -inf is meant to be 0
@pytest.mark.parametrize(("sigma", "expected"), [(3e-20, 1 / 6), (1e23, 0.0)], ids=str)
def test_mmd_at_a_bandwidth_whose_coefficient_float32_has_not(sigma: float, expected: float):
    x = torch.tensor([[0.0, 0], [1, 1], [2, 3]], device=DEVICE)
    found = mmd_distances(x, RaggedTasks.from_list([x[:2]]), bandwidths=[sigma]).distances
    # As test_mmd.py has it: a kernel that is 1 for equal rows alone, or for all.
    torch.testing.assert_close(float(found), expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_near_pairs_keep_their_digits(precision: str):
    x, tasks = near_rows(1e-3, 100, DEVICE)
    x.requires_grad_()
    energy_distances(x, tasks, precision=precision).sum().backward()
    exact = x.detach().double().requires_grad_()
    naive.energy_distances(exact, double(tasks)).sum().backward()
    # Gradients are those of the rows as given, in float32, whatever the distances are computed in.
    allowed = 2 * (gradient_error(x.detach(), tasks.features) + gradient_error(x.detach(), x.detach())) / len(x)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=allowed)


def test_memory_changes_no_bit_and_tasks_in_pieces_agree(path: str, monkeypatch: pytest.MonkeyPatch):
    x, tasks = problem(20)
    how = (common_centre(tasks.features), torch.empty(0, dtype=torch.float64), "distance", "bf16", None)
    whole = energy_distances(x, tasks, precision="bf16")
    cross = pair_sums(x, tasks.features, tasks.offsets, *how, False)[0]
    # On a GPU a piece is longer than all that there is here; program_cases.py has more rows.
    piece = 32 if units.INTERPRETED else 2**14
    nearest = [nearest_neighbours(x, tasks, k) for k in (1, 2)]

    def few(self: gpu.Setting, offsets: torch.Tensor, rows: int):
        self._piece = piece
        return chunks(self, offsets, piece)

    chunks = gpu.Setting._chunks
    monkeypatch.setattr(gpu.Setting, "_chunks", few)
    torch.testing.assert_close(energy_distances(x, tasks, precision="bf16"), whole, rtol=0, atol=1e-6)
    for k, found in zip((1, 2), nearest, strict=True):
        assert torch.equal(nearest_neighbours(x, tasks, k).rows, found.rows)
    if path == "streamed":  # stripes in shares of one, tasks across shares, and both of the target's units alone
        assert torch.equal(pair_sums(x, tasks.features, tasks.offsets, *how, False)[0], cross)


def test_a_bound_that_is_too_small_is_refused():
    x, tasks = problem(20)
    with pytest.raises(ValueError, match="at least"):
        energy_distances(x, tasks, precision="bf16", memory=100)


def test_the_least_bound_is_enough_for_a_target_longer_than_the_tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streamed, "PARTIALS", 2**10)  # a bound that this small input can meet
    x, tasks = rows(40, 20, 1), RaggedTasks.from_list([rows(5, 20, 2)])
    plain = energy_distances(x, tasks, precision="bf16")
    with pytest.raises(ValueError, match="at least") as refused:
        energy_distances(x, tasks, precision="bf16", memory=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert torch.equal(energy_distances(x, tasks, precision="bf16", memory=least), plain)


@pytest.mark.parametrize("k", [2, 7, 40])
def test_several_nearest(k: int, path: str):
    x, tasks = problem(20)
    with dispatch.report() as reports:
        found = nearest_neighbours(x, tasks, k)
    assert reports[0].path == path
    exact, numbers = naive.nearest_neighbours(x.double(), tasks.features.double(), k)
    # As below, of float32: where the k-th and the next lie closer than the products' error either may be given.
    reach = 2 * torch.cat([x, tasks.features]).double().norm(dim=1).amax()
    allowed = 2 * (6 * 20**0.5 + 8) * 2.0**-24 * reach**2 / exact
    assert bool(((found.distances.double() - exact).abs() <= allowed).all())
    given = (x.double()[:, None] - tasks.features.double()[found.rows]).norm(dim=2)
    torch.testing.assert_close(found.distances.double(), given, rtol=2.0**-20, atol=0)
    assert all(len(set(row)) == k for row in found.rows.tolist())
    assert float((found.rows == numbers).double().mean()) > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nearest(precision: str, path: str):
    x, tasks = problem(20)
    found = nearest_neighbours(x, tasks, precision=precision)
    y = tasks.features.double()
    exact, numbers = naive.nearest_neighbours(x.double(), y, 2)
    # Rounding moves a row by h of its norm at most, and so a distance by h of both norms; a product of 20 terms is off
    # by (6 sqrt(20) + 8) u of their squares, and its root by that over 2 d. A row that is missed seemed as far as the
    # one that is given: both may be off.
    centre = common_centre(tasks.features).double()
    reach = (x.double() - centre).norm(dim=1) + (y - centre).norm(dim=1).amax()
    product = (6 * 20**0.5 + 8) * 2.0**-24 * reach**2 / (2 * exact[:, 0])
    allowed = 2 * (HALF_STEP.get(precision, 0.0) * reach + product)
    off = found.distances[:, 0].double() - exact[:, 0]
    # What is given is the distance of its row from their difference: rounded by some u, never nearer than the nearest.
    rounding = 2.0**-21 * exact[:, 0]
    assert bool(((off >= -rounding) & (off <= allowed + rounding)).all())
    clear = exact[:, 1] - exact[:, 0] > allowed
    assert bool(clear.any())
    assert torch.equal(found.rows[clear, 0], numbers[clear, 0])


@pytest.mark.parametrize("precision", ["fp32", *ROUNDED])
def test_softmins_of_a_pair_that_is_not_held(precision: str, path: str):
    x, tasks = problem(20)
    rows_, columns = Points(tasks.features, tasks.offsets), Points(x, torch.tensor([0, len(x)]))
    cost = Cost(2, None, precision, common_centre(tasks.features))
    held = make_costs(Batch(rows_, columns, [1], (35, len(columns.features)), cost, 2**26))
    batch = Batch(rows_, columns, [1], None, cost, 2**26)
    how = choose_path(batch)
    assert how[0] == ("fused" if path == "fused" else "eager")
    recomputed = make_costs(batch, how[0])
    f, g = rows(1, 35, 3), rows(1, 20, 4)
    for epsilon in (0.5, 20.0):
        # A cost of about 20 is off by some 20 * 2^-21, and so is its softmin.
        torch.testing.assert_close(recomputed.rows(g, epsilon), held.rows(g, epsilon), rtol=0, atol=1e-4)
        torch.testing.assert_close(recomputed.columns(f, epsilon), held.columns(f, epsilon), rtol=0, atol=1e-4)


def test_softmins_that_the_programs_have_not_are_eager(path: str):
    x, tasks = problem(20)
    rows_, columns = Points(tasks.features, tasks.offsets), Points(x, torch.tensor([0, len(x)]))
    cost = Cost(2, None, "bf16", common_centre(tasks.features))
    enough = 2 * (35 + 20) * 64 * 16  # the operands, of which each row has 64 numbers, in half of it
    for other, memory, taken in (
        (cost, enough, path == "fused"),
        (cost, enough - 1, False),
        (cost._replace(p=1), enough, False),
        (cost._replace(labels=torch.zeros(1, 1, device=DEVICE)), enough, False),
        (cost._replace(precision="fp64"), enough, False),
    ):
        assert choose_path(Batch(rows_, columns, [1], None, other, memory))[0] == ("fused" if taken else "eager")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # as it is refused, in the end
def test_rows_so_far_out_that_squares_overflow_are_refused():
    x, tasks = problem(20)
    far = RaggedTasks(tasks.features * 1e20, tasks.offsets)
    for call in (
        lambda: euclidean_distances(x, far, form="pairs"),
        lambda: euclidean_distances(x * 1e20, tasks, form="pairs"),
        lambda: nearest_neighbours(x, far),
    ):
        with pytest.raises(ValueError, match="so far that squares overflow"):
            call()
    near = RaggedTasks(tasks.features * 1e16, tasks.offsets)
    expected = naive.euclidean_distances(x.double(), double(near), form="pairs")
    torch.testing.assert_close(euclidean_distances(x, near, form="pairs").double(), expected, rtol=1e-5, atol=0)


def test_self_terms_of_another_path_are_refused(path: str):
    x, tasks = problem(3)
    kept = energy_self_terms(tasks, precision="bf16")
    with dispatch.override("eager"), pytest.raises(ValueError, match=f"path {path}"):
        energy_distances(x, tasks, precision="bf16", self_terms=kept)

"""Sinkhorn divergences against their definition in float64, and what is promised of error, memory and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.kernels import dispatch, naive
from headstart.kernels.engine.ground_cost import LEAST_CHUNK, Cost, chunk_bytes
from headstart.kernels.engine.precision import rounded
from headstart.kernels.engine.transport import Settings
from headstart.kernels.engine.transport_operators import warn_of
from headstart.kernels.ragged import RaggedTasks, common_centre
from headstart.kernels.sinkhorn import default_epsilon, sinkhorn_distances, sinkhorn_self_terms
from tests.kernels.cases import HALF_STEP, KINDS, SOME_SLOW, Case, U, change, double, gradient_error, near_rows, picked

TOLERANCE = {"fp32": 1e-4, "fp64": 1e-10}


def features(n: int, d: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).clamp_min(-0.5).to(device, dtype)


def costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    """`naive.ground_cost` without an array [N, M, D]."""
    return naive.pairwise(x.double(), y.double()) ** p / p


def largest(x: Tensor, tasks: RaggedTasks, p: int) -> float:
    """The largest cost among the rows of the target, those of a task, and between both."""
    sides = [(x, x), *((x, tasks.task(t)) for t in range(tasks.num_tasks))]
    sides += [(tasks.task(t), tasks.task(t)) for t in range(tasks.num_tasks)]
    return max(float(costs(a, b, p).amax()) for a, b in sides)


def bound(c: float, epsilon: float, d: int, p: int, precision: str, tolerance: float) -> float:
    """The stated error, with c the largest cost.

    Each value is the dual's at potentials (f, softmin f): concave, so below the optimum by at most
    <f* - f, 1/N - marginal> <= osc(f* - f) / 2 times the L1 error, and the potentials of costs in [0, c] range over
    c at most. Half of it and half of it again comes from the self terms, with the other sign.

    Rounding: rows lie within sqrt(2 c) of the centre, so a cost is off by (6 sqrt(D) + 8) u 2 c (Higham and Mary, SIAM
    J. Sci. Comput. 41 (2019) A2815: six standard deviations of a product), at most 28 sqrt(D) u c; that in three terms
    of weight 1, 1/2, 1/2, and some u of c and of epsilon from softmin. For p = 1, an error e of d^2 is e / 2 d, and
    d^2 is at least 2^-10 of the norms (fp64: 2^-20, which tolerance covers), or else from differences.
    """
    return (tolerance + (64 if p == 2 else 512) * d**0.5 * U[precision]) * (c + epsilon)


def reference(x: Tensor, tasks: RaggedTasks, epsilon: float, p: int, num_iterations: int = 300) -> Tensor:
    def transport(a: Tensor, b: Tensor) -> Tensor:
        return naive.entropic_transport(costs(a, b, p), epsilon, num_iterations=num_iterations)

    own, sources = transport(x, x), [tasks.task(t) for t in range(tasks.num_tasks)]
    return torch.stack([transport(x, y) - (own + transport(y, y)) / 2 for y in sources])


@pytest.mark.parametrize("case", SOME_SLOW)
def test_parity_with_the_definition(case: Case, device: str):
    target, tasks = case.make(device)
    chosen, some = picked(tasks)
    for p in (1, 2):
        c = largest(target, some, p)
        # Where costs are far above epsilon the definition's plain iterations hardly converge; the next test takes time.
        epsilon = c / 4 or 0.1
        expected = reference(target, some, epsilon, p)
        for precision, tolerance in TOLERANCE.items():
            found = sinkhorn_distances(
                target, tasks, p=p, epsilon=epsilon, precision=precision, tolerance=tolerance, max_iterations=5000
            )
            assert bool(found.converged.all())
            assert found.distances.dtype == (torch.float64 if precision == "fp64" else torch.float32)
            allowed = bound(c, epsilon, case.dim, p, precision, tolerance)
            torch.testing.assert_close(found.distances[chosen].double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_at_a_small_epsilon_and_with_tasks_that_end_at_different_times(p: int, device: str):
    target = features(63, 16, 1, device)
    tasks = RaggedTasks.from_list([features(n, 16, n, device) * (1 + n % 3) for n in (1, 2, 63, 70, 123)])
    found = sinkhorn_distances(target, tasks, p=p, tolerance=1e-9, max_iterations=20000)
    assert len(set(found.num_iterations.tolist())) >= 2
    expected = naive.sinkhorn_distances(target, tasks, epsilon=found.epsilon, p=p, num_iterations=3000)
    allowed = bound(largest(target, tasks, p), found.epsilon, 16, p, "fp64", 1e-9)
    torch.testing.assert_close(found.distances, expected, rtol=0, atol=2 * allowed)  # the definition's too


# Where the target's rows are all the same, nothing gives epsilon a scale: the other task may be too far for it.
@pytest.mark.filterwarnings("ignore:1 of 3 Sinkhorn distances did not converge")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 63, 257], ids="N{}".format)
def test_the_distance_to_itself_is_within_the_stated_error(n: int, kind: str, device: str):
    target = change(kind, features(n, 100, 3)).to(device, torch.float32)
    other = change(kind, features(5, 100, 4)).to(device, torch.float32)
    tasks = RaggedTasks.from_list([target.clone(), other, target.flip(0)])
    for p, precision in ((1, "fp32"), (2, "fp32"), (2, "fp64")):
        found = sinkhorn_distances(target, tasks, p=p, precision=precision)
        assert bool(found.converged[[0, 2]].all())
        allowed = bound(
            float(costs(target, target, p).amax()), found.epsilon, 100, p, precision, float(found.errors[0])
        )
        assert 0 <= float(found.distances[0]) <= allowed
        assert 0 <= float(found.distances[2]) <= allowed
        assert float(found.distances[1]) > 0


@pytest.mark.parametrize("scale", [1e-20, 1e-30], ids=str)  # squares of few digits, and of none
def test_an_epsilon_for_rows_whose_squares_vanish_in_float32(scale: float, device: str):
    x = features(40, 7, 1, device, torch.float32) * scale
    assert default_epsilon(x, 1) == pytest.approx(float(naive.median_distance(x.double())) / 10, rel=1e-12, abs=0)
    assert default_epsilon(x) == default_epsilon(x, 1) ** 2
    with pytest.raises(ValueError, match=r"epsilon is .*; accepted: .* or features of another scale"):
        sinkhorn_distances(x, RaggedTasks.from_list([x[:20]]))  # and not 0 for all, at the epsilon of equal rows
    with pytest.raises(ValueError, match=r"so near that their costs vanish in torch.float64; accepted: rows farther"):
        default_epsilon(x.double() * 1e-150)


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
def test_the_default_epsilon_follows_the_targets_scale_alone(p: int, device: str):
    x = features(123, 7, 1, device, torch.float32)
    assert default_epsilon(x, p) == pytest.approx((float(naive.median_distance(x.double())) / 10) ** p, rel=1e-6)
    for scale in (1e-4, 1e4):
        assert default_epsilon(x * scale, p) == pytest.approx(default_epsilon(x, p) * scale**p, rel=1e-5, abs=0)
    # Of features near 0.5 a shift by 1e3 keeps 14 bits.
    assert default_epsilon(x + 1e3, p) == pytest.approx(default_epsilon(x, p), rel=1e-3)
    assert default_epsilon(x[:1], p) == default_epsilon(x[:1].expand(9, 7), p) == pytest.approx(0.1**p)
    many = features(3000, 2, 2, device)
    spaced = many[torch.arange(1024, device=device) * 3000 // 1024]
    assert default_epsilon(many, p) == pytest.approx((float(naive.median_distance(spaced)) / 10) ** p, rel=1e-12)
    tasks = RaggedTasks.from_list([features(9, 7, 5, device, torch.float32) * 2])
    assert sinkhorn_distances(x, tasks, p=p).epsilon == default_epsilon(x, p)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 20), st.sampled_from([1, 2]))
def test_symmetry_and_order(seed: int, n: int, d: int, p: int):
    x, y, z = (features(n + i, d, seed + i) for i in range(3))
    epsilon = default_epsilon(x, p) * 10

    def distances(a: Tensor, sets: list[Tensor]) -> Tensor:
        tasks = RaggedTasks.from_list(sets)
        return sinkhorn_distances(a, tasks, p=p, epsilon=epsilon, tolerance=1e-8, max_iterations=20000).distances

    allowed = 2 * bound(largest(x, RaggedTasks.from_list([y, z]), p), epsilon, d, p, "fp64", 1e-8)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    found = distances(x, [x, y, z])
    torch.testing.assert_close(distances(shuffled, [z, shuffled, y]), found[[2, 0, 1]], rtol=0, atol=allowed)
    torch.testing.assert_close(distances(y, [x])[0], found[1], rtol=0, atol=allowed)


def test_self_terms_can_be_kept_and_those_of_something_else_are_refused(device: str):
    x = features(40, 8, 1, device)
    tasks = RaggedTasks.from_list([features(n, 8, n, device) for n in (3, 50)])
    kept = sinkhorn_self_terms(tasks, epsilon=0.5)
    plain = sinkhorn_distances(x, tasks, epsilon=0.5)
    for epsilon in (0.5, None):  # None: that of the self terms
        found = sinkhorn_distances(x, tasks, epsilon=epsilon, self_terms=kept)
        assert torch.equal(found.distances, plain.distances)
        assert found.epsilon == 0.5
    for asked in ({"p": 1}, {"precision": "fp32"}):
        with pytest.raises(ValueError, match="self terms are those of 2 tasks with precision fp64, p 2"):
            sinkhorn_distances(x, tasks, self_terms=kept, epsilon=0.5, **asked)
    with pytest.raises(ValueError, match=r"epsilon is 0\.6; accepted: 0\.5, that of the self terms"):
        sinkhorn_distances(x, tasks, self_terms=kept, epsilon=0.6)
    with pytest.raises(ValueError, match="task 0 is that of 3 rows; accepted: of its 4"):
        sinkhorn_distances(x, RaggedTasks(tasks.features, torch.tensor([0, 4, 53])), epsilon=0.5, self_terms=kept)


def as_rounded(x: Tensor, centre: Tensor, precision: str) -> Tensor:
    """The rows that the products of a precision see, in float64."""
    high, low = rounded((x - centre).float(), precision)
    return centre.double() + high.double() + (0 if low is None else low.double())


@pytest.mark.parametrize("p", [1, 2], ids="p{}".format)
@pytest.mark.parametrize("precision", HALF_STEP)
@pytest.mark.parametrize("held", [True, False], ids=["held", "recomputed"])
def test_costs_of_a_rounded_precision_are_those_of_the_rounded_rows(precision: str, p: int, held: bool, device: str):
    d, tolerance = 32, 1e-5
    x = features(70, d, 1, device, torch.float32) + 1
    tasks = RaggedTasks.from_list([x.clone(), *(features(n, d, n, device, torch.float32) + 1.2 for n in (1, 40, 150))])
    memory = None if held else chunk_bytes(x, LEAST_CHUNK, Cost(p, None, precision))  # the least that is accepted
    centre = common_centre(tasks.features)
    rows, seen = as_rounded(x, centre, precision), as_rounded(tasks.features, centre, precision)
    seen = RaggedTasks(seen, tasks.offsets)
    c = largest(rows, seen, p)
    epsilon = c / 4
    how = {"p": p, "precision": precision, "tolerance": tolerance, "memory": memory, "epsilon": epsilon}
    kept = sinkhorn_self_terms(tasks, **how)
    with dispatch.report() as reports:
        found = sinkhorn_distances(x, tasks, self_terms=kept, **how)
    assert any("do not fit" in each.reason for each in reports) == (not held)
    again = sinkhorn_distances(x, tasks, **how)
    assert torch.equal(found.distances, again.distances)
    expected = reference(rows, seen, epsilon, p)
    allowed = bound(c, epsilon, d, p, "fp32", tolerance)
    reach = float(torch.cat([x, tasks.features]).double().sub(centre).norm(dim=1).max())
    if precision == "bf16x3":  # the product of both low parts is left out
        allowed += 2.0**-14 * reach**2 if p == 2 else 2.0**-8 * reach
    torch.testing.assert_close(found.distances.double(), expected, rtol=0, atol=allowed)
    # And to the definition on the rows as given: the stated error.
    moved = HALF_STEP[precision] * reach
    allowed += 4 * moved if p == 1 else 4 * moved * ((2 * c) ** 0.5 + moved)
    expected = reference(x, tasks, epsilon, p)
    torch.testing.assert_close(found.distances.double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("precision", HALF_STEP)
def test_a_gradient_under_a_rounded_precision_is_that_at_the_rounded_rows(precision: str, device: str):
    x = features(40, 8, 1, device, torch.float32)
    tasks = RaggedTasks.from_list([features(50, 8, 2, device, torch.float32) + 0.5])
    centre = common_centre(tasks.features)
    how = {"epsilon": 2.0, "tolerance": 1e-6, "max_iterations": 5000}
    given = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(sinkhorn_distances(given, tasks, precision=precision, **how).distances.sum(), given)
    rows = as_rounded(x, centre, precision).requires_grad_()
    seen = RaggedTasks(as_rounded(tasks.features, centre, precision), tasks.offsets)
    (exact,) = torch.autograd.grad(sinkhorn_distances(rows, seen, **how).distances.sum(), rows)
    # A cost off by e moves the plan by e / epsilon of itself: e is some 64 sqrt(D) u of the costs, 30, and for bf16x3
    # 2^-15 of squared norms, 10. Weights of a row are 1/40 in both plans, differences at most 8.
    moved = (64 * 8**0.5 * U["fp32"] * 30 + (2.0**-15 * 10 if precision == "bf16x3" else 0)) / 2 + 4e-6
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2 * moved * 8 / 40)
    assert float(exact.abs().max()) > 20 * moved * 8 / 40


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3"])
def test_gradients_of_near_pairs_keep_their_digits(precision: str, device: str):
    x, tasks = near_rows(1e-4, 100, device)
    centre, epsilon, tolerance = common_centre(tasks.features), 20.0, 1e-5
    how = {"p": 1, "epsilon": epsilon, "tolerance": tolerance, "precision": precision}
    x.requires_grad_()
    (found,) = torch.autograd.grad(sinkhorn_distances(x, tasks, **how).distances.sum(), x)
    x = x.detach()
    rows, seen = x.double(), tasks.features.double()
    if precision in HALF_STEP:
        rows, seen = as_rounded(x, centre, precision), as_rounded(tasks.features, centre, precision)
    rows.requires_grad_()
    expected = naive.sinkhorn_distances(  # what 5,000 iterations change of its gradient is 1e-15
        rows, RaggedTasks(seen, tasks.offsets), epsilon=epsilon, p=1, num_iterations=100
    )
    (exact,) = torch.autograd.grad(expected.sum(), rows)
    # Two plans, of which each row has 1/10, against unit vectors. A plan is off by the tolerance, and by what costs and
    # potentials are off by over epsilon: rows 200 from the centre are rounded to u of it each, costs up to 400 to 8 u.
    # All of a row may go to one column: 10 times the mean over the columns.
    moved = tolerance + (2 * 200 + 2 * 8 * 400) * U["fp32"] / epsilon
    near = gradient_error(rows.detach(), seen) + gradient_error(rows.detach(), rows.detach())
    allowed = (2 * moved + near * 10) / 10
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=allowed)
    assert float(exact.abs().max()) > 1000 * allowed


def test_self_terms_bring_their_centre_and_precision(device: str):
    x, other = features(30, 8, 1, device, torch.float32), features(50, 8, 2, device, torch.float32) + 3
    first, second = RaggedTasks.from_list([x.clone()]), RaggedTasks.from_list([other])
    kept = sinkhorn_self_terms(first, epsilon=2.0, precision="bf16")
    assert kept.centre is not None
    assert float(sinkhorn_distances(x, first, precision="bf16", self_terms=kept).distances) < 1e-3
    short = sinkhorn_self_terms(RaggedTasks.from_list([x[:, :5]]), epsilon=2.0, precision="bf16")
    with pytest.raises(ValueError, match=r"centre \[5\]; accepted: \[8\]"):
        sinkhorn_distances(x, first, precision="bf16", self_terms=short)
    with pytest.raises(ValueError, match="precision bf16"):
        sinkhorn_distances(x, second, precision="fp32", self_terms=kept)


def test_what_does_not_converge_is_reported(device: str):
    x, tasks = (
        features(63, 3, 1, device),
        RaggedTasks.from_list([features(70, 3, 2, device), features(1, 3, 3, device)]),
    )
    with pytest.warns(RuntimeWarning, match="of 2 Sinkhorn distances did not converge in 1 iterations"):
        found = sinkhorn_distances(x, tasks, max_iterations=1)
    assert not bool(found.converged[0])
    assert found.num_iterations.tolist() == [1, 1]
    assert float(found.errors[0]) > 1e-3


def test_the_error_is_that_of_the_worst_of_three_plans(device: str):
    many, one = features(63, 3, 1, device), features(1, 3, 2, device)  # with one row a plan is exact at once
    how = {"epsilon": 0.1, "max_iterations": 1}
    for x, y in ((many, one), (one, many)):
        tasks = RaggedTasks.from_list([y])
        with pytest.warns(RuntimeWarning, match="1 of 1 Sinkhorn distances did not converge in 1 iterations"):
            found = sinkhorn_distances(x, tasks, **how)
        with pytest.warns(RuntimeWarning, match="1 of 1 Sinkhorn distances did not converge in 1 iterations"):
            again = sinkhorn_distances(x, tasks, self_terms=sinkhorn_self_terms(tasks, **how), max_iterations=1)
        assert float(found.errors) == float(again.errors) > 1e-3
        assert not bool(found.converged | again.converged)


def test_an_iteration_that_stands_still_by_rounding_is_reported(device: str):
    # Costs of 4,000 in float32 are whole multiples of 2e-4: at an epsilon of 1e-6 potentials no longer move, and the
    # marginal seems exact where in float64 it is wrong by 0.4.
    x, y = features(100, 16, 1, device, torch.float32), features(77, 16, 3, device, torch.float32) * 30
    with pytest.warns(RuntimeWarning, match="precision='fp64'"):
        found = sinkhorn_distances(x, RaggedTasks.from_list([y]), epsilon=1e-6, max_iterations=200)
    assert not bool(found.converged[0])
    assert bool(found.distances.isfinite().all())


@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_it_goes_on_until_the_error_with_its_rounding_is_within_the_tolerance(device: str):
    x = features(40, 16, 1, device, torch.float32)
    tasks = RaggedTasks.from_list([features(20 + t, 16, t, device, torch.float32) for t in range(30)])
    # Where an iteration stands still, the error is what rounding adds, and as much again at most.
    stalled = float(sinkhorn_distances(x, tasks, epsilon=1.0, tolerance=1e-9).errors.amax())
    assert bool(sinkhorn_distances(x, tasks, epsilon=1.0, tolerance=2 * stalled).converged.all())


def test_a_plan_that_only_rounding_puts_in_doubt_is_left_and_reported(device: str):
    x, y = torch.zeros(1, 4, device=device), torch.full((1, 4), 50.0, device=device)  # one pair, at a cost of 5,000
    with pytest.warns(RuntimeWarning, match="precision='fp64'"):
        found = sinkhorn_distances(x, RaggedTasks.from_list([y]), epsilon=1e-3, max_iterations=200)
    assert float(found.errors) == pytest.approx(2 * U["fp32"] * 5000 / 1e-3)
    assert int(found.num_iterations) < 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; accepted: a positive number"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"p": 3}, "p is 3; accepted: 1, 2"),
        ({"precision": "fp8"}, "accepted: bf16, tf32, bf16x3, fp32, fp64"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance is 1.0; accepted: .* less than 1"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"memory": 1}, "at least"),
    ],
)
def test_bad_options_are_refused(options: dict, said: str, device: str):
    x = features(5, 3, 1, device)
    with pytest.raises(ValueError, match=said):
        sinkhorn_distances(x, RaggedTasks.from_list([x]), **options)


def test_costs_that_overflow_are_refused(device: str):
    x, y = features(5, 3, 1, device, torch.float32), features(4, 3, 2, device, torch.float32)
    with pytest.raises(ValueError, match="overflow"):
        sinkhorn_distances(x * 1e20, RaggedTasks.from_list([y]), epsilon=1.0)


@pytest.mark.parametrize("epsilon", [1e-45, 1e-37, 1e38, 1e300], ids=str)
def test_an_epsilon_that_float32_cannot_divide_costs_by_is_refused(epsilon: float, device: str):
    x, y = features(20, 8, 1, device, torch.float32), features(30, 8, 2, device, torch.float32)
    tasks = RaggedTasks.from_list([y])
    with pytest.raises(ValueError, match=r"epsilon is .*; accepted: .* in torch.float32, .* or precision='fp64'"):
        sinkhorn_distances(x, tasks, epsilon=epsilon)


@pytest.mark.filterwarnings("ignore:1 of 1 Sinkhorn distances did not converge")
@pytest.mark.parametrize("epsilon", [1e-35, 1e37], ids=str)
def test_an_epsilon_near_what_float32_has_is_no_nan(epsilon: float, device: str):
    x, y = features(20, 8, 1, device, torch.float32), features(30, 8, 2, device, torch.float32)
    found = sinkhorn_distances(x, RaggedTasks.from_list([y]), epsilon=epsilon, max_iterations=50)
    assert bool(found.distances.isfinite().all() & found.errors.isfinite().all())


@pytest.mark.parametrize("scale", [1e-20, 1e20], ids=str)
def test_features_of_a_scale_whose_squares_float32_has_not_are_taken_by_fp64(scale: float, device: str):
    x, y = features(20, 8, 1, device, torch.float32), features(30, 8, 2, device, torch.float32)
    tasks = RaggedTasks.from_list([y * scale])
    with pytest.raises(ValueError, match="precision='fp64'"):
        sinkhorn_distances(x * scale, tasks)
    found = sinkhorn_distances(x * scale, tasks, precision="fp64", tolerance=1e-6)
    plain = sinkhorn_distances(x, RaggedTasks.from_list([y]), precision="fp64", tolerance=1e-6)
    # float32 rounds a scaled row by 2^-24 of itself, and squares below 1.2e-38, of which epsilon is made, to 2^-149.
    torch.testing.assert_close(found.distances / scale**2, plain.distances, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.epsilon / scale**2, plain.epsilon, rtol=1e-3, atol=0)


def test_a_target_that_has_no_costs_is_named(device: str):
    x, tasks = features(5, 3, 1, device), RaggedTasks.from_list([features(4, 3, 2, device)])
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 1] = bad
        for epsilon in (None, 1.0):
            with pytest.raises(ValueError, match="target has NaN or infinite features in row 2"):
                sinkhorn_distances(broken, tasks, epsilon=epsilon)
    with pytest.raises(ValueError, match=r"so far apart that their costs overflow in torch\.float64"):
        sinkhorn_distances(x * 1e200, tasks)


def test_an_error_that_is_no_number_is_warned_of():
    with pytest.warns(RuntimeWarning, match="1 of 2 Sinkhorn distances did not converge"):
        warn_of(torch.tensor([0.0, math.nan]), Settings(1.0, 1e-3, 10, 2**20))


def test_half_precision_rows_are_computed_in_single(device: str):
    x, y = features(40, 8, 1, device).half(), features(33, 8, 2, device).half()
    found = sinkhorn_distances(x, RaggedTasks.from_list([y]), epsilon=1.0)
    wide = sinkhorn_distances(x.float(), RaggedTasks.from_list([y.float()]), epsilon=1.0)
    assert found.distances.dtype == torch.float32
    assert double(RaggedTasks.from_list([y])).features.dtype == torch.float64
    torch.testing.assert_close(found.distances, wide.distances, rtol=1e-5, atol=0)

"""MMD: the statistic, its bandwidths, and what is kept of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine.terms import SelfTerms
from headstart.kernels.mmd import MEDIAN_ROWS, MULTIPLES, median_bandwidths, mmd_distances, mmd_self_terms
from headstart.kernels.ragged import RaggedTasks
from tests.kernels.cases import KINDS, change, double, rounding_error


def rows(n: int, d: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("unbiased", [False, True], ids=["v", "u"])
@pytest.mark.parametrize("bandwidths", [None, [2.0], [0.5, 1.0, 7.0]], ids=["median", "one", "three"])
def test_fp64_is_the_definition(bandwidths: list[float] | None, unbiased: bool, device: str):
    x = rows(63, 17, 1, device)
    tasks = RaggedTasks.from_list([x[::2], *(rows(n, 17, n, device) * 1.5 for n in (2, 63, 300))])
    given = None if bandwidths is None else torch.tensor(bandwidths)
    found = mmd_distances(x, tasks, bandwidths=given, unbiased=unbiased)
    expected = naive.mmd_distances(x, tasks, found.bandwidths, unbiased=unbiased)
    # Squares from products around a centre: some 1e-15 of the norms, over 2 sigma^2.
    torch.testing.assert_close(found.distances, expected, rtol=0, atol=1e-12)
    if unbiased:
        assert found.distances[0] < 0  # of the target's own rows: not clamped
    else:
        assert bool((found.distances >= 0).all())


def test_default_bandwidths_follow_the_target_alone_and_its_scale(device: str):
    x = rows(50, 5, 1, device)
    found = median_bandwidths(x)
    apart = torch.nn.functional.pdist(x)
    torch.testing.assert_close(
        found, (apart.median() * torch.tensor(MULTIPLES, device=device)).cpu(), check_dtype=False
    )
    torch.testing.assert_close(median_bandwidths(1e4 * x), 1e4 * found)
    single = x.to(torch.float32)
    # Of float32 a distance over five coordinates is off by some 4 u; squares of the two last scales are not in it.
    for scale in (1.0, 1e-30, 1e30):
        exact = float(naive.median_distance((scale * single).double())) * torch.tensor(MULTIPLES, dtype=torch.float64)
        torch.testing.assert_close(median_bandwidths(scale * single), exact, rtol=2.0**-22, atol=0)
    one, two = (mmd_distances(x, RaggedTasks.from_list([rows(9, 5, s, device)])) for s in (2, 3))
    assert torch.equal(one.bandwidths, two.bandwidths)
    assert median_bandwidths(x[:1].expand(9, 5)).tolist() == list(MULTIPLES)
    many = rows(3 * MEDIAN_ROWS, 2, 1, device)
    for few in (many, many[1:]):  # of which every third, too
        torch.testing.assert_close(median_bandwidths(few), median_bandwidths(few[::3]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 63, 257, 300], ids="N{}".format)
def test_the_distance_to_itself_is_exactly_zero(n: int, kind: str, device: str):
    x = change(kind, rows(n, 20, n, device, torch.float32))
    other = change(kind, rows(5, 20, 9, device, torch.float32)) + (1 if kind == "all-equal" else 0)
    tasks = RaggedTasks.from_list([other, x.clone(), other, x.clone()])
    for precision in ("fp32", "bf16", "tf32", "bf16x3"):
        for memory in (None, 64 * 2**20):
            found = mmd_distances(x, tasks, precision=precision, memory=memory).distances
            assert found[1] == 0
            assert found[3] == 0
            energy = energy_distances(x, tasks, precision=precision, memory=memory)
            assert energy[1] == 0
            assert energy[3] == 0


def test_self_terms_can_be_kept_and_carry_their_bandwidths(device: str):
    x = rows(40, 6, 1, device)
    tasks = RaggedTasks.from_list([rows(n, 6, n, device) for n in (3, 80)])
    kept = mmd_self_terms(tasks, median_bandwidths(x))
    assert torch.equal(mmd_distances(x, tasks, self_terms=kept).distances, mmd_distances(x, tasks).distances)
    with pytest.raises(ValueError, match="bandwidths"):
        mmd_distances(x, tasks, self_terms=kept, bandwidths=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="self terms have bandwidths None; accepted: tensor"):
        mmd_distances(x, tasks, self_terms=replace(kept, bandwidths=None), bandwidths=kept.bandwidths)
    with pytest.raises(ValueError, match="kind distance"):
        mmd_distances(x, tasks, self_terms=energy_self_terms(tasks), bandwidths=kept.bandwidths)
    with pytest.raises(ValueError, match="precision"):
        mmd_distances(x.float(), RaggedTasks(tasks.features.float(), tasks.offsets), self_terms=kept)


def test_self_terms_join_where_they_agree(device: str):
    x = rows(40, 6, 1, device, torch.float32)
    parts = [RaggedTasks.from_list([rows(n, 6, n, device, torch.float32) for n in sizes]) for sizes in ((3, 80), (7,))]
    whole = RaggedTasks.from_list([part.task(t) for part in parts for t in range(part.num_tasks)])
    for precision in ("fp32", "bf16"):
        # What is rounded needs one centre; what is not has each its own.
        centre = whole.features.mean(0) if precision == "bf16" else None
        joined = SelfTerms.join([energy_self_terms(part, precision=precision, centre=centre) for part in parts])
        kept = energy_self_terms(whole, precision=precision, centre=centre)
        assert torch.equal(joined.sums, kept.sums)
        found = energy_distances(x, whole, precision=precision, self_terms=joined)
        assert torch.equal(found, energy_distances(x, whole, precision=precision, self_terms=kept))
        off = (found.double() - naive.energy_distances(x.double(), double(whole))).abs().cpu()
        stated = [rounding_error(x, whole.task(t), precision, 4) for t in range(whole.num_tasks)]
        assert bool((off <= torch.tensor(stated)).all())
    with pytest.raises(ValueError, match="centre"):
        SelfTerms.join([energy_self_terms(part, precision="bf16") for part in parts])


def test_self_terms_that_do_not_agree_are_not_joined(device: str):
    tasks = RaggedTasks.from_list([rows(5, 6, 1, device)])
    first = mmd_self_terms(tasks, [1.0, 2.0])
    for name, other in (
        ("kind", "distance"),
        ("precision", "fp32"),
        ("path", "fused"),
        ("centre", tasks.features[0]),
        ("bandwidths", torch.tensor([1.0, 3.0])),
    ):
        with pytest.raises(ValueError, match=f"self terms 1 have {name} "):
            SelfTerms.join([first, replace(first, **{name: other})])
    with pytest.raises(ValueError, match="no self terms"):
        SelfTerms.join([])


@pytest.mark.parametrize(
    "centre", [torch.zeros(5), torch.tensor([0.0, float("nan"), 0, 0, 0, 0])], ids=["short", "NaN"]
)
def test_a_centre_that_rows_do_not_have_is_refused(centre: torch.Tensor):
    tasks = RaggedTasks.from_list([rows(5, 6, 1)])
    with pytest.raises(ValueError, match=r"centre is torch.float32 \[[56]\] on cpu; accepted: finite, \[6\]"):
        energy_self_terms(tasks, precision="bf16", centre=centre)


@pytest.mark.parametrize("bad", [[], [0.0], [-1.0], [float("nan")], [float("inf")], [[1.0]]], ids=str)
def test_bad_bandwidths_are_refused(bad: list):
    x = rows(4, 3, 1)
    with pytest.raises(ValueError, match="positive and finite"):
        mmd_distances(x, RaggedTasks.from_list([x + 1]), bandwidths=torch.tensor(bad))


@pytest.mark.parametrize("sigma", [1e-200, 3e-20, 2e22, 1e200], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_a_bandwidth_whose_coefficient_no_dtype_has_is_taken(precision: str, sigma: float, device: str):
    x = torch.tensor([[0.0, 0], [1, 1], [2, 3]], device=device, requires_grad=True)  # exact in bf16, about any of them
    found = mmd_distances(x, RaggedTasks.from_list([x.detach()[:2]]), bandwidths=[sigma], precision=precision).distances
    # A kernel that is 1 for equal rows and 0 for others, or 1 for all: 1/3 + 1/2 - 2/3. Distances squared are 2 and
    # more, or 13 at most, so that the others are below exp(-1e30) or above 1 - 1e-30.
    torch.testing.assert_close(float(found.detach()), 1 / 6 if sigma < 1 else 0.0, rtol=2.0**-22, atol=0)
    found.sum().backward()
    # 4 c |x - y| at most, of which c is at least the least normal number, and |x - y| below 4.
    assert float(x.grad.abs().max()) <= (0 if sigma < 1 else 16 * torch.finfo(torch.float32).tiny)


def test_bandwidths_may_be_a_list_of_numbers():
    x = rows(4, 3, 1)
    tasks, sigmas = RaggedTasks.from_list([x + 1]), [0.1, 3]
    found = mmd_distances(x, tasks, bandwidths=sigmas)
    expected = mmd_distances(x, tasks, bandwidths=torch.tensor(sigmas, dtype=torch.float64))
    assert torch.equal(found.distances, expected.distances)
    assert found.bandwidths.tolist() == sigmas
    kept = mmd_self_terms(tasks, sigmas)
    assert torch.equal(mmd_distances(x, tasks, self_terms=kept).distances, expected.distances)


def test_one_row_has_no_unbiased_estimate():
    x = rows(4, 3, 1)
    with pytest.raises(ValueError, match="task 1 has one row"):
        mmd_distances(x, RaggedTasks.from_list([x, x[:1]]), unbiased=True)
    with pytest.raises(ValueError, match="target has one row"):
        mmd_distances(x[:1], RaggedTasks.from_list([x]), unbiased=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 20))
def test_symmetry_and_permutation(seed: int, n: int, d: int):
    x, y = rows(n, d, seed), rows(n + 3, d, seed + 1) + 0.5
    sigma = torch.tensor([0.7, 2.0])

    def mmd(a: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return mmd_distances(a, RaggedTasks.from_list(others), bandwidths=sigma).distances

    shuffled = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    # Each of three means of numbers in [0, 1] is off by the rounding of squares over 2 sigma^2: some 1e-14.
    torch.testing.assert_close(mmd(x, y), mmd(y, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(mmd(shuffled, y), mmd(x, y), rtol=0, atol=1e-12)
    torch.testing.assert_close(mmd(x, y, x, y[:2]), mmd(x, y[:2], y, x)[[1, 2, 0]], rtol=0, atol=1e-12)

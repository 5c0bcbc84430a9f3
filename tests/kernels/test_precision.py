"""What the rounded precisions cost, and that an order of tasks survives them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine.precision import (
    exact_products,
    make_operand,
    round_tf32,
    split_bf16,
    stated_error,
)
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.ragged import RaggedTasks, common_centre
from tests.kernels.cases import FUNCTIONS, HALF_STEP, AddedAsOnCuda, double, rounding_error, thirds


def features(n: int, d: int, seed: int, device: str) -> torch.Tensor:
    """Like a ReLU's: half of them 0."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).relu().to(device)


@pytest.mark.parametrize("precision", HALF_STEP)
def test_an_operand_is_as_near_as_its_precision_says(precision: str, device: str):
    rows = features(40, 100, 1, device) * 3
    centre = rows.mean(0)
    operand = make_operand(rows, centre, precision, 128)
    assert operand.high.shape == (40, 128)
    value = operand.high.double() + (0 if operand.low is None else operand.low.double())
    exact = rows - centre
    assert bool(((value[:, :100] - exact).abs() <= HALF_STEP[precision] * exact.abs() + 1e-38).all())
    assert not bool(value[:, 100:].any())
    # As three products have them: high high + 2 high low.
    low = 0 if operand.low is None else operand.low.double()
    products = (operand.high.double() * (operand.high.double() + 2 * low)).sum(1)
    torch.testing.assert_close(operand.squares.double(), products, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["fp32", *HALF_STEP])
def test_the_squares_of_a_few_rows_are_those_that_they_have_among_others(precision: str, device: str):
    rows = features(40, 300, 1, device)
    centre = rows.mean(0)
    with nullcontext() if device == "cuda" else AddedAsOnCuda():
        squares = make_operand(rows, centre, precision, 320).squares
        for n in (1, 2, 5, 15):
            few = make_operand(rows[:n], centre, precision, 320)
            assert len(few.high) == n
            assert torch.equal(few.squares, squares[:n])


def test_tf32_rounds_to_nearest_even():
    step = 2.0**-10
    values = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-23, -1 - 0.7 * step, 0.0])
    expected = torch.tensor([1.0, 1 + 2 * step, 1 + step, -1 - step, 0.0])
    torch.testing.assert_close(round_tf32(values), expected, rtol=0, atol=0)


def test_bf16_splits_to_sixteen_bits():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    high, low = split_bf16(values)
    assert float(((high.double() + low.double() - values) / values).abs().max()) <= 2.0**-17


def test_the_most_exact_of_all_threads_decides_and_the_last_one_out_restores():
    matmul, cpu = torch.backends.mkldnn.matmul, torch.device("cpu")
    before = matmul.fp32_precision
    outside = {"bf16": "ieee", "fp32": "bf16"}  # as the caller has them: not what the last one out wants
    try:
        with ThreadPoolExecutor(1) as elsewhere:
            for first, second in (("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
                here, there = exact_products(cpu, first), exact_products(cpu, second)
                matmul.fp32_precision = outside[second]
                here.__enter__()
                elsewhere.submit(there.__enter__).result()
                assert matmul.fp32_precision == "ieee"
                here.__exit__()
                assert matmul.fp32_precision == ("bf16" if second == "bf16" else "ieee")
                elsewhere.submit(there.__exit__).result()
                assert matmul.fp32_precision == outside[second]
    finally:
        matmul.fp32_precision = before


def test_within_a_thread_the_innermost_decides():
    matmul, cpu = torch.backends.mkldnn.matmul, torch.device("cpu")
    before = matmul.fp32_precision
    with exact_products(cpu), exact_products(cpu, "bf16"):
        assert matmul.fp32_precision == "bf16"
        with exact_products(cpu, "bf16x3"), exact_products(cpu):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_changes_no_bit_of_a_value_or_a_gradient(name: str, device: str):
    x, y = features(40, 64, 1, device), features(90, 64, 2, device) + 0.1
    tasks = RaggedTasks(y, torch.tensor([0, 50, 90]), thirds(y))
    x.requires_grad_(name not in ("mean distances", "neighbours", "prototype distances"))

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor | None]:
        found = FUNCTIONS[name](x, tasks)
        found = found if isinstance(found, torch.Tensor) else found[0]
        return found.detach(), torch.autograd.grad(found.sum(), x)[0] if x.requires_grad else None

    value, gradient = value_and_gradient()
    with torch.autocast(device, torch.bfloat16):
        again, moved = value_and_gradient()
        assert torch.is_autocast_enabled(device)
    assert torch.equal(again, value)
    assert gradient is None or torch.equal(moved, gradient)


@pytest.mark.parametrize("precision", HALF_STEP)
@pytest.mark.parametrize(("n", "d"), [(40, 2048), (300, 256), (123, 64), (2, 512), (1, 100)], ids=str)
def test_the_error_of_a_mean_is_that_of_rounding(n: int, d: int, precision: str, device: str):
    x = features(63, d, 1, device)
    tasks = RaggedTasks.from_list([features(m, d, m, device) + 0.1 for m in (n, 77)])
    sources = [tasks.task(t) for t in range(2)]
    exact = naive.euclidean_distances(x.double(), double(tasks), form="pairs")
    off = (euclidean_distances(x, tasks, form="pairs", precision=precision).double() - exact).abs()
    assert bool((off.cpu() <= torch.tensor([rounding_error(x, y, precision, 1) for y in sources])).all())
    exact = naive.energy_distances(x.double(), double(tasks))
    off = (energy_distances(x, tasks, precision=precision).double() - exact).abs()
    # 2 cross terms less 2 self terms: slopes of at most 4 a row.
    assert bool((off.cpu() <= torch.tensor([rounding_error(x, y, precision, 4) for y in sources])).all())


@pytest.mark.parametrize("precision", HALF_STEP)
def test_the_error_of_rows_near_each_other_and_far_from_the_centre(precision: str, device: str):
    y, other = features(40, 1, 1, device), features(300, 1, 2, device)
    x, tasks = y[:30] + 0.1 * features(30, 1, 3, device), RaggedTasks.from_list([y, other + 100])
    exact = naive.euclidean_distances(x.double(), double(tasks), form="pairs")[0]
    off = float((euclidean_distances(x, tasks, form="pairs", precision=precision)[0].double() - exact).abs())
    about = {"num_means": 1, "centre": common_centre(tasks.features)}
    assert off <= stated_error(x, y, float(exact), precision, **about)
    assert off > stated_error(x, y, float(exact), precision, num_means=1)  # about their own mean


@pytest.mark.filterwarnings("error")
def test_the_stated_error_is_a_number_for_a_target_that_requires_a_gradient():
    x = features(30, 3, 1, "cpu")
    assert stated_error(x.clone().requires_grad_(), x + 1, 1.0, "bf16") == stated_error(x, x + 1, 1.0, "bf16")


def test_self_terms_of_another_precision_would_be_off_and_are_refused(device: str):
    x = features(300, 512, 1, device)
    tasks = RaggedTasks.from_list([features(300, 512, 2, device)])
    with pytest.raises(ValueError, match="precision fp32; accepted: bf16"):
        energy_distances(x, tasks, precision="bf16", self_terms=energy_self_terms(tasks))


@pytest.mark.parametrize("precision", HALF_STEP)
def test_the_order_of_tasks_is_that_of_float64_beyond_the_error(precision: str, device: str):
    generator = torch.Generator().manual_seed(0)
    x = features(120, 256, 1, device)
    tasks = []
    for t in range(200):
        n = int(torch.randint(5, 60, (1,), generator=generator))
        tasks.append(features(n, 256, 10 + t, device) + 0.002 * t)
    ragged = RaggedTasks.from_list(tasks)
    exact = naive.energy_distances(x.double(), double(ragged)).cpu()
    found = energy_distances(x, ragged, precision=precision).cpu().double()
    error = torch.tensor([rounding_error(x, y, precision, 4) for y in tasks])
    gaps = exact[:, None] - exact
    wrong = (gaps > 0) & (found[:, None] < found)
    assert bool((gaps[wrong] <= (error[:, None] + error)[wrong]).all())
    # And the error is small enough to mean something: nearly all pairs are beyond it.
    assert float((gaps.abs() > error[:, None] + error).float().mean()) > (0.8 if precision == "bf16" else 0.95)

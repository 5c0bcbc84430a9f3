"""Prototype distances against their definition, others' class means and matchings, and where arithmetic is hard."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.kernels import naive
from headstart.kernels.prototype import prototype_distances
from headstart.kernels.ragged import BLOCK_ROWS, RaggedTasks
from tests.kernels.cases import CASES, KINDS, SIZES, Case, U, change, double, held

FORMS = ("assignment", "nearest")


def features(n: int, d: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # All 53 bits: sums of float32 numbers are exact in float64, in any order.
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.clamp_min(-0.5).to(device, dtype)


def classes(n: int, num_classes: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Labels with gaps between them, up to the largest int64, in any order."""
    names = torch.tensor([7, 0, 2**63 - 1, 10**12, 3, *range(100, 500)])
    return names[torch.randint(0, num_classes, (n,), generator=torch.Generator().manual_seed(seed))].to(device)


def ragged(
    sizes: tuple[int, ...], d: int, num_classes: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> RaggedTasks:
    tasks = [features(n, d, 100 + i, device, dtype) * (1 + i % 3) for i, n in enumerate(sizes)]
    return RaggedTasks.from_list(tasks, [classes(n, num_classes, 200 + i, device) for i, n in enumerate(sizes)])


def rounding(target: torch.Tensor, tasks: RaggedTasks) -> float:
    """Of two float64 means of at most n rows, ours and the definition's: n u of the largest number in each feature."""
    num_rows = max(len(target), int(tasks.sizes.max()))
    largest = max(float(target.abs().max()), float(tasks.features.abs().max()))
    return 2 * (num_rows + 8) * U["fp64"] * largest * math.sqrt(target.shape[1])


def error(target: torch.Tensor, tasks: RaggedTasks) -> float:
    """The stated error of two class means, and the definition's for rows less the target's first.

    The point amid the target and all rows lie within `reach` of its first row. A mean of n rows is off by u of their
    mean length a sum: blocks and their number for ours, whose rows lie within 2 reach of the point, n for the other.
    """
    num_rows = max(len(target), int(tasks.sizes.max()))
    first = target[0].double()
    reach = max(float((rows.double() - first).norm(dim=1).max()) for rows in (target, tasks.features))
    ours = min(num_rows, BLOCK_ROWS) + num_rows / BLOCK_ROWS + 4
    return 2 * (2 * ours + num_rows + 4) * U["fp64"] * reach


LARGE = Case(5000, 6000, 200, 300, "plain")  # classes of many blocks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_parity_with_the_definition(case: Case, form: str, device: str):
    target, labels, tasks = case.make_labelled(device)
    # Less the target's first row, exactly: sums of rows near 1e3 would cost the definition the digits that we keep.
    first = target[0].double()
    moved = RaggedTasks(tasks.features.double() - first, tasks.offsets, tasks.labels)
    expected = naive.prototype_distances(target.double() - first, labels, moved, form=form)
    # Both add D squares, and the root halves what that is off by; six standard deviations (see `square_error`).
    adding = (6 * case.dim**0.5 + 8) * U["fp64"]
    for precision, dtype, half_step in (("fp32", torch.float32, U["fp32"]), ("fp64", torch.float64, 0)):
        found = prototype_distances(target, tasks, labels=labels, form=form, precision=precision)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=adding + half_step, atol=error(target, tasks))


# In float32 they are among the cases.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs_of_other_dtypes(kind: str, dtype: torch.dtype, device: str):
    target, labels = change(kind, features(63, 64, 1, device, dtype)), classes(63, 5, 2, device)
    tasks = ragged((1, 63, 123), 64, 4, device, dtype)
    tasks = RaggedTasks.from_list(
        [change(kind, tasks.task(t)) for t in range(3)], list(tasks.labels.split(tasks.sizes.tolist()))
    )
    for form in FORMS:
        found = prototype_distances(target, tasks, labels=labels, form=form)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = naive.prototype_distances(target.double(), labels, double(tasks), form=form)
        relative = U["fp64" if dtype == torch.float64 else "fp32"]
        torch.testing.assert_close(found.double(), expected, rtol=relative, atol=rounding(target, tasks))


@pytest.mark.parametrize("form", FORMS)
def test_an_offset_that_all_rows_share_costs_no_digits(form: str, device: str):
    target, labels, tasks = (
        features(1000, 64, 1, device),
        classes(1000, 3, 2, device),
        ragged((63, 1000), 64, 3, device),
    )
    tasks, target = double(tasks), target.double()
    # float32 numbers move by 2^20 without rounding; a sum of them would lose 2^20 u a row.
    moved = RaggedTasks(tasks.features + 2**20, tasks.offsets, tasks.labels)
    found = prototype_distances(target + 2**20, moved, labels=labels, form=form)
    expected = prototype_distances(target, tasks, labels=labels, form=form)
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(target, tasks))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [*SIZES, 3000], ids="N{}".format)
def test_the_distance_to_itself_is_exactly_zero(n: int, kind: str, form: str, device: str):
    # 3000 rows of 2 classes: classes of several blocks of 512 rows; 257 of 200: classes of one row.
    for d, num_classes, dtype in ((100, 2, torch.float64), (3, 200, torch.float64), (64, 20, torch.float32)):
        target, labels = change(kind, features(n, d, 3, device, dtype)), classes(n, num_classes, 4, device)
        other, its = features(5, d, 5, device, dtype) * 3 + 1, classes(5, 3, 6, device)
        renamed = labels.max() - labels  # the same classes under other names, in the opposite order
        tasks = RaggedTasks.from_list([target, other, target.clone(), target], [labels, its, labels, renamed])
        least = least_memory(target, tasks, labels)
        for memory in (None, least, 2 * least):
            found = prototype_distances(target, tasks, labels=labels, form=form, memory=memory)
            assert found[[0, 2, 3]].tolist() == [0, 0, 0]
            assert found[1] > 0
        alone = RaggedTasks.from_list([target], [labels])
        assert float(prototype_distances(target, alone, labels=labels, form=form)) == 0


def least_memory(target: torch.Tensor, tasks: RaggedTasks, labels: torch.Tensor) -> int:
    with pytest.raises(ValueError, match="accepted: at least") as refused:
        prototype_distances(target, tasks, labels=labels, memory=1)
    return int(str(refused.value).split()[-1])


@pytest.mark.parametrize("form", FORMS)
def test_the_memory_bound_changes_no_bit_and_is_refused_when_too_small(form: str, device: str):
    target, labels = features(1700, 64, 1, device, torch.float64), classes(1700, 20, 2, device)
    tasks = ragged((9000, *SIZES, 1, 1), 64, 15, device, torch.float64)
    expected = prototype_distances(target, tasks, labels=labels, form=form)
    least = least_memory(target, tasks, labels)
    for memory in (least, least + 10**5, 4 * least):
        found = prototype_distances(target, tasks, labels=labels, form=form, memory=memory)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=f"at least {least}"):
        prototype_distances(target, tasks, labels=labels, form=form, memory=least - 1)


@pytest.mark.parametrize(
    ("d", "num_classes", "sizes", "its"),
    [(64, 20, (9000, 1000), 15), (8, 300, (2000, 1500), 400), (64, 1700, (300,), 3)],
)
def test_memory_is_held_to(d: int, num_classes: int, sizes: tuple[int, ...], its: int):
    target, labels, tasks = features(1700, d, 1), torch.arange(1700) % num_classes, ragged(sizes, d, its)
    least = least_memory(target, tasks, labels)
    for memory in (least, 4 * least):
        _, most = held(lambda memory=memory: prototype_distances(target, tasks, labels=labels, memory=memory))
        assert most <= memory + 48 * (len(target) + len(tasks.features))  # and what is as long as the rows


def test_by_hand(device: str):
    target = torch.tensor([[0.0], [2.0], [10.0], [12.0]], device=device)  # means 1 and 11
    labels = torch.tensor([5, 5, 0, 0], device=device)
    tasks = RaggedTasks.from_list(
        [torch.tensor(rows, device=device) for rows in ([[1.0], [3.0], [2.0]], [[2.0]], [[9.0], [14.0], [4.0]])],
        [torch.tensor(names, device=device) for names in ([1, 1, 1], [3], [8, 9, 4])],
    )
    # Means 2; 2; and 9, 14, 4 for the classes 8, 9, 4: of them 4 and 9 match 1 and 11.
    assert prototype_distances(target, tasks, labels=labels).tolist() == [1, 1, 2.5]
    assert prototype_distances(target, tasks, labels=labels, form="nearest").tolist() == [5, 5, 2.5]


def test_against_other_class_means_and_matching(device: str):
    nearest_centroid = pytest.importorskip("sklearn.neighbors").NearestCentroid
    optimize, distance = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.spatial.distance")
    target, labels = features(600, 64, 1, device, torch.float64), classes(600, 25, 2, device)
    tasks = ragged((400, 1000, 257), 64, 30, device, torch.float64)

    def means(x: torch.Tensor, y: torch.Tensor):
        return nearest_centroid().fit(x.cpu().numpy(), y.cpu().numpy()).centroids_

    expected: dict[str, list[float]] = {form: [] for form in FORMS}
    for t, names in enumerate(tasks.labels.split(tasks.sizes.tolist())):
        costs = distance.cdist(means(target, labels), means(tasks.task(t), names))
        expected["assignment"].append(costs[optimize.linear_sum_assignment(costs)].mean())
        expected["nearest"].append(costs.min(1).mean())
    for form in FORMS:
        found = prototype_distances(target, tasks, labels=labels, form=form)
        assert found.tolist() == pytest.approx(expected[form], abs=rounding(target, tasks), rel=0)


def test_halves_of_the_digits_are_near_each_other(device: str):
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    rows, labels = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    halves = [(rows[::2], labels[::2]), (rows[1::2], labels[1::2]), (rows[1::2], (labels[1::2] + 3) % 10)]
    tasks = RaggedTasks.from_list([half for half, _ in halves], [its for _, its in halves])
    for form in FORMS:
        found = prototype_distances(rows[::2], tasks, labels=labels[::2], form=form)
        assert found[0] == 0
        # Each class lies nearest to its own other half, and its name makes no difference.
        paired = [
            (rows[::2][labels[::2] == c].mean(0) - rows[1::2][labels[1::2] == c].mean(0)).norm() for c in range(10)
        ]
        assert found[1:].tolist() == pytest.approx([float(sum(paired)) / 10] * 2, rel=1e-13)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_symmetry_and_order(seed: int, n: int, m: int, num_classes: int, its_classes: int):
    x, y = features(n, 5, seed, dtype=torch.float64), features(m, 5, seed + 1, dtype=torch.float64) + 1
    of_x, of_y = classes(n, num_classes, seed, "cpu"), classes(m, its_classes, seed + 1, "cpu")
    allowed = 2 * rounding(x, RaggedTasks.from_list([x, y]))

    def prototype(a: torch.Tensor, its: torch.Tensor, b: torch.Tensor, others: torch.Tensor, form: str) -> float:
        return float(prototype_distances(a, RaggedTasks.from_list([b], [others]), labels=its, form=form)[0])

    places = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert prototype(x, of_x, y, of_y, "assignment") == pytest.approx(
        prototype(y, of_y, x, of_x, "assignment"), abs=allowed, rel=0
    )
    tasks, labels, order = [x, y, x[:1], y[:2]], [of_x, of_y, of_x[:1], of_y[:2]], [2, 0, 3, 1]
    for form in FORMS:
        found = prototype_distances(x, RaggedTasks.from_list(tasks, labels), labels=of_x, form=form)
        moved = RaggedTasks.from_list([tasks[i] for i in order], [labels[i] for i in order])
        assert torch.equal(prototype_distances(x, moved, labels=of_x, form=form), found[order])
        shuffled = prototype(x[places], of_x[places], y, of_y, form)
        assert shuffled == pytest.approx(float(found[1]), abs=allowed, rel=0)
        own = prototype(x[places], of_x[places], x, of_x, form)
        assert own == pytest.approx(0, abs=allowed)


def test_bad_input_is_refused(device: str):
    x, labels, tasks = features(3, 4, 0, device), classes(3, 2, 0, device), ragged((3, 5), 4, 2, device)
    bad = x.clone()
    bad[1, 2] = float("nan")
    far = features(3, 4, 0, device, torch.float64) * 1e200
    far_tasks = RaggedTasks.from_list([far + 1e200], [labels])
    vast = features(3, 4, 0, device, torch.float64).sign() * 1.7e308  # whose sums overflow: means are NaN
    vast_tasks = RaggedTasks.from_list([vast], [labels])
    unlabelled = RaggedTasks(tasks.features, tasks.offsets)
    for target, among, its, options, said in (
        (features(3, 5, 0, device), tasks, labels, {}, r"\[N, 4\]"),
        (x[:0], tasks, labels[:0], {}, "no rows"),
        (x.double(), tasks, labels, {}, "float"),
        (bad, tasks, labels, {}, "row 1"),
        (x, unlabelled, labels, {}, "no labels; accepted: RaggedTasks"),
        (x, tasks, labels[:2], {}, r"int64 \[2\] on .*; accepted: torch.int64 \[3\]"),
        (x, tasks, labels[:, None], {}, r"int64 \[3, 1\] on .*; accepted: torch.int64 \[3\]"),
        (x, tasks, labels.int(), {}, r"int32 \[3\] on .*; accepted: torch.int64 \[3\]"),
        (x, tasks, labels.to("meta"), {}, r"on meta; accepted: .* on (cpu|cuda)"),
        (x, tasks, torch.tensor([0, -2, 1], device=device), {}, "label -2 of the target, in row 1, .* 0 or more"),
        (x, tasks, labels, {"form": "best"}, "form is 'best'; accepted: assignment, nearest"),
        (x, tasks, labels, {"precision": "double"}, "precision is 'double'; accepted: bf16, tf32, bf16x3, fp32"),
        (far, far_tasks, labels, {}, "squared distances overflow"),
        (far, far_tasks, labels, {"form": "nearest"}, "squared distances overflow"),
        (vast, vast_tasks, labels, {}, "squared distances overflow"),
        (vast, vast_tasks, labels, {"form": "nearest"}, "squared distances overflow"),
    ):
        with pytest.raises(ValueError, match=said):
            prototype_distances(target, among, labels=its, **options)

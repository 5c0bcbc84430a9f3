"""Label-aware transport distances: their definition, what they reduce to, and what they do not depend on."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from headstart.kernels import dispatch, label_aware, label_distances, naive
from headstart.kernels.engine.classes import ClassRows
from headstart.kernels.label_aware import label_aware_distances, label_aware_self_terms
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances
from tests.kernels.cases import KINDS, SOME_SLOW, Case, U, by_singular_values, change, double, held, picked

FORMS = ("bures", "sinkhorn")
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(n: int, d: int, classes: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows about their class's own place, the classes of different spread; labels 0, 3, 6, ..."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=generator)
    places = torch.randn(classes, d, generator=generator)
    x = places[y] + torch.randn(n, d, generator=generator) * (0.3 + 0.3 * y[:, None])
    return x.double().to(device), (3 * y).to(device)


def ragged(sets: list[tuple[Tensor, Tensor]]) -> RaggedTasks:
    return RaggedTasks.from_list([x for x, _ in sets], [y for _, y in sets])


def largest(x: Tensor, tasks: RaggedTasks) -> float:
    """No less than the largest cost with its label term: W^2 of two classes is at most the largest of |x - y|^2."""
    rows = torch.cat([x, tasks.features]).double()
    return float(naive.pairwise(rows, rows).amax()) ** 2


def bound(c: float, epsilon: float, d: int, precision: str, tolerance: float) -> float:
    """The stated error: as in test_sinkhorn.py, and twice that of half of W^2, in costs of weight 1, 1/2 and 1/2.

    Half of W^2 is a Sinkhorn divergence at costs of c / 2 at most, or Bures', whose traces are c / 2 at most: so it
    is off by 4 sqrt(k D) u c in float64, and the definition's by 4 sqrt(k max(D, n)) u c: n and k at most 1,000.
    """
    each = tolerance + 64 * d**0.5 * U[precision]
    bures = 8 * (1000 * max(d, 1000)) ** 0.5 * U["fp64"] * c
    return each * (c + epsilon) + 2 * max(each * (c / 2 + epsilon), bures)


@pytest.fixture
def definition(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The definition, with costs that need no array [N, n, D], and Bures distances by singular values.

    test_frechet.py holds these to the definition's, whose roots would cost eight of sixteen digits here.
    """
    monkeypatch.setattr(naive, "ground_cost", lambda x, y, p=2: naive.pairwise(x, y) ** p / p)
    monkeypatch.setattr(naive, "frechet_distances", by_singular_values)
    return naive.label_aware_distances


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SOME_SLOW)
def test_parity_with_the_definition(case: Case, form: str, definition: Callable[..., Tensor], device: str):
    target, labels, tasks = case.make_labelled(device)
    chosen, some = picked(tasks)
    c = largest(target, some)
    # A half step leaves tanh(c / 2 epsilon) = 0.85 of what potentials are off by (Birkhoff; Peyre and Cuturi, theorem
    # 4.1): 50 iterations 7e-8 of c, and the value is off by the square of that.
    epsilon = c / 2.5 or 0.1
    expected = definition(
        target.double(), labels, double(some), epsilon=epsilon, label_distance=form, num_iterations=50
    )
    for precision, tolerance in TOLERANCE.items():
        found = label_aware_distances(
            target, tasks, labels=labels, label_distance=form, epsilon=epsilon, tolerance=tolerance,
            precision=precision,
        )  # fmt: skip
        assert bool(found.converged.all())
        assert found.distances.dtype == (torch.float64 if precision == "fp64" else torch.float32)
        allowed = bound(c, epsilon, case.dim, precision, tolerance)
        torch.testing.assert_close(found.distances[chosen].double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_labelled_set_is_at_no_distance_from_itself_under_other_names(form: str, kind: str, device: str):
    x, y = labelled(80, 20, 5, 2)
    x, y = change(kind, x).to(device, torch.float32), y.to(device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(device)
    tasks = ragged([(x.clone(), y.clone()), (x[order], 100 - y[order])])
    found = label_aware_distances(x, tasks, labels=y, label_distance=form)
    assert bool(found.converged.all())
    allowed = bound(largest(x, tasks), found.epsilon, 20, "fp32", float(found.errors.amax()))
    assert float(found.distances.abs().amax()) <= allowed


def test_wrong_labels_are_seen(device: str):
    x, y = labelled(120, 6, 4, 3, device)
    wrong = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(device)]
    found = label_aware_distances(x, ragged([(x, y), (x, wrong)]), labels=y)
    plain = sinkhorn_distances(x, ragged([(x, y), (x, wrong)]))
    assert found.epsilon == plain.epsilon
    assert float(plain.distances[1]) < 1e-2 < 1 < float(found.distances[1])
    assert abs(float(found.distances[0])) < 1e-2


def test_classes_of_many_tasks_are_compared_within_the_memory():
    tasks = ragged([labelled(n, 256, 10 - n % 2, n) for n in range(95, 103)])
    how = {"epsilon": 1000.0, "label_distance": "sinkhorn", "tolerance": 1e-6}
    plain = label_aware_self_terms(tasks, **how)
    memory = 8_000_000
    assert int(tasks.sizes.sum()) * 8 * 256 * 8 > memory  # each row is in as many pairs as its task has other classes
    found, most = held(lambda: label_aware_self_terms(tasks, **how, memory=memory))
    assert memory / 4 < most <= memory
    allowed = 2 * bound(largest(tasks.features, tasks), 1000.0, 256, "fp64", 1e-6)
    torch.testing.assert_close(found.values, plain.values, rtol=0, atol=allowed)


@pytest.mark.parametrize("memory", [None, 4_600_000], ids=["held", "recomputed"])
def test_without_a_label_term_it_is_the_sinkhorn_divergence(memory: int | None, monkeypatch, device: str):
    def nothing(some: RaggedTasks, others: RaggedTasks | None, memory: int) -> Tensor:
        return some.features.new_zeros(some.num_tasks, (others or some).num_tasks, dtype=torch.float64)

    monkeypatch.setattr(label_distances, "frechet_table", nothing)
    x, y = labelled(400, 6, 4, 3, device)
    tasks = ragged([labelled(n, 6, 3, n, device) for n in (1, 390, 30)])
    plain = sinkhorn_distances(x, tasks, epsilon=2.0, tolerance=1e-8)
    found = label_aware_distances(x, tasks, labels=y, epsilon=2.0, tolerance=1e-8, memory=memory)
    allowed = bound(largest(x, tasks), 2.0, 6, "fp64", 1e-8)
    torch.testing.assert_close(found.distances, plain.distances, rtol=0, atol=allowed)


@pytest.mark.parametrize("form", FORMS)
def test_recomputed_costs_have_the_label_term_too(form: str, device: str):
    x, y = labelled(400, 6, 4, 3, device)
    tasks = ragged([labelled(n, 6, 3, n, device) for n in (1, 390, 30)])
    held = label_aware_distances(x, tasks, labels=y, label_distance=form, epsilon=3.0, tolerance=1e-8)
    found = label_aware_distances(
        x, tasks, labels=y, label_distance=form, epsilon=3.0, tolerance=1e-8, memory=4_600_000
    )
    allowed = bound(largest(x, tasks), 3.0, 6, "fp64", 1e-8)
    torch.testing.assert_close(found.distances, held.distances, rtol=0, atol=allowed)


def test_against_pot_with_the_costs_put_together_by_hand():
    ot = pytest.importorskip("ot")
    (x, x_labels), (y, y_labels) = labelled(30, 4, 3, 1), labelled(25, 4, 3, 2)

    def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.mean(0), (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)

    def transport(a: Tensor, a_labels: Tensor, b: Tensor, b_labels: Tensor) -> float:
        label_costs = torch.zeros(len(a), len(b), dtype=torch.float64)
        for one in a_labels.unique():
            for other in b_labels.unique():
                (m, s), (n, t) = moments(a[a_labels == one]), moments(b[b_labels == other])
                # POT's is the root, of covariances.
                distance = ot.gaussian.bures_wasserstein_distance(m.numpy(), n.numpy(), s.numpy(), t.numpy())
                label_costs[(a_labels == one)[:, None] & (b_labels == other)] = float(distance) ** 2
        costs = ((naive.pairwise(a, b) ** 2 + label_costs) / 2).numpy()
        plan = torch.as_tensor(ot.sinkhorn([], [], costs, 4.0, method="sinkhorn_log", stopThr=1e-12, numItermax=5000))
        divergence = (plan * (plan * len(a) * len(b)).log()).nan_to_num().sum()
        return float((plan * torch.as_tensor(costs)).sum() + 4.0 * divergence)

    expected = transport(x, x_labels, y, y_labels)
    expected -= (transport(x, x_labels, x, x_labels) + transport(y, y_labels, y, y_labels)) / 2
    found = label_aware_distances(x, ragged([(y, y_labels)]), labels=x_labels, epsilon=4.0, tolerance=1e-10)
    # The root of a product of covariances, as POT takes it, is exact to the root of u.
    assert float(found.distances[0]) == pytest.approx(expected, abs=1e-6)


def test_self_terms_can_be_kept_and_those_of_something_else_are_refused(device: str):
    x, y = labelled(40, 6, 4, 3, device)
    tasks = ragged([labelled(n, 6, 3, n, device) for n in (7, 30)])
    kept = label_aware_self_terms(tasks, epsilon=2.0)
    plain = label_aware_distances(x, tasks, labels=y, epsilon=2.0)
    for epsilon in (2.0, None):  # None: that of the self terms
        found = label_aware_distances(x, tasks, labels=y, epsilon=epsilon, self_terms=kept)
        assert torch.equal(found.distances, plain.distances)
    with pytest.raises(ValueError, match="label distance sinkhorn"):
        label_aware_distances(x, tasks, labels=y, epsilon=2.0, self_terms=kept, label_distance="sinkhorn")
    with pytest.raises(ValueError, match="label distance None"):
        sinkhorn_distances(x, tasks, epsilon=2.0, self_terms=kept)


def test_bad_labels_are_refused(device: str):
    x, y = labelled(10, 3, 2, 1, device)
    tasks = ragged([(x, y)])
    for labels, said in (
        (y[:5], r"accepted: torch.int64 \[10\]"),
        (y.double(), "int64"),
        (y - 100, "of the target, in row 0, is negative"),
    ):
        with pytest.raises(ValueError, match=said):
            label_aware_distances(x, tasks, labels=labels)
    for call in (lambda t, **how: label_aware_distances(x, t, labels=y, **how), label_aware_self_terms):
        with pytest.raises(ValueError, match="tasks have no labels"):
            call(RaggedTasks(tasks.features, tasks.offsets), epsilon=1.0)
        with pytest.raises(ValueError, match="label_distance is 'euclidean'; accepted: bures, sinkhorn"):
            call(tasks, label_distance="euclidean", epsilon=1.0)
        with pytest.raises(ValueError, match=r"epsilon is -1\.0; accepted: a positive number"):
            call(tasks, epsilon=-1.0)


def test_what_does_not_converge_is_reported(device: str):
    x, y = labelled(50, 3, 2, 1, device)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        found = label_aware_distances(x, ragged([labelled(60, 3, 2, 2, device)]), labels=y, max_iterations=1)
    assert not bool(found.converged[0])
    with pytest.warns(RuntimeWarning, match="did not converge"):
        label_aware_self_terms(ragged([(x, y)]), epsilon=0.1, max_iterations=1)


def test_label_distances_that_do_not_converge_are_reported(device: str):
    x, y = labelled(60, 3, 4, 1, device)
    tasks = ragged([labelled(90, 3, 5, 2, device)])
    with pytest.warns(RuntimeWarning, match="did not converge") as seen:
        label_aware_distances(x, tasks, labels=y, label_distance="sinkhorn", epsilon=0.1, max_iterations=1)
    counts = Counter(int(re.search(r"of (\d+) Sinkhorn", str(each.message))[1]) for each in seen)
    # Four classes and five by themselves, their 6 and 10 pairs, each of the four to all five; and the three plans.
    assert counts == {4: 1, 5: 1 + 4, 6: 1, 10: 1, 1: 1}


@pytest.mark.filterwarnings("ignore:.*did not converge in 1 iterations")
def test_the_error_is_that_of_the_worst_of_three_plans(device: str):
    many, one = labelled(50, 3, 2, 1, device), labelled(1, 3, 1, 2, device)  # with one row a plan is exact at once
    for (x, y), other in ((many, one), (one, many)):
        found = label_aware_distances(x, ragged([other]), labels=y, epsilon=0.1, max_iterations=1)
        assert float(found.errors) > 1e-3
        assert not bool(found.converged)


def test_below_0_it_is_the_definition_that_is():
    # Two crosses, one turned by 45 degrees, an arm a class: their means agree, and the squared Bures distances of arms
    # (1 - |cos|) are not negative definite. At an epsilon far above the costs what is left is half of their mean over
    # pairs less that within: a clamp at 0 would hide it.
    x = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    turned = torch.tensor([[1, 1], [-1, -1], [-1, 1], [1, -1]], dtype=torch.float64) / 2**0.5
    y, tasks = torch.tensor([0, 0, 1, 1]), RaggedTasks.from_list([turned], [torch.tensor([0, 0, 1, 1])])
    found = float(label_aware_distances(x, tasks, labels=y, epsilon=10.0, tolerance=1e-9).distances[0])
    assert found < -0.19
    expected = naive.label_aware_distances(x, y, tasks, epsilon=10.0, num_iterations=100)
    assert found == pytest.approx(float(expected[0]), abs=bound(2.0, 10.0, 2, "fp64", 1e-9))


def nuclear(x: Tensor, tasks: RaggedTasks) -> Tensor:
    """`by_singular_values` in float64 and in torch, for its gradient."""
    distances = []
    for t in range(tasks.num_tasks):
        y = tasks.task(t)
        a, b = (v - v.mean(0) for v in (x, y))
        shared = torch.linalg.svdvals(a @ b.T).sum() / (len(a) * len(b)) ** 0.5
        means = (x.mean(0) - y.mean(0)).square().sum()
        distances.append(means + a.square().sum() / len(a) + b.square().sum() / len(b) - 2 * shared)
    return torch.stack(distances)


def gradient_bound(c: float, tolerance: float, weights: Tensor) -> float:
    """What gradients are off by at epsilon = c / 2.5, where a half step leaves 0.85 of what potentials are off by.

    Marginals that are off by e leave a plan off by 2 e N / (1 - 0.85^2) of itself. A row has 1 / N of it and moves by
    root(c) at most, and a class's rows by 3 root(c) more for half of a label distance: (7 + 21) e root(c), and as much
    for the target's own plan, and for the plans behind a Sinkhorn label distance.
    """
    return 100 * tolerance * c**0.5 * float(weights.abs().sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(9, (1, 12, 30)), (60, (40, 25))], ids=str)
@pytest.mark.parametrize("memory", [None, 4_600_000], ids=["held", "recomputed"])
def test_gradients_are_those_of_the_definition(
    form: str, sizes: tuple[int, tuple[int, ...]], memory: int | None, monkeypatch: pytest.MonkeyPatch, device: str
):
    monkeypatch.setattr(naive, "frechet_distances", nuclear)
    x, y = labelled(sizes[0], 4, 3, 3, device)
    tasks = ragged([labelled(n, 4, 2 + n % 2, n, device) for n in sizes[1]])
    weights = torch.tensor([0.7, -1.3, 0.4], dtype=torch.float64, device=device)[: tasks.num_tasks]
    c, tolerance = largest(x, tasks), 1e-13
    epsilon = c / 2.5
    ours, exact = (x.clone().requires_grad_() for _ in range(2))
    found = label_aware_distances(
        ours, tasks, labels=y, label_distance=form, epsilon=epsilon, tolerance=tolerance, memory=memory
    )
    (found.distances * weights).sum().backward()
    expected = naive.label_aware_distances(exact, y, tasks, epsilon=epsilon, label_distance=form, num_iterations=150)
    (expected * weights).sum().backward()
    allowed = gradient_bound(c, tolerance, weights)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, exact.grad, rtol=0, atol=allowed)
    plain = x.clone().requires_grad_()
    (sinkhorn_distances(plain, tasks, epsilon=epsilon, tolerance=tolerance).distances * weights).sum().backward()
    assert float((ours.grad - plain.grad).abs().max()) > 1e5 * allowed  # the labels have their part in it


@pytest.mark.parametrize("form", FORMS)
def test_classes_that_do_not_fit_together_give_the_same_gradient(form: str, monkeypatch: pytest.MonkeyPatch):
    def one_by_one(
        classes: ClassRows, _: object, low: int = 0, high: int | None = None
    ) -> Iterator[tuple[int, int, RaggedTasks]]:
        for c in range(low, classes.num_classes if high is None else high):
            yield c, c + 1, classes.rows(c, c + 1)

    def gradient() -> Tensor:
        at = x.clone().requires_grad_()
        found = label_aware_distances(at, tasks, labels=y, label_distance=form, epsilon=c / 2.5, tolerance=tolerance)
        (found.distances * weights).sum().backward()
        assert at.grad is not None
        return at.grad

    (x, y), weights = labelled(30, 4, 3, 3), torch.tensor([0.7, -1.3], dtype=torch.float64)
    tasks = ragged([labelled(n, 4, 3, n) for n in (20, 41)])
    c, tolerance = largest(x, tasks), 1e-13
    together = gradient()
    for module in (label_aware, label_distances):
        monkeypatch.setattr(module, "chunks", one_by_one)
    torch.testing.assert_close(gradient(), together, rtol=0, atol=2 * gradient_bound(c, tolerance, weights))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_take_the_label_distances_of_the_distance(form: str, device: str):
    x, y = labelled(30, 4, 3, 3, device)
    tasks = ragged([labelled(n, 4, 3, n, device) for n in (20, 41)])
    found = label_aware_distances(x.requires_grad_(), tasks, labels=y, label_distance=form, epsilon=3.0).distances.sum()
    with dispatch.report() as reports:
        found.backward()
    # Of each of the target's three classes to those of the tasks and to its own: the potentials of its transports, to
    # itself and to them. The divergences themselves would be as many transports again.
    expected = [] if form == "bures" else ["transports"] * 3 * 2 * 2
    assert [each.function for each in reports] == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_step_against_the_gradient_brings_labels_together(form: str, device: str):
    x, y = labelled(60, 5, 3, 1, device)
    tasks = ragged([labelled(80, 5, 3, 2, device)])
    distances = []
    for _ in range(6):
        x = x.detach().requires_grad_()
        found = label_aware_distances(x, tasks, labels=y, label_distance=form, epsilon=1.0).distances[0]
        found.backward()
        distances.append(float(found.detach()))
        x = x - 20 * x.grad
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_keep_to_the_memory(form: str):
    x, y = labelled(150, 256, 3, 1)
    x, tasks = x.float().requires_grad_(), ragged([labelled(n, 256, 3, n) for n in (100, 30)])
    tasks = RaggedTasks(tasks.features.float(), tasks.offsets, tasks.labels)

    def distances(memory: int) -> Tensor:
        return label_aware_distances(
            x, tasks, labels=y, label_distance=form, epsilon=200.0, tolerance=0.3, memory=memory
        ).distances

    least, fits = 1, False
    while not fits:  # it is asked for by the classes, by a transport, and by its label distances
        try:
            fits = bool(len(distances(least)))
        except ValueError as refused:
            least = int(str(refused).split("at least ")[1].split(",")[0])
    largest_class = int(y.unique(return_counts=True)[1].max())
    for memory in (least, 2**25):
        x.grad = None
        _, most = held(lambda memory=memory: distances(memory).sum().backward())
        # The result and one array more like it, a class in float64 four times, and what is as long as the rows are.
        assert most <= memory + 2 * x.nbytes + 4 * 8 * 256 * largest_class + 80 * (len(x) + len(tasks.features))

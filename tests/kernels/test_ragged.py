"""Ragged tasks: what they hold, and what they refuse at construction; and what this room and its tests may import."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headstart.kernels import naive
from headstart.kernels.ragged import RaggedTasks, check_alike, check_labels, common_centre
from tests.kernels.cases import FUNCTIONS, thirds

X = torch.arange(12.0).reshape(6, 2)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_tasks_and_means(device: str):
    tasks = RaggedTasks(X.to(device), offsets(0, 1, 4, 6).to(device))
    assert (tasks.num_tasks, tasks.num_features, tasks.sizes.tolist()) == (3, 2, [1, 3, 2])
    assert torch.equal(tasks.task(1).cpu(), X[1:4])
    assert torch.equal(tasks.task(-1).cpu(), X[4:])
    for t in (3, -4):
        with pytest.raises(IndexError, match=f"task {t} of 3"):
            tasks.task(t)
    expected = torch.stack([X[:1].mean(0), X[1:4].mean(0), X[4:].mean(0)])
    for dtype, its in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.half, torch.float32)):
        found = RaggedTasks(tasks.features.to(dtype), tasks.offsets).means()
        assert found.dtype == its
        assert torch.equal(found.cpu(), expected.to(its))


def test_offsets_and_labels_may_be_strided():
    features = torch.randn(900, 3, generator=torch.Generator().manual_seed(1))
    apart, labels = offsets(0, 9, 600, 9, 900, 9)[::2], thirds(features)
    together = RaggedTasks(features, offsets(0, 600, 900), labels)
    tasks = RaggedTasks(features, apart, labels.repeat_interleave(2)[::2])
    assert tasks.offsets.is_contiguous()  # or searchsorted warns, once in a process
    for function in FUNCTIONS.values():
        for one, other in zip(function(features[:50], tasks), function(features[:50], together), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("num_rows", [1, 63, 127, 1000], ids="N{}".format)
def test_the_common_centre_is_amid_rows_that_are_in_order(num_rows: int):
    rows = torch.arange(num_rows, dtype=torch.float64)[:, None]
    # Of every k-th of them, from the first: at most k / 2 from the mean, k being at most a 64th.
    assert float((common_centre(rows) - rows.mean(0)).abs()) <= num_rows / 128


def test_means_survive_a_large_common_offset(device: str):
    rows = torch.randn(1000, 3, dtype=torch.float64)
    tasks = RaggedTasks((rows + 4096).float().to(device), offsets(0, 300, 1000).to(device))
    exact = torch.stack([tasks.features[:300].double().mean(0), tasks.features[300:].double().mean(0)])
    # Half a unit in the last place of 4096 is 2.4e-4; a running float32 sum would be off by hundreds of them.
    assert float((tasks.means().double() - exact).abs().max()) <= 2.5e-4


@pytest.mark.parametrize(
    ("features", "where", "labels", "said"),
    [
        (X, offsets(0, 3, 3, 6), None, r"task 1 is empty \(offsets 3 to 3\)"),
        (X, offsets(0, 4, 2, 6), None, r"task 1 ends before it starts \(offsets 4 to 2\)"),
        (X, offsets(1, 6), None, "start at 1"),
        (X, offsets(0, 5), None, "end at 5"),
        (X, torch.tensor([0.0, 6.0]), None, "int64"),
        (X, offsets(0), None, r"int64 \[1\] .*; accepted: .* with T >= 1"),
        (X, offsets(0, 6).expand(2, 2), None, r"int64 \[2, 2\] .*; accepted: torch.int64 \[T \+ 1\]"),
        (X[:, :0], offsets(0, 6), None, r"float32 \[6, 0\] .*; accepted: .* with D >= 1"),
        (X[0], offsets(0, 1), None, "features"),
        (X.long(), offsets(0, 6), None, "features"),
        (X.to(torch.float8_e4m3fn), offsets(0, 6), None, r"torch\.float8_e4m3fn .*; accepted: .* torch\.bfloat16"),
        (X.to_sparse(), offsets(0, 6), None, r"torch\.sparse_coo; accepted: a dense tensor"),
        (X, offsets(0, 6), torch.zeros(5, dtype=torch.int64), "labels"),
        (X, offsets(0, 6), torch.zeros(6, dtype=torch.int64, device="meta"), r"on meta; accepted: .* on cpu"),
        (X, offsets(0, 6), torch.tensor([0, 1, -1, 0, 0, 0]), "row 2"),
    ],
)
def test_what_cannot_be_is_refused(features, where, labels, said: str):
    with pytest.raises(ValueError, match=said):
        RaggedTasks(features, where, labels)


@pytest.mark.parametrize("tasks", [[torch.tensor(1.0)], [X, X[0]]], ids=["number", "row"])
def test_a_task_of_a_list_has_two_dimensions(tasks: list):
    with pytest.raises(ValueError, match=r"task [01] is torch.float32 .*; accepted: \[n_t, D\]"):
        RaggedTasks.from_list(tasks)


@pytest.mark.parametrize(
    ("tasks", "labels", "said"),
    [
        ([], None, "no tasks were given"),
        ([X, X[:, :1]], None, r"task 1 is .*; accepted: \[n_t, 2\] as task 0"),
        ([X, X.double()], None, r"task 1 is torch\.float64 .*; accepted: as task 0, torch\.float32"),
        ([X[:2], X], [[0] * 3, [0] * 5], r"lengths \[3, 5\]; accepted: those of the tasks, \[2, 6\]"),
        ([X], [], r"lengths \[\]; accepted: those of the tasks, \[6\]"),
    ],
)
def test_tasks_of_a_list_agree(tasks: list, labels: list | None, said: str):
    with pytest.raises(ValueError, match=said):
        RaggedTasks.from_list(tasks, labels and [torch.tensor(y) for y in labels])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RaggedTasks(X.numpy(), offsets(0, 6)), "features is a ndarray; accepted: a torch.Tensor"),
        (lambda: RaggedTasks(X, [0, 6]), "offsets is a list"),
        (lambda: RaggedTasks(X, offsets(0, 6), [0] * 6), "labels is a list"),
        (lambda: RaggedTasks.from_list([X, X.tolist()]), "task 1 is a list"),
        (lambda: RaggedTasks.from_list(X[None]), r"tasks are one tensor, torch.float32 \[1, 6, 2\]"),
        (lambda: check_alike(X.numpy(), RaggedTasks(X, offsets(0, 6))), "target is a ndarray"),
        (lambda: check_alike(X, X), "tasks is a Tensor; accepted: RaggedTasks"),
        (lambda: check_labels([0] * 6, X), "labels is a list"),
    ],
)
def test_what_is_no_tensor_is_told_from_one(make: Callable[[], object], said: str):
    with pytest.raises(TypeError, match=said):
        make()


@pytest.mark.parametrize("row", [3, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named_by_task_and_row(bad: float, row: int):
    rows = X.clone()
    rows[row, 1] = bad
    with pytest.raises(ValueError, match=rf"task 1 .*row {row - 3} \(row {row} of all"):
        RaggedTasks(rows, offsets(0, 3, 6))


def test_every_distance_has_a_definition_a_row_in_the_readme_and_the_tests_that_all_have():
    room = Path(__file__).parents[2] / "kernels"
    readme = (room / "README.md").read_text()
    tested = {name for function in FUNCTIONS.values() for name in (function.__name__, *function.__code__.co_names)}
    found = set()
    for path in set(room.glob("*.py")) - {room / "naive.py", room / "ragged.py"}:
        for node in (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)):
            if {"target", "tasks", "precision"} <= {a.arg for a in (*node.args.args[:2], *node.args.kwonlyargs)}:
                found.add(node.name)
                assert hasattr(naive, node.name)
                assert node.name in tested, f"{node.name} is not in tests.kernels.cases.FUNCTIONS"
                assert f"`{path.stem}.{node.name}`" in readme
    assert {"energy_distances", "nearest_neighbours"} < found


def test_this_room_and_its_tests_import_little():
    root = Path(__file__).parent.parent.parent
    allowed = {"torch", "triton", "headstart", *sys.stdlib_module_names}
    for path in [*(root / "kernels").rglob("*.py"), *(root / "tests/kernels").glob("*.py")]:
        # What the GPU machines have; others' distances are imported where they are, by pytest.importorskip.
        extra = {"pytest", "hypothesis", "numpy", "scipy", "sklearn", "tests"} if "tests" in path.parts else set()
        extra |= {"scipy"} if path.name == "prototype.py" else set()  # the assignment
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed | extra, f"{path} imports {name}"
                assert not name.startswith("headstart.") or name.startswith("headstart.kernels"), path

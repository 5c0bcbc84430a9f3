"""Distances between the class means of a labelled target and those of many labelled ragged tasks."""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.precision import PRECISIONS, as_result, resolve_precision
from headstart.kernels.ragged import (
    BLOCK_ROWS,
    RaggedTasks,
    check_alike,
    check_bytes,
    check_finite,
    check_labels,
    check_not_negative,
    common_centre,
    make_blocks,
    sums_of_rows,
)

_CHUNK = defaultdict(lambda: 2**26, cpu=2**20)
"""Numbers of the features that are summed at a time: more would leave the CPU's cache, fewer be launches alone."""


def prototype_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    labels: Tensor,
    form: Literal["assignment", "nearest"] = "assignment",
    precision: str | None = None,
    memory: int | None = None,
) -> Tensor:
    """Distance of a target [N, D] with labels [N] to each of T labelled ragged tasks, as [T]; smaller is closer.

    With class means m_c of the target's C classes and m'_c of the C_t classes of a task:

        assignment: min over one-to-one matchings of min(C, C_t) classes of the mean of |m_c - m'_c'|_2; symmetric
        nearest:    mean over c of min over c' of |m_c - m'_c'|_2; not symmetric

        prototype_distances(target, tasks, labels=labels)
        prototype_distances(target, tasks, labels=labels, form="nearest")    # several classes may share one of a task

    Labels are any int64 >= 0; which number a class has makes no difference. Class means: J. Snell et al., "Prototypical
    Networks for Few-shot Learning", NeurIPS 2017, equation (1); the matching is D. F. Crouse's, IEEE Transactions on
    Aerospace and Electronic Systems 52 (2016) 1679-1696, in SciPy. `naive.prototype_distances` is the definition.

    Cost: one pass over the features, C sum C_t D for the distances, and C_t^3 a task for the matching, on the CPU.
    `precision` is one of `engine.precision.PRECISIONS` (default: fp64 for float64 features, else fp32). It decides the
    dtype of the result, float64 for fp64 and else float32; inside all is float64, since products are a small part here.
    `memory` bounds, in bytes, what is held beside the inputs and what is as long as T or the sum of n_t (default 256
    MiB, or more where less cannot do): it changes the time and no bit of the result. d(X, X) is exactly 0. Not
    differentiable.

    Error: (512 + n / 512) u times the mean distance of a class's n rows from a point amid the target, u = 1.1e-16, and
    the rounding to `precision`; means nearer than 1e-154 may count as equal.
    ValueError: a target of another D, dtype or device, without rows, or not finite; labels that are not int64 [N] on
    the target's device, or negative; tasks without labels; a form or precision that is not accepted; a bound that is
    too small; class means so far apart that squares overflow, or the result.
    """
    check_alike(target, tasks)
    check_bytes(memory)
    precision = resolve_precision(precision, target.dtype)
    if form not in _MATCHINGS:
        raise ValueError(f"form is {form!r}; accepted: {', '.join(_MATCHINGS)}")
    if tasks.labels is None:
        raise ValueError("tasks have no labels; accepted: RaggedTasks(features, offsets, labels)")
    check_labels(labels, target)
    distances: Tensor = _distances(target, labels, tasks.features, tasks.labels, tasks.offsets, form, precision, memory)
    return distances


@torch.library.custom_op("headstart::prototype_distances", mutates_args=())
def _distances(
    target: Tensor,
    labels: Tensor,
    features: Tensor,
    task_labels: Tensor,
    offsets: Tensor,
    form: str,
    precision: str,
    memory: int | None,
) -> Tensor:
    check_finite(target)
    check_not_negative(labels)
    tasks = RaggedTasks(features, offsets, task_labels)
    with dispatch.Watch("prototype distances", target.device) as watch:
        distances = _matched(target, labels, tasks, _MATCHINGS[form], memory, watch)
    return as_result(torch.tensor(distances, dtype=torch.float64), precision).to(target.device)


@_distances.register_fake
def _(target: Tensor, labels: Tensor, features: Tensor, task_labels: Tensor, offsets: Tensor, *settings: Any) -> Tensor:
    return target.new_empty(offsets.shape[0] - 1, dtype=PRECISIONS[settings[1]])


def _matched(
    target: Tensor,
    labels: Tensor,
    tasks: RaggedTasks,
    match: Callable[[Any], float],
    memory: int | None,
    watch: dispatch.Watch,
) -> list[float]:
    """The distance to each task, of the matched class means."""
    assert tasks.labels is not None
    of_target = _sort_by_class(labels, torch.tensor([0, len(target)]))
    of_tasks = _sort_by_class(tasks.labels, tasks.offsets)
    limits = _limits(target, of_target, of_tasks, memory)
    chunk_rows, max_blocks, watch.planned = limits
    centre = common_centre(target).double()
    target_means = _class_means(target, of_target, 0, of_target.num_classes, centre, chunk_rows)
    distances: list[float] = []
    low = 0
    blocks = of_tasks.first_block[of_tasks.first_class]
    while low < tasks.num_tasks:
        # As many tasks as fit: at least one, by `_limits`.
        high = int(torch.searchsorted(blocks, blocks[low] + max_blocks, right=True)) - 1
        classes = of_tasks.first_class[low : high + 1].tolist()
        means = _class_means(tasks.features, of_tasks, classes[0], classes[-1], centre, chunk_rows)
        # From differences: a product would lose a distance that is small beside the norms, and 0 for equal means.
        costs = torch.cdist(target_means, means, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
        starts = [c - classes[0] for c in classes]
        distances += [match(costs[:, a:b]) for a, b in pairwise(starts)]
        low = high
    return distances


def _assignment(costs: Any) -> float:
    """The least mean of costs [C, C_t] over one-to-one matchings.

    Exactly 0 where every class has a mean equal to its own at 0: the shortest augmenting paths then all have length 0,
    and the dual variables stay 0.
    """
    _check_finite(costs)
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].mean())


def _nearest(costs: Any) -> float:
    _check_finite(costs)
    return float(costs.min(1).mean())


_MATCHINGS: dict[str, Callable[[Any], float]] = {"assignment": _assignment, "nearest": _nearest}
"""What `form` may be: numpy's float64 [C, C_t] distances of class means to one number."""


class _Classes(NamedTuple):
    """The rows of ragged tasks sorted by task and class, and cut into blocks that each lie in one class."""

    order: Tensor
    """Rows by task, then label, then their own order: [sum n_t] int64 on the device of the features."""
    ends: Tensor
    """Block b has the rows order[ends[b]] up to order[ends[b + 1]]; int64, on the CPU as all below."""
    first_block: Tensor
    """Class g, counted over all tasks, has the blocks first_block[g] up to first_block[g + 1]."""
    first_class: Tensor
    """Task t has the classes first_class[t] up to first_class[t + 1]."""

    @property
    def num_classes(self) -> int:
        return len(self.first_block) - 1


def _sort_by_class(labels: Tensor, offsets: Tensor) -> _Classes:
    device = labels.device
    task = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()).to(device)
    # Two stable sorts and no product of task and label, which may be as large as int64 allows.
    order = labels.argsort(stable=True)
    order = order[task[order].argsort(stable=True)]
    label = labels[order]
    changes = (label[1:] != label[:-1]) | (task[1:] != task[:-1])
    starts = torch.cat([offsets[:1], changes.nonzero().flatten().cpu() + 1, offsets[-1:]])
    blocks = make_blocks(starts, BLOCK_ROWS)
    return _Classes(order, blocks.ends, blocks.first_of_task, torch.searchsorted(starts, offsets))


def _limits(target: Tensor, of_target: _Classes, of_tasks: _Classes, memory: int | None) -> tuple[int, int, int]:
    """Rows and blocks to take at a time under a bound of so many bytes, and the bytes that these take.

    ValueError where the bound cannot be kept.
    """
    num_classes, num_features = of_target.num_classes, target.shape[1]
    # Rows as gathered and in float64, their block sums (of blocks of one row) and their places.
    row_bytes = num_features * (target.element_size() + 16) + 48
    # Block sums, joined, and class sums; the costs of one class, and copies of them on the CPU and in SciPy.
    block_bytes = 24 * num_features + 24 * num_classes
    blocks = of_tasks.first_block[of_tasks.first_class]
    largest = max(int(blocks.diff().max()), len(of_target.ends) - 1)
    least = 8 * num_features * num_classes + BLOCK_ROWS * row_bytes + largest * block_bytes
    half = (fit_memory(memory, least) - least) // 2
    chunk_rows = max(BLOCK_ROWS, min(BLOCK_ROWS + half // row_bytes, _CHUNK[target.device.type] // num_features))
    max_blocks = largest + half // block_bytes
    most_rows = min(chunk_rows, max(len(of_target.order), len(of_tasks.order)))
    most_blocks = min(max_blocks, max(largest, len(of_tasks.ends) - 1))
    return chunk_rows, max_blocks, 8 * num_features * num_classes + most_rows * row_bytes + most_blocks * block_bytes


@torch.no_grad()
def _class_means(features: Tensor, classes: _Classes, low: int, high: int, centre: Tensor, chunk_rows: int) -> Tensor:
    """Means of `features - centre` over the classes low up to high, [high - low, D] float64.

    A class's mean depends on its rows in their order and on the centre alone, to the last bit: blocks start at its
    first row and every BLOCK_ROWS rows after, and sums have a fixed order.
    """
    first, last = int(classes.first_block[low]), int(classes.first_block[high])
    sums, block = [], first
    while block < last:
        # As many blocks as fit: at least one, because chunk_rows is at least BLOCK_ROWS.
        end = min(last, int(torch.searchsorted(classes.ends, classes.ends[block] + chunk_rows, right=True)) - 1)
        ends = classes.ends[block : end + 1]
        rows = features[classes.order[int(ends[0]) : int(ends[-1])]].double().sub_(centre)
        sums.append(sums_of_rows(rows, ends[:-1] - ends[0]))
        block = end
    blocks = classes.first_block[low : high + 1]
    means = sums_of_rows(torch.cat(sums), blocks[:-1] - first)
    return means.div_(classes.ends[blocks].diff().to(means.device)[:, None])


def _check_finite(costs: Any) -> None:
    if not (costs < float("inf")).all():
        raise ValueError("class means are so far apart that squared distances overflow; accepted: |x - y|^2 < 1.7e308")

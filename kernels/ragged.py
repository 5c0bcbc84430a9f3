"""Many tasks of different sizes in one tensor, and the fixed blocks of rows in which they are worked through."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What features may be."""

BLOCK_ROWS = 512
"""Rows of one task that are summed in one go by `block_means`: part of the result's bits, so it is fixed."""


@dataclass(frozen=True, eq=False)
class RaggedTasks:
    """T tasks' features, one after the other, with no padding between them.

        tasks = RaggedTasks(features, offsets)          # features [sum n_t, D], offsets [T + 1]
        tasks = RaggedTasks.from_list([first, second])  # tensors [n_t, D]
        tasks.task(1)                                   # the second task's rows, [n_t, D]

    Checked once, here, so that nothing below has to: ValueError, or TypeError for what is no tensor, says what was
    given and what is accepted. The tensors are not copied, and must not be changed afterwards. Distances are
    differentiable by the target alone (those of naive.py by the features too): no gradient reaches what these are of.
    """

    features: Tensor
    """[sum n_t, D], of one of DTYPES, finite, on any device."""
    offsets: Tensor
    """[T + 1] int64: task t has the rows offsets[t] up to offsets[t + 1]. Kept on the CPU, where schedules are made."""
    labels: Tensor | None = None
    """[sum n_t] int64, 0 or more, on the device of the features; None where the tasks have none."""
    sizes: Tensor = field(init=False, repr=False)
    """Rows of each task, [T] int64 on the CPU."""
    smallest: int = field(init=False)
    """Rows of the smallest task."""

    def __post_init__(self) -> None:
        for name in ("features", "offsets", *(() if self.labels is None else ("labels",))):
            check_tensor(name, getattr(self, name))
        dense = self.features.dtype in DTYPES and self.features.layout == torch.strided
        if self.features.ndim != 2 or self.features.shape[1] == 0 or not dense:
            raise ValueError(
                f"features are {_describe(self.features)}; accepted: a dense tensor [sum n_t, D] with D >= 1 of "
                + ", ".join(str(dtype) for dtype in DTYPES)
            )
        object.__setattr__(self, "offsets", _checked_offsets(self.offsets, len(self.features)))
        object.__setattr__(self, "sizes", self.offsets.diff())
        object.__setattr__(self, "smallest", int(self.sizes.min()))
        row = first_nonfinite_row(self.features)
        if row is not None:
            task = int(torch.searchsorted(self.offsets, row, right=True)) - 1
            raise ValueError(
                f"task {task} has NaN or infinite features in its row {row - int(self.offsets[task])} "
                f"(row {row} of all); accepted: finite values"
            )
        if self.labels is not None:
            _check_labels(self.labels, self.features)

    @classmethod
    def from_list(cls, tasks: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> "RaggedTasks":
        """Tasks from tensors [n_t, D] that agree in D, dtype and device; labels are tensors [n_t]."""
        _check_list("tasks", tasks, "[n_t, D]")
        if not tasks:
            raise ValueError("no tasks were given; accepted: at least one tensor [n_t, D]")
        for t, task in enumerate(tasks):
            check_tensor(f"task {t}", task)
            if task.ndim != 2:
                raise ValueError(f"task {t} is {_describe(task)}; accepted: [n_t, D]")
            if task.shape[1] != tasks[0].shape[1]:
                raise ValueError(f"task {t} is {_describe(task)}; accepted: [n_t, {tasks[0].shape[1]}] as task 0")
            if _kind(task) != _kind(tasks[0]):
                raise ValueError(f"task {t} is {_describe(task)}; accepted: as task 0, {_describe(tasks[0])}")
        if labels is not None:
            _check_list("labels", labels, "[n_t]")
        for t, its in enumerate(() if labels is None else labels):
            check_tensor(f"labels of task {t}", its)
            if its.ndim != 1:
                raise ValueError(f"labels of task {t} are {_describe(its)}; accepted: [n_t]")
        if labels is not None and [len(y) for y in labels] != [len(task) for task in tasks]:
            raise ValueError(
                f"labels have the lengths {[len(y) for y in labels]}; accepted: those of the tasks, "
                f"{[len(task) for task in tasks]}"
            )
        sizes = torch.tensor([0, *(len(task) for task in tasks)], dtype=torch.int64)
        return cls(torch.cat(list(tasks)), sizes.cumsum(0), None if labels is None else torch.cat(list(labels)))

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.offsets) - 1

    @property
    def num_features(self) -> int:
        """D."""
        return self.features.shape[1]

    def task(self, t: int) -> Tensor:
        """The features of task t, [n_t, D]: a view."""
        if not -self.num_tasks <= t < self.num_tasks:
            raise IndexError(f"task {t} of {self.num_tasks}")
        t %= self.num_tasks
        return self.features[int(self.offsets[t]) : int(self.offsets[t + 1])]

    def means(self) -> Tensor:
        """The mean feature of every task, [T, D], in the dtype of the features (float32 for 16-bit ones).

        A common centre is subtracted before the sums and added after them, so that a large offset that all rows
        share costs no digits. ValueError: rows so far apart that sums overflow.
        """
        dtype = torch.float64 if self.features.dtype == torch.float64 else torch.float32
        centre = common_centre(self.features)
        means = block_means(self.features, self.offsets, centre, dtype)
        means = (means + centre).to(dtype)
        if not bool(means.isfinite().all()):
            raise ValueError(f"some rows are so far apart that their sums overflow in {dtype}; accepted: nearer rows")
        return means


class Blocks(NamedTuple):
    """Runs of rows, each inside one task: the fixed grid in which rows are summed. On the CPU."""

    ends: Tensor
    """[B + 1] int64: block b has the rows ends[b] up to ends[b + 1]."""
    first_of_task: Tensor
    """[T + 1] int64: the blocks of task t are first_of_task[t] up to first_of_task[t + 1]."""


def make_blocks(offsets: Tensor, rows: int) -> Blocks:
    """Cut the tasks of offsets [T + 1] into blocks that start at a task's first row and every `rows` rows after."""
    sizes = offsets.diff()
    if int(sizes.max()) <= rows:
        return Blocks(offsets, torch.arange(len(offsets), device="cpu"))
    counts = (sizes + rows - 1) // rows
    first_of_task = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
    task = torch.repeat_interleave(counts)
    starts = offsets[task] + rows * (torch.arange(len(task), device="cpu") - first_of_task[task])
    return Blocks(torch.cat([starts, offsets[-1:]]), first_of_task)


def block_means(
    features: Tensor,
    offsets: Tensor,
    centre: Tensor | None,
    dtype: torch.dtype,
    chunk_rows: int = 8 * BLOCK_ROWS,
) -> Tensor:
    """Mean of `features - centre` for every task, [T, D] float64: blocks summed in `dtype`, their sums in float64.

    A task's mean depends on its own rows and the centre alone, to the last bit, and not on its neighbours, its
    place or `chunk_rows`: d(X, X) = 0 rests on that. Error at most BLOCK_ROWS * u * mean|x - centre|.
    """
    if centre is not None:
        centre = centre.to(torch.promote_types(centre.dtype, dtype))
    blocks = make_blocks(offsets, BLOCK_ROWS)
    sums, low = [], 0
    while low < len(blocks.ends) - 1:
        # As many blocks as fit, and at least one.
        high = int(torch.searchsorted(blocks.ends, blocks.ends[low] + chunk_rows, right=True)) - 1
        ends = blocks.ends[low : max(low + 1, high) + 1]
        rows = features[int(ends[0]) : int(ends[-1])]
        rows = rows.to(dtype) if centre is None else (rows - centre).to(dtype)
        sums.append(sums_of_rows(rows, ends[:-1] - ends[0]).double())
        low += len(ends) - 1
    block_sums = torch.cat(sums)
    if len(block_sums) > len(offsets) - 1:
        block_sums = sums_of_rows(block_sums, blocks.first_of_task[:-1])
    return block_sums.div_(offsets.diff().to(features.device)[:, None])


def sums_of_rows(rows: Tensor, starts: Tensor) -> Tensor:
    """Sum of each run of rows [N, D] that begins at `starts`, [len(starts), D].

    embedding_bag adds the rows of a run one after the other on the CPU and on CUDA, whatever lies beside the run,
    and takes 1.9 ms for 512 runs of 51k rows, D = 256, where segment_reduce takes 22 (torch 2.15, one core).
    """
    return F.embedding_bag(torch.arange(len(rows), device=rows.device), rows, starts.to(rows.device), mode="sum")


def sums_of_runs(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs of values [N] float64, each in its own order, [len(lengths)] on the CPU."""
    sums: Tensor = torch.segment_reduce(values.cpu(), "sum", lengths=lengths, unsafe=True)
    return sums


def common_centre(features: Tensor) -> Tensor:
    """A point amid the rows, [D]: the mean of 64 to 127 of them, evenly spaced; float64 for float64, else float32.

    It only has to be near: what is subtracted is added again, or cancels in a difference.
    """
    sample = features[:: max(1, len(features) // 64)]
    return sample.double().contiguous().mean(0).to(torch.promote_types(features.dtype, torch.float32))


def first_nonfinite_row(features: Tensor) -> int | None:
    """The first row of features [N, D] with a NaN or an infinity, or None."""
    # One read of the data: isfinite().all() writes a mask first and takes 25 times as long on the CPU.
    low, high = torch.aminmax(features)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return None
    return int((~torch.isfinite(features)).any(1).nonzero()[0])


def check_target(target: Tensor, tasks: RaggedTasks) -> None:
    """Refuse, with a ValueError, a target that cannot be compared with the tasks: [N, D], N >= 1, alike, finite."""
    check_alike(target, tasks)
    check_finite(target)


def check_tensor(name: str, value: object) -> None:
    """Refuse, with a TypeError, what is no tensor: arrays of NumPy and lists."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: a torch.Tensor, as torch.as_tensor makes it")


def check_alike(target: Tensor, tasks: RaggedTasks) -> None:
    """Refuse, with a ValueError, a target that cannot be compared with the tasks: [N, D], N >= 1, of their kind.

    ValueError as well: a target with a tangent, which operators drop, so that forward-mode derivatives would be 0.
    TypeError: what is no tensor, or no RaggedTasks. Looks at no value, so that it can be compiled.
    """
    if not isinstance(tasks, RaggedTasks):
        raise TypeError(f"tasks is a {type(tasks).__name__}; accepted: RaggedTasks")
    check_tensor("target", target)
    num_features = tasks.num_features
    if target.ndim != 2 or target.shape[1] != num_features:
        raise ValueError(f"target is {_describe(target)}; accepted: [N, {num_features}] as the tasks have it")
    if len(target) == 0:
        raise ValueError(f"target has no rows: {_describe(target)}; accepted: at least one")
    if _kind(target) != _kind(tasks.features):
        raise ValueError(
            f"target is {_describe(target)}; accepted: the dtype and device of the tasks, "
            f"{tasks.features.dtype} on {tasks.features.device}"
        )
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(target).tangent is not None:
        raise ValueError("target has a forward-mode tangent; accepted: none, and torch.autograd.grad of the distances")


def check_finite(target: Tensor) -> None:
    """Refuse, with a ValueError, a target [N, D] with a row that is not finite."""
    row = first_nonfinite_row(target)
    if row is not None:
        raise ValueError(f"target has NaN or infinite features in row {row}; accepted: finite values")


def check_labels(labels: Tensor, target: Tensor) -> None:
    """Refuse, with a ValueError, labels that are not a target's: [N] int64 on its device. Looks at no value."""
    check_tensor("labels", labels)
    if labels.shape != target.shape[:1] or labels.dtype != torch.int64 or labels.device != target.device:
        # Said only here: a number of rows that is said is one that a compiled graph is for.
        accepted = f"accepted: torch.int64 [{len(target)}] on {target.device}, 0 or more"
        raise ValueError(f"labels of the target are {_describe(labels)}; {accepted}")


def check_not_negative(labels: Tensor) -> None:
    """Refuse, with a ValueError, a target's labels [N] of which one is negative."""
    if bool((labels < 0).any()):
        row = int((labels < 0).nonzero()[0])
        raise ValueError(f"label {int(labels[row])} of the target, in row {row}, is negative; accepted: 0 or more")


def check_whole(name: str, value: object, accepted: str) -> None:
    """Refuse, with a TypeError, what is no whole number: 2.0, "2" and True. NumPy's are. ValueError beyond 63 bits."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; accepted: {accepted}")
    if not -(2**63) <= int(value) < 2**63:  # which no operator takes
        raise ValueError(f"{name} is {value}; accepted: {accepted}, below 2^63")


def check_bytes(memory: object) -> None:
    """Refuse, with a TypeError, a bound that is no whole number of bytes, nor None."""
    if memory is not None:
        check_whole("memory", memory, "a whole number of bytes, or None")


def check_two_rows(target: Tensor, tasks: RaggedTasks) -> None:
    """Refuse, with a ValueError, what has no unbiased estimate: a target or a task of one row."""
    if len(target) < 2:
        raise ValueError("target has one row; accepted with unbiased=True: at least two")
    if tasks.smallest < 2:
        task = int((tasks.sizes < 2).nonzero()[0])
        raise ValueError(f"task {task} has one row; accepted with unbiased=True: at least two a task")


def _check_list(name: str, values: object, each: str) -> None:
    if not isinstance(values, Sequence):
        what = f"one tensor, {_describe(values)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise TypeError(f"{name} are {what}; accepted: a list of tensors {each}")


def _checked_offsets(offsets: Tensor, num_rows: int) -> Tensor:
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets are {_describe(offsets)}; accepted: torch.int64 [T + 1] with T >= 1")
    offsets = offsets.cpu().contiguous()  # as searchsorted wants them, which warns otherwise
    if int(offsets[0]) != 0:
        raise ValueError(f"offsets start at {int(offsets[0])}; accepted: 0")
    sizes = offsets.diff()
    bad = int((sizes < 1).nonzero()[0]) if bool((sizes < 1).any()) else None
    if bad is not None:
        between = f"{int(offsets[bad])} to {int(offsets[bad + 1])}"
        what = "is empty" if int(sizes[bad]) == 0 else "ends before it starts"
        raise ValueError(f"task {bad} {what} (offsets {between}); accepted: at least one row a task")
    if int(offsets[-1]) != num_rows:
        raise ValueError(f"offsets end at {int(offsets[-1])}; accepted: the number of rows, {num_rows}")
    return offsets


def _check_labels(labels: Tensor, features: Tensor) -> None:
    accepted = f"accepted: torch.int64 [{len(features)}] on {features.device}, 0 or more"
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64 or labels.device != features.device:
        raise ValueError(f"labels are {_describe(labels)}; {accepted}")
    if bool((labels < 0).any()):
        row = int((labels < 0).nonzero()[0])
        raise ValueError(f"label {int(labels[row])} in row {row} is negative; {accepted}")


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.layout]:
    return tensor.dtype, tensor.device, tensor.layout


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"

"""Runs of rows that the Triton programs are launched for, what they compute, and how what they give is added."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from headstart.kernels.engine.layouts import FINISH, Config, choose_config
from headstart.kernels.engine.precision import Operand

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the programs run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 before the first import."""

_SMALL = Config(16, 16, 64, 1, 1)  # under the interpreter, where small inputs are to have ragged tiles
_FAR = 2.0**122  # what no square may reach, so that two and their products can be added in float32


class Job(NamedTuple):
    """An epilogue with its parameters."""

    epilogue: str
    precision: str
    coefficients: Tensor | None = None
    h: Tensor | None = None
    inv_epsilon: float = 0.0
    p: int = 2

    def constants(self) -> dict[str, object]:
        """What both programs take as constants."""
        return {
            "EPILOGUE": self.epilogue,
            "P": self.p,
            "B": 0 if self.coefficients is None else len(self.coefficients),
        }


class Units(NamedTuple):
    """Runs of rows inside tasks, U of them."""

    starts: Tensor
    """[U] int64, like the rest on one device."""
    sizes: Tensor
    tasks: Tensor
    first_of_task: Tensor
    """[T + 1]: the units of task t are first_of_task[t] up to first_of_task[t + 1]."""

    def to(self, device: torch.device) -> "Units":
        """Move all of them to a device."""
        return Units(*(part.to(device) for part in self))


def cut(starts: Tensor, sizes: Tensor, rows: int) -> Units:
    """Units of so many rows of tasks [T]: from a task's first row on, its last one shorter."""
    counts = -(-sizes // rows)
    first = F.pad(counts.cumsum(0), (1, 0))
    tasks = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = rows * (torch.arange(len(tasks)) - first[tasks])
    return Units(starts[tasks] + within, (sizes[tasks] - within).clamp(max=rows), tasks, first)


def met_units(x_units: Units, y_units: Units, own: bool) -> tuple[Tensor, Tensor]:
    """Which units of x each unit of y meets, all or (`own`) those of its task: (the first, how many), [U] both."""
    if own:
        first = x_units.first_of_task
        return first[y_units.tasks], first.diff()[y_units.tasks]
    firsts = torch.zeros_like(y_units.starts)
    return firsts, torch.full_like(firsts, len(x_units.starts))


def whole(operand: Operand) -> tuple[Tensor, Tensor]:
    """Starts and sizes of all rows as one task."""
    return torch.tensor([0]), torch.tensor([len(operand.squares)])


def tile_config(operand: Operand, precision: str) -> Config:
    """The layout of `tile_kernel`."""
    if INTERPRETED:
        return _SMALL
    return choose_config(precision, operand.high.shape[1], torch.cuda.get_device_capability(operand.high.device))


def finish_config() -> Config:
    """The layout of `finish_kernel`."""
    return _SMALL if INTERPRETED else FINISH


def check_operands(x: Operand, y: Operand) -> None:
    """ValueError: rows that the programs cannot read."""
    pitch = x.high.shape[1]
    for operand in (x, y):
        if pitch % 64 or operand.high.shape[1] != pitch or not operand.high.is_contiguous():
            raise ValueError(
                f"operands are {list(x.high.shape)} and {list(y.high.shape)}; accepted: rows of equal length, a "
                "multiple of 64, with nothing between them"
            )


def check_squares(*largest: Tensor) -> None:
    """ValueError: the largest square of some operand is one with which sums overflow, or NaN."""
    if not float(torch.stack(largest).amax()) < _FAR:
        raise ValueError(
            f"some rows are {_FAR**0.5:.0e} or more from the centre, so far that squares overflow in float32; "
            "accepted: nearer rows, or precision='fp64'"
        )


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chunks(costs: Tensor, bound: int) -> Iterator[tuple[int, int]]:
    """Runs (first, last + 1) of costs [U] that add up to no more than the bound, or of one that passes it."""
    ends, low = costs.cumsum(0), 0
    while low < len(costs):
        done = int(ends[low] - costs[low])
        high = max(low + 1, int(torch.searchsorted(ends, done + bound, right=True)))
        yield low, high
        low = high


def byte_chunks(costs: Tensor, memory: int, share: int) -> Iterator[tuple[int, int]]:
    """The same for bytes and a `share`-th part of the memory, with a ValueError where one cost passes that."""
    largest = int(costs.max())
    if largest > memory // share:
        raise ValueError(f"memory is {memory} bytes; accepted: at least {largest * share}")
    return chunks(costs, memory // share)


def logsumexp_runs(values: Tensor, lengths: Tensor) -> Tensor:
    """log sum exp over consecutive runs of rows of values [R, N], [len(lengths), N]; -inf where all are."""
    if len(lengths) == len(values):
        return values
    lengths = lengths.to(values.device)
    largest: Tensor = torch.segment_reduce(values, "max", lengths=lengths, axis=0, unsafe=True)
    largest = torch.where(largest == float("-inf"), 0, largest)
    of_row = torch.repeat_interleave(lengths, output_size=len(values))
    sums: Tensor = torch.segment_reduce((values - largest[of_row]).exp(), "sum", lengths=lengths, axis=0, unsafe=True)
    return sums.log_() + largest

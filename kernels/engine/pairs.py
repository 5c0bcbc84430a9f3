"""Sums over pairs of rows as operators: what energy, MMD and Euclidean distances are made of.

They are registered with torch.library, so that torch.compile takes them whole and gradients pass through them; inside
they check their input, choose a path and run it.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine import sums
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.sweep import Sweep
from headstart.kernels.engine.tile import Value
from headstart.kernels.ragged import check_finite

_FIRST = 2**18
"""Numbers of the tasks' first rows that are compared at a time: less than the least memory that is accepted."""


def _value(kind: str, coefficients: Tensor) -> Value:
    return Value("rbf" if kind == "rbf" else "distance", tuple(coefficients.tolist()))


@torch.library.custom_op("headstart::pair_sums", mutates_args=())
def pair_sums(
    target: Tensor,
    features: Tensor,
    offsets: Tensor,
    centre: Tensor | None,
    coefficients: Tensor,
    kind: str,
    precision: str,
    memory: int | None,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """sum_ij v(x_i, y_j) over the target x [N, D] and each task y of features [M, D]; [T] float64.

    And with `own` the sum over the target with itself, [1], as `own_sums` has it; else [0].

    `kind` is "distance" or "rbf" with `coefficients` c_b [B] float64 on the CPU. A task that is the target itself, row
    by row, gets the sum that `own_sums` gives for it, to the last bit: that is what makes d(X, X) exactly 0 on every
    path and whatever stands beside the task.
    """
    value = _value(kind, coefficients)
    path, reason = dispatch.choose(target.device, precision, target.shape[1])
    if path != "eager":
        check_finite(target)  # an eager sum fails by itself on what is not finite, and says so below
    same = _same_tasks(target, features, offsets)
    wanted = own or len(same) > 0
    whole = torch.tensor([0, len(target)])
    itself: Tensor | None = None
    with dispatch.Watch("pair sums", target.device, path, reason, precision) as watch:
        if path == "eager":
            if memory is not None:
                # What the own sums of the largest task take is refused here, by one figure.
                sizes = (len(target), int(offsets.diff().max()))
                least = max(Sweep(features, n, value, precision, 2**62, centre).least for n in sizes)
                if target.requires_grad:
                    least = max(least, _gradient_sweep(features, len(target), value, precision, 2**62, centre).least)
                fit_memory(memory, least, ", which one tile takes")
            engine = Sweep(features, len(target), value, precision, memory, centre)
            watch.planned = engine.planned
            try:
                totals, itself = sums.cross_sums(engine, target, features, offsets, own=wanted)
            except ValueError:
                check_finite(target)
                raise
        else:
            from headstart.kernels.engine import gpu  # Triton, which other paths do not need

            setting = gpu.Setting(features, max(len(target), len(features)), centre, value, precision, path, memory)
            totals = gpu.pair_sums(setting, target, features, offsets)
            if wanted:
                setting = gpu.Setting(target, len(target), centre, value, precision, path, memory)
                itself = gpu.own_sums(setting, target, whole)
    if itself is None:
        itself = totals.new_empty(0)
    totals[same] = itself
    return totals, itself if own else totals.new_empty(0)


@torch.library.custom_op("headstart::own_sums", mutates_args=())
def own_sums(
    features: Tensor,
    offsets: Tensor,
    centre: Tensor | None,
    coefficients: Tensor,
    kind: str,
    precision: str,
    memory: int | None,
) -> Tensor:
    """sum_ij v(y_i, y_j) over each task y of features [M, D] with itself, a row with itself included; [T] float64."""
    value = _value(kind, coefficients)
    path, reason = dispatch.choose(features.device, precision, features.shape[1])
    with dispatch.Watch("own sums", features.device, path, reason, precision) as watch:
        if path == "eager":
            engine = Sweep(features, int(offsets.diff().max()), value, precision, memory, centre)
            watch.planned = engine.planned
            return sums.own_sums(engine, features, offsets)
        from headstart.kernels.engine import gpu

        setting = gpu.Setting(features, len(features), centre, value, precision, path, memory)
        return gpu.own_sums(setting, features, offsets)


def _gradient_sweep(
    features: Tensor, num_columns: int, value: Value, precision: str, memory: int | None, centre: Tensor | None
) -> Sweep:
    """Gradients are in float32 at least, whatever the sums were in."""
    wide = precision if precision in ("fp32", "fp64") else "fp32"
    return sums.gradient_sweep(features, num_columns, value, wide, memory, centre)


@torch.library.custom_op("headstart::pair_gradient", mutates_args=())
def pair_gradient(
    target: Tensor,
    features: Tensor,
    row_weights: Tensor,
    centre: Tensor | None,
    coefficients: Tensor,
    kind: str,
    precision: str,
    memory: int | None,
) -> Tensor:
    """sum_j w_j dv(x_i, y_j)/dx_i for weights w [M] of the rows y; [N, D] in the target's dtype. Always `eager`."""
    moved, value = torch.empty_like(target), _value(kind, coefficients)
    engine = _gradient_sweep(features, len(target), value, precision, memory, centre)
    sums.cross_gradient(engine, target, features, row_weights, moved)
    return moved


@torch.library.custom_op("headstart::own_gradient", mutates_args=())
def own_gradient(
    features: Tensor,
    offsets: Tensor,
    weights: Tensor,
    centre: Tensor | None,
    coefficients: Tensor,
    kind: str,
    precision: str,
    memory: int | None,
) -> Tensor:
    """w_t sum_j dv(y_i, y_j)/dy_i over the rows j of the task t of row i, for weights w [T]; [M, D] as the features."""
    moved, value = torch.empty_like(features), _value(kind, coefficients)
    for t, (start, end) in enumerate(pairwise(offsets.tolist())):
        rows, same = features[start:end], weights[t].expand(end - start)
        engine = _gradient_sweep(features, len(rows), value, precision, memory, centre)
        sums.cross_gradient(engine, rows, rows, same, moved[start:end])
    return moved


@pair_sums.register_fake
def _(target: Tensor, features: Tensor, offsets: Tensor, *how: object) -> tuple[Tensor, Tensor]:
    num_own = 1 if how[-1] else 0
    return target.new_empty(offsets.shape[0] - 1, dtype=torch.float64), target.new_empty(num_own, dtype=torch.float64)


@own_sums.register_fake
def _(features: Tensor, offsets: Tensor, *_: object) -> Tensor:
    return features.new_empty(offsets.shape[0] - 1, dtype=torch.float64)


@pair_gradient.register_fake
def _(target: Tensor, *_: object) -> Tensor:
    return torch.empty_like(target)


@own_gradient.register_fake
def _(features: Tensor, *_: object) -> Tensor:
    return torch.empty_like(features)


def _pair_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    target, features, offsets, centre, coefficients, ctx.kind, ctx.precision, ctx.memory, ctx.own = inputs
    ctx.save_for_backward(target, features, offsets, centre, coefficients)


def _pair_backward(ctx: Any, gradient: Tensor, own_gradient_: Tensor) -> tuple[Tensor | None, ...]:
    target, features, offsets, centre, coefficients = ctx.saved_tensors
    how = (centre, coefficients, ctx.kind, ctx.precision, ctx.memory)
    weights = torch.repeat_interleave(gradient, offsets.diff().to(gradient.device), output_size=features.shape[0])
    moved = pair_gradient(target, features, weights, *how)
    if ctx.own:
        # A pair of rows counts twice, once from each side.
        whole = torch.arange(2) * target.shape[0]  # torch.tensor would make a compiled graph for this number of rows
        moved += own_gradient(target, whole, 2 * own_gradient_, *how)
    return moved, *[None] * 8


pair_sums.register_autograd(_pair_backward, setup_context=_pair_context)


def _same_tasks(target: Tensor, features: Tensor, offsets: Tensor) -> list[int]:
    """The tasks whose rows are the target's rows, bit by bit and in order."""
    alike = (offsets.diff() == len(target)).nonzero().flatten()
    if not len(alike):
        return []
    first = offsets[alike].to(features.device)
    some_at_once = first.split(max(1, _FIRST // features.shape[1]))
    alike = alike[torch.cat([(features[some] == target[0]).all(1) for some in some_at_once]).cpu()]
    starts = offsets[alike].tolist()
    chosen = zip(alike.tolist(), starts, strict=True)
    return [t for t, start in chosen if torch.equal(features[start : start + len(target)], target)]

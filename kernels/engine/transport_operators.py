"""Transports as operators: what Sinkhorn divergences are made of.

They are registered with torch.library, so that torch.compile takes them whole and gradients pass through them.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from headstart.kernels.engine.ground_cost import Cost, Points
from headstart.kernels.engine.precision import PRECISIONS, exact_products
from headstart.kernels.engine.softmin import add_gradient
from headstart.kernels.engine.transport import Settings, solve
from headstart.kernels.ragged import check_finite


@torch.library.custom_op("headstart::sinkhorn_transports", mutates_args=())
def transports(
    target: Tensor,
    features: Tensor,
    offsets: Tensor,
    p: int,
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    precision: str,
    memory: int | None,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(OT(x, y) [T], OT(x, x) [1], iterations [T], the errors of both, the potentials of y [M] and of x [N])."""
    check_finite(target)
    settings = Settings(float(epsilon), tolerance, max_iterations, memory)
    cost, own = Cost(p, None, precision, centre), as_points(target)
    itself, cross = solve(own, None, cost, settings), solve(Points(features, offsets), own, cost, settings)
    warn_of(torch.maximum(cross.errors, itself.errors), settings)
    return (
        cross.values,
        itself.values,
        cross.num_iterations,
        cross.errors,
        itself.errors,
        cross.potentials,
        itself.potentials,
    )


@transports.register_fake
def _(
    target: Tensor, features: Tensor, offsets: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def new(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return target.new_empty(size, dtype=dtype)

    num_tasks, dtype = offsets.shape[0] - 1, PRECISIONS[settings[4]]
    counts, potentials = new(num_tasks, torch.int64), (new(features.shape[0], dtype), new(target.shape[0], dtype))
    return new(num_tasks), new(1), counts, new(num_tasks), new(1), *potentials


@torch.library.custom_op("headstart::sinkhorn_gradient", mutates_args=())
def sinkhorn_gradient(
    target: Tensor,
    features: Tensor,
    offsets: Tensor,
    potentials: Tensor,
    own_potentials: Tensor,
    weights: Tensor,
    own_weight: Tensor,
    p: int,
    epsilon: Tensor,
    precision: str,
    memory: int | None,
    centre: Tensor | None,
) -> Tensor:
    """sum_t w_t dOT(x, y_t)/dx + w dOT(x, x)/dx at the potentials of the optimum, [N, D] as the target."""
    cost, at = Cost(p, None, precision, centre), float(epsilon)
    sources, own = Points(features, offsets), as_points(target)
    out, cuts = torch.zeros(target.shape, dtype=PRECISIONS[precision], device=target.device), offsets.tolist()
    with exact_products(target.device):
        for t, weight in enumerate(weights.tolist()):
            if weight:
                rows, part = sources.only(t), potentials[cuts[t] : cuts[t + 1]]
                add_gradient(out, weight, rows, own, part, at, cost, memory)
        # Both sides of OT(x, x) move: each has the gradient of one.
        add_gradient(out, 2 * float(own_weight), own, own, own_potentials, at, cost, memory)
    return out.to(target.dtype)


@sinkhorn_gradient.register_fake
def _(target: Tensor, *_: object) -> Tensor:
    return target.new_empty(target.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    target, features, offsets, ctx.p, epsilon, _, _, ctx.precision, ctx.memory, centre = inputs
    ctx.save_for_backward(target, features, offsets, *output[5:], epsilon, centre)


def _backward(ctx: Any, weights: Tensor, own_weight: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, epsilon, centre = ctx.saved_tensors
    moved = sinkhorn_gradient(*saved, weights, own_weight, ctx.p, epsilon, ctx.precision, ctx.memory, centre)
    return moved, *[None] * 9


transports.register_autograd(_backward, setup_context=_context)


@torch.library.custom_op("headstart::sinkhorn_self_values", mutates_args=())
def self_values(
    features: Tensor,
    offsets: Tensor,
    p: int,
    epsilon: Tensor,
    tolerance: float,
    max_iterations: int,
    precision: str,
    memory: int | None,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """OT(y, y) of each task and its error, [T] float64 both."""
    settings = Settings(float(epsilon), tolerance, max_iterations, memory)
    solution = solve(Points(features, offsets), None, Cost(p, None, precision, centre), settings)
    warn_of(solution.errors, settings)
    return solution.values, solution.errors


@self_values.register_fake
def _(features: Tensor, offsets: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    values = features.new_empty(offsets.shape[0] - 1, dtype=torch.float64)
    return values, torch.empty_like(values)


def as_points(features: Tensor) -> Points:
    """One set."""
    return Points(features.detach(), torch.tensor([0, len(features)]))


def warn_of(errors: Tensor, settings: Settings) -> None:
    """Warn where a transport did not converge."""
    lost = int((~(errors <= settings.tolerance)).sum())  # so written that a NaN is lost
    if lost:
        warnings.warn(
            f"{lost} of {len(errors)} Sinkhorn distances did not converge in {settings.max_iterations} iterations: "
            f"marginal error up to {float(errors.max()):.1e}, tolerance {settings.tolerance:.1e}; what helps is more "
            "iterations, a larger epsilon or tolerance, precision='fp64'",
            RuntimeWarning,
            stacklevel=3,
        )

"""Energy distances between a target and many ragged tasks."""

from torch import Tensor

from headstart.kernels.engine.terms import SelfTerms, make_self_terms, means_of_pairs, not_negative
from headstart.kernels.ragged import RaggedTasks


def energy_self_terms(
    tasks: RaggedTasks, *, precision: str | None = None, memory: int | None = None, centre: Tensor | None = None
) -> SelfTerms:
    """The self terms of T tasks, for `energy_distances(..., self_terms=...)` with many targets.

    Cost: sum n_t^2 D multiplications. Under bf16, tf32 and bf16x3 the terms hold for one centre [D], by default amid
    these tasks: to join the terms of several sets, give all of them the same. Errors as for `energy_distances`.
    """
    return make_self_terms("distance", tasks, precision=precision, memory=memory, centre=centre)


def energy_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    unbiased: bool = False,
    precision: str | None = None,
    memory: int | None = None,
    self_terms: SelfTerms | None = None,
) -> Tensor:
    """Energy distance of a target x [N, D] to each of T ragged tasks y [n_t, D], as [T]; smaller is closer.

        2 mean_ij |x_i - y_j|  -  mean_ij |x_i - x_j|  -  mean_ij |y_i - y_j|

        energy_distances(target, tasks)                    # V-statistic: 0 for X itself, never negative
        energy_distances(target, tasks, unbiased=True)     # U-statistic: may be negative; needs two rows a task

    No root is taken: the root is the metric. Székely and Rizzo, Journal of Statistical Planning and Inference 143
    (2013) 1249-1272; `naive.energy_distances` is the definition. Differentiable with respect to the target.

    `precision` is one of `engine.precision.PRECISIONS` (default: fp64 for float64 features, else fp32), the result
    float64 for fp64 and else float32. `memory` bounds, in bytes, what is held beside the inputs and what is as long as
    T or the sum of n_t (default 256 MiB, 4 GiB on a GPU's own paths, or more where less cannot do): it changes no bit
    of the result, and d(X, X) is exactly 0. A gradient holds one array more like the target. `self_terms` spares the
    tasks' own part, half of the work when n_t is about N. `headstart.kernels.dispatch` chooses the path.

    Error: some sqrt(D) u of the mean distance in each of the three means, u = 6e-8 for fp32 and 1.1e-16 for fp64; for
    the rounded precisions kernels/README.md has the table. Squares below the least normal number lose their digits:
    rows nearer than 1e-19 (1e-154 for fp64) may count as equal.
    ValueError: a target of another D, dtype or device, without rows, or not finite; a precision that is not accepted;
    a bound that cannot hold one tile; self terms of other tasks, or of another precision, path or centre; one row with
    `unbiased`; rows so far apart that squares overflow.
    """
    means = means_of_pairs("distance", target, tasks, unbiased, precision, memory, self_terms)
    # In this order equal terms cancel exactly.
    distances = (means.cross - means.target) + (means.cross - means.tasks)
    return (distances if unbiased else not_negative(distances)).to(means.dtype)

"""Maximum mean discrepancies between a target and many ragged tasks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.engine.median import keeps_digits, median_distance
from headstart.kernels.engine.terms import SelfTerms, make_self_terms, means_of_pairs, not_negative
from headstart.kernels.ragged import RaggedTasks, check_alike

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths, as multiples of the target's median pairwise distance, where none are given."""

MEDIAN_ROWS = 1024
"""Rows of the target, evenly spaced, whose pairwise distances the median is of."""


class MMD(NamedTuple):
    """Distances, and the bandwidths that they hold for: distances of other bandwidths cannot be ranked with them."""

    distances: Tensor
    """[T]."""
    bandwidths: Tensor
    """sigma [B] float64 on the CPU."""


def median_bandwidths(target: Tensor) -> Tensor:
    """MULTIPLES of the median distance between rows of a target [N, D] that lie apart, [B] float64 on the CPU.

    Of more than MEDIAN_ROWS rows, that many evenly spaced ones. Where all rows are equal the median is taken as 1. The
    median heuristic is that of Gretton et al. (2012), section 8, spread over a mixture as in Li, Swersky and Zemel,
    ICML 2015.
    """
    step = -(-len(target) // MEDIAN_ROWS)
    sample = target.detach()[::step].to(torch.promote_types(target.dtype, torch.float32))
    median = median_distance(sample)
    if not keeps_digits(median, sample.dtype):
        median = median_distance(sample.double())
    return median * torch.tensor(MULTIPLES, dtype=torch.float64, device="cpu")


def mmd_self_terms(
    tasks: RaggedTasks,
    bandwidths: Tensor | Sequence[float],
    *,
    precision: str | None = None,
    memory: int | None = None,
    centre: Tensor | None = None,
) -> SelfTerms:
    """The self terms of T tasks at bandwidths sigma [B], for `mmd_distances(..., self_terms=...)`.

    Cost: sum n_t^2 (D + B). `centre` as for `energy_self_terms`.
    """
    return make_self_terms(
        "rbf", tasks, precision=precision, memory=memory, centre=centre, bandwidths=_checked(_tensor(bandwidths), None)
    )


def mmd_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    bandwidths: Tensor | Sequence[float] | None = None,
    unbiased: bool = False,
    precision: str | None = None,
    memory: int | None = None,
    self_terms: SelfTerms | None = None,
) -> MMD:
    """Squared MMD of a target x [N, D] to each of T ragged tasks y [n_t, D], as [T], and the bandwidths it holds for.

        mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j),  k = mean_b exp(-|x - y|^2 / (2 sigma_b^2))

        distances, bandwidths = mmd_distances(target, tasks)       # one set of bandwidths for all T: they can be ranked
        mmd_distances(target, others, bandwidths=bandwidths)       # on the same scale

    Gretton et al., Journal of Machine Learning Research 13 (2012) 723-773; `naive.mmd_distances` is the definition.
    `bandwidths` sigma [B], in the features' unit; None: those of the self terms, or `median_bandwidths(target)`, which
    holds up to 40 MB whatever `memory` says. The V-statistic by default, 0 for X itself; `unbiased` as for
    `energy_distances`, and so are `precision`, `memory`, `self_terms` and the errors. Differentiable with respect to
    the target, with the bandwidths held.

    Error: that of d^2, some sqrt(D) u (|x|^2 + |y|^2) with norms from the centre, over 2 sigma^2 of the smallest sigma;
    d^2 below the least normal number (1e-38 for fp32) counts as 0.
    ValueError: as for `energy_distances`, and bandwidths that are not positive and finite. TypeError: complex ones.
    """
    check_alike(target, tasks)
    kept = None if self_terms is None else self_terms.bandwidths
    if bandwidths is not None:
        chosen = _checked(_tensor(bandwidths), kept)
    elif kept is None:
        chosen = _median_bandwidths(target.detach())
    if kept is not None:
        chosen = kept  # those given are the same numbers
    means = means_of_pairs("rbf", target, tasks, unbiased, precision, memory, self_terms, chosen)
    # In this order equal terms cancel exactly.
    distances = (means.target - means.cross) + (means.tasks - means.cross)
    return MMD((distances if unbiased else not_negative(distances)).to(means.dtype), chosen)


def _tensor(bandwidths: Tensor | Sequence[float]) -> Tensor:
    if isinstance(bandwidths, Tensor) and bandwidths.is_complex():
        raise TypeError(f"bandwidths are {bandwidths.dtype}; accepted: real numbers")
    # Here and not in the operator: of a tensor on "meta", as torch.set_default_device may make it, its fake would run.
    return torch.as_tensor(bandwidths, dtype=torch.float64, device="cpu")


@torch.library.custom_op("headstart::median_bandwidths", mutates_args=())
def _median_bandwidths(target: Tensor) -> Tensor:
    return median_bandwidths(target)


@_median_bandwidths.register_fake
def _(target: Tensor) -> Tensor:
    return torch.empty(len(MULTIPLES), dtype=torch.float64)


@torch.library.custom_op("headstart::checked_bandwidths", mutates_args=())
def _checked(bandwidths: Tensor, kept: Tensor | None) -> Tensor:
    """A copy of bandwidths [B] float64 on the CPU; ValueError where those of kept self terms are others."""
    given = bandwidths.clone()
    if given.ndim != 1 or len(given) == 0 or not bool((given.isfinite() & (given > 0)).all()):
        raise ValueError(f"bandwidths are {given.tolist()}; accepted: [B], positive and finite")
    if kept is not None and not torch.equal(given, kept.cpu()):
        accepted = f"{kept.tolist()}, those of the self terms, or None to take them"
        raise ValueError(f"bandwidths are {given.tolist()}; accepted: {accepted}")
    return given


@_checked.register_fake
def _(bandwidths: Tensor, kept: Tensor | None) -> Tensor:
    return torch.empty_like(bandwidths)

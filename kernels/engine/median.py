"""The median distance between the rows of a set: the scale that bandwidths and epsilons are taken from."""

import math

import torch
from torch import Tensor


def median_distance(rows: Tensor) -> float:
    """`naive.median_distance` of rows [N, D], in their dtype: 1 where all are equal, and 0 where all squares vanish.

    From differences, of each pair once: N^2 D / 2 in time, and some N^2 numbers.
    """
    if bool((rows == rows[0]).all()):
        return 1.0
    # Of the pairs i < j alone: each distance would be there twice, which leaves the lower median where it is.
    distances = torch.pdist(rows)
    apart = distances[distances > 0]
    return float(apart.median()) if len(apart) else 0.0


def keeps_digits(median: float, dtype: torch.dtype) -> bool:
    """False where squares about it overflow in a dtype, or lose digits: below its least normal number."""
    return dtype == torch.float64 or torch.finfo(dtype).tiny ** 0.5 < median < math.inf

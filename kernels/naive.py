"""The specification: every task distance written out plainly, one task at a time, with the whole [N, n_t] matrix.

These functions compute in the dtype that they are given; in float64 they are what every other path is held to.
They are slow and hold everything in memory: use the module that has the distance's name (`headstart.kernels.energy`
for `energy_distances`).

    naive.energy_distances(target.double(), RaggedTasks(features.double(), offsets))   # [T]
"""

import math
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from headstart.kernels.ragged import RaggedTasks


def pairwise(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||_2 for x [N, D] and y [M, D], as [N, M], from the differences themselves.

    Not from |x|^2 + |y|^2 - 2 x.y, which loses a distance that is small beside the norms.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def euclidean_distances(target: Tensor, tasks: RaggedTasks, *, form: Literal["mean", "pairs"] = "mean") -> Tensor:
    """Euclidean distance of a target [N, D] to each of T tasks, as [T].

    - `mean`: ||mean(x_s) - mean(x_t)||_2 = sqrt(sum_i (xs_i - xt_i)^2) between the tasks' mean features, the
      textbook's distance between two tasks' feature vectors.
    - `pairs`: mean over all pairs of rows of ||x_s - x_t||_2.
    """
    distances = []
    for t in range(tasks.num_tasks):
        source = tasks.task(t)
        if form == "mean":
            distances.append((source.mean(0) - target.mean(0)).square().sum().sqrt())
        else:
            distances.append(pairwise(target, source).mean())
    return torch.stack(distances)


def energy_distances(target: Tensor, tasks: RaggedTasks, *, unbiased: bool = False) -> Tensor:
    """Energy distance of a target x [N, D] to each of T tasks y [n_t, D], as [T]; no root is taken.

        2 mean_ij |x_i - y_j|  -  mean_ij |x_i - x_j|  -  mean_ij |y_i - y_j|

    The default is the V-statistic: all N^2 and n_t^2 pairs count, a row with itself too, so that d(X, X) = 0 and no
    value is negative. `unbiased` leaves the pairs of a row with itself out of the divisor, N (N - 1) and
    n_t (n_t - 1): the U-statistic, whose expectation is the distance of the populations and which may be negative.

    Source: G. J. Székely and M. L. Rizzo, "Energy statistics: A class of statistics based on distances", Journal of
    Statistical Planning and Inference 143 (2013) 1249-1272, equation (6.1) without its factor nm / (n + m).
    """
    distances, own = [], _within(target, unbiased)
    for t in range(tasks.num_tasks):
        source = tasks.task(t)
        cross = pairwise(target, source).mean()
        distances.append(2 * cross - own - _within(source, unbiased))
    return torch.stack(distances)


def _within(x: Tensor, unbiased: bool) -> Tensor:
    num_rows = len(x)
    return pairwise(x, x).sum() / (num_rows * (num_rows - 1 if unbiased else num_rows))


def median_distance(x: Tensor) -> Tensor:
    """Median of |x_i - x_j| over the pairs of different rows of x [N, D] that lie apart, a scalar; 1 where none do."""
    distances = pairwise(x, x)
    apart = distances[distances > 0]
    return apart.median() if len(apart) else distances.new_ones(())


def rbf_kernel(x: Tensor, y: Tensor, bandwidths: Tensor) -> Tensor:
    """The mixture mean_b exp(-|x_i - y_j|^2 / (2 sigma_b^2)) for bandwidths sigma [B], as [N, M]."""
    squares = pairwise(x, y).square()
    return torch.stack([torch.exp(-squares / (2 * sigma**2)) for sigma in bandwidths]).mean(0)


def mmd_distances(target: Tensor, tasks: RaggedTasks, bandwidths: Tensor, *, unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy of a target x [N, D] to each of T tasks y [n_t, D], as [T].

        mean_ij k(x_i, x_j)  +  mean_ij k(y_i, y_j)  -  2 mean_ij k(x_i, y_j)

    with k of `rbf_kernel`. The default is the V-statistic; `unbiased` leaves the pairs of a row with itself out.

    Source: A. Gretton et al., "A Kernel Two-Sample Test", Journal of Machine Learning Research 13 (2012) 723-773,
    equations (5) (V-statistic) and (3) (unbiased).
    """

    def within(x: Tensor) -> Tensor:
        values, num_rows = rbf_kernel(x, x, bandwidths), len(x)
        if not unbiased:
            return values.mean()
        return (values.sum() - values.diagonal().sum()) / (num_rows * (num_rows - 1))

    distances, own = [], within(target)
    for t in range(tasks.num_tasks):
        source = tasks.task(t)
        distances.append(own + within(source) - 2 * rbf_kernel(target, source, bandwidths).mean())
    return torch.stack(distances)


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Prototypes: the mean of the rows of each label that occurs, by ascending label, [C, D]."""
    return torch.stack([features[labels == label].mean(0) for label in labels.unique()])


def prototype_distances(
    target: Tensor, labels: Tensor, tasks: RaggedTasks, *, form: Literal["assignment", "nearest"] = "assignment"
) -> Tensor:
    """Distance between the class means of a target [N, D] with labels [N] and those of each of T labelled tasks, [T].

    - `assignment`: min over one-to-one matchings of min(C, C_t) classes of the mean of ||m_c - m_c'||_2.
    - `nearest`: mean over the target's classes c of min over c' of ||m_c - m_c'||_2; not symmetric.
    """
    distances = []
    means = class_means(target, labels)
    assert tasks.labels is not None
    for t in range(tasks.num_tasks):
        low, high = int(tasks.offsets[t]), int(tasks.offsets[t + 1])
        costs = pairwise(means, class_means(tasks.task(t), tasks.labels[low:high]))
        if form == "nearest":
            distances.append(costs.amin(1).mean())
            continue
        short = costs if costs.shape[0] <= costs.shape[1] else costs.T
        matchings = permutations(range(short.shape[1]), len(short))
        sums = [torch.stack([short[i, j] for i, j in enumerate(matching)]).sum() for matching in matchings]
        distances.append(torch.stack(sums).amin() / len(short))
    return torch.stack(distances)


def frechet_distances(target: Tensor, tasks: RaggedTasks) -> Tensor:
    """Squared Fréchet distance between the Gaussians with the moments of a target and of each of T tasks, as [T].

        |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)

    with covariances S = mean_i (x_i - m)(x_i - m)^T, divided by N (so that a task of one row has none). It is the
    squared 2-Wasserstein distance of the Gaussians (Bures-Wasserstein); the root is the metric.

    Source: D. C. Dowson and B. V. Landau, "The Fréchet distance between multivariate normal distributions", Journal of
    Multivariate Analysis 12 (1982) 450-455; M. Heusel et al., NeurIPS 2017, for features of networks.
    """
    mean, covariance = _moments(target)
    root = _root(covariance)
    distances = []
    for t in range(tasks.num_tasks):
        its_mean, its_covariance = _moments(tasks.task(t))
        cross = _root(root @ its_covariance @ root)
        distances.append((mean - its_mean).square().sum() + (covariance + its_covariance - 2 * cross).trace())
    return torch.stack(distances)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / len(x)


def _root(matrix: Tensor) -> Tensor:
    """The root of a symmetric positive semidefinite matrix, through its eigenvalues."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def entropic_transport(costs: Tensor, epsilon: float, *, num_iterations: int = 5000) -> Tensor:
    """Entropic optimal transport between uniform weights at costs C [N, M], a scalar:

        min over couplings P of  <P, C> + epsilon KL(P | a b^T)  =  mean_i f_i + mean_j g_j

    with potentials f [N], g [M] found by Sinkhorn's iterations in the log domain, until rounding alone moves them;
    differentiable through them.

    Source: G. Peyré and M. Cuturi, "Computational Optimal Transport" (2019), section 4.4.
    """
    num_rows, num_columns = costs.shape
    f, g = costs.new_zeros(num_rows), costs.new_zeros(num_columns)
    for _ in range(num_iterations):
        last = f
        f = -epsilon * (torch.logsumexp((g - costs) / epsilon, 1) - math.log(num_columns))
        g = -epsilon * (torch.logsumexp((f[:, None] - costs) / epsilon, 0) - math.log(num_rows))
        # Sums of exponentials, and so potentials, are off by some u of their size: no step says less than that.
        if bool((f - last).abs().max() <= 16 * torch.finfo(f.dtype).eps * f.abs().max()):
            break
    return f.mean() + g.mean()


def sinkhorn_distances(
    target: Tensor, tasks: RaggedTasks, *, epsilon: float, p: Literal[1, 2] = 2, num_iterations: int = 5000
) -> Tensor:
    """Sinkhorn divergence of a target x [N, D] to each of T tasks y [n_t, D], as [T]; the cost is |x - y|^p / p.

        OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2,    OT = `entropic_transport` with that epsilon

    Source: J. Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019,
    equation (3).
    """

    def transport(x: Tensor, y: Tensor) -> Tensor:
        return entropic_transport(ground_cost(x, y, p), epsilon, num_iterations=num_iterations)

    sources = [tasks.task(t) for t in range(tasks.num_tasks)]
    own = transport(target, target)
    return torch.stack([transport(target, y) - (own + transport(y, y)) / 2 for y in sources])


def ground_cost(x: Tensor, y: Tensor, p: Literal[1, 2] = 2) -> Tensor:
    """|x_i - y_j|^p / p, [N, M]; for p = 2 from the differences squared, so that it has a gradient at equal rows."""
    if p == 1:
        return pairwise(x, y)
    squares: Tensor = (x[:, None, :] - y[None, :, :]).square().sum(2)
    return squares / 2


def nearest_neighbours(target: Tensor, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k rows of features [M, D] nearest to each row of a target [N, D]: (distances [N, k], rows [N, k] int64).

    Nearest first; equal distances by the number of the row.
    """
    distances, rows = pairwise(target, features).sort(dim=1, stable=True)
    return distances[:, :k], rows[:, :k]


def label_aware_distances(
    target: Tensor,
    labels: Tensor,
    tasks: RaggedTasks,
    *,
    epsilon: float,
    label_distance: Literal["bures", "sinkhorn"] = "bures",
    num_iterations: int = 5000,
) -> Tensor:
    """Distance between a labelled target x [N, D] and each of T labelled tasks y [n_t, D], as [T].

    `sinkhorn_distances` with p = 2 at the cost (|x - y|^2 + W^2(class of x, class of y)) / 2, W^2 between the rows of
    two classes: `frechet_distances`, or twice `sinkhorn_distances`, which tends to half of W^2.

    Source: D. Alvarez-Melis and N. Fusi, "Geometric Dataset Distances via Optimal Transport", NeurIPS 2020,
    equations (5) and (10).
    """

    def label_costs(x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor) -> Tensor:
        (x_classes, x_index), (y_classes, y_index) = (v.unique(return_inverse=True) for v in (x_labels, y_labels))
        classes = RaggedTasks.from_list([y[y_labels == label] for label in y_classes])
        sets = [x[x_labels == label] for label in x_classes]
        if label_distance == "bures":
            table = torch.stack([frechet_distances(rows, classes) for rows in sets])
        else:
            divergence = [sinkhorn_distances(v, classes, epsilon=epsilon, num_iterations=num_iterations) for v in sets]
            table = 2 * torch.stack(divergence)
        return table[x_index][:, y_index]

    def transport(x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor) -> Tensor:
        costs = ground_cost(x, y) + label_costs(x, x_labels, y, y_labels) / 2
        return entropic_transport(costs, epsilon, num_iterations=num_iterations)

    assert tasks.labels is not None
    own, distances = transport(target, labels, target, labels), []
    for t in range(tasks.num_tasks):
        y, y_labels = tasks.task(t), tasks.labels[int(tasks.offsets[t]) : int(tasks.offsets[t + 1])]
        cross, other = transport(target, labels, y, y_labels), transport(y, y_labels, y, y_labels)
        distances.append(cross - (own + other) / 2)
    return torch.stack(distances)

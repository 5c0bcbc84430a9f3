"""Scores of a source task: how well its features fit the target's labels, without training anything.

    score_features(features, labels)    # {"knn": 0.93, "ridge": 0.95, "score": 0.94}

Both are leave-one-out accuracies: every labelled image is learnt from and tested on, and larger is better.
Features without any signal score below chance, since leaving a sample out makes its class the rarer one.

Everything is torch in float64: numpy's BLAS brings threads of its own, and with the two pools together the
scores took ten times as long on a busy machine.
"""

from collections.abc import Iterator

import numpy as np
import torch

from headstart.trainer.heads import Array, as_tensor, require_finite

# Rows of the similarity matrix held at once: 512 x 5000 in float64 are 20 MB.
_ROWS = 512
# Similarities, and sums of them, that differ by less are taken as equal: float64 rounds at about 1e-16.
_EQUAL = 1e-9
# Of which a subsample has this many, or all that there are, on average.
_SAMPLES_PER_CLASS = 5
# Penalties tried, relative to the total sum of squares, which no eigenvalue of X^T X exceeds.
_PENALTIES = torch.logspace(-7, 1, 17, dtype=torch.float64)


def score_features(features: Array, labels: Array, cap: int = 5000, seed: int = 0) -> dict[str, float]:
    """The scores of features [N, D] with labels [N]: `knn`, `ridge`, and `score`, their mean.

    Of more than `cap` samples a stratified subsample of `cap` is scored, of cap / 5 random classes at most: with one
    sample left of each class no leave-one-out could be right. Raises DataError where a feature is not finite,
    ValueError for fewer than two samples.
    """
    require_finite(features, "labelled")
    x, y = _checked(features, labels)
    if len(x) > cap:
        classes = np.random.default_rng(seed).permutation(int(y.max()) + 1)[: cap // _SAMPLES_PER_CLASS]
        kept = np.isin(y.numpy(), classes)
        x, y = x[kept], y[kept]
    if len(x) > cap:
        chosen = stratified_subsample(y.numpy(), cap, seed)
        x, y = x[chosen], y[chosen]
    knn, ridge = knn_score(x, y), ridge_score(x, y)
    return {"knn": knn, "ridge": ridge, "score": (knn + ridge) / 2}


def stratified_subsample(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sorted indices [size] of a random subsample that keeps every class's share of N to within one sample.

    Shares are rounded down, and the largest remainders up, those that are equal in random order.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    _, starts, counts = np.unique(shuffled[by_class], return_index=True, return_counts=True)
    ranks = np.arange(len(labels)) - np.repeat(starts, counts)
    num_each, remainders = np.divmod(counts * size, len(labels))
    by_remainder = np.lexsort((rng.permutation(len(counts)), -remainders))
    num_each[by_remainder[: size - num_each.sum()]] += 1
    return np.sort(order[by_class[ranks < np.repeat(num_each, counts)]])


def knn_score(features: Array, labels: Array, k: int = 5) -> float:
    """Leave-one-out accuracy of the k nearest neighbours by cosine similarity, 0 to 1.

    Samples as similar as the k-th neighbour share the places that are left, so that duplicates count the same
    in any order. The most votes win, then the larger summed similarity, then the lower label. k is N - 1 at
    most; a row of zeros has similarity 0 to all. Raises ValueError for fewer than two samples or k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; accepted: at least 1")
    x, y = _checked(features, labels)
    k = min(k, len(x) - 1)
    one_hot = torch.nn.functional.one_hot(y).double()
    largest = x.abs().amax(1, keepdim=True)
    # Divided by the largest value first, so that no square overflows or vanishes.
    x = torch.nn.functional.normalize(x / largest.where(largest > 0, 1))
    correct = 0
    for start in range(0, len(x), _ROWS):
        similarity = x[start : start + _ROWS] @ x.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -torch.inf
        weights, neighbours = _neighbours(similarity, k)
        near = similarity.gather(1, neighbours)
        votes, sums = torch.zeros(2, len(rows), one_hot.shape[1], dtype=torch.float64)
        votes.scatter_add_(1, y[neighbours], weights)
        sums.scatter_add_(1, y[neighbours], weights * near.where(weights > 0, 0))
        leads = votes >= votes.amax(1, keepdim=True) - _EQUAL
        sums[~leads] = -torch.inf
        leads = sums >= sums.amax(1, keepdim=True) - _EQUAL
        # argmax over 0 and 1 names any of the ones; over falling weights it names the first.
        first = leads * torch.arange(leads.shape[1], 0, -1)
        correct += int((first.argmax(1) == y[start : start + len(rows)]).sum())
    return correct / len(x)


def _neighbours(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that add up to k, and indices, both [B, M], of the neighbours in similarity [B, N]."""
    near, indices = similarity.topk(min(k + 1, similarity.shape[1]))
    kth = near[:, k - 1 : k]
    if bool((near[:, k:] < kth - _EQUAL).all()):
        return torch.ones(len(similarity), k, dtype=torch.float64), indices[:, :k]
    above, level = similarity > kth + _EQUAL, (similarity - kth).abs() <= _EQUAL
    share = (k - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)
    weights = above.double() + level * share
    return weights, torch.arange(similarity.shape[1]).expand_as(similarity)


def ridge_score(features: Array, labels: Array, ridge: float | None = None) -> float:
    """Leave-one-out accuracy of one-against-all ridge regression with an intercept, 0 to 1.

    All N refits in closed form: with H = 1/N + X (X^T X + ridge I)^-1 X^T the hat matrix of the centred
    features and r the residuals, the error on the sample left out is e_i = r_i / (1 - h_ii) (PRESS, Allen
    1974; Golub, Heath and Wahba 1979). `ridge` is the penalty for the features as they come; None takes, of
    17 between 1e-7 and 10 times the centred sum of squares, the one with the smallest sum of e_i^2. Computed
    from the eigenvalues of the smaller of X^T X and X X^T. Raises ValueError for fewer than two samples or a
    ridge not above 0.
    """
    if ridge is not None and not ridge > 0:
        raise ValueError(f"ridge is {ridge}; accepted: above 0, or None to choose it")
    x, y = _checked(features, labels)
    targets = torch.nn.functional.one_hot(y).double()
    magnitude = float(x.abs().max())
    x = x - x.mean(0)
    largest = float(x.abs().max())
    if largest > 1e-12 * magnitude:
        # Divided by the largest value, so that no square overflows or vanishes.
        x = x / largest
        penalties = _PENALTIES * x.square().sum() if ridge is None else x.new_tensor([ridge / largest**2])
    else:
        # Constant features: the intercept alone predicts, whatever the penalty.
        x, penalties = torch.zeros_like(x), torch.ones(1)
    errors = min(_leave_one_out(x, targets, penalties), key=lambda e: float(e.square().sum()))
    return float(((targets - errors).argmax(1) == y).double().mean())


def _leave_one_out(x: torch.Tensor, targets: torch.Tensor, penalties: torch.Tensor) -> Iterator[torch.Tensor]:
    """Errors [N, C] on the samples left out, for each penalty; x [N, D] is centred."""
    num_samples, num_features = x.shape
    centred = targets - targets.mean(0)
    if num_samples <= num_features:
        # X X^T = U diag(s) U^T with all N eigenvectors, so residuals and 1 - h are sums of terms
        # ridge / (s + ridge) and lose no digits where the fit is nearly exact. One eigenvector is constant
        # and belongs to the intercept: its eigenvalue is moved from 0, which rounding makes 1e-16 of the
        # total, to the total, and its term is taken off again.
        total = x.square().sum()
        eigenvalues, basis = _eigh(x @ x.T + total / num_samples)
        loadings, squares = basis.T @ centred, basis.square()
        for penalty in penalties:
            shrink = penalty / (eigenvalues + penalty)
            residuals = basis @ (shrink[:, None] * loadings)
            constant = penalty / (total + penalty) / num_samples
            yield residuals / _positive(squares @ shrink - constant)
    else:
        eigenvalues, rotation = _eigh(x.T @ x)
        basis = x @ rotation
        loadings, squares = basis.T @ centred, basis.square()
        for penalty in penalties:
            inverse = 1 / (eigenvalues + penalty)
            residuals = centred - basis @ (inverse[:, None] * loadings)
            yield residuals / _positive(1 - 1 / num_samples - squares @ inverse)


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # On one thread: half of the work is bound by memory, and on a busy two-core machine a second thread took
    # n = 2048 from 1.6 s to 25 s and n = 600 from 0.04 s to 7 s (torch 2.15).
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(num_threads)
    # A Gram matrix has none below 0 but for rounding.
    return eigenvalues.clamp(min=0), vectors


def _positive(remainder: torch.Tensor) -> torch.Tensor:
    """1 - h as a column [N, 1], kept off the zero that a vanishing penalty rounds it to."""
    return remainder.clamp(min=torch.finfo(torch.float64).eps)[:, None]


def _checked(features: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] in float64 and labels [N] counted from 0, on the CPU."""
    x, y = as_tensor(features), as_tensor(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) < 2:
        shapes = f"features {tuple(x.shape)} and labels {tuple(y.shape)}"
        raise ValueError(f"{shapes} do not fit; accepted: [N, D] and [N] with N at least 2")
    return x.cpu().double(), torch.unique(y.cpu(), return_inverse=True)[1]

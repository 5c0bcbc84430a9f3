"""What the numbers of a run may claim: intervals, verdict, choice of mode, calibration, raw-pixel control.

    lo, hi = accuracy_interval(predicted == labels)
    pair = predicted == labels, scratch_predicted == labels
    verdict(paired_interval(*pair, seed=0), mcnemar_p_value(*pair))      # "transfer"

Accuracies are 0 to 1; `correct` is always one bool per image, [N], in the order of the images.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn, untyped

Interval = tuple[float, float]
Verdict = Literal["transfer", "no transfer", "unclear"]

# A verdict is wrong for two equally good models in at most this share of runs.
_SIGNIFICANCE = 0.05
# Inverse penalties of the raw-pixel control, tried on validation.
_CONTROL_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The mode that `auto` takes, and why."""

    mode: Literal["feature", "finetune"]
    """The mode taken."""
    reason: str
    """A sentence for the report."""
    difference: float
    """Accuracy on validation of finetune less that of feature."""
    standard_error: float
    """Of the difference, over the same images."""


def accuracy_interval(correct: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval of the accuracy whose images are `correct` [N], by Wilson (1927).

    It has a width where all images are right, or wrong, too: 3 of 3 give [0.44, 1]. Raises ValueError for an
    empty `correct` or an impossible level.
    """
    values = _bools(correct)
    found = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(_checked(level), method="wilson")
    return float(found.low), float(found.high)


def paired_interval(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of accuracy a less accuracy b on the same N images, resampled in pairs.

    An image adds +1 (a alone is right), 0 or -1, so the counts of a resample are multinomial, and are drawn as
    such. It is the bootstrap of Efron (1979), in 1 ms where scipy.stats.bootstrap, which draws and sums
    N x num_resamples indices, takes 1.3 s at N = 10,000. On a handful of images it is too narrow, as any
    bootstrap is: 2 against 0 right of 2 give [1, 1]. Raises ValueError for lengths that differ.
    """
    gains, losses, num_samples = _discordant(correct_a, correct_b)
    tail = (1 - _checked(level)) / 2
    shares = np.array([gains, losses, num_samples - gains - losses]) / num_samples
    counts = np.random.default_rng(seed).multinomial(num_samples, shares, size=num_resamples)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / num_samples, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar_p_value(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """McNemar's exact two-sided p-value (1947): could equally good models disagree so unevenly by chance?

    Of n images that one of the two alone gets right, each is a's with probability 1/2 where neither is better:
    a binomial test, exact for any n. 1 where they never disagree. Raises ValueError for lengths that differ.
    """
    gains, losses, _ = _discordant(correct_a, correct_b)
    return float(scipy.stats.binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


def verdict(interval: Interval, p_value: float) -> Verdict:
    """What the paired interval of transferred less control, and the exact p-value beside it, say together.

    `transfer` where the interval lies above 0, `no transfer` where below, and either only with p at most .05.
    For two equally good models the interval alone is wrong in up to half of all runs on 2 images and 12% on 6;
    the exact test keeps that at 5% at any size, and on thousands of images the two nearly always agree.
    """
    low, high = interval
    if p_value > _SIGNIFICANCE:
        return "unclear"
    if low > 0:
        return "transfer"
    return "no transfer" if high < 0 else "unclear"


def choose_mode(feature_correct: np.ndarray, finetune_correct: np.ndarray) -> Choice:
    """Take finetune where it beats feature by over one standard error of the paired difference, else feature.

    Both are [N] over the same validation images. With b images that finetune alone gets right and c that
    feature alone gets right, difference = (b - c) / N and, with the variance over N - 1, difference >
    standard error is the same as (b - c)^2 > b + c, McNemar's statistic above 1. The whole numbers are
    compared: at b = 1, c = 0 the two sides are equal, and rounding would decide.
    """
    gains, losses, num_samples = _discordant(finetune_correct, feature_correct)
    difference = (gains - losses) / num_samples
    # With a single image nothing is known of the variance: as large as a difference can be.
    error = 1.0
    if num_samples > 1:
        variance = ((gains + losses) - (gains - losses) ** 2 / num_samples) / (num_samples - 1)
        error = math.sqrt(variance / num_samples)
    better = gains > losses and (gains - losses) ** 2 > gains + losses
    points = f"{100 * difference:+.2f} points, one standard error being {100 * error:.2f}"
    reason = f"on {num_samples} validation images fine-tuning changes accuracy by {points}: "
    reason += "a gain beyond it" if better else "no gain beyond it, so the cheaper mode is kept"
    return Choice(mode="finetune" if better else "feature", reason=reason, difference=difference, standard_error=error)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T, 0.05 to 10,000, that makes softmax(logits / T) [N, C] likeliest for labels [N].

    Minimises the mean negative log-likelihood (Guo et al. 2017), a convex function of 1/T. As in Platt
    (1999) the targets are smoothed by one pseudo-sample, 1 / (N + 2) of each spread over all classes: where
    every label has the top logit the likelihood itself would grow until T = 0 and the model would claim
    certainty. 1 where no T is better, as with equal logits. Heads of a large learning rate have logits in the hundreds
    and need a T above 20.
    """
    scores = np.asarray(logits, dtype=np.float64)
    truth = np.asarray(labels, dtype=np.int64)
    if scores.ndim != 2 or truth.shape != scores.shape[:1] or not len(truth):
        shapes = f"logits {scores.shape} and labels {truth.shape}"
        raise ValueError(f"{shapes} do not fit; accepted: [N, C] and [N] with N at least 1")
    share = 1 / (len(truth) + 2)
    aim = (1 - share) * scores[np.arange(len(truth)), truth] + share * scores.mean(1)

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return float((scipy.special.logsumexp(scores * inverse, axis=1) - aim * inverse).mean())

    bounds = (math.log(0.05), math.log(10_000.0))
    found = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
    return math.exp(found.x) if found.fun < loss(0.0) - 1e-12 else 1.0


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy, 0 to 1, over `bins` equal bins of the top probability.

    sum_b n_b / N |accuracy_b - confidence_b| for probabilities [N, C] and labels [N] (Guo et al. 2017); a
    probability on an edge belongs to the bin below it.
    """
    confidence = np.asarray(probabilities, dtype=np.float64).max(1)
    correct = np.asarray(probabilities).argmax(1) == np.asarray(labels)
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def raw_pixels_control(
    train: np.ndarray,
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    test: np.ndarray,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Classes [N] that logistic regression on raw pixels predicts for `test` [N, D]: nothing is transferred.

    Five penalties are fitted on `train`; the highest accuracy on validation is taken, then the strongest
    penalty. Pixels are centred one by one and divided by one deviation common to all: a deviation for each
    magnifies the borders, and took 3 points off this control on 300 MNIST digits of 16 x 16 pixels (.844 to
    .815). `progress` counts fits: one takes minutes where there are thousands of classes.
    """
    labels = np.asarray(train_labels)
    if (labels == labels[0]).all():
        return np.full(len(test), labels[0])
    pixels = [np.asarray(part, dtype=np.float64) for part in (train, validation, test)]
    mean = pixels[0].mean(0)
    scale = float((pixels[0] - mean).std()) or 1.0
    known, chosen_on, asked = ((part - mean) / scale for part in pixels)
    best_accuracy, predicted = -1.0, np.empty(0)
    # One thread: on a busy two-core machine two took 40 s for 7 s at [20000, 768]; small fits gain nothing.
    # A fit that stops at max_iter is a control like any other.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # of many small ones: as for a regression
        for done, penalty in enumerate(_CONTROL_PENALTIES, start=1):
            fit = LogisticRegression(C=penalty, max_iter=300).fit(known, labels)
            accuracy = float(fit.score(chosen_on, validation_labels))
            if accuracy > best_accuracy:
                best_accuracy, predicted = accuracy, fit.predict(asked)
            if progress is not None:
                progress(done, len(_CONTROL_PENALTIES))
    return predicted


def _bools(correct: np.ndarray) -> np.ndarray:
    values = np.asarray(correct)
    if values.ndim != 1 or not len(values) or values.dtype != np.bool_:
        raise ValueError(f"correct is {values.dtype} {values.shape}; accepted: bool [N] with N at least 1")
    return values


def _discordant(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int, int]:
    """How many images a alone gets right, how many b alone, and N."""
    a, b = _bools(correct_a), _bools(correct_b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} images do not pair; accepted: the same images in the same order")
    return int((a & ~b).sum()), int((b & ~a).sum()), len(a)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; accepted: above 0 and below 1")
    return level

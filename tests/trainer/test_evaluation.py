import math
from functools import cache

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from headstart.trainer.evaluation import (
    accuracy_interval,
    choose_mode,
    expected_calibration_error,
    fit_temperature,
    mcnemar_p_value,
    paired_interval,
    raw_pixels_control,
    verdict,
)


def outcomes(right, wrong):
    return np.array([True] * right + [False] * wrong)


def pairs(both=0, only_a=0, only_b=0, neither=0):
    """Outcomes of a and of b on the same images."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def nll(logits, labels, temperature):
    scaled = logits / temperature
    log_sum = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
    return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())


def drawn_labels(logits, rng):
    """Labels drawn from softmax(logits), by the Gumbel trick."""
    return (logits + rng.gumbel(size=logits.shape)).argmax(1)


@pytest.mark.parametrize(("n", "accuracy"), [(10, 0.9), (300, 0.8), (1000, 0.93)])
def test_interval_covers_the_true_accuracy_in_95_of_100_samples(n, accuracy):
    covered = 0.0
    for right in range(n + 1):
        low, high = accuracy_interval(outcomes(right, n - right))
        covered += scipy.stats.binom.pmf(right, n, accuracy) * (low <= accuracy <= high)
    assert 0.925 <= covered <= 0.97


@pytest.mark.parametrize(("right", "wrong"), [(2, 1), (9, 1), (240, 60), (1, 999)])
def test_interval_ends_where_the_accuracy_seen_would_be_196_standard_errors_off(right, wrong):
    n, seen = right + wrong, right / (right + wrong)
    for end in accuracy_interval(outcomes(right, wrong)):  # Wilson (1927)
        assert abs(seen - end) == pytest.approx(scipy.stats.norm.ppf(0.975) * (end * (1 - end) / n) ** 0.5)


def test_paired_interval_covers_the_true_difference():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(1000):
        kind = rng.choice(4, size=400, p=[0.75, 0.10, 0.06, 0.09])
        low, high = paired_interval(kind <= 1, (kind == 0) | (kind == 2), seed=trial, num_resamples=2000)
        covered += low <= 0.04 <= high
    assert 0.925 <= covered / 1000 <= 0.97


def test_paired_interval_is_that_of_resampled_indices():
    a, b = pairs(both=100, only_a=25, only_b=10, neither=15)
    peer = scipy.stats.bootstrap(
        (a.astype(int) - b,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Differences come in steps of 1/150; the ends of two independent bootstraps may be a step apart.
    assert paired_interval(a, b, seed=0) == pytest.approx((peer.low, peer.high), abs=1.01 / 150)


def test_another_seed_draws_other_resamples():
    a, b = pairs(both=6000, only_a=1500, only_b=500, neither=2000)
    assert len({paired_interval(a, b, seed=seed, num_resamples=100) for seed in range(5)}) == 5


def test_interval_of_ten_thousand():
    assert accuracy_interval(outcomes(9000, 1000)) == pytest.approx((0.9 - 0.00588, 0.9 + 0.00588), abs=2e-4)


def test_intervals_widen_with_the_level():
    correct = outcomes(700, 300)
    narrow, wide = accuracy_interval(correct, level=0.5), accuracy_interval(correct, level=0.99)
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]
    a, b = pairs(both=600, only_a=150, only_b=50, neither=200)
    assert paired_interval(a, b, seed=3) == paired_interval(a, b, seed=3)
    narrow, wide = paired_interval(a, b, seed=3, level=0.5), paired_interval(a, b, seed=3, level=0.99)
    assert wide[0] < narrow[0] < 0.1 < narrow[1] < wide[1]


def test_the_interval_of_an_accuracy_has_a_width_where_all_images_are_right():
    assert accuracy_interval(outcomes(3, 0)) == pytest.approx((0.4385, 1), abs=1e-4)
    assert accuracy_interval(outcomes(0, 3)) == pytest.approx((0, 0.5615), abs=1e-4)


def test_models_that_never_disagree_differ_by_nothing():
    assert paired_interval(outcomes(50, 0), outcomes(50, 0), seed=0) == (0, 0)
    assert mcnemar_p_value(outcomes(50, 0), outcomes(50, 0)) == 1


def test_paired_interval_is_narrower_than_the_unpaired_where_outcomes_agree():
    a, b = pairs(both=800, only_a=40, only_b=10, neither=150)
    low, high = paired_interval(a, b, seed=0)
    low_a, high_a = accuracy_interval(a)
    low_b, high_b = accuracy_interval(b)
    assert low > 0
    assert high - low < 0.5 * ((high_a - low_b) - (low_a - high_b))
    swapped = paired_interval(b, a, seed=0)
    assert swapped == pytest.approx((-high, -low), abs=2e-3)


@pytest.mark.parametrize(
    ("interval", "p_value", "expected"),
    [
        ((0.001, 0.2), 0.05, "transfer"),
        ((0.001, 0.2), 0.051, "unclear"),
        ((0.0, 0.2), 0.04, "unclear"),
        ((-0.1, 0.1), 0.5, "unclear"),
        ((-0.2, 0.0), 0.04, "unclear"),
        ((0.0, 0.0), 1, "unclear"),
        ((-0.2, -0.001), 0.051, "unclear"),
        ((-0.2, -0.001), 0.05, "no transfer"),
    ],
)
def test_verdict_at_its_boundaries(interval, p_value, expected):
    assert verdict(interval, p_value) == expected


@cache
def judged(gains, losses, num_samples):
    """The verdict on N images of which one model alone gets `gains` right, the other alone `losses`."""
    a, b = pairs(only_a=gains, only_b=losses, neither=num_samples - gains - losses)
    return verdict(paired_interval(a, b, seed=0, num_resamples=1000), mcnemar_p_value(a, b))


@pytest.mark.parametrize(
    ("gains", "losses", "num_samples", "expected"),
    [
        (2, 0, 2, "unclear"),
        (4, 0, 30, "unclear"),
        (5, 0, 30, "unclear"),
        (6, 0, 30, "transfer"),
        (0, 6, 30, "no transfer"),
        (250, 77, 4400, "transfer"),
    ],
)
def test_a_few_images_decide_nothing(gains, losses, num_samples, expected):
    assert judged(gains, losses, num_samples) == expected
    assert judged(losses, gains, num_samples) == {"transfer": "no transfer", "no transfer": "transfer"}.get(
        expected, expected
    )


@pytest.mark.parametrize("disagreement", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1])
def test_equal_models_get_a_verdict_in_at_most_5_of_100_runs(disagreement):
    for num_samples in range(2, 31):
        wrong = sum(
            scipy.stats.binom.pmf(n, num_samples, disagreement) * scipy.stats.binom.pmf(gains, n, 0.5)
            for n in range(num_samples + 1)
            for gains in range(n + 1)
            if judged(gains, n - gains, num_samples) != "unclear"
        )
        assert wrong <= 0.05, num_samples


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_p_value_counts_the_splits_at_least_as_uneven(gains, losses, rest):
    n = gains + losses
    ways = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(gains - losses))
    a, b = pairs(both=rest, only_a=gains, only_b=losses, neither=1)
    assert mcnemar_p_value(a, b) == pytest.approx(ways / 2**n, rel=1e-9)


@pytest.mark.parametrize(
    ("both", "only_feature", "only_finetune", "neither", "mode"),
    [
        (90, 0, 0, 10, "feature"),
        (80, 5, 5, 10, "feature"),
        (280, 0, 1, 19, "feature"),
        (280, 0, 2, 18, "finetune"),
        (270, 6, 10, 14, "feature"),
        (270, 6, 11, 13, "finetune"),
        (200, 40, 2, 58, "feature"),
        (0, 0, 30, 0, "finetune"),
        (0, 30, 0, 0, "feature"),
        (30, 0, 0, 0, "feature"),
        (0, 0, 1, 0, "feature"),
    ],
)
def test_choice_takes_finetune_beyond_one_error(both, only_feature, only_finetune, neither, mode):
    feature, finetune = pairs(both, only_feature, only_finetune, neither)
    choice = choose_mode(feature, finetune)
    assert choice.mode == mode
    assert choice.difference == pytest.approx(finetune.mean() - feature.mean())
    paired = finetune.astype(float) - feature.astype(float)
    if len(feature) > 1:
        assert choice.standard_error == pytest.approx(paired.std(ddof=1) / math.sqrt(len(paired)), abs=1e-12)
    assert f"on {len(feature)} validation images" in choice.reason
    assert ("cheaper" in choice.reason) == (mode == "feature")


def test_choice_says_the_difference_and_its_error_in_points():
    # 2 images of 300 are +0.67 points; the outcomes 1, 1 and 298 zeros have a deviation of sqrt(2 - 4/300) / sqrt(299).
    said = "fine-tuning changes accuracy by +0.67 points, one standard error being 0.47: a gain beyond it"
    assert choose_mode(*pairs(both=280, only_b=2, neither=18)).reason.endswith(said)
    said = "fine-tuning changes accuracy by -0.67 points, one standard error being 0.47: no gain beyond it"
    assert said in choose_mode(*pairs(both=280, only_a=2, neither=18)).reason


def test_a_single_validation_image_leaves_the_error_as_large_as_a_difference_can_be():
    assert choose_mode(*pairs(only_b=1)).standard_error == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_choice_follows_the_printed_numbers(images):
    feature, finetune = np.array(images).T
    choice = choose_mode(feature, finetune)
    if abs(choice.difference - choice.standard_error) > 1e-9:
        assert (choice.mode == "finetune") == (choice.difference > choice.standard_error)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 10))
    labels = drawn_labels(logits, rng)
    # The standard error of log T here is about 0.01.
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.04)


def test_temperature_lowers_the_likelihoods_loss_and_the_calibration_error():
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(2000, 5))
    labels = drawn_labels(logits, rng)
    overconfident = 4 * logits
    temperature = fit_temperature(overconfident, labels)
    grid = np.exp(np.linspace(math.log(0.05), math.log(20), 400))
    best = min(nll(overconfident, labels, t) for t in grid)
    assert nll(overconfident, labels, temperature) <= best + 1e-3

    def error(x):
        odds = np.exp(x - x.max(1, keepdims=True))
        return expected_calibration_error(odds / odds.sum(1, keepdims=True), labels)

    assert error(overconfident / temperature) < 0.25 * error(overconfident)


@pytest.mark.parametrize("num_samples", [4, 200])
def test_temperature_of_perfect_separation_claims_no_certainty(num_samples):
    labels = np.arange(num_samples) % 4
    logits = 6.0 * np.eye(4)[labels]
    temperature = fit_temperature(logits, labels)
    odds = np.exp(logits[0] / temperature)
    # One pseudo-sample in N + 2 is spread over the four classes: 1 - 3/4/(N + 2) is the confidence that fits.
    assert odds.max() / odds.sum() == pytest.approx(1 - 0.75 / (num_samples + 2), abs=1e-4)
    assert fit_temperature(1e3 * logits, labels) == pytest.approx(1e3 * temperature, rel=1e-3)


def test_temperature_of_equal_logits_is_one_and_of_wrong_ones_the_highest():
    assert fit_temperature(np.zeros((10, 3)), np.arange(10) % 3) == 1
    assert fit_temperature(5 * np.eye(3), np.array([1, 2, 0])) == pytest.approx(10_000, rel=1e-3)
    assert 0.05 <= fit_temperature(np.array([[3.0, 1.0]]), np.array([0])) <= 20


def test_temperature_of_logits_far_too_close_together_is_the_lowest():
    labels = np.arange(200) % 4
    assert fit_temperature(1e-4 * np.eye(4)[labels], labels) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("top", "right", "expected"),
    [([0.8] * 10, 8, 0), ([0.8] * 10, 3, 0.5), ([1.0] * 4, 4, 0), ([1.0] * 4, 0, 1), ([0.5] * 8, 4, 0)],
    ids=["calibrated", "overconfident", "sure-and-right", "sure-and-wrong", "coin"],
)
def test_calibration_error_of_known_cases(top, right, expected):
    probabilities = np.array([[p, 1 - p] for p in top])
    labels = np.array([0] * right + [1] * (len(top) - right))
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_weighs_bins_by_their_images():
    # Six at .9, three of them right, and four at .4, all right: in one bin too sure and too unsure cancel.
    probabilities = np.array([[0.9, 0.1, 0.0]] * 6 + [[0.4, 0.3, 0.3]] * 4)
    labels = np.array([0] * 3 + [1] * 3 + [0] * 4)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.6 * 0.4 + 0.4 * 0.6)
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(0.48)
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(0)


def test_calibration_error_counts_a_probability_on_an_edge_in_the_bin_below_it():
    # Two bins: .5 is the upper edge of the first. In the second a miss at .5 and a hit at .8 would partly cancel.
    probabilities = np.array([[0.5, 0.5], [0.8, 0.2]])
    assert expected_calibration_error(probabilities, np.array([1, 0]), bins=2) == pytest.approx((0.5 + 0.2) / 2)


def test_calibration_error_has_fifteen_bins():
    # .91 and .96 share a bin of ten and of twelve, not of fifteen: 13/15 to 14/15 ends between them.
    probabilities = np.array([[0.91, 0.09], [0.96, 0.04]])
    assert expected_calibration_error(probabilities, np.array([1, 0])) == pytest.approx((0.91 + 0.04) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_raw_pixels_control_is_the_strongest_of_the_penalties_that_are_best_on_validation(seed):
    # Small parts with a few wrong labels, so that the penalties differ on training and validation, and some are level.
    x, y = load_digits(return_X_y=True)
    order, rng = np.random.default_rng(seed).permutation(len(y)), np.random.default_rng(seed)
    train, validation, test = order[:80], order[80:110], order[110:510]
    labels = np.where(rng.random(80) < 0.2, rng.integers(0, 10, 80), y[train])
    scaled = (x - x[train].mean(0)) / (x[train] - x[train].mean(0)).std()
    fits = [LogisticRegression(C=c, max_iter=300).fit(scaled[train], labels) for c in (0.001, 0.01, 0.1, 1, 10)]
    best = max(fits, key=lambda fit: fit.score(scaled[validation], y[validation]))  # of equals the first
    fitted: list[tuple[int, int]] = []
    parts = x[train], labels, x[validation], y[validation], x[test]
    predicted = raw_pixels_control(*parts, progress=lambda *done: fitted.append(done))
    np.testing.assert_array_equal(predicted, best.predict(scaled[test]))
    assert fitted == [(done, 5) for done in range(1, 6)]


def test_raw_pixels_control_on_digits_of_any_scale():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    train, validation, test = order[:300], order[300:600], order[600:]
    predicted = raw_pixels_control(x[train], y[train], x[validation], y[validation], x[test])
    assert (predicted == y[test]).mean() > 0.92
    brighter = raw_pixels_control(
        *(part for i in (train, validation) for part in (x[i] * 16 + 3, y[i])), x[test] * 16 + 3
    )
    assert (brighter == predicted).mean() > 0.99


@pytest.mark.filterwarnings("error")
def test_raw_pixels_control_of_many_classes_of_one_image_each():
    x, y = np.eye(30), np.arange(30)
    assert raw_pixels_control(x, y, x, y, x[:3]).tolist() == [0, 1, 2]


def test_raw_pixels_control_of_one_class_or_constant_pixels():
    x = np.random.default_rng(0).random((10, 4))
    assert raw_pixels_control(x, np.full(10, 3), x, np.full(10, 3), x[:2]).tolist() == [3, 3]
    labels = np.array([1] * 7 + [0] * 3)
    assert raw_pixels_control(np.ones((10, 4)), labels, x, labels, np.ones((2, 4))).tolist() == [1, 1]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"float64 \(3,\); accepted: bool"):
        accuracy_interval(np.ones(3))
    with pytest.raises(ValueError, match="2 and 3 images do not pair"):
        paired_interval(outcomes(1, 1), outcomes(2, 1), seed=0)
    for interval in (accuracy_interval, lambda right, level: paired_interval(right, right, seed=0, level=level)):
        with pytest.raises(ValueError, match="level is 95; accepted: above 0 and below 1"):
            interval(outcomes(1, 1), level=95)
    with pytest.raises(ValueError, match=r"logits \(2, 2\) and labels \(3,\) do not fit"):
        fit_temperature(np.zeros((2, 2)), np.zeros(3))
    with pytest.raises(ValueError, match=r"logits \(2,\) and labels \(2,\) do not fit"):
        fit_temperature(np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"logits \(0, 2\) and labels \(0,\) do not fit"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0))
    for outcome in (np.ones((2, 2), dtype=bool), np.ones(0, dtype=bool)):
        with pytest.raises(ValueError, match=r"accepted: bool \[N\] with N at least 1"):
            accuracy_interval(outcome)
    for level in (0, 1):
        with pytest.raises(ValueError, match=f"level is {level}; accepted"):
            accuracy_interval(outcomes(1, 1), level=level)

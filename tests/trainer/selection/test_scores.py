import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from headstart.trainer.errors import DataError
from headstart.trainer.selection import scores
from headstart.trainer.selection.scores import knn_score, ridge_score, score_features, stratified_subsample

SIZES = [(7, 3, 2), (23, 63, 3), (63, 23, 4), (123, 5, 5), (31, 31, 3), (32, 31, 3)]
IDS = [f"N{n}-D{d}-C{c}" for n, d, c in SIZES]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two threads on a busy machine make these small products ten times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def clusters(n, d, c, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % c
    return rng.normal(size=(c, d))[labels] + 1.2 * rng.normal(size=(n, d)) + 0.5, labels


def naive_knn(x, y, k):
    """The definition for features without duplicates: votes, then summed similarity, then the lower label."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    correct = 0
    for i in range(len(x)):
        similarity = {j: float(x[i] @ x[j]) for j in range(len(x)) if j != i}
        near = sorted(similarity, key=lambda j: -similarity[j])[:k]

        def rank(label, near=near, similarity=similarity):
            of_label = [similarity[j] for j in near if y[j] == label]
            return len(of_label), sum(of_label), -label

        correct += max({y[j] for j in near}, key=rank) == y[i]
    return correct / len(x)


def naive_ridge(x, y, ridge):
    """The definition: N refits, each without one sample."""
    targets = np.eye(y.max() + 1)[y]
    correct = 0
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        fit = Ridge(alpha=ridge, solver="cholesky").fit(x[rest], targets[rest])
        correct += fit.predict(x[i : i + 1]).argmax() == y[i]
    return correct / len(x)


@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize(("n", "d", "c"), SIZES, ids=IDS)
def test_knn_score_is_its_definition(n, d, c, k, monkeypatch):
    x, y = clusters(n, d, c)
    expected = naive_knn(x, y, k)
    assert knn_score(x, y, k=k) == pytest.approx(expected)
    monkeypatch.setattr(scores, "_ROWS", 5)
    assert knn_score(x, y, k=k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 5])
def test_knn_score_is_sklearns_leave_one_out(k):
    x, y = clusters(63, 9, 2)
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    assert knn_score(x, y, k=k) == pytest.approx(cross_val_score(peer, x, y, cv=LeaveOneOut()).mean())


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize(("n", "d", "c"), SIZES, ids=IDS)
def test_ridge_score_is_that_of_all_refits(n, d, c, ridge):
    x, y = clusters(n, d, c)
    assert ridge_score(x, y, ridge=ridge) == pytest.approx(naive_ridge(x, y, ridge))


@pytest.mark.parametrize("ridge", [1e-6, 1.0])
@pytest.mark.parametrize(("n", "d", "c"), SIZES, ids=IDS)
def test_leave_one_out_errors_are_those_of_the_refits(n, d, c, ridge):
    x, y = clusters(n, d, c)
    targets = np.eye(c)[y]
    centred = torch.tensor(x - x.mean(0))
    (errors,) = scores._leave_one_out(centred, torch.tensor(targets), torch.tensor([ridge], dtype=torch.float64))
    for i in (0, n // 2, n - 1):
        rest = np.arange(n) != i
        fit = Ridge(alpha=ridge, solver="svd").fit(x[rest], targets[rest])
        expected = targets[i] - fit.predict(x[i : i + 1])[0]
        # float64 rounds at 1e-16, and the eigenvalues go up to 4000: 4e9 times the smallest ridge.
        np.testing.assert_allclose(errors[i].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "d", "c"), SIZES, ids=IDS)
def test_the_ridge_chosen_is_that_of_ridge_cv(n, d, c):
    x, y = clusters(n, d, c)
    grid = scores._PENALTIES.numpy() * np.square(x - x.mean(0)).sum()
    chosen = RidgeCV(alphas=grid).fit(x, np.eye(c)[y]).alpha_
    assert ridge_score(x, y) == ridge_score(x, y, ridge=float(chosen))


@pytest.mark.parametrize("seed", range(12))
def test_the_penalties_are_17_from_a_ten_millionth_to_ten_times_the_sum_of_squares(seed):
    rng = np.random.default_rng(seed)
    y = np.arange(40) % 2
    noise = rng.normal(size=(40, 60))  # the strongest penalties are best where there is nothing to learn
    hidden = np.hstack([rng.normal(size=(40, 5)), 3e-4 * y[:, None]])  # the weakest, where little tells everything
    for x in (noise, hidden):
        grid = np.logspace(-7, 1, 17) * np.square(x - x.mean(0)).sum()
        chosen = RidgeCV(alphas=grid).fit(x, np.eye(2)[y]).alpha_
        assert ridge_score(x, y) == ridge_score(x, y, ridge=float(chosen))


def test_the_score_is_the_mean_of_five_neighbours_and_of_the_chosen_ridge():
    x, y = clusters(63, 9, 3, seed=1)
    knn, ridge = naive_knn(x, y, 5), ridge_score(x, y)
    assert knn != ridge
    assert knn != naive_knn(x, y, 3)
    assert score_features(x, y) == pytest.approx({"knn": knn, "ridge": ridge, "score": (knn + ridge) / 2})


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 1000), share=st.floats(0.1, 0.9))
@settings(max_examples=100, deadline=None)
def test_a_subsample_keeps_every_class_to_within_one_sample(sizes, seed, share):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    size = max(1, int(share * len(labels)))
    found = np.bincount(labels[stratified_subsample(labels, size, seed)], minlength=len(sizes))
    assert found.sum() == size
    assert (np.abs(found - size * np.array(sizes) / len(labels)) < 1).all()


def test_a_subsample_of_single_images_leaves_out_any_of_them():
    chosen = np.concatenate([stratified_subsample(np.arange(10), 5, seed) for seed in range(20)])
    assert set(chosen) == set(range(10))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(4, 40),
    d=st.integers(1, 12),
    power=st.integers(-60, 60),
)
def test_scores_do_not_depend_on_scale_rotation_order_or_names_of_classes(seed, n, d, power):
    rng = np.random.default_rng(seed)
    x, y = clusters(n, d, 3, seed)
    if d == 1:
        # The cosine of single numbers is 1 or -1: everything ties, and the lower label wins by its name.
        x, d = np.hstack([x, rng.normal(size=(n, 1))]), 2
    expected = score_features(x, y)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    order = rng.permutation(n)
    assert score_features(x * 2.0**power, y) == expected
    assert score_features(x @ rotation, y) == pytest.approx(expected)
    assert score_features(x[order], y[order]) == pytest.approx(expected)
    assert score_features(x, np.array([40, 10, 70])[y]) == pytest.approx(expected)


@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_knn_score_of_duplicates_does_not_depend_on_their_order(seed, k):
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 3, size=(17, 2)).astype(float)
    y = rng.integers(0, 3, 17)
    order = rng.permutation(17)
    assert knn_score(x, y, k=k) == knn_score(x[order], y[order], k=k)


def test_duplicates_share_the_places_that_are_left():
    # k = 1 asks each of the four copies for one of the other three: of 0, 1, 1, 0 each sees its class once
    # and the other twice; of 1, 1, 1, 0 the first three see their own twice.
    x = np.array([[1.0, 2.0]] * 4 + [[-1.0, 0.5]] * 2)
    assert knn_score(x, np.array([0, 1, 1, 0, 2, 2]), k=1) == pytest.approx(2 / 6)
    assert knn_score(x, np.array([1, 1, 1, 0, 2, 2]), k=1) == pytest.approx(5 / 6)
    # Row 0 at k = 2: one place for row 1, of its class, and one for the three copies, two of them of class 1.
    angles = np.array([0.0, 0.1, 0.5, 0.5, 0.5])
    x, y = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([0, 0, 1, 1, 2])
    # Rows 2 and 3 see one copy of their class and one of class 2, alike, and the lower label wins.
    assert knn_score(x, y, k=2) == pytest.approx(4 / 5)


def test_equal_votes_go_to_the_nearer_class():
    angles = np.array([0.0, 0.1, 0.5, 3.0, 3.1])
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    # Of row 0's two neighbours, at 0.1 and 0.5, the nearer has class 1.
    assert knn_score(x, np.array([1, 1, 0, 2, 2]), k=2) > knn_score(x, np.array([0, 1, 0, 2, 2]), k=2)


def test_constant_features_score_as_their_majority():
    y = np.array([0] * 7 + [1] * 4)
    for x in (np.zeros((11, 3)), np.full((11, 3), 0.1), np.full((11, 1), 1e30)):
        assert score_features(x, y) == pytest.approx({"knn": 7 / 11, "ridge": 7 / 11, "score": 7 / 11})


@pytest.mark.parametrize(
    "x", [[[1.0], [3.0]], [[-1.0, 2.0], [0.5, 1.0]], [[1.0], [-1.0]]], ids=["D1", "D2", "opposite"]
)
def test_two_samples_know_only_each_other(x):
    assert score_features(np.array(x), np.array([0, 1]))["score"] == 0
    assert score_features(np.array(x), np.array([5, 5]))["score"] == 1


def test_separated_clusters_score_one_and_extremes_do_not_overflow():
    x, y = clusters(60, 8, 3)
    x = x + 50 * np.eye(3, 8)[y]
    for factor in (1, 1e-150, 1e150):
        assert score_features(x * factor, y)["score"] == 1
    assert score_features(torch.tensor(x, dtype=torch.float16), torch.tensor(y))["score"] == 1


def test_more_than_cap_samples_are_subsampled_by_class():
    labels = np.repeat([0, 1, 2], [700, 250, 50])
    chosen = stratified_subsample(labels, 100, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [70, 25, 5]
    assert len(np.unique(chosen)) == 100
    assert not np.array_equal(chosen, stratified_subsample(labels, 100, seed=1))
    x, y = clusters(300, 4, 3)
    capped = score_features(x, y, cap=99, seed=4)
    chosen = stratified_subsample(y, 99, seed=4)
    assert capped == score_features(x[chosen], y[chosen])
    assert capped == score_features(x, y, cap=99, seed=4)


def test_of_many_small_classes_whole_ones_are_scored():
    # A sample of each of the 30 would leave none to know it by.
    x, y = clusters(150, 30, 30)
    x = x + 50 * np.eye(30)[y]
    assert score_features(x, y) == score_features(x, y, cap=30) == {"knn": 1, "ridge": 1, "score": 1}
    # Any of them: a class of noise is among the 6 of 30 in a fifth of the draws.
    x[y == 7] = np.random.default_rng(1).normal(size=(5, 30))
    fails = sum(score_features(x, y, cap=30, seed=seed)["knn"] < 1 for seed in range(60))
    assert 2 <= fails <= 25


def test_bad_input_is_refused():
    x, y = clusters(20, 4, 2)
    x[11, 3] = math.nan
    with pytest.raises(DataError, match="row 11, dimension 3 is nan"):
        score_features(x, y)
    with pytest.raises(ValueError, match="N at least 2"):
        knn_score(x[:1], y[:1])
    with pytest.raises(ValueError, match="k is 0; accepted: at least 1"):
        knn_score(x[:5], y[:5], k=0)
    with pytest.raises(ValueError, match=r"ridge is -1\.0; accepted: above 0"):
        ridge_score(x[:5], y[:5], ridge=-1.0)

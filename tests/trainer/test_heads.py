import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headstart.trainer import heads
from headstart.trainer.errors import DataError, RecipeError
from headstart.trainer.heads import HeadBank, HeadSetting, audition, head_settings
from headstart.trainer.recipe import Search

SETTINGS = [
    HeadSetting(learning_rate=rate, weight_decay=decay, seed=seed)
    for rate, decay, seed in [(1e-3, 0.01, 0), (3e-2, 0.0, 1), (1e-2, 1.0, 0), (1e-1, 0.3, 7), (3e-3, 3.0, 2)]
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on a busy machine make these small products ten times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def blobs(num_samples, num_features, num_classes, seed=0, spread=1.5):
    """Normal clusters, away from the origin, each dimension on a scale of its own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_samples) % num_classes
    centres = rng.normal(size=(num_classes, num_features))
    x = centres[labels] + spread * rng.normal(size=(num_samples, num_features))
    scales = 10.0 ** rng.uniform(-2, 2, num_features)
    return torch.tensor((x + 3) * scales, dtype=torch.float32), torch.tensor(labels)


def fitted(settings, x, y, *, num_classes, optimizer="adamw", epochs=8, batch_size=32):
    bank = HeadBank(settings, num_classes=num_classes, optimizer=optimizer)
    bank.fit(x, y, epochs=epochs, batch_size=batch_size, seed=3)
    return bank


def one_by_one(setting, x, y, *, num_classes, optimizer, epochs, batch_size):
    """The naive twin: one nn.Linear, autograd and torch.optim, in float64, on Pareto-scaled features."""
    x = x.double()
    deviation = x.std(0, correction=0)
    x = (x - x.mean(0)) / (deviation * deviation.square().mean().sqrt()).sqrt()
    linear = nn.Linear(x.shape[1], num_classes, dtype=torch.float64)
    drawn = torch.rand(num_classes, x.shape[1], generator=torch.Generator().manual_seed(setting.seed))
    with torch.no_grad():
        linear.weight.copy_((drawn * 2 - 1) * 0.1 / math.sqrt(x.shape[1]))
        linear.bias.zero_()
    decays = [(linear.weight, setting.weight_decay), (linear.bias, 0.0)]
    groups = [{"params": [parameter], "weight_decay": decay} for parameter, decay in decays]
    if optimizer == "adamw":
        stepper = torch.optim.AdamW(groups, lr=setting.learning_rate)
    else:
        stepper = torch.optim.SGD(groups, lr=setting.learning_rate, momentum=0.9, nesterov=True)
    num_batches, order = math.ceil(len(x) / batch_size), torch.Generator().manual_seed(3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, epochs * num_batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).tensor_split(num_batches):
            stepper.zero_grad()
            nn.functional.cross_entropy(linear(x[batch]), y[batch]).backward()
            stepper.step()
            schedule.step()
    return linear(x).detach()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("n", "d", "c"), [(63, 17, 3), (123, 257, 5)], ids=["N63-D17-C3", "N123-D257-C5"])
def test_bank_equals_torch_optim_on_one_linear_each(n, d, c, optimizer):
    x, y = blobs(n, d, c)
    logits = fitted(SETTINGS[:4], x, y, num_classes=c, optimizer=optimizer).logits(x)
    for k, setting in enumerate(SETTINGS[:4]):
        expected = one_by_one(setting, x, y, num_classes=c, optimizer=optimizer, epochs=8, batch_size=32)
        assert (logits[k] - expected).abs().max() < 1e-4 * expected.abs().max(), setting


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_bank_of_k_equals_k_banks_of_one(optimizer):
    x, y = blobs(123, 257, 5)
    together = fitted(SETTINGS, x, y, num_classes=5, optimizer=optimizer).logits(x)
    for k, setting in enumerate(SETTINGS):
        alone = fitted([setting], x, y, num_classes=5, optimizer=optimizer).logits(x)[0]
        assert (together[k] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_the_batch_is_never_copied_per_head():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    x, y = blobs(128, 130, 3)
    with Watch():
        fitted(SETTINGS * 3, x, y, num_classes=3, epochs=1, batch_size=64)
    # The features themselves, 128 x 130, are the largest; K x B x D would be 15 x 64 x 130.
    assert largest == 128 * 130


def test_heads_of_one_rate_and_decay_differ_by_their_seed_alone():
    x, y = blobs(40, 80, 4)
    settings = [HeadSetting(learning_rate=1e-3, weight_decay=0.01, seed=seed) for seed in (0, 1, 0)]
    logits = fitted(settings, x, y, num_classes=4).logits(x)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_head_is_the_banks_row_on_raw_features():
    x, y = blobs(90, 33, 4)
    bank = fitted(SETTINGS, x, y, num_classes=4)
    logits = bank.logits(x)
    assert logits.shape == (5, 90, 4)
    for k in range(5):
        head = bank.head(k)
        torch.testing.assert_close(head(x).detach(), logits[k], rtol=1e-4, atol=1e-4)
        assert all(parameter.requires_grad for parameter in head.parameters())


def test_constant_dimension_has_no_weight_and_changes_nothing():
    x, y = blobs(60, 8, 3)
    constants = torch.tensor([0.0, 7.0, -1e4, 0.1]).expand(60, 4)
    with_constants = fitted(SETTINGS, torch.cat([x, constants], 1), y, num_classes=3)
    assert torch.isfinite(with_constants.logits(torch.cat([x, constants], 1))).all()
    weight = with_constants.head(0).weight
    assert ((weight == 0).sum(0) == torch.tensor([0] * 8 + [3] * 4)).all()
    moved = with_constants.logits(torch.cat([x, constants + 5], 1))
    torch.testing.assert_close(moved, with_constants.logits(torch.cat([x, constants], 1)))


def test_a_dimension_is_constant_where_it_varies_by_rounding_alone():
    x, y = blobs(60, 8, 3)
    rounding = torch.tensor([7.0, 7.0000005]).repeat(30)
    small = 7 + 1e-3 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    weight = fitted(SETTINGS, torch.cat([x, rounding[:, None], small[:, None]], 1), y, num_classes=3).head(0).weight
    assert (weight[:, 8] == 0).all()
    assert (weight[:, 9] != 0).all()


def test_passes_in_pieces_are_passes_over_all_rows(monkeypatch):
    x, y = blobs(60, 8, 3, spread=3)
    order = y.argsort(stable=True)  # pieces of their own mean and their own classes
    x, y = x[order], y[order]
    whole = fitted(SETTINGS, x, y, num_classes=3)
    expected = (whole.logits(x), *whole.evaluate(x, y))
    monkeypatch.setattr(heads, "_ROWS", 7)
    pieces = fitted(SETTINGS, x, y, num_classes=3)
    torch.testing.assert_close((pieces.logits(x), *pieces.evaluate(x, y)), expected, rtol=1e-4, atol=1e-4)
    bad = x.clone()
    bad[17, 2] = math.nan
    with pytest.raises(DataError, match="row 17, dimension 2 is nan"):
        heads.require_finite(bad, "training")


def test_evaluate_agrees_with_the_logits():
    x, y = blobs(200, 12, 5, spread=3)
    bank = fitted(SETTINGS, x, y, num_classes=5)
    accuracies, losses = bank.evaluate(x, y)
    for k, logits in enumerate(bank.logits(x)):
        assert accuracies[k] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
        assert losses[k] == pytest.approx(float(nn.functional.cross_entropy(logits.double(), y)), rel=1e-12)


def test_audition_is_deterministic_and_does_not_touch_its_input_or_the_global_generator():
    x, y = blobs(80, 20, 4)
    kept, state = x.clone(), torch.get_rng_state()
    seen = []
    first, second = (
        audition(x, y, x, y, num_classes=4, search=Search(epochs=5), progress=lambda *a: seen.append(a))
        for _ in range(2)
    )
    assert seen == [(epoch, 5) for epoch in range(1, 6)] * 2
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.accuracies, first.losses, first.setting) == (
        second.accuracies,
        second.losses,
        second.setting,
    )
    assert torch.equal(first.head.weight, second.head.weight)


@pytest.mark.parametrize("spread", [4, 0.1], ids=["accuracies-differ", "all-right"])
def test_best_is_highest_accuracy_then_lowest_loss_then_lowest_index(spread):
    x, y = blobs(120, 10, 4, spread=spread)
    search = Search(learning_rates=(1e-4, 1e-2, 1e-1), weight_decays=(0.1,), seeds=(0, 0), epochs=10)
    result = audition(x, y, x, y, num_classes=4, search=search)
    rows = zip(result.accuracies, result.losses, strict=True)
    order = sorted((-accuracy, loss, k) for k, (accuracy, loss) in enumerate(rows))
    assert result.setting == head_settings(search)[order[0][2]]
    assert (result.accuracy, result.loss) == (-order[0][0], order[0][1])
    assert float((result.head(x).argmax(1) == y).double().mean()) == pytest.approx(result.accuracy)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_audition_fits_on_the_training_part_and_judges_on_the_validation_part(optimizer):
    x, y = blobs(120, 10, 4, spread=3)
    search = Search(learning_rates=(1e-3, 1e-1), weight_decays=(0.1, 1.0), epochs=3, batch_size=16)
    bank = HeadBank(head_settings(search), num_classes=4, optimizer=optimizer)
    bank.fit(x[:70], y[:70], epochs=3, batch_size=16, seed=5)
    accuracies, losses = bank.evaluate(x[70:], y[70:])
    result = audition(x[:70], y[:70], x[70:], y[70:], num_classes=4, search=search, optimizer=optimizer, seed=5)
    assert (result.accuracies, result.losses) == (tuple(accuracies.tolist()), tuple(losses.tolist()))


def test_the_higher_accuracy_is_taken_though_its_loss_is_higher():
    x, y = blobs(140, 10, 4, spread=2)
    search = Search(learning_rates=(1e-2, 1.0), weight_decays=(0.0,), epochs=100)
    result = audition(x[:40], y[:40], x[40:], y[40:], num_classes=4, search=search)
    assert result.losses[0] < result.losses[1]
    assert result.accuracies[0] < result.accuracies[1]
    assert result.setting.learning_rate == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_non_finite_features_are_refused_by_row(part, value):
    x, y = blobs(30, 6, 3)
    bad = x.clone()
    bad[17, 2] = bad[21, 0] = value
    train, validation = (bad, x) if part == "training" else (x, bad)
    with pytest.raises(DataError, match=rf"{part} features .* row 17, dimension 2 is {value}"):
        audition(train, y, validation, y, num_classes=3, search=Search(epochs=1))


def test_search_that_diverges_is_refused_and_one_sound_head_is_enough():
    x, y = blobs(64, 6, 2, spread=0.5)
    rates = {"learning_rates": (90.0,), "weight_decays": (50.0,), "epochs": 20, "batch_size": 8}
    with pytest.raises(RecipeError, match=r"search\.learning_rates is \(90\.0,\)"):
        audition(x, y, x, y, num_classes=2, search=Search(**rates))
    sound = Search(**{**rates, "learning_rates": (90.0, 1e-2), "weight_decays": (50.0, 0.1)})
    result = audition(x, y, x, y, num_classes=2, search=sound)
    assert result.accuracy > 0.9
    assert result.accuracies[:2] == (0, 0)
    assert result.losses[:2] == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("n", "d", "c"),
    [(5, 17, 1000), (1, 4, 3), (2, 1, 2), (300, 7, 300)],
    ids=["N-below-C", "one-sample", "N2-D1", "one-sample-classes"],
)
def test_small_and_wide_cases_train(n, d, c):
    x, y = blobs(n, d, c)
    result = audition(x, y, x, y, num_classes=c, search=Search(epochs=30))
    assert result.head.weight.shape == (c, d)
    assert math.isfinite(result.loss)
    assert result.accuracy > 0.9 or n == 300


def test_read_only_arrays_and_half_precision_features_are_taken():
    x, y = blobs(60, 9, 3)
    x = x / x.std(0)
    frozen, labels = (np.frombuffer(part.numpy().tobytes(), part.numpy().dtype) for part in (x, y))
    frozen = frozen.reshape(60, 9)
    expected = fitted(SETTINGS, x, y, num_classes=3).logits(x)
    torch.testing.assert_close(fitted(SETTINGS, frozen, labels, num_classes=3).logits(frozen), expected)
    half = x.half()
    expected = fitted(SETTINGS, half.float(), y, num_classes=3).logits(half.float())
    torch.testing.assert_close(fitted(SETTINGS, half, y, num_classes=3).logits(half), expected)


def test_what_does_not_fit_is_refused():
    x, y = blobs(20, 4, 2)
    with pytest.raises(ValueError, match=r"labels go from 0 to 1; accepted: 0 to 0"):
        fitted(SETTINGS, x, y, num_classes=1)
    with pytest.raises(ValueError, match=r"labels go from -1 to 0; accepted: 0 to 1"):
        fitted(SETTINGS, x, y - 1, num_classes=2)
    with pytest.raises(ValueError, match=r"\(20, 4\) and labels \(19,\) do not fit"):
        fitted(SETTINGS, x, y[1:], num_classes=2)
    with pytest.raises(ValueError, match="optimizer is 'adam'; accepted: adamw, sgd"):
        fitted(SETTINGS, x, y, num_classes=2, optimizer="adam")


def test_audition_matches_a_tuned_logistic_regression_on_digits():
    x, y = load_digits(return_X_y=True)
    train, validation = np.random.default_rng(0).permutation(len(y))[:600].reshape(2, 300)
    search = Search(learning_rates=(1e-3, 1e-2, 1e-1), weight_decays=(0.01, 0.3, 1.0, 3.0), batch_size=64)
    result = audition(x[train], y[train], x[validation], y[validation], num_classes=10, search=search)
    scaled = StandardScaler().fit(x[train]).transform(x)
    fits = [LogisticRegression(C=c).fit(scaled[train], y[train]) for c in (0.01, 0.1, 1, 10)]
    peer = max(fit.score(scaled[validation], y[validation]) for fit in fits)
    # A point is 3 images; the two differ by 0.6 +- 0.6 points over eight splits.
    assert result.accuracy > peer - 0.015

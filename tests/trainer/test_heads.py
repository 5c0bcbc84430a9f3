import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headstart.trainer import heads
from headstart.trainer.errors import DataError
from headstart.trainer.heads import HeadBank, HeadSetting

SETTINGS = [
    HeadSetting(learning_rate=rate, weight_decay=decay, seed=seed)
    for rate, decay, seed in [(1e-3, 0.01, 0), (3e-2, 0.0, 1), (1e-2, 1.0, 0), (1e-1, 0.3, 7), (3e-3, 3.0, 2)]
]

pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_bank_equals_torch_optim_on_one_linear_each(blobs, n, d, c, optimizer):
    x, y = blobs(n, d, c)
    logits = fitted(SETTINGS[:4], x, y, num_classes=c, optimizer=optimizer).logits(x)
    for k, setting in enumerate(SETTINGS[:4]):
        expected = one_by_one(setting, x, y, num_classes=c, optimizer=optimizer, epochs=8, batch_size=32)
        assert (logits[k] - expected).abs().max() < 1e-4 * expected.abs().max(), setting


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_bank_of_k_equals_k_banks_of_one(blobs, optimizer):
    x, y = blobs(123, 257, 5)
    together = fitted(SETTINGS, x, y, num_classes=5, optimizer=optimizer).logits(x)
    for k, setting in enumerate(SETTINGS):
        alone = fitted([setting], x, y, num_classes=5, optimizer=optimizer).logits(x)[0]
        assert (together[k] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_the_batch_is_never_copied_per_head(blobs):
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


def test_heads_of_one_rate_and_decay_differ_by_their_seed_alone(blobs):
    x, y = blobs(40, 80, 4)
    settings = [HeadSetting(learning_rate=1e-3, weight_decay=0.01, seed=seed) for seed in (0, 1, 0)]
    logits = fitted(settings, x, y, num_classes=4).logits(x)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_head_is_the_banks_row_on_raw_features(blobs):
    x, y = blobs(90, 33, 4)
    bank = fitted(SETTINGS, x, y, num_classes=4)
    logits = bank.logits(x)
    assert logits.shape == (5, 90, 4)
    for k in range(5):
        head = bank.head(k)
        torch.testing.assert_close(head(x).detach(), logits[k], rtol=1e-4, atol=1e-4)
        assert all(parameter.requires_grad for parameter in head.parameters())


def test_the_default_dtype_changes_no_bit(blobs):
    x, y = blobs(90, 33, 4)
    expected = fitted(SETTINGS, x, y, num_classes=4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = fitted(SETTINGS, x, y, num_classes=4)
        weights = [head.weight for head in (found.head(0), expected.head(0))]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.logits(x), expected.logits(x))
    assert weights[0].dtype == torch.float32
    assert torch.equal(*weights)


def test_constant_dimension_has_no_weight_and_changes_nothing(blobs):
    x, y = blobs(60, 8, 3)
    constants = torch.tensor([0.0, 7.0, -1e4, 0.1]).expand(60, 4)
    with_constants = fitted(SETTINGS, torch.cat([x, constants], 1), y, num_classes=3)
    assert torch.isfinite(with_constants.logits(torch.cat([x, constants], 1))).all()
    weight = with_constants.head(0).weight
    assert ((weight == 0).sum(0) == torch.tensor([0] * 8 + [3] * 4)).all()
    moved = with_constants.logits(torch.cat([x, constants + 5], 1))
    torch.testing.assert_close(moved, with_constants.logits(torch.cat([x, constants], 1)))


def test_a_dimension_is_constant_where_it_varies_by_rounding_alone(blobs):
    x, y = blobs(60, 8, 3)
    rounding = torch.tensor([7.0, 7.0000005]).repeat(30)
    small = 7 + 1e-3 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    weight = fitted(SETTINGS, torch.cat([x, rounding[:, None], small[:, None]], 1), y, num_classes=3).head(0).weight
    assert (weight[:, 8] == 0).all()
    assert (weight[:, 9] != 0).all()


def test_passes_in_pieces_are_passes_over_all_rows(blobs, monkeypatch):
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


def test_evaluate_agrees_with_the_logits(blobs):
    x, y = blobs(200, 12, 5, spread=3)
    bank = fitted(SETTINGS, x, y, num_classes=5)
    accuracies, losses = bank.evaluate(x, y)
    for k, logits in enumerate(bank.logits(x)):
        assert accuracies[k] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
        assert losses[k] == pytest.approx(float(nn.functional.cross_entropy(logits.double(), y)), rel=1e-12)


def test_read_only_arrays_and_half_precision_features_are_taken(blobs):
    x, y = blobs(60, 9, 3)
    x = x / x.std(0)
    frozen, labels = (np.frombuffer(part.numpy().tobytes(), part.numpy().dtype) for part in (x, y))
    frozen = frozen.reshape(60, 9)
    expected = fitted(SETTINGS, x, y, num_classes=3).logits(x)
    torch.testing.assert_close(fitted(SETTINGS, frozen, labels, num_classes=3).logits(frozen), expected)
    half = x.half()
    expected = fitted(SETTINGS, half.float(), y, num_classes=3).logits(half.float())
    torch.testing.assert_close(fitted(SETTINGS, half, y, num_classes=3).logits(half), expected)


def test_what_does_not_fit_is_refused(blobs):
    x, y = blobs(20, 4, 2)
    with pytest.raises(ValueError, match=r"labels go from 0 to 1; accepted: 0 to 0"):
        fitted(SETTINGS, x, y, num_classes=1)
    for odd in (0.5, math.nan):
        with pytest.raises(ValueError, match=rf"labels hold {odd}; accepted: whole numbers, 0 to 1"):
            fitted(SETTINGS, x, torch.where(y == 1, odd, 0.0), num_classes=2)
    with pytest.raises(ValueError, match=r"labels go from -1 to 0; accepted: 0 to 1"):
        fitted(SETTINGS, x, y - 1, num_classes=2)
    with pytest.raises(ValueError, match=r"\(20, 4\) and labels \(19,\) do not fit"):
        fitted(SETTINGS, x, y[1:], num_classes=2)
    with pytest.raises(ValueError, match="optimizer is 'adam'; accepted: adamw, sgd"):
        fitted(SETTINGS, x, y, num_classes=2, optimizer="adam")

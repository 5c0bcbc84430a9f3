"""The best of a bank of heads is what a source is judged by."""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from headstart.trainer import exact
from headstart.trainer.audition import audition, head_settings
from headstart.trainer.errors import DataError, RecipeError, RunError
from headstart.trainer.heads import HeadBank
from headstart.trainer.recipe import Search
from tests.kernels import other_device

pytestmark = pytest.mark.usefixtures("one_thread")


def test_audition_is_deterministic_and_does_not_touch_its_input_or_the_global_generator(blobs):
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
def test_best_is_highest_accuracy_then_lowest_loss_then_lowest_index(blobs, spread):
    x, y = blobs(120, 10, 4, spread=spread)
    search = Search(learning_rates=(1e-4, 1e-2, 1e-1), weight_decays=(0.1,), seeds=(0, 0), epochs=10)
    result = audition(x, y, x, y, num_classes=4, search=search)
    rows = zip(result.accuracies, result.losses, strict=True)
    order = sorted((-accuracy, loss, k) for k, (accuracy, loss) in enumerate(rows))
    assert result.setting == head_settings(search)[order[0][2]]
    assert (result.accuracy, result.loss) == (-order[0][0], order[0][1])
    assert float((result.head(x).argmax(1) == y).double().mean()) == pytest.approx(result.accuracy)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_audition_fits_on_the_training_part_and_judges_on_the_validation_part(blobs, optimizer):
    x, y = blobs(120, 10, 4, spread=3)
    search = Search(learning_rates=(1e-3, 1e-1), weight_decays=(0.1, 1.0), epochs=3, batch_size=16)
    bank = HeadBank(head_settings(search), num_classes=4, optimizer=optimizer)
    bank.fit(x[:70], y[:70], epochs=3, batch_size=16, seed=5)
    accuracies, losses = bank.evaluate(x[70:], y[70:])
    result = audition(x[:70], y[:70], x[70:], y[70:], num_classes=4, search=search, optimizer=optimizer, seed=5)
    assert (result.accuracies, result.losses) == (tuple(accuracies.tolist()), tuple(losses.tolist()))


def test_the_higher_accuracy_is_taken_though_its_loss_is_higher(blobs):
    x, y = blobs(140, 10, 4, spread=2)
    search = Search(learning_rates=(1e-2, 1.0), weight_decays=(0.0,), epochs=100)
    result = audition(x[:40], y[:40], x[40:], y[40:], num_classes=4, search=search)
    assert result.losses[0] < result.losses[1]
    assert result.accuracies[0] < result.accuracies[1]
    assert result.setting.learning_rate == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_non_finite_features_are_refused_by_row(blobs, part, value):
    x, y = blobs(30, 6, 3)
    bad = x.clone()
    bad[17, 2] = bad[21, 0] = value
    train, validation = (bad, x) if part == "training" else (x, bad)
    with pytest.raises(DataError, match=rf"{part} features .* row 17, dimension 2 is {value}"):
        audition(train, y, validation, y, num_classes=3, search=Search(epochs=1))


def test_search_that_diverges_is_refused_and_one_sound_head_is_enough(blobs):
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
def test_small_and_wide_cases_train(blobs, n, d, c):
    x, y = blobs(n, d, c)
    result = audition(x, y, x, y, num_classes=c, search=Search(epochs=30))
    assert result.head.weight.shape == (c, d)
    assert math.isfinite(result.loss)
    assert result.accuracy > 0.9 or n == 300


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


ON_ANOTHER_DEVICE = """
import torch
from tests.kernels.other_device import DEVICE
from headstart.trainer.audition import audition
from headstart.trainer.recipe import Search

x, y = torch.randn(90, 20, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 4
x[:, 0] += y
for optimizer in ("adamw", "sgd"):
    here, there = (
        audition(x[:60], y[:60], x[60:], y[60:], num_classes=4, search=Search(epochs=3), optimizer=optimizer, device=d)
        for d in ("cpu", DEVICE)
    )
    assert (there.losses, there.setting) == (here.losses, here.setting)
    assert there.head.weight.device.type == "cpu" and torch.equal(there.head.weight, here.head.weight)
"""


@pytest.mark.slow
@pytest.mark.skipif(not other_device.can_be_built(), reason="needs g++ 11 or newer")
def test_an_audition_mixes_no_devices(tmp_path: Path):
    library = str(other_device.build(tmp_path))
    environment = os.environ | {"HEADSTART_OTHER_DEVICE": library, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ON_ANOTHER_DEVICE], check=True, timeout=200, env=environment)


@pytest.mark.gpu
def test_on_a_gpu_heads_are_those_of_the_cpu_and_the_same_again(blobs):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, y = blobs(400, 100, 7)
    there, again, here = (
        audition(x[:300], y[:300], x[300:], y[300:], num_classes=7, search=Search(epochs=20), device=device)
        for device in ("cuda", "cuda", "cpu")
    )
    assert torch.equal(there.head.weight, again.head.weight)
    torch.testing.assert_close(torch.tensor(there.losses), torch.tensor(here.losses), rtol=1e-3, atol=0)


def test_a_gpu_whose_memory_is_full_is_named(blobs, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nMore about it.")

    monkeypatch.setattr(HeadBank, "fit", full)
    monkeypatch.setattr(exact, "exact_products", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    x, y = blobs(40, 5, 2)
    with pytest.raises(RunError, match=r"NVIDIA H100 has no memory left to train heads: .* 20 MiB\. Free it, or set"):
        audition(x, y, x, y, num_classes=2, search=Search(epochs=1), device="meta")

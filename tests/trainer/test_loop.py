"""The loop: it learns, it resumes exactly, its ranks share an epoch, its precision is the one asked for."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.loop import Loop, Rank, Task, autocast, parameter_groups
from headstart.trainer.recipe import Train

SETTINGS = Train(epochs=3, batch_size=16, learning_rate=1e-2, workers=1)
PREPROCESS = Preprocess(Preprocessing(resize=8, crop=8, channels=1, mean=(0.5,), std=(0.5,)))


def digits(num: int, start: int = 0) -> LabelledImages:
    found = load_digits()
    images = (found.images[start : start + num] * 15).astype(np.uint8)
    storage = ImageArrays(images)
    return LabelledImages(
        classes=tuple("0123456789"),
        labels=found.target[start : start + num].astype(np.int64),
        digests=storage.digests(),
        storage=storage,
        grey=storage.grey(),
    )


TASK = Task(train=digits(100), validation=digits(61, 100), preprocess=PREPROCESS)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(288, 10),
    )


def loop_of(model: nn.Module, settings: Train = SETTINGS, rank: Rank | None = None, **options) -> Loop:
    return Loop(model, TASK, settings, learning_rate=settings.learning_rate, seed=5, rank=rank or Rank(), **options)


def test_it_learns_digits():
    epochs = list(loop_of(network()).epochs())
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert epochs[-1].validation_accuracy > 0.7
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert epochs[-1].learning_rate < 0.1 * SETTINGS.learning_rate


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_loop_ends_with_the_same_bits(stop: int, optimizer: str):
    settings = replace(SETTINGS, optimizer=optimizer)
    whole = loop_of(network(dropout=0.2), settings)
    undisturbed = list(whole.epochs())
    first = loop_of(network(dropout=0.2), settings)
    for epoch in first.epochs():
        if epoch.epoch == stop:
            break
    stored = io.BytesIO()
    torch.save(first.state(), stored)
    stored.seek(0)
    torch.manual_seed(999)  # another process has another random state
    second = loop_of(network(dropout=0.2), settings)
    second.load_state(torch.load(stored, weights_only=True))
    resumed = list(second.epochs())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert [replace(e, seconds=0) for e in resumed] == [replace(e, seconds=0) for e in undisturbed[stop:]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_ranks_share_every_image_of_an_epoch(size: int):
    settings = replace(SETTINGS, batch_size=18, workers=size)
    loops = [loop_of(network(), settings, Rank(rank=r, size=size)) for r in range(size)]
    per_rank = [loop._batches(0) for loop in loops]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = np.concatenate([batch for batches in per_rank for batch in batches])
    assert set(seen) == set(range(100))
    assert len(seen) <= 100 + size
    first_global = np.concatenate([batches[0] for batches in per_rank])
    assert set(first_global) == set(np.random.default_rng([5, 0]).permutation(100)[:18])


def test_epochs_have_orders_of_their_own():
    loop = loop_of(network())
    assert not np.array_equal(loop._batches(0)[0], loop._batches(1)[0])
    assert np.array_equal(loop._batches(1)[0], loop_of(network())._batches(1)[0])


def test_a_last_batch_of_one_image_is_left_out():
    batches = loop_of(network(), replace(SETTINGS, batch_size=33))._batches(0)
    assert [len(batch) for batch in batches] == [33, 33, 33]


def test_metrics_are_sums_over_the_ranks():
    doubled = loop_of(network(), reduce=lambda totals: totals * 2)
    single = loop_of(network())
    assert next(iter(doubled.epochs())).validation_accuracy == next(iter(single.epochs())).validation_accuracy


def test_biases_and_norms_are_not_decayed():
    decayed, others = parameter_groups(network(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_precision_is_the_one_asked_for():
    with autocast("bf16", "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    for precision in ("fp32", "auto"):
        with autocast(precision, "cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    halves = loop_of(network(), replace(SETTINGS, precision="bf16"))
    assert list(halves.epochs())[-1].validation_accuracy > 0.6

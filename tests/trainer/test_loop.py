"""The loop: it learns, it resumes exactly, its ranks share an epoch, its precision is the one asked for."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.trainer.inputs.batches import to_pixels
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.loop import Epoch, Loop, Rank, Task, autocast, parameter_groups
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


class Wrapped(nn.Module):
    """A model inside another under `module`, as data parallelism has it; notes how either is called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[bool] = []
        self.calls_inside: list[tuple[bool, bool]] = []
        module.register_forward_pre_hook(
            lambda inside, _: self.calls_inside.append((inside.training, torch.is_grad_enabled()))
        )

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls.append(self.training)
        logits: Tensor = self.module(pixels)
        return logits


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


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("sgd", "fp32"), ("adamw", "bf16")])
def test_the_loop_is_the_plain_one(optimizer: str, precision: str):
    settings = Train(
        epochs=2, batch_size=30, optimizer=optimizer, precision=precision, weight_decay=0.3, warmup=0.3, workers=1
    )
    loop = Loop(network(), TASK, settings, learning_rate=2e-2, seed=5, rank=Rank())
    found = list(loop.epochs())

    def rate(step: int) -> float:  # of 8 steps, 0.3 of which are 2.4
        return 2e-2 * ((step + 1) / 3.4 if step < 2.4 else (1 + math.cos(math.pi * (step - 2.4) / 5.6)) / 2)

    (x, y), (other_x, other_y) = (
        (to_pixels([part.image(i) for i in range(len(part))], PREPROCESS), torch.from_numpy(part.labels))
        for part in (TASK.train, TASK.validation)
    )
    model, step = network(), 0
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0},
    ]
    plain = torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    for epoch in range(2):
        loss_sum, right = 0.0, 0
        for batch in np.split(np.random.default_rng([5, epoch]).permutation(100), [30, 60, 90]):
            for group in plain.param_groups:
                group["lr"] = rate(step)
            with half:
                logits = model.train()(x[batch])
            loss = F.cross_entropy(logits.float(), y[batch])
            model.zero_grad()
            loss.backward()
            plain.step()
            step += 1
            loss_sum += loss.item() * len(batch)
            right += int((logits.argmax(1) == y[batch]).sum())
        with torch.no_grad(), half:
            validated = model.eval()(other_x).float()
        told = found[epoch]
        assert told.learning_rate == pytest.approx(rate(step), abs=1e-12)
        assert (told.train_loss, told.train_accuracy) == (pytest.approx(loss_sum / 100), right / 100)
        assert told.validation_loss == pytest.approx(F.cross_entropy(validated, other_y).item())
        assert told.validation_accuracy == int((validated.argmax(1) == other_y).sum()) / 61
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loop.model.state_dict()[name], tensor)


def test_the_rate_ends_at_zero_after_a_single_step():
    settings = replace(SETTINGS, epochs=1, batch_size=100, warmup=0.5)
    assert [epoch.learning_rate for epoch in loop_of(network(), settings).epochs()] == [0]


def test_a_wrapped_models_weights_and_validation_are_those_of_the_model_inside():
    plain, wrapped = loop_of(network(dropout=0.2)), Wrapped(network(dropout=0.2))
    loop = loop_of(wrapped)
    assert [replace(e, seconds=0) for e in loop.epochs()] == [replace(e, seconds=0) for e in plain.epochs()]
    assert list(loop.state()["model"]) == list(plain.state()["model"])
    assert wrapped.calls == [True] * 3 * 7
    assert wrapped.calls_inside == ([(True, True)] * 7 + [(False, False)]) * 3


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


@pytest.mark.parametrize(("num", "sizes"), [(100, [33, 33, 33]), (101, [33, 33, 33, 2]), (1, [1])])
def test_a_last_batch_of_one_image_is_left_out_where_there_are_others(num: int, sizes: list[int]):
    task = replace(TASK, train=digits(num))
    loop = Loop(network(), task, replace(SETTINGS, batch_size=33), learning_rate=1e-2, seed=5, rank=Rank())
    assert [len(batch) for batch in loop._batches(0)] == sizes


def test_each_seed_epoch_and_rank_draws_from_a_stream_of_its_own():
    def streams(seed: int, rank: int) -> list[int]:
        settings = replace(SETTINGS, epochs=2, batch_size=100)
        rank_of_two = Rank(rank=rank, size=2)
        loop = Loop(network(), TASK, settings, learning_rate=1e-2, seed=seed, rank=rank_of_two)
        return [torch.initial_seed() for _ in loop.epochs()]

    found = [*streams(5, 0), *streams(5, 1), *streams(6, 0)]
    assert len(set(found)) == 6
    assert streams(5, 1) == found[2:4]


@pytest.mark.parametrize("num_validation", [150, 1])
def test_ranks_sum_their_metrics_and_share_their_statistics(num_validation: int):
    task = replace(TASK, validation=digits(num_validation, 100))
    parts: list[Tensor] = [torch.empty(0)] * 2
    met = Barrier(2, timeout=60)

    def train(rank: int) -> tuple[Loop, Epoch]:
        def reduce(part: Tensor) -> Tensor:
            assert not part.requires_grad
            parts[rank] = part.clone()
            met.wait()
            total = parts[0] + parts[1]
            met.wait()
            return total

        loop = Loop(
            models[rank], task, settings, learning_rate=1e-2, seed=5, rank=Rank(rank=rank, size=2), reduce=reduce
        )
        return loop, next(iter(loop.epochs()))

    settings, models = replace(SETTINGS, workers=2), [network(), network()]
    with ThreadPoolExecutor(2) as pool:
        (first, told), (second, told_too) = pool.map(train, range(2))
    assert replace(told, seconds=0) == replace(told_too, seconds=0)
    norms = [loop.model[1].state_dict() for loop in (first, second)]
    for name in ("running_mean", "running_var"):
        assert torch.equal(norms[0][name], norms[1][name])
    assert int(norms[0]["num_batches_tracked"]) == len(first._batches(0))
    losses, right = 0.0, 0
    for rank, loop in enumerate((first, second)):
        x = [task.validation.image(i) for i in range(rank, num_validation, 2)]
        y = torch.from_numpy(task.validation.labels[rank::2])
        with torch.no_grad():
            logits = loop.model(to_pixels(x, PREPROCESS)) if x else torch.empty(0, 10)
        losses += F.cross_entropy(logits, y, reduction="sum").item()
        right += int((logits.argmax(1) == y).sum())
    assert told.validation_loss == pytest.approx(losses / num_validation)
    assert told.validation_accuracy == right / num_validation


def test_statistics_are_the_mean_of_the_ranks():
    loop = loop_of(network(), rank=Rank(size=2), reduce=lambda mine: mine + 3)
    loop._average_statistics()
    buffers = dict(loop.model.named_buffers())
    assert torch.equal(buffers["1.running_mean"], torch.full((8,), 1.5))
    assert torch.equal(buffers["1.running_var"], torch.full((8,), 2.0))
    assert int(buffers["1.num_batches_tracked"]) == 0


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


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bf16_is_not_given_it(monkeypatch: pytest.MonkeyPatch, native: bool):
    # What an A100 and a T4 answer.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert isinstance(autocast("fp32", "cuda:1"), nullcontext)
    assert isinstance(autocast("auto", "cpu"), nullcontext)
    if native:
        for precision in ("auto", "bf16"):
            assert autocast(precision, "cuda:1").fast_dtype == torch.bfloat16
    else:
        assert isinstance(autocast("auto", "cuda:1"), nullcontext)
        with pytest.raises(ValueError, match="which this GPU only emulates"):
            autocast("bf16", "cuda:1")

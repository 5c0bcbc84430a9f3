"""HeadBank: K linear heads trained together on cached features.

    bank = HeadBank(settings, num_classes=10)
    bank.fit(features, labels, epochs=100, batch_size=256, seed=0)
    head = bank.head(0)                 # an nn.Linear that takes raw features [N, D]

The heads share the order of batches, so a step of all of them is one product [B, D] x [D, K*C] forwards and
one [K*C, B] x [B, D] backwards; the batch is never copied per head. The gradient of a linear head's
cross-entropy is written down (softmax - one-hot), which leaves autograd with nothing to do.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from headstart.trainer.errors import DataError
from headstart.trainer.head_optimizers import OPTIMIZERS

Array = torch.Tensor | np.ndarray
Progress = Callable[[int, int], None]

# Rows that are looked at together where a whole pass over the features needs a float64 copy.
_ROWS = 4096
# Logits held at once while a bank is evaluated: 64 MiB of float32.
_LOGITS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class HeadSetting:
    """What one head of a bank is trained with."""

    learning_rate: float
    """Peak rate; the cosine takes it to 0 over the run."""
    weight_decay: float
    """Decoupled for adamw, an L2 penalty for sgd; not applied to the bias."""
    seed: int = 0
    """Decides the initial weights; the order of batches belongs to the bank."""


def as_tensor(array: Array) -> torch.Tensor:
    """The array as a tensor on the same memory; read-only arrays are copied, as torch has no such tensors."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.copy()
    return torch.as_tensor(array).detach()


def require_finite(features: Array, part: str) -> None:
    """Raise DataError naming the first row of features [N, D] that holds a NaN or an infinity."""
    rows = as_tensor(features)
    for start in range(0, len(rows), _ROWS):
        finite = torch.isfinite(rows[start : start + _ROWS])
        if bool(finite.all()):
            continue
        row, dimension = (int(i) for i in (~finite).nonzero()[0])
        row += start
        raise DataError(
            f"the {part} features have a value that is not finite: row {row}, dimension {dimension} is "
            f"{float(rows[row, dimension])}; accepted: finite numbers. Leave that image out, or extract the "
            "features again in fp32 with weights that are finite"
        )


class HeadBank:
    """K linear heads of C classes, each with its own rate, decay and seed, trained in batched products.

    Features are centred and Pareto-scaled inside, by the training rows; a dimension
    that is constant there (a deviation below 1e-6 of its mean: float32's rounding) is given no weight. AdamW
    (Loshchilov and Hutter 2019, betas 0.9 and 0.999, eps 1e-8) or SGD with Nesterov momentum 0.9, both as in
    torch.optim; no decay on biases; rate(t) = rate (1 + cos(pi t / T)) / 2 over the T steps of the run.

    A bank of K heads and K banks of one differ by rounding alone, because BLAS sums in another order: logits
    by less than 1e-4 of the largest logit in the tests. The same call gives the same bits.
    """

    def __init__(
        self,
        settings: Sequence[HeadSetting],
        *,
        num_classes: int,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        device: torch.device | str = "cpu",
    ) -> None:
        if not settings:
            raise ValueError("settings is empty; accepted: at least one HeadSetting")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; accepted: at least 1")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}")
        self.settings = tuple(settings)
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.device = torch.device(device)
        self._weight = self._bias = self._mean = self._scale = torch.empty(0)

    def fit(
        self,
        features: Array,
        labels: Array,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        """Train every head from its initialisation on features [N, D] with labels [N] in 0 to C-1.

        The N rows are shuffled anew each epoch by `seed` and cut into ceil(N / batch_size) batches of nearly
        equal size, so that no step rests on a few left-over rows. `progress` counts epochs. Raises ValueError
        for shapes or labels that do not fit.
        """
        x, y = self._checked(features, labels)
        self._mean, self._scale = _moments(x)
        self._initialise(x.shape[1])
        rates, decays = (
            self._weight.new_tensor([getattr(s, name) for s in self.settings]).view(-1, 1, 1)
            for name in ("learning_rate", "weight_decay")
        )
        make = OPTIMIZERS[self.optimizer]
        steppers = make(self._weight, rates, decays), make(self._bias, rates, torch.zeros_like(decays))
        num_batches = math.ceil(len(x) / batch_size)
        num_steps, done = epochs * num_batches, 0
        order = torch.Generator().manual_seed(seed)
        rows = torch.empty(math.ceil(len(x) / num_batches), x.shape[1], device=self.device, dtype=x.dtype)
        for epoch in range(epochs):
            shuffled = torch.randperm(len(x), generator=order).to(self.device)
            for batch in shuffled.tensor_split(num_batches):
                chosen = torch.index_select(x, 0, batch, out=rows[: len(batch)])
                gradients = self._gradients(self._scaled(chosen), y[batch])
                schedule = 0.5 * (1 + math.cos(math.pi * done / num_steps))
                for stepper, gradient in zip(steppers, gradients, strict=True):
                    stepper.step(gradient, schedule)
                done += 1
            if progress is not None:
                progress(epoch + 1, epochs)

    def logits(self, features: Array) -> torch.Tensor:
        """Logits of every head, [K, N, C] float32, for features [N, D]."""
        parts = [self._forward(rows) for _, rows in self._chunks(features)]
        return torch.cat(parts).transpose(0, 1)

    def evaluate(self, features: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Accuracies [K] and mean cross-entropies [K] in nats, float64, without holding all logits at once.

        A head whose logits are not finite has accuracy 0 and an infinite loss.
        """
        _, y = self._checked(features, labels)
        correct = torch.zeros(len(self.settings), dtype=torch.float64, device=self.device)
        loss = torch.zeros_like(correct)
        for start, rows in self._chunks(features):
            logits = self._forward(rows)
            truth = y[start : start + len(rows), None]
            correct += (logits.argmax(2) == truth).sum(0)
            chosen = truth[..., None].expand(-1, len(self.settings), 1)
            loss -= logits.double().log_softmax(2).gather(2, chosen).sum((0, 2))
        diverged = ~torch.isfinite(loss)
        correct[diverged], loss[diverged] = 0.0, math.inf
        return correct.cpu() / len(y), loss.cpu() / len(y)

    def head(self, k: int) -> nn.Linear:
        """Head k on the CPU as an nn.Linear on raw features: W' = W s, b' = b - W' m, folded in float64."""
        folded = self._weight[k] * self._scale.double()
        # Made on the meta device: the default initialisation would draw from the global generator for nothing.
        linear = nn.Linear(folded.shape[1], self.num_classes, device="meta", dtype=torch.float32).to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.copy_(folded)
            linear.bias.copy_(self._bias[k, :, 0] - folded @ self._mean.double())
        return linear

    def _initialise(self, num_features: int) -> None:
        """Weights [K, C, D] uniform in +-0.1/sqrt(D), biases [K, C, 1] zero."""
        # A tenth of nn.Linear's range: most directions of weight space get no gradient where N < D, and what
        # is left there of the initialisation is noise on new images. Measured at N = 300, 100 epochs, rate
        # 1e-3, decay 0.01: 0.2 (CRAFT features), 0.7 (raw pixels) and 1.1 points (scikit-learn's digits)
        # better than the full range.
        bound = 0.1 / math.sqrt(num_features)
        drawn = []
        for setting in self.settings:
            # Drawn on the CPU whatever the device, so that a seed means the same weights everywhere.
            generator = torch.Generator().manual_seed(setting.seed)
            drawn.append(torch.rand(self.num_classes, num_features, generator=generator, dtype=torch.float32))
        self._weight = torch.stack(drawn).mul_(2 * bound).sub_(bound).to(self.device)
        self._bias = torch.zeros_like(self._weight[..., :1])

    def _checked(self, features: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = as_tensor(features), as_tensor(labels)
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
            shapes = f"features {tuple(x.shape)} and labels {tuple(y.shape)}"
            raise ValueError(f"{shapes} do not fit; accepted: [N, D] and [N] with N at least 1")
        if y.is_floating_point() and bool((odd := y != y.round()).any()):
            raise ValueError(f"labels hold {float(y[odd][0])}; accepted: whole numbers, 0 to {self.num_classes - 1}")
        if int(y.min()) < 0 or int(y.max()) >= self.num_classes:
            raise ValueError(f"labels go from {int(y.min())} to {int(y.max())}; accepted: 0 to {self.num_classes - 1}")
        return x.to(self.device), y.to(self.device, torch.int64)

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """(x - m) s for rows [B, D], in place where they are already float32."""
        return rows.float().sub_(self._mean).mul_(self._scale)

    def _forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [B, K, C] of raw rows [B, D], which are left as they are."""
        return self._product(self._scaled(rows.clone()))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        logits = x @ self._weight.flatten(0, 1).T
        return logits.view(len(x), len(self.settings), self.num_classes).add_(self._bias[..., 0])

    def _gradients(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the mean cross-entropy over the batch x [B, D]: weights [K, C, D] and biases [K, C, 1]."""
        error = self._product(x).softmax(2)
        error.sub_(nn.functional.one_hot(y, self.num_classes)[:, None]).div_(len(x))
        weight = error.flatten(1).T @ x
        return weight.view_as(self._weight), error.sum(0)[..., None]

    def _chunks(self, features: Array) -> Iterator[tuple[int, torch.Tensor]]:
        x = as_tensor(features)
        size = max(1, min(_ROWS, _LOGITS // (len(self.settings) * self.num_classes)))
        for start in range(0, len(x), size):
            yield start, x[start : start + size].to(self.device)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and Pareto scale [D], 1 / sqrt(s_d s) (0 where x_d is constant), of x [N, D], float32.

    s_d is the dimension's standard deviation and s the root mean square of all of them: half way between leaving
    the features as they are and giving every dimension, however small, the same weight (van den Berg et al. 2006,
    doi:10.1186/1471-2164-7-142). On 300 digits it was worth up to 2 points over full standardisation.
    """
    # float64, and the deviations from the mean in a second pass: features far from 0 keep their variance.
    chunks = [x[i : i + _ROWS] for i in range(0, len(x), _ROWS)]
    mean = torch.stack([c.double().sum(0) for c in chunks]).sum(0) / len(x)
    squares = torch.stack([(c.double() - mean).square().sum(0) for c in chunks]).sum(0)
    deviation = (squares / len(x)).sqrt()
    common = deviation.square().mean().sqrt()
    scale = (1 / (deviation * common).sqrt()).float()
    return mean.float(), scale.masked_fill(deviation <= 1e-6 * mean.abs(), 0.0)

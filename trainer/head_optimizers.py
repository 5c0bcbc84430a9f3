"""torch's optimisers for a bank of heads: one stack of parameters, rates and decays of their own for each head."""

import math

import torch


class AdamW:
    """torch.optim.AdamW for a stack of K parameters [K, ...], each with its own rate and decay [K, 1, 1]."""

    def __init__(self, parameter: torch.Tensor, rates: torch.Tensor, decays: torch.Tensor) -> None:
        self.parameter, self.rates, self.decays = parameter, rates, decays
        self.first, self.second, self.buffer = (torch.zeros_like(parameter) for _ in range(3))
        self.num_steps = 0

    def step(self, gradient: torch.Tensor, schedule: float) -> None:
        """Take one step, the rates times `schedule`."""
        self.num_steps += 1
        rates = self.rates * schedule
        self.parameter.mul_(1 - rates * self.decays)
        self.first.lerp_(gradient, 1 - 0.9)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        # The bias corrections are moved onto eps and the rates: a pass over all weights less for each.
        root = math.sqrt(1 - 0.999**self.num_steps)
        torch.sqrt(self.second, out=self.buffer).add_(1e-8 * root)
        torch.div(self.first, self.buffer, out=self.buffer)
        self.parameter.addcmul_(self.buffer, rates, value=-root / (1 - 0.9**self.num_steps))


class SGD:
    """torch.optim.SGD(momentum=0.9, nesterov=True) for a stack of K parameters, as `AdamW`."""

    def __init__(self, parameter: torch.Tensor, rates: torch.Tensor, decays: torch.Tensor) -> None:
        self.parameter, self.rates, self.decays = parameter, rates, decays
        self.momentum = torch.zeros_like(parameter)

    def step(self, gradient: torch.Tensor, schedule: float) -> None:
        """Take one step, the rates times `schedule`."""
        gradient = gradient + self.decays * self.parameter
        # torch.optim's first step takes the gradient as the momentum, which starting from 0 gives as well.
        self.momentum.mul_(0.9).add_(gradient)
        self.parameter.sub_(gradient.add_(self.momentum, alpha=0.9).mul_(self.rates * schedule))


OPTIMIZERS: dict[str, type[AdamW] | type[SGD]] = {"adamw": AdamW, "sgd": SGD}

"""Softmins of a pair of sets through the Triton tile engine: costs are recomputed in registers in every half step.

Recomputing pays where D is small: a half step over stored costs moves 4 bytes a pair, 1.3 ps at 3 TB/s, and one over
recomputed ones multiplies 2 D numbers, 1.3 ps at D = 532 on tensor cores.
"""

import torch
from torch import Tensor

from headstart.kernels.engine import launch
from headstart.kernels.engine.ground_cost import Cost, Points
from headstart.kernels.engine.precision import make_operand
from headstart.kernels.engine.softmin import Recomputed


class FusedCosts(Recomputed):
    """As `Recomputed` for p = 2 without labels, but for fp64; near pairs are not repaired."""

    def __init__(self, rows: Points, columns: Points, cost: Cost, memory: int) -> None:
        super().__init__(rows, columns, cost, memory)
        self._memory = memory // 2
        self.planned = memory
        pitch = (rows.features.shape[1] + 63) // 64 * 64
        self._operands = [
            make_operand(side.features, self._centre[0], cost.precision, pitch) for side in (rows, columns)
        ]

    @staticmethod
    def fit(rows: Points, columns: Points, cost: Cost, memory: int) -> bool:
        """Whether the pair is one for this class, and its operands fit in half of the memory."""
        pitch = (rows.features.shape[1] + 63) // 64 * 64
        held = (len(rows.features) + len(columns.features)) * pitch * 16
        return cost.p == 2 and cost.labels is None and cost.dtype == torch.float32 and held <= memory // 2

    def _softmin(self, side: int, exponents: Tensor, epsilon: Tensor | float) -> Tensor:
        out, over = self._operands[side], self._operands[1 - side]
        sums = launch.row_logsumexp(
            out,
            over,
            torch.tensor([0, len(over.squares)]),
            exponents[0].contiguous(),
            inv_epsilon=1 / float(epsilon),
            p=2,
            precision=self._cost.precision,
            path="fused",
            memory=self._memory,
        )
        return sums * -epsilon

"""How far distances in each precision are from float64, on features as after a ReLU: the largest of several draws.

python -m benchmarks.precision
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import is_quick, print_rows
from benchmarks.rows import append_rows
from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances

DIM = 2048
SHIFTS = (0.10, 0.14, 0.18)
"""Added to the second set before its ReLU: how far apart the two are."""
SEEDS = range(6)


def draw(seed: int, shift: float, rows: int = 300) -> tuple[Tensor, Tensor]:
    """Two sets of features, [rows, DIM] each."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, DIM, generator=generator) for _ in range(2))
    return x.relu_(), y.add_(shift).relu_()


def values(x: Tensor, y: Tensor, precision: str, sinkhorn: bool) -> dict[str, Tensor]:
    """What is compared: single distances of 16 rows to all of the others, the energy and the Sinkhorn distance."""
    single, whole = RaggedTasks(y, torch.arange(len(y) + 1)), RaggedTasks.from_list([y])
    rows = [euclidean_distances(row[None], single, form="pairs", precision=precision) for row in x[:16]]
    found = {"distance": torch.cat(rows), "energy": energy_distances(x, whole, precision=precision)}
    if sinkhorn:
        found["sinkhorn"] = sinkhorn_distances(x, whole, tolerance=1e-5, precision=precision).distances
    return {name: value.double() for name, value in found.items()}


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    rows = []
    for shift in SHIFTS[:1] if quick else SHIFTS:
        worst: dict[str, dict[str, float]] = {}
        for seed in SEEDS[:1] if quick else SEEDS:
            x, y = draw(seed, shift)
            exact = values(x, y, "fp64", sinkhorn=seed < 2)
            for precision in ("bf16", "tf32", "bf16x3", "fp32"):
                errors = worst.setdefault(precision, {})
                for name, value in values(x, y, precision, sinkhorn=seed < 2).items():
                    errors[name] = max(errors.get(name, 0.0), float((value - exact[name]).abs().max()))
        of_last = {name: f"{float(value.mean()):.3g}" for name, value in exact.items()}
        rows += [
            {
                "dim": DIM,
                "energy": of_last["energy"],
                "precision": precision,
                **{f"{name}_error": f"{error:.2g}" for name, error in errors.items()},
            }
            for precision, errors in worst.items()
        ]
    append_rows("precision", rows)
    print_rows("precision", rows)
    return rows


if __name__ == "__main__":
    main(quick=is_quick(__doc__))

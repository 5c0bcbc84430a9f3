"""The GPU's figures in one command: `make bench-gpu`, or python3 -m benchmarks.gpu with PYTHONPATH=.typing:."""

import sys
import time

import torch

from benchmarks import energy, euclidean, mmd, neighbours, sinkhorn
from benchmarks.distances import copy_rate, print_rows, product_rate, root_rate
from benchmarks.rows import device_name

BUDGET = 7 * 60
"""Seconds after which no further benchmark is begun."""


def main() -> None:
    """Measure on the CUDA device, append the rows, and print the short table of them last."""
    if not torch.cuda.is_available():
        print(
            "no CUDA device here: run this on a machine with a GPU; `make bench` has the CPU's figures", file=sys.stderr
        )
        sys.exit(2)
    print(device_name())
    rates = {precision: f"{product_rate(precision) / 1e9:.0f} TFLOP/s" for precision in ("bf16", "tf32", "fp32")}
    print(rates, f"copy {copy_rate() / 1e9:.2f} TB/s, roots {root_rate() / 1e9:.2f} T/s")
    started, summary = time.monotonic(), []
    for benchmark in (energy, mmd, neighbours, euclidean, sinkhorn):
        name = benchmark.__name__.rsplit(".", 1)[-1]
        if time.monotonic() - started > BUDGET:
            print(f"{name}: left out, {BUDGET} s are over", file=sys.stderr)
            continue
        columns = ("num_tasks", "median_rows", "dim", "contender", "p50", "speedup", "max_error", "peak_mb", "of_floor")
        summary += [{"": name, **{key: row[key] for key in columns}} for row in benchmark.main()]
    print_rows("all of them, in ms", summary)


if __name__ == "__main__":
    main()

"""The GPU's figures in one command: `make bench-gpu`, or python3 -m benchmarks.gpu with PYTHONPATH=.typing:."""

import sys
import time
from itertools import groupby
from typing import Any

import torch

from benchmarks import distances, energy, euclidean, mmd, neighbours, sinkhorn
from benchmarks.distances import FAILED, copy_rate, kept_going, print_rows, product_rate, root_rate
from benchmarks.rows import device_name

BUDGET = 6 * 60
"""Seconds after which no further workload is begun."""


def main() -> None:
    """Measure on the CUDA device, append the rows, and print the short table of them last; exit 1 if some failed."""
    if not torch.cuda.is_available():
        print(
            "no CUDA device here: run this on a machine with a GPU; `make bench` has the CPU's figures", file=sys.stderr
        )
        sys.exit(2)
    started, summary = time.monotonic(), []
    distances.deadline = started + BUDGET
    print(device_name(), f"torch {torch.__version__}", flush=True)
    rates = {precision: f"{product_rate(precision) / 1e9:.0f} TFLOP/s" for precision in ("bf16", "tf32", "fp32")}
    print(rates, f"copy {copy_rate() / 1e9:.2f} TB/s, roots {root_rate() / 1e9:.2f} T/s", flush=True)
    # What the goals are about comes first: the time may be up before the rest.
    for benchmark in (energy, mmd, sinkhorn, neighbours, euclidean):
        name = benchmark.__name__.rsplit(".", 1)[-1]
        with kept_going(name, "cuda"):
            summary += [{"": name, **row} for row in shortened(benchmark.main())]
    if summary:
        print_rows(f"the fastest of each workload, in ms; {time.monotonic() - started:.0f} s in all", summary)
    for each in FAILED:
        print(f"failed: {each}")
    sys.exit(1 if FAILED else 0)


def shortened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a workload: its first contender that ran, the fastest of ours, and the fastest of the others."""
    short = []
    for _, group in groupby(rows, lambda row: [row[key] for key in ("num_tasks", "median_rows", "dim", "num_target")]):
        some = list(group)
        ours, others = ([row for row in some if row["contender"].startswith("headstart") == mine] for mine in (1, 0))
        row = {key: some[0][key] for key in ("num_tasks", "median_rows", "dim", "contender", "p50", "of_floor")}
        row["max_error"] = some[0]["max_error"]
        for title, those in (("fastest of ours", ours), ("fastest of others", others)):
            best = min(those, key=lambda row: row["p50"], default=None)
            row[title] = "" if best is None else f"{best['contender']} {best['p50']:.2f}"
        short.append(row)
    return short


if __name__ == "__main__":
    main()

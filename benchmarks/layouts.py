"""Layouts of the tile program on a GPU, beside cuBLAS: what the table in kernels/engine/layouts.py is chosen by.

    make layouts-gpu            # or python3 -m benchmarks.layouts with PYTHONPATH=.typing:.

A row is a layout at a precision and a length of rows: sums of the roots, or of five exponentials, over all pairs of a
target with tasks. `of_rate` is the rate of its products as a share of that of one large product of cuBLAS on the same
machine; `difference` to the sums of the layout in use must be rounding alone. The layout in use has `used` in its row.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.distances import FAILED, kept_going, print_rows, product_rate
from benchmarks.rows import append_rows, device_name, interleaved
from headstart.kernels.engine import fused, launch
from headstart.kernels.engine.launch import Value
from headstart.kernels.engine.layouts import Config, choose_config
from headstart.kernels.engine.precision import Operand, make_operand

CANDIDATES = {
    "bf16": (
        Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 4), Config(256, 128, 64, 8, 3), Config(256, 128, 64, 8, 4),
        Config(128, 256, 128, 8, 2), Config(64, 256, 64, 4, 3), Config(64, 256, 64, 4, 4), Config(128, 128, 128, 8, 3),
        Config(128, 128, 64, 8, 4), Config(128, 128, 64, 4, 3), Config(128, 128, 64, 4, 4), Config(64, 128, 64, 4, 4),
    ),
    "tf32": (
        Config(128, 256, 32, 8, 3), Config(128, 256, 32, 8, 4), Config(256, 128, 32, 8, 3), Config(256, 128, 32, 8, 4),
        Config(128, 256, 64, 8, 2), Config(64, 256, 32, 4, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4),
        Config(128, 128, 32, 4, 3), Config(128, 128, 32, 4, 4), Config(64, 128, 32, 4, 4),
    ),
    "bf16x3": (
        Config(128, 256, 32, 8, 2), Config(128, 256, 32, 8, 3), Config(256, 128, 32, 8, 3), Config(128, 256, 64, 8, 2),
        Config(64, 256, 32, 4, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 3), Config(128, 128, 32, 4, 2),
        Config(128, 128, 32, 4, 3), Config(64, 128, 64, 4, 2), Config(64, 128, 64, 4, 3),
    ),
    "fp32": (
        Config(128, 64, 16, 4, 3), Config(128, 64, 32, 4, 3), Config(128, 128, 8, 8, 3), Config(128, 128, 16, 8, 3),
        Config(128, 128, 32, 8, 2), Config(64, 64, 16, 4, 3),
    ),
}  # fmt: skip
"""Layouts that on sm_90 compile without spills and fit, by precision."""


@dataclass(frozen=True)
class Case:
    """What the layouts are compared on."""

    precision: str
    dim: int
    epilogue: str
    """sqrt, or rbf with five bandwidths."""
    num_target: int = 4096
    num_tasks: int = 64
    rows: int = 2048

    def make(self, device: str) -> tuple[Operand, Operand, Tensor, Value]:
        """The target, the tasks, their offsets, and what is summed."""
        generator = torch.Generator(device).manual_seed(0)
        x, y = (
            torch.randn(rows, self.dim, generator=generator, device=device)
            for rows in (self.num_target, self.num_tasks * self.rows)
        )
        centre, pitch = x.new_zeros(self.dim), -(-self.dim // 64) * 64
        offsets = self.rows * torch.arange(self.num_tasks + 1)
        scales = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], device=device) / self.dim
        value = Value("sqrt") if self.epilogue == "sqrt" else Value("rbf", scales)
        return *(make_operand(rows, centre, self.precision, pitch) for rows in (x, y)), offsets, value


def cases() -> Iterator[Case]:
    """Long rows and short ones of each precision, and the epilogue that takes most registers on one of them."""
    for precision in CANDIDATES:
        for dim, epilogue in ((2048, "sqrt"), (256, "sqrt"), (256, "rbf")):
            if precision != "fp32" or dim == 256:  # without tensor cores long rows would tell nothing new
                yield Case(precision, dim, epilogue)


@contextmanager
def laid_out(config: Config) -> Iterator[None]:
    """Every launch of the tile program has this layout."""
    with patch.object(fused, "tile_config", lambda operand, precision: config):
        yield


def sums(case: Case, given: tuple[Operand, Operand, Tensor, Value], config: Config) -> Tensor:
    """The sums of each task, [T]."""
    x, y, offsets, value = given
    with laid_out(config):
        return launch.cross_sums(x, y, offsets, precision=case.precision, value=value, path="fused", memory=2**32)


def compiled(case: Case, config: Config) -> str:
    """Compile a layout for few rows, in a process of its own, into Triton's cache; say what kept it from running."""
    few = replace(case, num_target=300, num_tasks=2, rows=300)
    try:
        sums(few, few.make("cuda"), config)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
    return ""


def compare(case: Case, configs: Sequence[Config], used: Config, device: str, runs: int = 5) -> list[dict[str, Any]]:
    """Time the layouts in turn; a row each, the fastest first."""
    given = case.make(device)
    expected = sums(case, given, used)
    times = interleaved({str(config): partial(sums, case, given, config) for config in configs}, runs=runs)
    work = 2 * case.num_target * case.num_tasks * case.rows * case.dim
    rows = []
    for config in configs:
        taken = times[str(config)]
        difference = float(((sums(case, given, config) - expected).abs() / expected).max())
        rows.append(
            {
                "precision": case.precision, "dim": case.dim, "epilogue": case.epilogue, **config._asdict(),
                "used": "used" if config == used else "", "unit": "ms",
                **{quantile: round(value, 4) for quantile, value in taken.items()},
                "of_rate": round(work / taken["p50"] / product_rate(case.precision), 3),
                "difference": f"{difference:.2g}",
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: row["p50"])


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: run this on a machine with a GPU", file=sys.stderr)
        sys.exit(2)
    started, best = time.monotonic(), []
    print(device_name(), f"torch {torch.__version__}", flush=True)
    capability = torch.cuda.get_device_capability()
    tried = [(case, config) for case in cases() for config in CANDIDATES[case.precision]]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        said = dict(zip(tried, pool.map(compiled, *zip(*tried, strict=True)), strict=True))
    print(f"{len(said)} programs, {time.monotonic() - started:.0f} s", flush=True)
    FAILED.extend(f"{case}, {config}: {why}" for (case, config), why in said.items() if why)
    for case in cases():
        with kept_going(str(case), "cuda"):
            used = choose_config(case.precision, -(-case.dim // 64) * 64, capability)
            configs = [config for config in CANDIDATES[case.precision] if not said[case, config]]
            rows = compare(case, configs, used, "cuda")
            append_rows("layouts", rows)
            print_rows(str(case), rows)
            best += [row for row in rows if row["used"] or row is rows[0]]
    if best:
        print_rows(f"the fastest layout of each case and the one in use; {time.monotonic() - started:.0f} s", best)
    for each in FAILED:
        print(f"failed: {each}")
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()

"""Both programs in turn, their seconds and memory, and what one pass over the images allows."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.textbook.agreement import Agreement, DisagreementError, agreement
from benchmarks.textbook.programs import Ours, Textbook, our_backbone, ours
from benchmarks.textbook.workload import Workload, prepare

Row = dict[str, Any]


@dataclass(kw_only=True)
class Meter:
    """Seconds and memory of one program's calls."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of this process; other work on the machine moves these less than the seconds."""
    peak_mib: float = 0.0
    """Highest resident memory of the process in any call; 0 where the system does not say."""

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Add what the block takes."""
        _reset_peak()
        started, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu)
        self.peak_mib = max(self.peak_mib, _peak_mib())


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size


def _peak_mib() -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def limit(epochs: int, forward: float, heads: float) -> float:
    """Return the best ratio that one pass over the images allows; forward and heads in seconds."""
    return epochs * forward / (forward + heads)


def measure(workload: Workload, *, num_runs: int = 5, say: Callable[[str], None] = lambda _: None) -> Row:
    """Run both programs, the textbook's once and ours `num_runs` times between its epochs; return a row of figures.

    Raises `DisagreementError` where they do not come to the same.
    """
    load = os.getloadavg()[0]
    every = max(1, workload.epochs // num_runs)
    theirs, mine, runs = Meter(), Meter(), list[Ours]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = prepare(workload, folder, folder / "cache")
        textbook = Textbook(workload, weights, folder)
        backbone = our_backbone(workload, weights, folder / "cache")
        for epoch in range(workload.epochs):
            with theirs.measuring():
                textbook.epoch()
            say(f"textbook: epoch {epoch + 1} of {workload.epochs}, {theirs.seconds[-1]:.2f} s")
            if epoch % every == 0 and len(runs) < num_runs:
                with mine.measuring():
                    runs.append(ours(workload, backbone, folder, folder / f"cache-{epoch}"))
                say(f"ours: all {workload.epochs} epochs, {mine.seconds[-1]:.2f} s")
        agreed = agreement(workload, textbook, backbone, runs[-1], folder / "cache")
    if failures := agreed.failures():
        raise DisagreementError(f"{workload.model}: {'; '.join(failures)}; allowed: {Agreement.LIMIT}; so no ratio")
    row = {
        "workload": f"{workload.model}-{workload.crop}",
        "num_images": workload.num_train,
        "epochs": workload.epochs,
        "batch_size": workload.batch_size,
        "num_threads": torch.get_num_threads(),
        "load_before": round(load, 2),
    }
    return row | _figures(workload.epochs, theirs, mine, [run.heads_seconds for run in runs]) | _rounded(asdict(agreed))


def _figures(epochs: int, theirs: Meter, mine: Meter, heads: Sequence[float]) -> Row:
    """Times in seconds. A run of ours gives a ratio to `epochs` times the mean of the two epochs around it.

    Sums or medians of the whole would be decided by when another job on the machine began and ended.
    """
    every = len(theirs.seconds) // len(mine.seconds)
    around = [np.mean(theirs.seconds[i * every : i * every + 2]) for i in range(len(mine.seconds))]
    ratios = [epochs * float(epoch) / run for epoch, run in zip(around, mine.seconds, strict=True)]
    fitting, ratio = float(np.median(heads)), float(np.median(ratios))
    best = limit(epochs, float(np.median(theirs.seconds)), fitting)
    figures = {
        "textbook": sum(theirs.seconds),
        **_quantiles("textbook_epoch", theirs.seconds),
        **_quantiles("ours", mine.seconds),
        "ours_heads": fitting,
        **_quantiles("ratio", ratios),
        "ratio_of_cpu_seconds": epochs * float(np.median(theirs.cpu_seconds) / np.median(mine.cpu_seconds)),
        "limit": best,
        "fraction_of_limit": ratio / best,
        "textbook_peak_mib": theirs.peak_mib,
        "ours_peak_mib": mine.peak_mib,
    }
    return {"unit": "s"} | _rounded(figures)


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def _rounded(figures: dict[str, float]) -> Row:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}

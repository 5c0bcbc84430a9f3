"""Which path computes a distance: chosen by device, precision and D; can be overridden; tells what it chose.

    with dispatch.override("streamed"), dispatch.report() as report:
        energy_distances(target, tasks, precision="bf16")
    report[0].path, report[0].reason, report[0].peak_bytes

Paths:

- `eager`: plain PyTorch, tile by tile, on any device; every precision; near pairs computed again from differences.
- `streamed` (CUDA): products of all rows, whatever task they belong to, by cuBLAS into a buffer, then one Triton kernel
  that reads each tile once; own sums of small tasks by the fused kernel.
- `fused` (CUDA): product and epilogue in one Triton kernel; the matrix of distances never reaches memory.

What is no sum over pairs of rows (means, class means, covariances, transport over costs that fit in memory) has the
`eager` path alone, and takes it whatever is asked for; its reports say so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PATHS = ("eager", "streamed", "fused")

FUSED_BELOW = 512
"""D below which `fused` is chosen. Fusion saves the passes over the matrix, whose share of the time falls with D: at
D = 2048 a fused kernel wins only above 66% of the tensor cores' rate, at D = 256 it may be five times as fast.

Sizes have no part in it: streamed products are over stripes of rows that ignore the tasks' borders, and so cost the
same whatever the tasks' sizes, and small tasks' own sums are one fused launch there too (`engine.streamed.own_rows`);
the target has none in any case, so that self terms can be kept for any."""


class _State:
    """What holds for the process while a context is open. Plain attributes: torch 2.11 compiles no ContextVar."""

    asked: str | None = None
    reports: "list[Report] | None" = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one computation did. A call may be several: an energy distance has cross terms and two sets of own terms."""

    function: str
    """What was computed: pair sums, own sums, neighbours, mean distances, prototype distances, Fréchet distances,
    transports."""
    path: str
    """One of PATHS."""
    reason: str
    """Why that path."""
    precision: str
    """What products were computed in."""
    peak_bytes: int
    """Most held beside inputs and result: measured on CUDA, planned on the CPU, whose allocator does not tell."""


def choose(device: torch.device, precision: str, dim: int) -> tuple[str, str]:
    """The path for features [*, dim] on a device at a precision, and the reason.

    ValueError: a path that was asked for by `override` and cannot be taken there.
    """
    asked = _State.asked
    if asked is not None:
        if asked != "eager" and (not _triton_runs(device) or precision == "fp64"):
            raise ValueError(
                f"path {asked!r} was asked for at {precision} on {device}; accepted there: eager"
                + ("" if precision == "fp64" else f" (streamed and fused need a CUDA device, not {device})")
            )
        return asked, "asked for"
    if device.type != "cuda":
        return "eager", f"on {device.type}"
    if precision == "fp64":
        return "eager", "fp64"
    if precision == "fp32":
        return "streamed", "exact float32 products have no tensor cores: cuBLAS"
    if dim < FUSED_BELOW:
        return "fused", f"D = {dim} < {FUSED_BELOW}"
    return "streamed", f"D = {dim} >= {FUSED_BELOW}"


def _triton_runs(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    from triton import knobs

    return bool(knobs.runtime.interpret)  # Triton's interpreter works on the CPU's memory


@contextmanager
def override(path: str) -> Iterator[None]:
    """Take that path for everything that the process computes inside; ValueError where it cannot be taken."""
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; accepted: {', '.join(PATHS)}")
    before, _State.asked = _State.asked, path
    try:
        yield
    finally:
        _State.asked = before


@contextmanager
def report() -> Iterator[list[Report]]:
    """Collect a Report for every computation inside, in order."""
    reports: list[Report] = []
    before, _State.reports = _State.reports, reports
    try:
        yield reports
    finally:
        _State.reports = before


class Watch:
    """What a computation that runs under it held at most, noted in the report that is being collected, if one is."""

    def __init__(
        self,
        function: str,
        device: torch.device,
        path: str = "eager",
        reason: str = "its only path",
        precision: str = "fp64",
    ) -> None:
        self._function, self._path, self._reason, self._precision = function, path, reason, precision
        self._device = device
        self.planned = 0
        """What the computation says that it will hold, in bytes."""

    def __enter__(self) -> "Watch":
        """Begin to watch."""
        if self._device.type == "cuda" and _State.reports is not None:
            # With its workspace, 32 MiB on Hopper, which would be counted for whatever multiplies first.
            with torch.cuda.device(self._device):
                torch.cuda.current_blas_handle()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        """Note what was seen."""
        reports = _State.reports
        if reports is None or failed is not None:
            return
        peak = self.planned
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._before
        reports.append(
            Report(
                function=self._function,
                path=self._path,
                reason=self._reason,
                precision=self._precision,
                peak_bytes=peak,
            )
        )

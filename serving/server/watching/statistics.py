"""What one version of one model has counted.

Everything is counted on the event loop, in plain integers without locks: an observation costs about a microsecond.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from headstart.serving.server.errors import ServeError

SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
STAGES = ("images", "queue", "compute", "total")
LATEST = "last_inference_ms"
_SUMS = ("success", "success_ns", "fail", "fail_ns", "queue_ns", "compute_ns", "rows", "executions", LATEST)


class Histogram:
    """Counts of values in buckets; a value lies in the first bucket whose bound is not below it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus has them: (upper bound, values up to it)."""
        running, rows = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound == float("inf") else str(float(bound)), float(running)))
        return rows


class Statistics:
    """Counts of one version of one model; `document` is Triton's form of them.

    An execution is one `session.run`; it answers one request, or several that were batched. Times are in ns.
    """

    def __init__(self, model: str, version: str) -> None:
        self.model, self.version = model, version
        self.success, self.success_ns = 0, 0
        self.fail, self.fail_ns = 0, 0
        self.queue_ns, self.compute_ns = 0, 0
        self.rows, self.executions = 0, 0
        self.last_inference_ms = 0
        self.batches: dict[int, list[int]] = {}
        """Executions and their ns, by the number of rows."""
        self.errors: dict[int, int] = {}
        """Refused and failed requests by HTTP status; 499 counts those whose client had gone."""
        self.stages = {stage: Histogram(SECONDS) for stage in STAGES}
        self.batch_rows = Histogram(ROWS)
        self.depth: Callable[[], int] = int
        """Requests that wait now."""
        self.drift: Callable[[], dict[str, Any]] = dict
        """The state of a drift gauge; empty where there is none."""
        self.memory = 0
        """Bytes by which the process grew while the version was loaded."""

    def executed(self, rows: int, nanoseconds: int) -> None:
        """Count one execution."""
        self.executions += 1
        self.batch_rows.observe(rows)
        row = self.batches.get(rows)
        if row is None:
            row = self.batches[rows] = [0, 0]
        row[0] += 1
        row[1] += nanoseconds

    def answered(
        self, rows: int, queue_ns: int, compute_ns: int, total_ns: int, now_ms: int, images_ns: int = 0
    ) -> None:
        """Count one request that was answered; `images_ns` is 0 where it brought no files."""
        self.success += 1
        self.rows += rows
        self.success_ns += total_ns
        self.queue_ns += queue_ns
        self.compute_ns += compute_ns
        self.last_inference_ms = now_ms
        stages = self.stages
        if images_ns:
            stages["images"].observe(images_ns * 1e-9)
        stages["queue"].observe(queue_ns * 1e-9)
        stages["compute"].observe(compute_ns * 1e-9)
        stages["total"].observe(total_ns * 1e-9)

    def refused(self, error: ServeError, total_ns: int) -> None:
        """Count one request that was not, and note with the error that it is."""
        error.counted = True
        self.failed(error.status, total_ns)

    def failed(self, status: int, total_ns: int = 0) -> None:
        """Count one request that was not, by its status alone."""
        self.fail += 1
        self.fail_ns += total_ns
        self.errors[status] = self.errors.get(status, 0) + 1

    def counts(self) -> dict[str, Any]:
        """All of it as JSON has it, for `added` and `restore`."""
        return {
            **{name: getattr(self, name) for name in _SUMS},
            "batches": {str(rows): row for rows, row in self.batches.items()},
            "errors": {str(status): count for status, count in self.errors.items()},
            "stages": {stage: [one.counts, one.total] for stage, one in self.stages.items()},
            "batch_rows": [self.batch_rows.counts, self.batch_rows.total],
        }

    def restore(self, counts: dict[str, Any]) -> None:
        """Be what `counts` says."""
        for name in _SUMS:
            setattr(self, name, counts[name])
        self.batches = {int(rows): row for rows, row in counts["batches"].items()}
        self.errors = {int(status): count for status, count in counts["errors"].items()}
        for stage, (found, total) in counts["stages"].items():
            self.stages[stage].counts, self.stages[stage].total = found, total
        self.batch_rows.counts, self.batch_rows.total = counts["batch_rows"]

    def document(self) -> dict[str, Any]:
        """Triton's ModelStatistics. Copying in and out is part of `compute_infer` here."""
        none = {"count": 0, "ns": 0}
        return {
            "name": self.model,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {
                "success": {"count": self.success, "ns": self.success_ns},
                "fail": {"count": self.fail, "ns": self.fail_ns},
                "queue": {"count": self.success, "ns": self.queue_ns},
                "compute_input": dict(none),
                "compute_infer": {"count": self.success, "ns": self.compute_ns},
                "compute_output": dict(none),
                "cache_hit": dict(none),
                "cache_miss": dict(none),
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": dict(none),
                    "compute_infer": {"count": count, "ns": nanoseconds},
                    "compute_output": dict(none),
                }
                for rows, (count, nanoseconds) in sorted(self.batches.items())
            ],
            "memory_usage": [{"type": "CPU", "id": 0, "byte_size": self.memory}],
            "response_stats": {},
        }

"""What the server counts, for Prometheus and for Triton's statistics.

Everything is counted on the event loop, in plain integers without locks: an observation costs about a microsecond,
and `prometheus_client` does its work when it is asked for the text.
"""

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.drift import distance

SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
STAGES = ("images", "queue", "compute", "total")
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_MODEL = ("model", "version")
_LATEST = "last_inference_ms"
_SUMS = ("success", "success_ns", "fail", "fail_ns", "queue_ns", "compute_ns", "rows", "executions", _LATEST)


def added(one: Any, other: Any) -> Any:
    """The sum of two `counts`, number by number; of the times of the last request the later one."""
    if isinstance(one, dict):
        return {
            name: _SUMMED.get(name, added)(one[name], other[name]) if name in one and name in other else value
            for name, value in {**one, **other}.items()
        }
    return [added(*pair) for pair in zip(one, other, strict=True)] if isinstance(one, list) else one + other


def _later(one: Any, other: Any) -> Any:
    return added(one, other) if isinstance(one, dict) else max(one, other)  # a model may have that name too


def _drifts_added(one: dict[str, Any], other: dict[str, Any]) -> Any:
    """As `added`; of features of two widths, while a version replaces another of its number, those of more rows."""
    if len(one.get("offset", ())) == len(other.get("offset", ())):
        return added(one, other)
    return max(one, other, key=lambda state: state.get("rows", 0))


_SUMMED: dict[str, Callable[[Any, Any], Any]] = {_LATEST: _later, "drift": _drifts_added}
"""What is not added as numbers are."""


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


class Metrics(Collector):
    """The statistics of all that is loaded, in a Prometheus registry of its own.

    metrics = Metrics()
    statistics = metrics.track("demo", "1")
    metrics.metrics_text()

    Args:
        workers: pids by number, where there are several; None is this process alone.
        restarts: how often a worker was started again.
    """

    def __init__(self, workers: dict[str, int] | None = None, restarts: int = 0) -> None:
        self._models: dict[tuple[str, str], Statistics] = {}
        self._reloads = {"ready": 0, "refused": 0}
        self._unknown = 0
        self._refused: dict[str, int] = {}
        self._workers, self._restarts = workers, restarts
        self.registry = prometheus_client.CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        if workers is None:
            prometheus_client.ProcessCollector(registry=self.registry)

    @classmethod
    def summed(cls, counts: Sequence[dict[str, Any]], workers: dict[str, int], restarts: int) -> "Metrics":
        """The metrics of a server of several processes, from the `counts` of each; those that ended have no `now`."""
        total: dict[str, Any] = functools.reduce(added, counts, {})
        metrics = cls(workers, restarts)
        metrics._reloads, metrics._unknown = total.get("loads", {}), total.get("unknown", 0)
        metrics._refused = total.get("refused", {})
        for model, versions in total.get("now", {}).items():
            for version, live in versions.items():
                statistics = metrics.track(model, version)
                statistics.restore(total["models"][model][version])
                statistics.depth = functools.partial(int, live["depth"])
                statistics.drift = functools.partial(dict, live["drift"])
                statistics.memory = live["memory"]
        return metrics

    def counts(self) -> dict[str, Any]:
        """All of it as JSON has it, for `added` and `summed`; `now` holds what is lost with the process."""
        models: dict[str, dict[str, Any]] = {}
        now: dict[str, dict[str, Any]] = {}
        for (model, version), one in self._models.items():
            models.setdefault(model, {})[version] = one.counts()
            now.setdefault(model, {})[version] = {"depth": one.depth(), "drift": one.drift(), "memory": one.memory}
        refused = dict(self._refused)
        return {"models": models, "now": now, "loads": self._reloads, "unknown": self._unknown, "refused": refused}

    def track(self, model: str, version: str) -> Statistics:
        """The statistics of a version: new, or those that it has when it was loaded anew."""
        return self._models.setdefault((model, version), Statistics(model, version))

    def forget(self, model: str, version: str) -> None:
        """Drop a version that is no longer served, so that reloads do not add up to memory."""
        self._models.pop((model, version), None)

    def find(self, model: str | None, version: str | None) -> list[Statistics]:
        """Those of a model and version, None being all, in the order of their names."""
        wanted = [
            one
            for (name, number), one in self._models.items()
            if (model is None or name == model) and (version is None or number == version)
        ]
        return sorted(wanted, key=lambda one: (one.model, len(one.version), one.version))

    def document(self, model: str | None, version: str | None) -> dict[str, Any]:
        """Triton's ModelStatisticsResponse of those that `find` finds."""
        return {"model_stats": [one.document() for one in self.find(model or None, version or None)]}

    def loaded(self, ready: bool) -> None:
        """Count a version that was loaded, or refused."""
        self._reloads["ready" if ready else "refused"] += 1

    def unknown(self) -> None:
        """Count a request for a model that is not served: without its name, which a stranger chose."""
        self._unknown += 1

    def refused(self, status: int) -> None:
        """Count a request that was refused or failed where no version had it."""
        self._refused[str(status)] = self._refused.get(str(status), 0) + 1

    def metrics_text(self) -> bytes:
        """The exposition in `CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks for."""
        seconds = HistogramMetricFamily(
            "headstart_request_duration_seconds",
            "Time of answered requests: until image files are decoded, in the queue, in the model, and all of it.",
            labels=(*_MODEL, "stage"),
        )
        rows = HistogramMetricFamily("headstart_batch_rows", "Rows of one execution.", labels=_MODEL)
        answered = CounterMetricFamily("headstart_requests_answered", "Requests answered.", labels=_MODEL)
        errors = CounterMetricFamily(
            "headstart_request_errors",
            "Requests refused or failed, by HTTP status, over gRPC too; 499: the client had gone. "
            "Model and version are empty where no version had the request.",
            labels=(*_MODEL, "status"),
        )
        depth = GaugeMetricFamily("headstart_queue_depth", "Requests that wait.", labels=_MODEL)
        drift = GaugeMetricFamily(
            "headstart_drift_distance",
            "From the live features' mean to the training features', over the training features' spread.",
            labels=_MODEL,
        )
        memory = GaugeMetricFamily(
            "headstart_model_memory_bytes", "By how much the process grew while it was loaded.", labels=_MODEL
        )
        seen = CounterMetricFamily("headstart_drift_rows", "Rows whose features the drift is of.", labels=_MODEL)
        for (model, version), one in self._models.items():
            memory.add_metric((model, version), one.memory)
            if state := one.drift():
                seen.add_metric((model, version), state["rows"])
                if (moved := distance(state)) is not None:
                    drift.add_metric((model, version), moved)
            for stage, histogram in one.stages.items():
                seconds.add_metric((model, version, stage), histogram.cumulative(), histogram.total)
            rows.add_metric((model, version), one.batch_rows.cumulative(), one.batch_rows.total)
            answered.add_metric((model, version), one.success)
            for status, count in one.errors.items():
                errors.add_metric((model, version, str(status)), count)
            depth.add_metric((model, version), one.depth())
        for refused, count in self._refused.items():
            errors.add_metric(("", "", refused), count)
        loads = CounterMetricFamily("headstart_model_loads", "Versions loaded, by their end.", labels=("result",))
        for result, count in self._reloads.items():
            loads.add_metric((result,), count)
        unknown = CounterMetricFamily("headstart_unknown_model_requests", "Requests for what is not served.")
        unknown.add_metric((), self._unknown)
        yield from (seconds, rows, answered, errors, depth, memory, drift, seen, loads, unknown)
        if self._workers is not None:
            yield from _processes(self._workers)
            yield GaugeMetricFamily("headstart_workers", "Processes that serve.", value=len(self._workers))
            yield CounterMetricFamily(
                "headstart_worker_restarts", "Workers that were started again.", value=self._restarts
            )


def _processes(pids: dict[str, int]) -> list[Metric]:
    """What ProcessCollector says of each process, labelled `worker`."""
    families: dict[str, Metric] = {}
    for number, pid in pids.items():
        collector = prometheus_client.ProcessCollector(pid=functools.partial(int, pid), registry=None)
        for family in collector.collect():
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                kept.add_sample(sample.name, {"worker": number}, sample.value)
    return list(families.values())

"""What all versions of a server have counted, for Prometheus and for Triton's statistics, over several processes too.

`prometheus_client` does its work when it is asked for the text.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headstart.serving.server.models.drift import distance
from headstart.serving.server.watching.statistics import LATEST, Statistics

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_MODEL = ("model", "version")


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


_SUMMED: dict[str, Callable[[Any, Any], Any]] = {LATEST: _later, "drift": _drifts_added}
"""What is not added as numbers are."""


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

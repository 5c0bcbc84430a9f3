"""What is counted, number by number: of one version, of a server of several processes, and as Prometheus reads it."""

import contextlib
import json
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from headstart.serving.server.watching.metrics import Metrics
from headstart.serving.server.watching.statistics import Histogram
from tests.serving.server.graphs import write_package
from tests.serving.server.tiny_service import RawClient
from tests.serving.server.watching.test_logs import BODY, LENGTH, PATH, Logged

STRANGE = b'{"inputs":[{"name":"other","datatype":"UINT8","shape":[1],"data":[1]}]}'
TOKEN = ("authorization", "Bearer t")


def counted(metrics: Metrics) -> Metrics:
    """With two executions of 2 rows and one of 1, two requests that were answered and two that were not."""
    one = metrics.track("demo", "1")
    for rows, nanoseconds in ((2, 100), (2, 50), (1, 7)):
        one.executed(rows, nanoseconds)
    one.answered(2, 1_000_000, 20_000_000, 30_000_000, now_ms=5)
    one.answered(3, 4_000_000, 50_000_000, 60_000_000, now_ms=9)
    one.failed(503, 11)
    one.failed(503, 2)
    one.failed(400)
    one.depth, one.drift, one.memory = (lambda: 4), (lambda: {"rows": 6}), 1000
    for ready in (True, False, False):
        metrics.loaded(ready)
    for _ in range(3):
        metrics.unknown()
    for status in (401, 404, 401):
        metrics.refused(status)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample, by its name and the values of its labels, in the order of their names."""
    families = text_string_to_metric_families(metrics.metrics_text().decode())
    return {
        " ".join([one.name, *(label for _, label in sorted(one.labels.items()))]): one.value
        for family in families
        for one in family.samples
    }


def test_a_value_lies_in_the_first_bucket_whose_bound_is_not_below_it():
    histogram = Histogram((1, 2, 4))
    for value in (1, 2, 3, 5):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 1), ("2.0", 2), ("4.0", 3), ("+Inf", 4)]
    assert histogram.total == 11


def test_tritons_statistics_are_what_was_counted():
    (one,) = counted(Metrics()).document("demo", None)["model_stats"]
    assert (one["inference_count"], one["execution_count"], one["last_inference"]) == (5, 3, 9)
    found = {name: (value["count"], value["ns"]) for name, value in one["inference_stats"].items() if value["count"]}
    assert found == {
        "success": (2, 90_000_000), "fail": (3, 13), "queue": (2, 5_000_000), "compute_infer": (2, 70_000_000),
    }  # fmt: skip
    batches = [(row["batch_size"], *row["compute_infer"].values()) for row in one["batch_stats"]]
    assert batches == [(1, 1, 7), (2, 2, 150)]
    assert one["memory_usage"][0]["byte_size"] == 1000


def test_prometheus_reads_what_was_counted():
    metrics = counted(Metrics())
    metrics.track("demo", "1").drift = dict
    found = samples(metrics)
    for stage, seconds in (("queue", 0.005), ("compute", 0.07), ("total", 0.09)):
        assert found[f"headstart_request_duration_seconds_count demo {stage} 1"] == 2
        assert abs(found[f"headstart_request_duration_seconds_sum demo {stage} 1"] - seconds) < 1e-9
    assert found["headstart_batch_rows_count demo 1"] == 3
    assert found["headstart_batch_rows_sum demo 1"] == 5
    assert found["headstart_requests_answered_total demo 1"] == 2
    assert found["headstart_request_errors_total demo 503 1"] == 2
    assert found["headstart_request_errors_total demo 400 1"] == 1
    assert found["headstart_queue_depth demo 1"] == 4
    assert found["headstart_model_memory_bytes demo 1"] == 1000
    assert [found[f"headstart_model_loads_total {end}"] for end in ("ready", "refused")] == [1, 2]
    assert found["headstart_unknown_model_requests_total"] == 3
    assert not any(name.startswith("headstart_drift") for name in found)


def test_a_version_that_is_loaded_anew_counts_on_and_one_that_is_forgotten_does_not():
    metrics = counted(Metrics())
    assert metrics.track("demo", "1").success == 2
    metrics.forget("demo", "1")
    assert metrics.find("demo", "1") == []
    for version in ("10", "9", "2"):
        metrics.track("demo", version)
    assert [one.version for one in metrics.find(None, None)] == ["2", "9", "10"]
    assert [one.version for one in metrics.find("demo", "9")] == ["9"]


def test_a_model_may_be_called_as_a_count_is():
    metrics = Metrics()
    metrics.track("last_inference_ms", "1").answered(2, 1, 1, 1, now_ms=5)
    whole = Metrics.summed([metrics.counts(), metrics.counts()], {}, 0)
    (one,) = whole.document("last_inference_ms", "1")["model_stats"]
    assert (one["inference_count"], one["last_inference"]) == (4, 5)


def test_a_server_of_several_processes_is_the_sum_of_those_that_run_and_those_that_ended():
    first, second, ended = (json.loads(json.dumps(counted(Metrics()).counts())) for _ in range(3))
    del ended["now"]
    ended["models"]["demo"]["1"]["last_inference_ms"] = 4
    whole = Metrics.summed([ended, first, second], {}, 7)
    (one,) = whole.find("demo", "1")
    assert (one.depth(), one.drift(), one.memory) == (8, {"rows": 12}, 2000), "of those that run"
    one.drift = dict
    document = one.document()
    assert (document["inference_count"], document["execution_count"], document["last_inference"]) == (15, 9, 9)
    assert [row["compute_infer"]["ns"] for row in document["batch_stats"]] == [21, 450]
    found = samples(whole)
    assert found["headstart_request_errors_total demo 503 1"] == 6
    assert (found["headstart_request_errors_total  401 "], found["headstart_request_errors_total  404 "]) == (6, 3)
    assert abs(found["headstart_request_duration_seconds_sum demo compute 1"] - 0.21) < 1e-9
    assert found["headstart_batch_rows_bucket 1.0 demo 1"] == 3
    assert (found["headstart_model_loads_total refused"], found["headstart_unknown_model_requests_total"]) == (6, 9)
    assert found["headstart_worker_restarts_total"] == 7


def test_a_version_that_replaces_one_of_other_features_in_some_processes_is_counted():
    def of_process(*offset: float, rows: int) -> dict[str, object]:
        metrics = Metrics()
        state = {"rows": rows, "worth": 2.0, "offset": list(offset), "training_noise": 0.5}
        metrics.track("demo", "1").drift = lambda: state if offset else {}
        return metrics.counts()

    old, new, none = of_process(1, 2, rows=40), of_process(1, 2, 3, rows=50), of_process(rows=0)
    for counts, rows, offset in (([old, new, none], 50, [1, 2, 3]), ([none, old, old], 80, [2, 4])):
        whole = Metrics.summed(counts, {}, 0)
        (one,) = whole.find("demo", "1")
        assert (one.drift()["rows"], one.drift()["offset"]) == (rows, offset)
        assert samples(whole)["headstart_drift_rows_total demo 1"] == rows


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_is_refused_is_counted_once_by_its_status(tmp_path: Path, workers: int):
    root, token = tmp_path / "models", tmp_path / "token"
    write_package(root / "demo" / "1", 1)
    token.write_text("t")
    server = Logged(root, token_file=token, workers=workers)
    client = RawClient(server.port)
    options = {"Authorization": "Bearer t"}
    for expected, method, path, body, headers in (
        (400, "POST", PATH, b"{", options),
        (400, "POST", PATH, b'{"inputs":[]}', options),
        (415, "POST", "/v1/predict", b"x", options | {"Content-Type": "text/plain"}),
        (404, "GET", "/nope", b"", options),
        (404, "GET", "/nope", b"", options),
        (404, "POST", "/v2/models/absent/infer", BODY, options | {"Inference_Header_Content_Length": LENGTH}),
        (400, "POST", PATH, STRANGE, options),  # by the scheduler, as the version's
        (405, "GET", PATH, b"", options),
        (401, "GET", "/v2", b"", {}),  # and the connection is closed
    ):
        assert client.ask(method, path, body, **headers).status == expected, path
    client.socket.close()
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        for method, metadata in (
            ("ModelInfer", []),
            ("ModelInfer", [TOKEN]),
            ("Nope", [TOKEN]),
            ("ServerLive", [TOKEN]),
        ):
            with contextlib.suppress(grpc.RpcError):
                channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"", metadata=metadata, timeout=10)
    client = RawClient(server.port)
    text = client.ask("GET", "/metrics", **options).body.decode()
    client.socket.close()
    server.stop()
    (errors,) = (one for one in text_string_to_metric_families(text) if one.name == "headstart_request_errors")
    assert {
        (one.labels["model"], one.labels["version"], one.labels["status"]): one.value for one in errors.samples
    } == {
        ("demo", "1", "400"): 1,
        ("", "", "400"): 3,  # gRPC's ModelInfer without a tensor is one
        ("", "", "401"): 2,
        ("", "", "404"): 4,
        ("", "", "405"): 1,
        ("", "", "415"): 1,
    }

"""The service in Triton's forms, read by Triton's own client and messages; and the command that serves it."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.http as triton
from google.protobuf import json_format
from PIL import Image
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from headstart.serving.device import _IDENTITY, CUDA, Device, check, open_on
from headstart.serving.errors import PackageError
from headstart.serving.package import MODEL
from headstart.serving.server.command import serve
from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.loading import Scheduling
from headstart.serving.server.models.policy import Policy
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.processes import supervisor
from headstart.serving.server.service import Service
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.watching.statistics import STAGES
from tests.serving.server.graphs import LABELS, classifier, identities, logits, write_package
from tests.serving.server.models.test_repository import IMAGE, NEVER, Graph, infer, looks, served_by, serving
from tests.serving.server.scheduling.test_batching import on_a_loop


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_package(tmp_path / "models" / "demo" / "1", 1)
    write_package(tmp_path / "models" / "demo" / "2", 2)
    write_package(tmp_path / "models" / "other" / "1", 1)
    return tmp_path / "models"


@on_a_loop
async def test_metadata_are_tritons_messages(root: Path):
    async with serving(root) as service:
        server = json_format.ParseDict(service.server_metadata(), service_pb2.ServerMetadataResponse())
        assert server.name == "headstart"
        assert re.fullmatch(r"\d+\.\d+.*", server.version)
        assert {"binary_tensor_data", "classification", "statistics", "model_repository"} <= set(server.extensions)
        for version in (None, "2"):
            document = service.model_metadata("demo", version)
            model = json_format.ParseDict(document, service_pb2.ModelMetadataResponse())
            assert (model.name, model.platform, list(model.versions)) == ("demo", "onnxruntime_onnx", ["2"])
            assert [(one.name, one.datatype, list(one.shape)) for one in model.inputs] == [
                ("images", "UINT8", [-1, -1, -1, 3]),
                ("encoded_images", "BYTES", [-1]),
            ]
            assert [(one.name, one.datatype, list(one.shape)) for one in model.outputs] == [
                ("logits", "FP32", [-1, 3]),
                ("probabilities", "FP32", [-1, 3]),
            ]


@on_a_loop
async def test_the_configuration_is_tritons_message_without_the_batch_in_its_sizes(root: Path):
    async with serving(root, scheduling=Scheduling(max_batch=8, max_delay_s=0.002, max_queue=11)) as service:
        config = json_format.ParseDict(service.model_config("demo", None), model_config_pb2.ModelConfig())
        assert (config.name, config.platform, config.backend) == ("demo", "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == 8
        assert [(one.name, one.data_type, list(one.dims), one.optional) for one in config.input] == [
            ("images", model_config_pb2.TYPE_UINT8, [-1, -1, 3], False),
            ("encoded_images", model_config_pb2.TYPE_STRING, [], True),
        ]
        assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [
            ("logits", model_config_pb2.TYPE_FP32, [3]),
            ("probabilities", model_config_pb2.TYPE_FP32, [3]),
        ]
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        assert config.version_policy.latest.num_versions == 1
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
        assert config.parameters["max_queue"].string_value == "11"
        assert config.default_model_filename == MODEL
    async with serving(root, policy=Policy.parse("canary:1:10%")) as service:
        config = json_format.ParseDict(service.model_config("demo", "1"), model_config_pb2.ModelConfig())
        assert list(config.version_policy.specific.versions) == [1, 2]


@on_a_loop
async def test_a_model_of_strings_and_of_no_batch_is_described_too(root: Path):
    loader = Graph()
    loader.graph = identities({"s": 8, "f": 1})
    loader.max_batch = 1
    async with serving(root, loader=loader) as service:
        document = service.model_config("demo", None)
        config = json_format.ParseDict(document, model_config_pb2.ModelConfig())
        assert config.max_batch_size == 0
        assert "dynamic_batching" not in document
        assert [(one.data_type, list(one.dims)) for one in config.input] == [
            (model_config_pb2.TYPE_STRING, [-1, 2]),
            (model_config_pb2.TYPE_FP32, [-1, 2]),
        ]
        assert service.model_metadata("demo", None)["inputs"][0] == {
            "name": "in_s",
            "datatype": "BYTES",
            "shape": [-1, 2],
        }


def files(*heights: int) -> np.ndarray:
    """PNGs of these heights, as the tensor of an input."""
    found = []
    for height in heights:
        file = io.BytesIO()
        Image.fromarray(np.zeros((height, 6, 3), np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return np.array(found, dtype=object)


@on_a_loop
async def test_files_that_are_refused_before_they_run_count_as_failures_once(root: Path):
    async with serving(root) as service:
        with pytest.raises(ServeError) as refused:
            await infer(service, inputs={"encoded_images": np.array([b"no image"], dtype=object)})
        assert refused.value.status == 400
        statistics = service.repository.find("demo", None).scheduler.statistics
        assert (statistics.fail, statistics.errors) == (1, {400: 1})
        with pytest.raises(ServeError):  # by the scheduler, once the file was decoded
            await infer(service, inputs={"encoded_images": files(4)}, deadline=0.0)
        assert (statistics.fail, statistics.errors) == (2, {400: 1, 504: 1})


@on_a_loop
async def test_files_of_several_sizes_are_one_request_however_it_ends(root: Path):
    async with serving(root) as service:
        scheduler = service.repository.find("demo", None).scheduler
        statistics = scheduler.statistics
        response = await infer(service, inputs={"encoded_images": files(4, 5, 4, 6)})
        await scheduler.drained()
        assert (statistics.success, statistics.rows, statistics.executions, statistics.fail) == (1, 4, 3, 0)
        assert {stage: sum(one.counts) for stage, one in statistics.stages.items()} == dict.fromkeys(STAGES, 1)
        sums = {stage: one.total for stage, one in statistics.stages.items()}
        assert sums["images"] * 1e9 == pytest.approx(response.timings_ns["images"])
        assert sums["images"] > 0
        assert sums["total"] >= sums["images"] + sums["compute"]
        assert statistics.success_ns >= sum(response.timings_ns.values())
        with pytest.raises(ServeError):
            await infer(service, inputs={"encoded_images": files(4, 5, 6)}, deadline=0.0)
        assert statistics.errors == {504: 1}
        going = asyncio.ensure_future(infer(service, inputs={"encoded_images": files(4, 5, 6)}))
        await asyncio.sleep(0)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        await scheduler.drained()
        assert (statistics.success, statistics.fail, statistics.errors) == (1, 2, {504: 1, 499: 1})
        await infer(service)  # pixels, which have no such stage
        await scheduler.drained()
        assert (sum(statistics.stages["images"].counts), statistics.success) == (1, 2)


@on_a_loop
async def test_statistics_are_tritons_message_and_count(root: Path):
    async with serving(root) as service:
        for _ in range(3):
            await infer(service)
        with pytest.raises(ServeError):
            await infer(service, inputs={})
        document = service.statistics("demo", None)
        (model,) = json_format.ParseDict(document, service_pb2.ModelStatisticsResponse()).model_stats
        assert (model.name, model.version) == ("demo", "2")
        assert (model.inference_count, model.execution_count) == (6, 3)
        assert (model.inference_stats.success.count, model.inference_stats.fail.count) == (3, 1)
        assert model.inference_stats.compute_infer.ns > 0
        assert [(one.batch_size, one.compute_infer.count) for one in model.batch_stats] == [(2, 3)]
        everything = service.statistics(None, None)["model_stats"]
        assert [(one["name"], one["version"]) for one in everything] == [("demo", "2"), ("other", "1")]
        assert service.statistics("demo", "2") == document
        assert b'headstart_requests_answered_total{model="demo",version="2"} 3.0' in service.metrics_text()


@on_a_loop
async def test_the_index_is_tritons_message_and_can_be_of_the_ready_alone(root: Path):
    async with serving(root) as service:
        document = {"models": service.repository_index(False)}
        index = json_format.ParseDict(document, service_pb2.RepositoryIndexResponse()).models
        assert [(one.name, one.version, one.state) for one in index] == [
            ("demo", "1", "UNAVAILABLE"),
            ("demo", "2", "READY"),
            ("other", "1", "READY"),
        ]
        assert [(row["name"], row["version"]) for row in service.repository_index(True)] == [
            ("demo", "2"),
            ("other", "1"),
        ]


@pytest.mark.parametrize("question", ["model_metadata", "model_config", "statistics"])
@on_a_loop
async def test_what_is_unknown_is_404_and_what_is_not_ready_is_503(root: Path, question: str):
    (root / "half" / "1").mkdir(parents=True)
    async with serving(root) as service:
        for name, version, status in (
            ("absent", None, 404),
            ("demo", "9", 404),
            ("demo", "x", 404),
            ("demo", "1", 404),  # there, and not chosen
            ("half", None, 503),
            ("half", "1", 503),
            ("half", "2", 404),
        ):
            with pytest.raises(ServeError) as caught:
                getattr(service, question)(name, version)
            assert caught.value.status == status, (name, version)
            assert str(root) not in caught.value.message
            assert not service.model_ready(name, version)
        assert service.model_ready("demo", None)
        assert service.model_ready("demo", "2")


@on_a_loop
async def test_loading_takes_no_configuration_and_no_files(root: Path):
    async with serving(root) as service:
        for parameters in ({"config": "{}"}, {"file:1/model.onnx": "AAAA"}):
            with pytest.raises(ServeError, match="load takes no parameters") as caught:
                await service.load("demo", parameters)
            assert caught.value.status == 400
        await service.load("demo", {})
        assert await served_by(service) == "2"


@on_a_loop
async def test_the_card_says_what_a_reader_wants_to_know(root: Path):
    async with serving(root) as service:
        card = json.loads(json.dumps(service.card("demo")))
        assert card["labels"] == list(LABELS)
        assert (card["name"], card["version"], card["task"]) == ("demo", "2", "image classification")
        assert card["licence"] == "not stated"
        assert card["latency"]["p50_ms"] == 1.0
        assert card["parity"]["tolerance"] == 1e-3
        with pytest.raises(ServeError):
            service.card("absent")


@on_a_loop
async def test_labels_are_those_of_the_model_that_answered_also_where_it_was_replaced_in_place(root: Path):
    labels = ("x", "y", "z")
    write_package(root / "demo" / "3", 3, graph=classifier(3, turns=10_000))  # which runs in a thread
    async with serving(root, poll_s=NEVER) as service:
        model, gate = service.repository.find("demo", None).model, threading.Event()
        run = model.run
        model.run = lambda feed, outputs: [gate.wait(10), run(feed, outputs)][1]
        asked = asyncio.create_task(infer(service))
        await asyncio.sleep(0)
        shutil.rmtree(root / "demo" / "3")
        write_package(root / "demo" / "3", 3, labels=labels)
        await looks(service)
        assert service.card("demo")["labels"] == list(labels)
        gate.set()
        assert (await asked).labels == LABELS
        assert (await infer(service)).labels == labels


class Server:
    """`serve` in a process of its own."""

    def __init__(self, root: Path, **options: Any) -> None:
        code = (
            "import sys, json; from pathlib import Path; from headstart.serving.server.command import serve\n"
            "o = json.loads(sys.argv[2]); say = lambda line: print(line, flush=True)\n"
            "code = serve(Path(sys.argv[1]), port=0, threads=1, say=say, **o)\n"
            "print(sorted({'torch', 'ray', 'onnx', 'typer', 'pydantic'} & set(sys.modules)), flush=True)\n"
            "sys.exit(code)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(root), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.match(r"ready: http://(127\.0\.0\.1:\d+) ", self.line)
        assert found, (self.line, self.process.stderr and self.process.stderr.read())
        self.address = found[1]

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=20)
        return self.process.returncode, out


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    started = Server(root, policy=["latest", "other=pinned:1"])
    yield started
    started.process.kill()
    started.process.wait()


def test_neither_a_closed_stdin_nor_a_stdout_on_a_full_disk_ends_the_server(root: Path):
    code = (
        "import os, sys; from pathlib import Path; from headstart.serving.server.command import serve\n"
        "sys.exit(serve(Path(sys.argv[1]), port=0, threads=1, say=lambda line: os.write(1, line.encode())))"
    )
    command = ["sh", "-c", 'exec "$@" <&- >/dev/full', "sh", sys.executable, "-c", code, str(root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "ready: " in line)
        assert line.endswith("stdout does not take this line (No space left on device)\n")
        process.terminate()
        process.stderr.read()
        assert process.wait(20) == 0


def test_tritons_client_works_with_the_served_repository(server: Server, root: Path):
    assert f"serves 2 of 3 versions in {root}" in server.line
    client = triton.InferenceServerClient(server.address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    assert not client.is_model_ready("demo", "1")
    tensor = triton.InferInput("images", list(IMAGE.shape), "UINT8").set_data_from_numpy(IMAGE)
    for binary in (True, False):
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary)]
        result = client.infer("demo", [tensor], outputs=outputs)
        assert result.get_response()["model_version"] == "2"
        np.testing.assert_allclose(result.as_numpy("logits"), logits(IMAGE, 2), rtol=1e-6)
    best = client.infer("demo", [tensor], outputs=[triton.InferRequestedOutput("logits", class_count=1)])
    assert best.as_numpy("logits")[0, 0].decode().split(":")[1:] == ["2", "blue"]
    assert {row["name"] for row in client.get_model_repository_index()} == {"demo", "other"}
    client.unload_model("other")
    assert not client.is_model_ready("other")
    client.load_model("other")
    assert client.is_model_ready("other")
    with pytest.raises(InferenceServerException, match="takes no parameters"):
        client.load_model("demo", config="{}")
    with pytest.raises(InferenceServerException, match="there is no model 'absent'; POST /v2/repository/index lists"):
        client.get_model_metadata("absent")
    write_package(root / "demo" / "3", 3)
    client.load_model("demo")
    assert client.get_model_metadata("demo")["versions"] == ["3"]
    (statistics,) = client.get_inference_statistics("demo")["model_stats"]
    assert (statistics["version"], statistics["inference_count"]) == ("3", 0)
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        assert 'headstart_queue_depth{model="demo",version="3"} 0.0' in answer.read().decode()
    client.close()
    code, out = server.stop()
    assert code == 0
    assert out.splitlines() == ["[]"]  # neither torch nor ray, onnx, typer or pydantic was imported


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": ["newest"]}, "'newest' is not known; accepted: latest"),
        ({"policy": ["a/b=latest"]}, "names no model"),
        ({"policy": ["=latest"]}, "names no model"),
        ({"policy": ["demo=pinned:1", "demo=canary:2:10%"]}, "'demo=canary:2:10%' is the second of demo; give one"),
        ({"policy": ["latest", "pinned:1"]}, "'pinned:1' is the second of all models; give one"),
        ({"max_delay_ms": -1}, "max_delay_ms is -1"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000; accepted: 1 to "),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 100_000}, "workers is 100000 with CPUExecutionProvider; accepted: 1 to "),
        ({"provider": "cpu"}, "'cpu' is not in this ONNX Runtime"),
        ({"port": 99999}, "port is 99999"),
        ({"token_file": Path("absent")}, "absent cannot be read"),
        ({"tls_cert": Path("absent")}, "absent cannot be read"),
        ({"tls_key": Path("absent")}, "tls_key is given without tls_cert"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_end_with_a_sentence_and_exit_code_2(root: Path, options: dict[str, Any], words: str):
    with pytest.raises(PackageError, match=re.escape(words)) as caught:
        serve(root, **options)
    assert caught.value.exit_code == 2


def test_every_option_reaches_what_it_is_for(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    class Kept:
        mirror = None

        def __init__(self, folder: Path, **options: Any) -> None:
            given.update(options, folder=folder)

    monkeypatch.setattr("headstart.serving.server.models.repository.Repository", Kept)
    monkeypatch.setattr("headstart.serving.server.service.Service", lambda kept: kept)

    def run(settings: HttpSettings, service: Any, **rest: Any) -> int:
        given.update(rest, settings=settings)
        return 5

    monkeypatch.setattr("headstart.serving.server.main.run", run)
    (tmp_path / "token").write_text("secret")
    code = serve(
        root, host="localhost", port=4001, grpc_port=4002, token_file=tmp_path / "token", threads=1, max_queue=7,
        max_batch=3, max_delay_ms=250, policy=["pinned:4", "demo=pinned:2"], public_key=tmp_path / "key", drift=0.5,
        max_memory="3M", access_log=True, open_health=True, idle_timeout=310.5,
    )  # fmt: skip
    assert code == 5
    settings = given["settings"]
    assert settings.open_health
    assert (settings.idle_timeout, HttpSettings().idle_timeout) == (310.5, 75)
    assert not HttpSettings().open_health
    assert (settings.host, settings.port, settings.grpc_port, settings.token) == ("localhost", 4001, 4002, "secret")
    assert not settings.reuse_port
    assert given["scheduling"] == Scheduling(max_batch=3, max_delay_s=0.25, max_queue=7)
    assert (given["folder"], given["threads"], given["provider"]) == (root, 1, "CPUExecutionProvider")
    assert (given["policy"], given["policies"]) == (Policy.parse("pinned:4"), {"demo": Policy.parse("pinned:2")})
    assert (given["public_key"], given["drift"], given["max_memory"]) == (tmp_path / "key", 0.5, 3 << 20)
    assert given["watch"] is not None


def test_workers_have_their_shares_of_the_memory_and_of_the_cores(root: Path, monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(supervisor, "supervise", lambda options, workers, *rest: given.append((options, workers)) or 0)
        assert serve(root, workers=2, max_memory="4G", public_key=None, drift=0.25) == 0
    ((options, workers),) = given
    assert (workers, options["max_memory"], options["drift"]) == (2, str(2 << 30), 0.25)

    class Stand:
        def __init__(self, options: Any, *rest: Any) -> None:
            given.append(options)

        async def run(self) -> int:
            return 0

    monkeypatch.setattr(supervisor, "Supervisor", Stand)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(7))
    for count, threads in ((2, 3), (7, 1), (8, 1)):
        assert supervisor.supervise({**options, "port": 0}, count, print) == 0
        assert given[-1]["threads"] == threads
        assert given[-1]["port"] > 0


def test_a_repository_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(PackageError, match="is no folder; make it"):
        serve(tmp_path / "absent")


@pytest.mark.parametrize(
    ("copy_to", "options", "words"),
    [
        ("", [], "there are no packages in {root}; copy one to NAME/1 there"),
        (".", [], "{root} is a package itself; copy it to FOLDER/NAME/1, and serve FOLDER"),
        ("1", [], "1: the package lies in 1/; copy it to 1/1/, or serve the folder above"),
        ("demo/1", ["--policy", "pinned:7"], "demo: version 7 of its policy is not there; there are 1"),
    ],
)
def test_a_server_that_serves_nothing_says_why(tmp_path: Path, copy_to: str, options: list[str], words: str):
    root = tmp_path / "served"
    if copy_to:
        write_package(root / copy_to, 1)
    else:
        root.mkdir()
    command = [sys.executable, "-m", "headstart.cluster.cli", "serve", str(root), "--port", "0", "--threads", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert " serves 0 of " in process.stdout.readline()
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert re.search(rf"WARNING headstart\.serving\.server\.[a-z.]+: {re.escape(words.format(root=root))}\n", log)


@pytest.mark.parametrize("provider", [CUDA, "TensorrtExecutionProvider"])
def test_a_provider_that_does_not_load_is_told_before_anything_is_served(
    root: Path, provider: str, capfd: pytest.CaptureFixture[str]
):
    try:
        check(Device(provider=provider, threads=1))
    except PackageError:
        pass
    else:
        pytest.skip(f"{provider} loads on this machine")
    capfd.readouterr()
    with pytest.raises(PackageError, match=f"{provider}.*CPUExecutionProvider") as caught:
        serve(root, port=0, provider=provider)
    assert caught.value.exit_code == 2
    assert capfd.readouterr().out == ""


def test_the_graph_that_tries_a_provider_is_one_identity():
    (found,) = onnx.load_from_string(_IDENTITY).graph.node
    assert found.op_type == "Identity"
    (given,) = open_on(Device(threads=1), _IDENTITY).run(None, {"x": np.float32([7])})
    assert given.tolist() == [7]


def test_a_port_in_use_is_told(server: Server, root: Path):
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(PackageError, match="is in use") as caught:
        serve(root, port=port)
    assert caught.value.exit_code == 2


def test_a_session_is_set_up_on_purpose(root: Path):
    async def options() -> onnxruntime.SessionOptions:
        service = Service(Repository(root, threads=1))
        await service.start()
        session = service.repository.find("demo", None).model._compute.func.__self__
        await service.stop()
        return session.get_session_options()

    found = asyncio.run(options())
    assert found.intra_op_num_threads == 1
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == "0"

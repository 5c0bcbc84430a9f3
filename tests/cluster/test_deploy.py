"""Beyond one machine: the Ray Serve application runs and answers as `headstart serve` does; KServe's manifest holds."""

import asyncio
import importlib
import inspect
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from headstart.cluster.connect import set_environment
from headstart.serving.runtime import Predictor
from headstart.serving.server.command import open_repository
from headstart.serving.server.errors import StartError
from headstart.serving.server.settings import HttpSettings
from tests.serving.server.graphs import write_package
from tests.serving.server.tiny_service import infer_body, wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), np.uint8)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def ray_environment() -> None:
    """Ray reads its environment, the token too, when it is first imported; in whichever test that is."""
    set_environment()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_package(folder / "demo" / "1", 1)
    return folder


def serve_config() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "serve.yaml").read_text()))


def test_the_configuration_is_one_of_ray_serve_and_names_what_is_there():
    schema = importlib.import_module("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(serve_config())
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    loaded = importlib.import_module(module)
    built = getattr(loaded, name)(application.args)
    (deployment,) = application.deployments
    assert deployment.name == loaded.Headstart.name == built._bound_deployment.name
    assert {*inspect.signature(open_repository).parameters, "token_file", "open_health"} == loaded._OPTIONS
    # A setting that is said twice is the same in both places.
    options = deployment.model_dump(exclude_unset=True)
    for setting in ("max_ongoing_requests", "health_check_period_s", "health_check_timeout_s"):
        assert options[setting] == getattr(loaded.Headstart._deployment_config, setting)
    assert options["graceful_shutdown_timeout_s"] >= loaded._DRAIN_S + 5


@pytest.mark.parametrize(
    ("args", "words"),
    [({}, "repository is missing"), ({"repository": "/m", "replicas": 2}, "'replicas' is no option")],
)
def test_arguments_that_cannot_be_are_refused(args: dict[str, Any], words: str):
    app = importlib.import_module("headstart.cluster.deploy.app").app
    with pytest.raises(StartError, match=f"{words}; accepted in args: .*repository"):
        app(args)
    with pytest.raises(StartError, match="open_health is 'false'; accepted: true and false"):
        app({"repository": "/m", "open_health": "false"})


# KServe -----------------------------------------------------------------------------------------------------------


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
FORMAT = {"name": TEXT, "version": TEXT}
HTTP_GET = closed({"path": {"type": "string", "pattern": "^/"}, "port": {"type": ["integer", "string"]}}, "port")
PROBE = closed({"httpGet": HTTP_GET, "periodSeconds": NUMBER, "failureThreshold": NUMBER})
CONTAINER = closed(
    {
        "name": TEXT,
        "image": TEXT,
        "args": {"type": "array", "items": TEXT},
        "env": {"type": "array", "items": closed({"name": TEXT, "value": TEXT}, "name")},
        "ports": {
            "type": "array",
            "items": closed({"name": TEXT, "containerPort": NUMBER, "protocol": TEXT}, "containerPort"),
        },
        "startupProbe": PROBE,
        "livenessProbe": PROBE,
        "readinessProbe": PROBE,
        "lifecycle": closed({"preStop": closed({"exec": closed({"command": {"type": "array", "items": TEXT}})})}),
        "securityContext": {"type": "object"},
        "resources": closed({"requests": TEXTS, "limits": TEXTS}),
        "volumeMounts": {
            "type": "array",
            "items": closed({"name": TEXT, "mountPath": TEXT}, "name", "mountPath"),
        },
    },
    "name",
)
# The fields that our manifest uses, with the types that KServe's definitions give them. The manifest was also held
# against those definitions themselves (kserve/kserve aaac4e29, unknown fields refused), which are 2 MB.
RUNTIME = closed(
    {
        "annotations": TEXTS,
        "supportedModelFormats": {
            "type": "array",
            "items": closed({**FORMAT, "autoSelect": FLAG, "priority": NUMBER}, "name"),
        },
        "protocolVersions": {"type": "array", "items": TEXT},
        "multiModel": FLAG,
        "containers": {"type": "array", "items": CONTAINER},
        "volumes": {"type": "array", "items": closed({"name": TEXT, "emptyDir": {"type": "object"}}, "name")},
    },
    "containers",
)
SERVICE = closed(
    {
        "predictor": closed(
            {
                "minReplicas": NUMBER,
                "terminationGracePeriodSeconds": NUMBER,
                "model": closed(
                    {
                        "runtime": TEXT,
                        "modelFormat": closed(FORMAT, "name"),
                        "protocolVersion": TEXT,
                        "storageUri": TEXT,
                    },
                    "modelFormat",
                ),
            }
        )
    },
    "predictor",
)


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())}


def test_a_body_is_read_no_further_than_it_is_accepted():
    from starlette.requests import Request

    module = importlib.import_module("headstart.cluster.deploy.app")
    parts = [{"type": "http.request", "body": b"12345", "more_body": True}] * 9

    async def receive() -> dict[str, Any]:
        return parts.pop()

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    assert asyncio.run(module._read(request, 12)) == b"123451234512345"
    assert len(parts) == 6


def test_the_manifests_are_what_kserve_takes():
    found = manifests()
    assert {kind: one["apiVersion"] for kind, one in found.items()} == {
        "ServingRuntime": "serving.kserve.io/v1alpha1",
        "InferenceService": "serving.kserve.io/v1beta1",
    }
    for kind, schema in (("ServingRuntime", RUNTIME), ("InferenceService", SERVICE)):
        jsonschema.validate(found[kind]["spec"], schema)
    runtime, model = found["ServingRuntime"], found["InferenceService"]["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container", "the name that KServe looks for"
    (_, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
    grace = found["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > int(seconds) + HttpSettings.drain_timeout
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in runtime["spec"]["volumes"]}


def test_the_container_serves_and_its_probes_answer(models: Path, tmp_path: Path):
    found = manifests()
    (container,) = found["ServingRuntime"]["spec"]["containers"]
    # As KServe does before it starts the container: the service's name in the place of {{.Name}}.
    container = json.loads(json.dumps(container).replace("{{.Name}}", found["InferenceService"]["metadata"]["name"]))
    port, grpc_port = free_port(), free_port()
    replaced = {"/mnt/models": str(models), "--host=0.0.0.0": "--host=127.0.0.1"}
    replaced |= {"--port=8080": f"--port={port}", "--grpc-port=9000": f"--grpc-port={grpc_port}"}
    assert set(replaced) <= set(container["args"])
    environment = {one["name"]: one["value"] for one in container["env"]}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert environment == {"TMPDIR": "/scratch"}
    command = [sys.executable, "-m", "headstart.cluster.cli", *(replaced.get(one, one) for one in container["args"])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"TMPDIR": str(scratch), "PATH": "/usr/bin:/bin"}
    ) as server:
        try:
            assert server.stdout is not None
            assert "serves 1 of 1" in server.stdout.readline()
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                get = container[probe]["httpGet"]
                assert get["port"] == container["ports"][0]["containerPort"] == 8080
                assert urllib.request.urlopen(f"http://127.0.0.1:{port}{get['path']}", timeout=5).status == 200
            path = found["ServingRuntime"]["spec"]["annotations"]["prometheus.kserve.io/path"]
            assert b"headstart_" in urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read()
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()


def test_the_image_copies_what_is_there_and_starts_what_exists():
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    sources = {
        source for word, rest in lines if word == "COPY" and "--from" not in rest for source in shlex.split(rest)[:-1]
    }
    assert not [source for source in sources if not (ROOT / source).exists()]
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert set(packed.values()) <= sources, "the wheel needs every room"
    words = dict(lines)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", words["USER"]), "not root, as a number"
    command = json.loads(words["CMD"])
    health = json.loads(words["HEALTHCHECK"].partition("CMD ")[2])
    compile(health[2], "HEALTHCHECK", "exec")
    port = next(one.partition("=")[2] for one in command if one.startswith("--port="))
    assert f"('127.0.0.1', {port})" in health[2]
    assert port in words["EXPOSE"].split()


# Ray Serve --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(models: Path) -> Iterator[tuple[str, Any]]:
    """The application of serve.yaml on a Ray of its own, with two replicas: its address, and the module of it."""
    ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    module = importlib.import_module("headstart.cluster.deploy.app")
    config = serve_config()["applications"][0]
    port = free_port()
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {**config["args"], "repository": str(models)}
        deployment = module.Headstart.options(num_replicas=2)
        serve.run(deployment.bind(arguments), name="headstart", route_prefix=config["route_prefix"])
        yield f"127.0.0.1:{port}", deployment.bind(arguments)
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://{address}{path}", data=body, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


JSON_BODY = json.dumps(
    {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [*IMAGES.shape], "data": IMAGES.ravel().tolist()}]}
).encode()
BINARY_BODY, LENGTH = infer_body(IMAGES, names=("images",))  # type: ignore[arg-type]


@pytest.mark.slow
def test_ray_serve_answers_as_headstart_serve_does(running: tuple[str, Any], models: Path):
    address, _ = running
    import tritonclient.http as triton

    client = triton.InferenceServerClient(address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo", "1")
    tensor = triton.InferInput("images", [*IMAGES.shape], "UINT8")
    tensor.set_data_from_numpy(IMAGES)
    expected = Predictor(models / "demo" / "1", threads=1).predict(IMAGES)
    found = client.infer("demo", [tensor])
    for name, array in zip(("logits", "probabilities"), expected, strict=True):
        assert np.array_equal(found.as_numpy(name), array)

    command = [sys.executable, "-m", "headstart.cluster.cli", "serve", str(models), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            match = re.search(r"http://(127\.0\.0\.1:\d+)", server.stdout.readline())
            assert match
            ours = match[1]
            requests: list[tuple[str, bytes | None, dict[str, str]]] = [
                ("/v2", None, {}),
                ("/", None, {}),
                ("/v2/models/demo", None, {}),
                ("/v2/models/%64emo/versions/1/config", None, {}),
                ("/v2/models/demo/infer", JSON_BODY, {}),
                ("/v2/models/demo/infer", BINARY_BODY, {"Inference_Header_Content_Length": str(LENGTH)}),
                ("/v2/models/demo/infer", b"{", {}),
                ("/v2/models/none/infer", JSON_BODY, {}),
                ("/v2/models/..%2f..%2fetc/ready", None, {}),
                ("/v2/repository/index", b"", {}),
                ("/nothing", None, {}),
            ]
            for path, body, headers in requests:
                theirs, here = ask(address, path, body, **headers), ask(ours, path, body, **headers)
                assert (theirs[0], theirs[2]) == (here[0], here[2]), path
                for name in ("Content-Type", "Inference-Header-Content-Length", "Content-Length"):
                    lower = {key.lower(): value for key, value in theirs[1].items()}
                    assert lower.get(name.lower()) == here[1].get(name), (path, name)
        finally:
            server.terminate()
            server.wait(30)
    status, _, body = ask(address, "/v2/repository/models/demo/unload", b"{}")
    assert status == 400
    assert b"one of several replicas" in body


@pytest.mark.slow
def test_ray_serve_keeps_to_a_token(running: tuple[str, Any], models: Path, tmp_path: Path):
    address, _ = running
    (tmp_path / "token").write_text("s3cret")
    serve, module = (importlib.import_module(name) for name in ("ray.serve", "headstart.cluster.deploy.app"))
    arguments = {"repository": str(models), "token_file": str(tmp_path / "token"), "open_health": True}
    serve.run(module.Headstart.options(num_replicas=1).bind(arguments), name="locked", route_prefix="/locked")
    try:
        assert ask(address, "/locked/v2")[0] == 401
        assert ask(address, "/locked/v2", Authorization="Bearer s3cret")[0] == 200
        assert ask(address, "/locked/v2/health/ready")[0] == 200
    finally:
        serve.delete("locked")


@pytest.mark.slow
def test_replicas_follow_the_repository_and_leave_without_a_failed_request(running: tuple[str, Any], models: Path):
    from ray import serve

    address, application = running
    statuses: list[int] = []
    versions: set[str] = set()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, _, body = ask(address, "/v2/models/demo/infer", JSON_BODY)
            statuses.append(status)
            if status == 200:
                versions.add(json.loads(body)["model_version"])

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        staged = write_package(models.parent / "staged", 2)
        shutil.copytree(staged, models / "demo" / "2")
        wait_until(lambda: "2" in versions, 20)
        time.sleep(2)
        versions.clear()
        time.sleep(1)
        assert versions == {"2"}, "every replica has followed"
        deployment = application._bound_deployment.options(num_replicas=1)
        serve.run(deployment.bind(*application._bound_deployment.init_args), name="headstart", route_prefix="/")
        time.sleep(3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    running_replicas = serve.status().applications["headstart"].deployments["headstart"].replica_states
    assert {str(getattr(state, "value", state)): count for state, count in running_replicas.items()} == {"RUNNING": 1}
    assert len(statuses) > 50
    assert set(statuses) == {200}

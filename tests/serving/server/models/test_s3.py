"""A repository in a bucket: the command, moto's server in the place of S3, and boto3 as the one who deploys."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import tritonclient.http as triton
from moto.server import ThreadedMotoServer

from tests.serving.server.graphs import write_package
from tests.serving.server.models.test_repository import IMAGE

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "a-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket named `models`, and the environment by which all find it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    try:
        store = boto3.resource("s3").Bucket("models")
        store.create()
        yield store
    finally:
        server.stop()


def deploy(bucket: Any, folder: Path, key: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.upload_file(str(path), f"{key}/{path.relative_to(folder).as_posix()}")


def started(url: str, log: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "headstart.cluster.cli", "serve", url, "--port", "0", "--threads", "1", *options]
    with log.open("w") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)


def test_a_bucket_is_served_and_followed(bucket: Any, tmp_path: Path):
    write_package(tmp_path / "1", 1)
    deploy(bucket, tmp_path / "1", "team/demo/1")
    log = tmp_path / "log"
    with started("s3://models/team", log) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert "serves 1 of 1 versions in s3://models/team" in line, log.read_text()
            with triton.InferenceServerClient(line.split("http://")[1].split()[0]) as client:
                pixels = triton.InferInput("images", list(IMAGE.shape), "UINT8").set_data_from_numpy(IMAGE)
                assert client.infer("demo", [pixels]).get_response()["model_version"] == "1"
                write_package(tmp_path / "2", 2)
                deploy(bucket, tmp_path / "2", "team/demo/2")
                deadline = time.monotonic() + 60
                while client.infer("demo", [pixels]).get_response()["model_version"] != "2":
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
        finally:
            server.terminate()
        assert server.wait(30) == 0
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in log.read_text()


def test_a_bucket_that_is_not_there_is_named(bucket: Any, tmp_path: Path):
    log = tmp_path / "log"
    with started("s3://others/team", log) as server:
        assert server.wait(60) == 2
    assert "s3://others/team cannot be listed" in log.read_text()
    assert "credentials" in log.read_text()

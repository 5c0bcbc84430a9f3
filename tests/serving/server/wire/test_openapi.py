"""The OpenAPI document held against a running server by schemathesis: right and wrong requests for every operation."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.serving.server.transport.paths import ROUTES
from headstart.serving.server.wire.openapi import document
from tests.serving.server.graphs import write_package
from tests.serving.server.wire.test_encoded import RunningRepository

# All that apply but `positive_data_acceptance`: the document says neither which inputs a model has nor what a JPEG is.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method"
)
CONFIG = """
[generation]
allow-extra-parameters = false  # HTTP has unknown headers ignored

[checks.not_a_server_error]
# A model that another request has unloaded, and a deadline of 1 ms on a busy machine, are no failures.
expected-statuses = ["2xx", "4xx", "503", "504"]

[phases.stateful]
enabled = false
"""
KNOWN = """
[parameters]
"path.name" = "demo"
"path.version" = "1"
"query.model" = "demo"

[[operations]]
include-operation-id = "unloadModel"
parameters = { "path.name" = "spare" }
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRepository]:
    root = tmp_path_factory.mktemp("models")
    write_package(root / "demo" / "1", mark=1)
    write_package(root / "spare" / "1", mark=2)
    with RunningRepository(root) as one:
        yield one


@pytest.mark.parametrize("names", ["known", "any"])
def test_every_operation_is_as_it_is_described(running: RunningRepository, tmp_path: Path, names: str):
    config, report = tmp_path / "schemathesis.toml", tmp_path / "report"
    config.write_text(CONFIG + (KNOWN if names == "known" else ""))
    url = f"http://{running.url}/openapi.json"
    command = ["--config-file", config, "run", url, "--checks", CHECKS, "--max-examples", 25, "--continue-on-failure"]
    command += ["--generation-deterministic", "--no-color", "--report", "ndjson", "--report-ndjson-path", report]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    seen = statuses(report)
    paths = document()["paths"]
    assert set(seen) == {f"{verb} {path}" for verb, path, _ in ROUTES} - {"GET /openapi.json"}  # it was read before
    for operation, found in seen.items():
        verb, path = operation.split()
        listed = set(paths[path][verb.lower()]["responses"])
        # Of what every operation may be told, these say that a path or a request's line or headers are wrong.
        assert found <= listed | {"400", "404", "431"}, operation
        assert "200" in found or names == "any", operation


def statuses(report: Path) -> dict[str, set[str]]:
    """The statuses that each operation answered with, where it was called by its own method."""
    found = defaultdict(set)
    for line in report.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for one in recorder.get("interactions", {}).values():
            if one["response"] and one["request"]["method"] == recorder["label"].split()[0]:
                found[recorder["label"]].add(str(one["response"]["status_code"]))
    return found

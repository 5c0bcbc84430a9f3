"""The demo, as the README shows it: on real digits, with real weights, and nothing that names the winner in advance."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO_TIMEOUT = 900


def demo(folder: Path, weights: Path) -> Any:
    (folder / "cache").mkdir(exist_ok=True)
    if not (folder / "cache/weights").exists():
        (folder / "cache/weights").symlink_to(weights)
    done = subprocess.run(
        [sys.executable, "-m", "headstart.cluster.cli", "demo", "--json"],
        cwd=folder, env=os.environ | {"HEADSTART_CACHE": str(folder / "cache")},
        capture_output=True, text=True, timeout=DEMO_TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(2 * DEMO_TIMEOUT)
def test_the_demo(tmp_path: Path, shared_weights: Path):
    summary = demo(tmp_path, shared_weights)
    assert json.loads((tmp_path / "runs/demo/summary.json").read_text()) == summary
    assert summary["test"]["num_samples"] == 4400
    assert summary["test"]["accuracy"] >= 0.93
    assert summary["controls"]["scratch"] is not None
    assert summary["controls"]["raw_pixels"] is not None
    low, high = summary["verdict_interval"]
    assert (summary["verdict"] == "transfer") == (low > 0)
    assert low < high
    ranking = {entry["source"]: entry for entry in summary["ranking"]}
    assert len(ranking) == 8
    assert all(entry["available"] for entry in ranking.values())
    assert ranking["demo-digits"]["distance"] < ranking["demo-photographs"]["distance"]
    assert ranking["english-g2"]["licence"] == "not stated"
    distances = json.loads((tmp_path / "runs/demo/ranking.json").read_text())["ranking"]
    near, far = (
        next(entry["distances"] for entry in distances if entry["source"] == f"demo-{name}")
        for name in ("digits", "photographs")
    )
    assert near["euclidean"] < far["euclidean"]
    again = demo(tmp_path, shared_weights)
    assert again["num_backbone_images"] == 0
    assert all(stage["skipped"] for stage in again["stages"].values())
    assert again["test"] == summary["test"]

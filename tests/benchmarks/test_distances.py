"""What a benchmark of distances does on a GPU where something fails: the rest of its rows are kept."""

import csv
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import distances, gpu, rows
from benchmarks.distances import Workload, is_quick, kept_going, measure
from headstart.kernels import naive
from headstart.kernels.energy import energy_distances

SOME = [Workload(num_tasks=3, rows=4, dim=dim, num_target=5) for dim in (2, 3)]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(distances, "FAILED", [])
    return tmp_path


def contenders(target: torch.Tensor, tasks: Any) -> dict[str, Any]:
    return {"headstart": lambda: energy_distances(target, tasks)}


def definition(target: torch.Tensor, tasks: Any) -> torch.Tensor:
    if target.shape[1] == 3:
        raise RuntimeError("out of memory\nand more")
    return naive.energy_distances(target, tasks)


def test_a_workload_that_fails_on_a_gpu_is_named_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch, results: Path
):
    with pytest.raises(RuntimeError, match="out of memory"):
        measure("speed", SOME, contenders, definition, runs=1)
    # What was measured before it is there already.
    (path,) = results.glob("speed-*.csv")
    assert [row["dim"] for row in csv.DictReader(path.open())] == ["2"]
    going = distances.kept_going
    monkeypatch.setattr(distances, "kept_going", lambda what, device: going(what, "cuda"))
    assert [row["dim"] for row in measure("speed", SOME, contenders, definition, runs=1)] == [2]
    (said,) = distances.FAILED
    assert said.startswith("speed, Workload(num_tasks=3, rows=4, dim=3")
    assert said.endswith("RuntimeError: out of memory")


def test_nothing_is_compared_with_ours_where_ours_fails(monkeypatch: pytest.MonkeyPatch):
    def fails() -> torch.Tensor:
        raise RuntimeError("no launch")

    def some(target: torch.Tensor, tasks: Any) -> dict[str, Any]:
        return {"headstart": fails, "other": lambda: energy_distances(target, tasks)}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    target, tasks = SOME[0].make("cpu")
    working = distances._working(some(target, tasks), SOME[0], "cuda")
    assert list(working) == ["other"]
    monkeypatch.setattr(distances, "_working", lambda *_: working)
    for given, speedup in ((some, ""), (lambda *_: working, 1.0)):
        (row,) = measure("speed", SOME[:1], given, definition, runs=1)
        assert (row["contender"], row["speedup"]) == ("other", speedup)


def test_what_is_not_known_on_the_command_line_measures_nothing(monkeypatch: pytest.MonkeyPatch):
    found = []
    for arguments in ([], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["energy", *arguments])
        found.append(is_quick("Speed."))
    assert found == [False, True]
    for argument, code in (("--help", 0), ("--quik", 2)):
        monkeypatch.setattr(sys, "argv", ["energy", argument])
        with pytest.raises(SystemExit) as caught:
            is_quick("Speed.")
        assert caught.value.code == code


def test_no_workload_is_begun_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distances, "deadline", time.monotonic() - 1)
    assert measure("speed", SOME, contenders, definition, runs=1) == []
    assert len(distances.FAILED) == 2
    assert distances.FAILED[0].endswith("the time is up")


def test_a_contender_that_fails_on_a_gpu_takes_no_other_with_it():
    with kept_going("one", "cuda"):
        raise ValueError
    assert distances.FAILED == ["one: ValueError: "]
    with pytest.raises(ValueError, match="two"), kept_going("one", "cpu"):
        raise ValueError("two")


def test_the_short_table_has_a_row_a_workload():
    def row(contender: str, p50: float, dim: int = 2) -> dict[str, Any]:
        common = {"num_tasks": 3, "median_rows": 4, "num_target": 5, "of_floor": "", "max_error": "0"}
        return {**common, "dim": dim, "contender": contender, "p50": p50}

    some = [row("headstart bf16", 2.0), row("headstart fp32", 1.0), row("loop", 3.0), row("headstart", math.pi, dim=7)]
    first, second = gpu.shortened(some)
    assert first["contender"] == "headstart bf16"
    assert first["fastest of ours"] == "headstart fp32 1.00"
    assert first["fastest of others"] == "loop 3.00"
    assert second["fastest of others"] == ""

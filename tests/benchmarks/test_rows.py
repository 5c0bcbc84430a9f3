"""Rows of results: appended under one header, and never mixed with rows of other columns."""

import csv
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import rows


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path


def test_rows_are_appended_with_where_they_come_from(results: Path):
    rows.append_rows("speed", [{"case": "a", "p50": 1.5}])
    path = rows.append_rows("speed", [{"case": "b", "p50": 2.5}, {"case": "c", "p50": 3.5}])
    found = list(csv.DictReader(path.open()))
    assert [row["case"] for row in found] == ["a", "b", "c"]
    assert all(row["torch"] and row["date"] and row["device"] and "commit" in row for row in found)
    assert path.name.startswith("speed-")


def test_a_tree_without_its_history_loses_no_row(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(results))  # where there is no git
    monkeypatch.delenv("HEADSTART_COMMIT", raising=False)
    rows.append_rows("speed", [{"case": "a"}])
    monkeypatch.setenv("HEADSTART_COMMIT", "abc1234")
    path = rows.append_rows("speed", [{"case": "b"}])
    assert [row["commit"] for row in csv.DictReader(path.open())] == ["unknown", "abc1234"]


def test_other_columns_go_into_another_file(results: Path):
    first = rows.append_rows("speed", [{"case": "a"}])
    second = rows.append_rows("speed", [{"case": "a", "unit": "ms"}])
    assert first != second
    assert len(first.read_text().splitlines()) == len(second.read_text().splitlines()) == 2


def test_contenders_are_timed_in_turn_and_in_every_order():
    order: list[str] = []

    def contender(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    times = rows.interleaved({"a": contender("a", 0), "b": contender("b", 0.01)}, runs=10)
    rounds = [tuple(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert len(rounds) == 11
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert times["b"]["p50"] >= 10
    assert times["a"]["p20"] <= times["a"]["p50"] <= times["a"]["p80"]


def test_short_contenders_are_timed_for_some_seconds_and_at_most_a_hundred_times(monkeypatch: pytest.MonkeyPatch):
    now, calls = [0.0], []

    def run() -> None:
        now[0] += 0.1
        calls.append(1)

    monkeypatch.setattr(rows, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for seconds, expected in ((0.0, 3), (1.95, 20), (1e6, 100)):
        calls.clear()
        rows.interleaved({"a": run}, runs=3, seconds=seconds)
        assert len(calls) == 1 + expected

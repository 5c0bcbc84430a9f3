"""Rows of results: appended under one header, and never mixed with rows of other columns."""

import csv
import time
from pathlib import Path

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


def test_contenders_are_timed_in_turn():
    order: list[str] = []

    def contender(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    times = rows.interleaved({"a": contender("a", 0), "b": contender("b", 0.01)}, runs=3)
    assert order == ["a", "b"] * 4
    assert times["b"]["p50"] >= 10
    assert times["a"]["p20"] <= times["a"]["p50"] <= times["a"]["p80"]

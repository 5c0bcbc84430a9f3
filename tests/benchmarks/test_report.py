"""The page of figures: its tables are those of the rows, and say which run they are of."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import report


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_the_page_has_the_rows_that_there_are():
    page = report.PAGE.read_text()
    assert report.render(page) == page, "run python -m benchmarks.report"
    copied_wrong = page.replace("| headstart |", "| headstart | 0")
    assert copied_wrong != page
    assert report.render(copied_wrong) == page
    assert page.count("<!-- end -->") == page.count("<!-- ") // 2 >= 10


def test_a_table_has_the_last_run_and_columns_that_have_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    found = [
        ("2026-01-01", "old", "2.0", "9", "ours", "1"),
        ("2026-01-02", "new", "2.1", "1000", "ours", "1234.5"),
        ("2026-01-02", "new+dirty", "2.1", "2", "theirs", ".04567"),
    ]
    write(tmp_path / "speed-cpu.csv", ("date", "commit", "torch", "num_tasks", "contender", "p50"), found)
    assert report.render("before\n<!-- speed -->\nold rows\n<!-- end -->\nafter\n") == (
        "before\n<!-- speed -->\n2026-01-02, new, torch 2.1:\n\n"
        "| tasks |  | p50, ms |\n| --- | --- | --- |\n| 1,000 | ours | 1,234 |\n| 2 | theirs | 0.0457 |\n"
        "<!-- end -->\nafter\n"
    )


def test_a_commit_of_digits_stays_one_and_a_tau_keeps_its_nines():
    columns = {"commit": "commit", "kendall_tau": "tau", "p50": "ms"}
    rows = [{"commit": commit, "kendall_tau": "0.999799", "p50": "9.9976"} for commit in ("2516723", "12e4567")]
    assert report.as_table(rows, columns).splitlines()[2:] == [
        "| 2516723 | 0.999799 | 10 |",
        "| 12e4567 | 0.999799 | 10 |",
    ]


def test_servers_have_a_row_each_and_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    columns = ("commit", "server", "transport", "concurrency", "overhead_ms", "rate_ratio", "requests_per_s", "peak_mb")
    found = [
        ("a", "headstart", "binary", "32", "", ".9", "200", "7"),
        ("a", "headstart", "binary", "1", ".5", ".8", "100", "7"),
        ("a", "uvicorn", "binary", "1", ".4", ".85", "90", "6"),
        ("a", "echo", "binary", "1", "", "", "9000", "5"),
        ("a", "session.run", "", "1", "", "", "300", ""),
        ("b+dirty", "headstart", "binary", "1", ".6", ".7", "80", "7"),
    ]
    common = {"date": "2026-11-30", "torch": "2.1", "model": "resnet50", "rounds": "2", "bare_p50_ms": "60"}
    write(tmp_path / "serving-cpu.csv", (*common, *columns), [(*common.values(), *row) for row in found])
    page = report.render("<!-- serving resnet50 -->\n<!-- end -->\n<!-- serving-runs resnet50 -->\n<!-- end -->\n")
    lines = page.splitlines()
    least = lines.index("| uvicorn | binary | 0.4 |  | 0.85 |  | 6 |")
    assert lines[least + 1] == "| headstart | binary | 0.5 | 200 | 0.8 | 0.9 | 7 |"
    assert "| date | commit | rounds | bare, ms | +ours | +uvicorn | ours 1 | uvicorn 1 | ours 32 |" in lines
    assert "| 2026-11-30 | a | 2 | 60 | 0.5 | 0.4 | 0.8 | 0.85 | 0.9 |" in lines
    assert "| 2026-11-30 | b | 2 | 60 | 0.6 |  | 0.7 |  |  |" in lines
    assert not any("echo" in line or "session.run" in line for line in lines)

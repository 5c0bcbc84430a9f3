"""What is printed for a narrow terminal can be read: columns go, names and numbers are never cut."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from headstart.cluster.report.doctor import print_findings
from headstart.cluster.report.sources import describe_sources, print_sources
from headstart.cluster.report.table import print_table, stdout_console
from headstart.cluster.stages.context import Reporter
from headstart.cluster.tune import print_trials
from headstart.trainer.selection.sources import catalog


def console(width: int) -> Console:
    return Console(width=width, file=io.StringIO(), record=True)


def cells(text: str) -> list[list[str]]:
    """The cells of a printed table, a list a line."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, [["[a]", "0.5000", "12"], ["b", "0.2500", "3"]]),
        (20, [["[a]", "0.5000"], ["b", "0.2500"]]),
    ],
)
def test_a_column_is_left_out_where_there_is_no_room_and_its_place_is_told(width: int, expected: list[list[str]]):
    found = console(width)
    columns = {"name": ["[a]", "b"], "share": ["0.5000", "0.2500"], "count": ["12", "3"]}
    print_table("Title", columns, found, leave_out=("count",), elsewhere="list.json")
    text = found.export_text()
    assert cells(text) == expected
    assert ("Left out for want of width: count; list.json has them." in " ".join(text.split())) == (width == 20)


@pytest.mark.parametrize("width", [60, 80])
def test_trials_have_their_sources_rates_and_accuracies_in_full(width: int):
    trial = {"source": "efficientnet-lite0-imagenet", "num_heads": 12, "accuracy": 0.9876, "loss": 0.1234}
    trial |= {"learning_rate": 0.001, "weight_decay": 0.3, "seed": 0}
    found = console(width)
    print_trials({"name": "mine", "trials": [trial], "unavailable": {}}, found)
    text = found.export_text()
    (row,) = cells(text)
    assert {"efficientnet-lite0-imagenet", "0.9876", "0.001", "0.3"} <= set(row)
    assert "tune.json has them" in " ".join(text.split())


@pytest.mark.parametrize("width", [40, 60])
def test_sources_have_their_tasks_where_it_is_narrow(cache: Path, width: int):
    found = console(width)
    print_sources(describe_sources(), found)
    names, tasks = zip(*cells(found.export_text()), strict=True)
    assert "".join(names) == "".join(catalog())  # folded at 40
    said = "".join(tasks).replace(" ", "")
    assert all(card.task.replace(" ", "") in said for card in catalog().values())


def test_what_the_doctor_found_is_not_cut():
    found = console(60)
    meaning = "does not load: libcuda.so.1: cannot open shared object file"
    finding = {"check": "CUDAExecutionProvider", "status": "warn", "value": "listed", "meaning": meaning}
    print_findings([finding], found)
    columns = ["".join(column).replace(" ", "") for column in zip(*cells(found.export_text()), strict=True)]
    assert columns == ["warn", "CUDAExecutionProvider", "listed", meaning.replace(" ", "")]


@pytest.mark.parametrize("width", [60, 80])
def test_a_bar_has_its_numbers_in_full(width: int):
    found = console(width)
    with Reporter(found).bar("features efficientnet-lite0") as progress:
        progress(12_345, 60_000)
    assert "12345/60000" in found.export_text()


def test_a_pipe_has_the_width_of_columns_and_else_the_one_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert stdout_console(130).width == 130
    monkeypatch.setenv("COLUMNS", "60")
    assert stdout_console(130).width == 60

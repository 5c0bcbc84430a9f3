"""The command line as it is promised: its commands and flags, and that the README speaks of no others."""

import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from headstart.cluster.cli import app

ROOT = Path(__file__).parent.parent.parent
COMMON = {"json", "help"}
RECIPE_COMMAND = {"set", "out", "fresh"} | COMMON
FLAGS = {
    "demo": {"out", "fresh"} | COMMON,
    "run": RECIPE_COMMAND | {"address"},
    "rank": RECIPE_COMMAND,
    "fit": RECIPE_COMMAND | {"address"},
    "evaluate": {"address"} | COMMON,
    "export": {"address", "variant"} | COMMON,
    "predict": {"provider"} | COMMON,
    "serve": {
        "host",
        "port",
        "grpc-port",
        "token-file",
        "open-health",
        "tls-cert",
        "tls-key",
        "idle-timeout",
        "provider",
        "threads",
        "max-queue",
        "max-batch",
    }
    | {"max-delay-ms", "policy", "public-key", "drift", "provider-option", "help"}
    | {"max-memory", "workers", "log-format", "access-log", "otel"},
    "package verify": {"public-key"} | COMMON,
    "package sign": {"key"} | COMMON,
    "package show": COMMON,
    "tune": {"set", "out", "address"} | COMMON,
    "submit": {"set", "out", "address"} | COMMON,
    "doctor": COMMON,
    "recipes list": COMMON,
    "recipes show": COMMON,
    "sources list": COMMON,
    "sources show": COMMON,
    "sources fetch": COMMON,
}


def commands() -> dict[str, set[str]]:
    found = {}

    def walk(group, prefix: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{prefix}{name} ")
            else:
                options = (option for parameter in command.params for option in parameter.opts)
                found[prefix + name] = {o.removeprefix("--") for o in options if o.startswith("--")} | {"help"}

    walk(typer.main.get_command(app), "")
    return found


def test_every_flag_is_a_decision():
    assert commands() == FLAGS


def test_the_version_is_that_of_the_distribution(headstart: Callable[..., Any]):
    ended = headstart("--version")
    assert (ended.code, ended.stdout.strip()) == (0, version("headstart"))


def test_shipped_recipes_are_listed_and_printed_to_be_changed(headstart: Callable[..., Any], tmp_path: Path):
    listed = headstart("recipes", "list", "--json").json()
    shipped = ROOT / "cluster/recipes"
    assert sorted(listed) == sorted(path.stem for path in shipped.glob("*.yaml"))
    assert all(line.strip() for line in listed.values())
    assert [line.split()[0] for line in headstart("recipes", "list").stdout.splitlines()] == list(listed)
    (tmp_path / "folder").write_text("name: a file of that name, in the folder that the user is in")
    printed = headstart("recipes", "show", "folder").stdout
    assert printed == (shipped / "folder.yaml").read_text()
    read = headstart("recipes", "show", "folder", "--json").json()
    assert read.keys() == yaml.safe_load(printed).keys()
    assert read["train"]["learning_rate"] == 3e-4  # which YAML 1.1 takes for text
    ended = headstart("recipes", "show", "folders")
    assert ended.code == 2
    assert "no recipe 'folders'; did you mean folder?" in ended.stderr


def test_the_readme_says_which_commands_have_no_json():
    assert "Each but `serve` takes `--json`" in (ROOT / "README.md").read_text()
    assert [name for name, flags in commands().items() if "json" not in flags] == ["serve"]


def test_the_readme_speaks_of_commands_that_are_there():
    text = (ROOT / "README.md").read_text()
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    known = {name.split()[0] for name in commands()}
    used = set(re.findall(r"headstart ([a-z]+) ", code))
    assert used
    assert used <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = set(re.findall(r"make ([a-z-]+)", code))
    assert {"demo", "test"} <= made
    assert made <= targets


def test_the_readme_reaches_its_two_commands_on_the_first_screen():
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:12])
    assert "make demo" in head
    assert "make test" in head


def test_the_readme_names_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:cluster|serving|benchmarks|trainer|kernels)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists(), name


def test_an_error_keeps_its_own_line_breaks_and_commands_no_terminal(headstart: Callable[..., Any], tmp_path: Path):
    ended = headstart("package", "show", "odd\x1b[2J")
    assert ended.code == 2
    assert ended.stderr.startswith(r"error: odd\x1b[2J is no package")
    (tmp_path / "odd\x9b.yaml").write_text("nme: x\n")
    ended = headstart("run", "odd\x9b.yaml")
    assert ended.code == 2
    assert r"recipe odd\x9b.yaml cannot be used:" + "\n  " in ended.stderr


def test_a_command_that_lacks_a_library_names_it(headstart: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "headstart.cluster.recipe_file", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    ended = headstart("recipes", "list")
    assert ended.code == 2
    assert ended.stderr.startswith("error: this command needs pydantic, which is not installed here")


@pytest.mark.parametrize(("status", "code"), [("FAILED", 1), ("STOPPED", 1), ("SUCCEEDED", 0)])
def test_a_job_that_did_not_succeed_is_1(
    headstart: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, status: str, code: int
):
    def submitted(recipe: object, address: str, out: Path) -> dict[str, str]:
        return {"job": "j", "status": status, "out": str(out)}

    monkeypatch.setattr("headstart.cluster.jobs.submit", submitted)
    ended = headstart("submit", "demo", "--address", "http://there:8265")
    assert (ended.code, ended.stdout) == (code, f"job j: {status}; its run directory is runs/demo\n")

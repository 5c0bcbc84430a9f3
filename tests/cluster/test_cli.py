"""The command line as it is promised: its commands and flags, and that the README speaks of no others."""

import re
from pathlib import Path

import typer

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

"""Arguments and options that several commands have, and how they print JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or the name of a shipped recipe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]
PackageArgument = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package, such as runs/demo/package.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set train.epochs=3."),
]
Out = Annotated[Path | None, typer.Option(help="The run directory itself; default runs/NAME.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster's address; its token in RAY_AUTH_TOKEN.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do every stage again.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]


T = TypeVar("T")


def escaped(text: str) -> str:
    r"""Return `text` with `\udcXX` for each byte XX of a file's name that is not UTF-8.

    Python holds such a byte as a lone surrogate, which no strict stdout takes, and no reader of JSON as a raw byte.
    The escape is JSON's own: `os.fsencode(json.loads(...))` is the name again. Other letters stay as they are.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def print_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    typer.echo(escaped(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)))


def print_found(found: T, as_json: bool, print_text: Callable[[T], None]) -> None:
    """Write what a command has found to stdout: as JSON, or in its own words."""
    (print_json if as_json else print_text)(found)

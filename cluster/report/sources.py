"""The source tasks that a run can start from, listed and shown."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headstart.cluster.stages.context import Reporter, cache_root
from headstart.trainer.backbones.weights import fetch_weights
from headstart.trainer.selection.sources import Candidate, resolve

Description = dict[str, Any]


def describe_sources() -> list[Description]:
    """Return the cards of the catalog and of the finished runs, each with `made_here`."""
    return [_describe(candidate) for candidate in resolve("all", cache_root())]


def describe_source(name: str) -> Description:
    """Return one card; `name` may also be a spec such as `source:PATH`. Raises `SourceError` where there is none."""
    return _describe(resolve((name,), cache_root())[0])


def fetch(name: str) -> Description:
    """Fetch a source's weights into the cache and verify them; returns their path and size."""
    candidate = resolve((name,), cache_root())[0]
    card = candidate.card
    with Reporter().bar(f"fetch {card.name}") as progress:
        found = fetch_weights(card.weights, card.sha256, cache_root(), base=candidate.base, progress=progress)
    return {"name": card.name, "path": str(found.path), "megabytes": found.path.stat().st_size / 1e6}


def print_sources(found: list[Description]) -> None:
    """Print the sources as a table."""
    table = Table(title="Source tasks", title_justify="left")
    for column in ("name", "task", "architecture", "pixels", "licence"):
        table.add_column(column)
    for source in found:
        style = "green" if source["made_here"] else None
        side = str(source["preprocessing"]["crop"])
        row = (source["name"], escape(source["task"]), source["architecture"], side, source["licence"])
        table.add_row(*row, style=style)
    Console().print(table)
    if any(source["made_here"] for source in found):
        Console().print("green: made here, by runs that are finished", style="dim")


def print_source(found: Description) -> None:
    """Print one card, a field a line."""
    console = Console()
    for field, value in found.items():
        if value not in ("", (), []):
            console.print(f"[bold]{field}[/bold]: {escape(str(value))}", highlight=False)


def _describe(candidate: Candidate) -> Description:
    return {**asdict(candidate.card), "made_here": candidate.base is not None}

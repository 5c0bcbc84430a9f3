"""The source tasks that a run can start from, listed and shown."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.markup import escape

from headstart.cluster.report.table import print_table, stdout_console
from headstart.cluster.stages.context import Reporter, cache_root
from headstart.trainer.backbones.weights import fetch_weights
from headstart.trainer.inputs.dataset import some
from headstart.trainer.selection.sources import Candidate, SourceCard, resolve, survey

Description = dict[str, Any]


def describe_sources() -> list[Description]:
    """Return the cards of the catalog and of the finished runs, each with `made_here`.

    Of a damaged one there is its name and the `reason`, which is None for all others.
    """
    candidates, passed_over = survey("all", cache_root())
    nothing: Description = dict.fromkeys(field.name for field in fields(SourceCard))
    damaged = [nothing | {"name": name, "made_here": True, "reason": reason} for name, reason in passed_over.items()]
    return [_describe(candidate) for candidate in candidates] + damaged


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


def print_sources(found: list[Description], console: Console | None = None) -> None:
    """Print the sources as a table."""
    console = console or stdout_console(130)
    sound = [source for source in found if source["reason"] is None]
    columns = {
        "name": [source["name"] for source in sound],
        "task": [source["task"] for source in sound],
        "architecture": [source["architecture"] for source in sound],
        "pixels": [str(source["preprocessing"]["crop"]) for source in sound],
        "licence": [source["licence"] for source in sound],
    }
    print_table(
        "Source tasks",
        columns,
        console,
        leave_out=("architecture", "pixels", "licence"),
        elsewhere="`headstart sources show NAME`",
        folded={"task": 24, "architecture": 20, "licence": 10},
        styles=["green" if source["made_here"] else "" for source in sound],
    )
    if any(source["made_here"] for source in found):
        console.print("green: made here, by runs that are finished", style="dim")
    print_unavailable({s["name"]: s["reason"] for s in found if s["reason"] is not None}, console)


def print_unavailable(reasons: Mapping[str, str], console: Console) -> None:
    """Print why sources cannot be used, by their names; those of one reason together."""
    for reason in dict.fromkeys(reasons.values()):
        names = some([name for name, why in reasons.items() if why == reason])
        console.print(f"unavailable: [bold]{escape(names)}[/bold]: {escape(reason)}")


def print_source(found: Description) -> None:
    """Print one card, a field a line; of many classes the first ten."""
    console = Console()
    for field, value in found.items():
        if value in (None, "", (), []):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {inner}" for name, inner in value.items())
        if isinstance(value, tuple):
            value = some(value)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        # Soft, so that what is copied from a narrow terminal is whole.
        console.print(f"[bold]{field.replace('_', ' ')}[/bold]: {escape(str(value))}", highlight=False, soft_wrap=True)


def _describe(candidate: Candidate) -> Description:
    return {**asdict(candidate.card), "made_here": candidate.base is not None, "reason": None}

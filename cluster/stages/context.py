"""What every stage is given: the recipe, the target task, the places to write to, and someone to tell."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from headstart.cluster import interrupt
from headstart.cluster.connect import Connection
from headstart.cluster.stages.run_directory import RunDirectory
from headstart.trainer.recipe import Recipe
from headstart.trainer.selection.ranking import Target


def cache_root() -> Path:
    """Return the cache: `$HEADSTART_CACHE`, or `~/.cache/headstart`."""
    return Path(os.environ.get("HEADSTART_CACHE") or "~/.cache/headstart").expanduser().absolute()


class Reporter:
    """Progress on stderr: a bar a stage."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar for the block; it is moved by calling what this yields with (done, total)."""
        wide = self.console.width >= 72
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(30 if wide else 10),
            MofNCompleteColumn(),
            *((TimeElapsedColumn(), TimeRemainingColumn()) if wide else ()),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=None)

            def move(done: int, total: int) -> None:
                interrupt.check()
                progress.update(task, completed=done, total=total)

            yield move
            interrupt.check()
            if progress.tasks[0].total is None:
                progress.update(task, completed=1, total=1)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Context:
    """One run, as its stages see it."""

    recipe: Recipe
    target: Target
    data_key: str
    """Fingerprint of the images and of their division into parts."""
    run: RunDirectory
    cache: Path
    connection: Connection
    reporter: Reporter
    settled: bool = False
    """Whether a ranking that is there stays, whatever sources have come since."""

    @property
    def tag(self) -> str:
        """Names this attempt in the features it computes."""
        return self.run.attempt

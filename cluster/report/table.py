"""Tables for a terminal of any width: columns are left out before a cell is cut."""

import os
import sys
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def stdout_console(piped: int) -> Console:
    """Return a console on stdout, `piped` columns wide in a pipe or a file: Rich takes those for 80. COLUMNS wins."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else piped)


def print_table(
    title: str,
    columns: Mapping[str, list[str]],
    console: Console,
    *,
    leave_out: Sequence[str],
    elsewhere: str,
    folded: Mapping[str, int] | None = None,
    styles: Sequence[str] | None = None,
) -> None:
    """Print columns of cells, the first of them names, the others numbers or, in `folded`, text.

    `folded` has the cells a line that a column of text is content with. Where the console is too narrow columns are
    left out in the order of `leave_out`, and a line says that `elsewhere` has them; names are folded where that is not
    enough. `styles` has one a row.
    """
    folded = folded or {}
    shown = dict(columns)
    left_out: list[str] = []
    while not (fits := _width(shown, folded) <= console.width) and len(left_out) < len(leave_out):
        left_out.append(leave_out[len(left_out)])
        del shown[left_out[-1]]
    table = Table(title=title, title_justify="left")
    for position, name in enumerate(shown):
        wraps = name in folded or (position == 0 and not fits)
        is_text = position == 0 or name in folded
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not wraps, overflow="fold")
    for number, row in enumerate(zip(*shown.values(), strict=True)):
        table.add_row(*map(escape, row), style=styles[number] if styles else None)
    console.print(table)
    if left_out:
        console.print(f"Left out for want of width: {', '.join(left_out)}; {elsewhere} has them.", style="dim")


def _width(columns: Mapping[str, list[str]], folded: Mapping[str, int]) -> int:
    """Cells that a table of these columns takes, borders included."""
    widths = {name: max(map(cell_len, (name, *cells))) for name, cells in columns.items()}
    return 1 + sum(3 + min(width, folded.get(name, width)) for name, width in widths.items())

"""The picture of a commit's rows: what each server adds to a bare call, and its requests/s with 32 clients."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.rows import device_slug
from benchmarks.serving.models import MODELS

_PANELS = (
    (1, "overhead_ms", "p50 over a bare call, one client, ms"),
    (32, "requests_per_s", "requests/s with 32 clients"),
)

_KEYS = ("model", "server", "transport", "concurrency")

Row = Mapping[str, str]


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each server and model, of the commit at which most servers were measured, the last such."""
    commits: dict[str, dict[tuple[str, ...], Row]] = {}
    for row in rows:
        commit = row["commit"].removesuffix("+dirty")  # a run's own rows make the next ones dirty
        commits.setdefault(commit, {})[tuple(row[column] for column in _KEYS)] = row
    found = max(reversed(commits.values()), key=lambda found: len({row["server"] for row in found.values()}))
    return list(found.values())


def plot(table: Path) -> Path:
    """Draw a file's `newest` rows into `serving-<device>.png` beside it, and return the picture."""
    from matplotlib.figure import Figure

    with table.open(newline="") as file:
        rows = newest(csv.DictReader(file))
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    figure = Figure(figsize=(11, 4.2 * len(models)), layout="constrained")
    for index, model in enumerate(models):
        for side, (concurrency, column, title) in enumerate(_PANELS):
            clients = str(concurrency), str(1 - side)  # the bare calls' best batch, a rate, has none
            axes = figure.add_subplot(len(models), 2, 2 * index + side + 1)
            chosen = {
                f"{row['server']}{', ' if row['transport'] else ''}{row['transport']}": float(row[column])
                for row in rows
                if row["model"] == model and row["concurrency"] in clients and row[column] != ""
            }
            names = sorted(chosen, key=lambda name: chosen[name], reverse=side == 0)
            colours = ["tab:orange" if name.startswith("headstart") else "tab:grey" for name in names]
            bars = axes.barh(names, [chosen[name] for name in names], color=colours)
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
            axes.set_xscale("log")
            axes.tick_params(labelsize=7)
            axes.set_title(f"{model}: {title}", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
    path = table.with_name(f"serving-{device_slug()}.png")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path

"""The picture of a commit's rows: p50 with one client and requests/s with 32, by server and model."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.rows import device_slug
from benchmarks.serving.models import MODELS

_PANELS = ((1, "p50_ms", "p50 with one client, ms"), (32, "requests_per_s", "requests/s with 32 clients"))

Row = Mapping[str, str]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of the rows of a file, the last of each server and model that the last row's commit has."""
    rows = list(rows)
    commits = [row["commit"].removesuffix("+dirty") for row in rows]  # a run's own rows make the next ones dirty
    found = {
        tuple(row[column] for column in ("model", "server", "transport", "concurrency")): row
        for row, commit in zip(rows, commits, strict=True)
        if commit == commits[-1]
    }
    return list(found.values())


def plot(table: Path) -> Path | None:
    """Draw a file's newest rows into `serving-<device>.png` beside it; None, and no picture, without all models."""
    from matplotlib.figure import Figure

    with table.open(newline="") as file:
        rows = newest(csv.DictReader(file))
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    if len(models) < len(MODELS):
        return None
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

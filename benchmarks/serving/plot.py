"""The picture of a run: p50 with one client and requests/s with 32, by server and model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, device_slug

_PANELS = ((1, "p50_ms", "p50 with one client, ms"), (32, "requests_per_s", "requests/s with 32 clients"))


def plot(rows: Sequence[dict[str, Any]]) -> Path:
    """Draw the rows into `results/serving-<device>.png`, and return the file."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(models)), layout="constrained")
    for index, model in enumerate(models):
        for side, (concurrency, column, title) in enumerate(_PANELS):
            axes = figure.add_subplot(len(models), 2, 2 * index + side + 1)
            chosen = {
                f"{row['server']}{', ' if row['transport'] else ''}{row['transport']}": float(row[column])
                for row in rows
                if row["model"] == model and row["concurrency"] in (concurrency, 1 - side) and row[column] != ""
            }
            names = sorted(chosen, key=lambda name: chosen[name], reverse=side == 0)
            colours = ["tab:orange" if name.startswith("headstart") else "tab:grey" for name in names]
            bars = axes.barh(names, [chosen[name] for name in names], color=colours)
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
            axes.set_xscale("log")
            axes.tick_params(labelsize=7)
            axes.set_title(f"{model}: {title}", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
    path = RESULTS / f"serving-{device_slug()}.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path

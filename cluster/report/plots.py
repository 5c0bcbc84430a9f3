"""The two pictures of a run: what is taken for what, and how it was learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

_MAX_NUMBERED = 20
_MAX_DRAWN = 200
"""Classes of a matrix whose cells are still seen: six pixels each."""
_FIT_STYLES = {"fit": ("C0", "o"), "control": ("C7", "s")}


def font_families(text: str) -> list[str]:
    """Name Matplotlib's own font, and those installed here that have the characters of a text that it lacks."""
    families = ["DejaVu Sans"]
    missing = set(map(ord, text)) - font_manager.get_font(font_manager.findfont(families[0])).get_charmap().keys()
    upright = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
    for font in sorted(upright, key=lambda font: (font.weight != 400, font.fname)):
        if not missing:
            break
        found = missing & font_manager.get_font(font.fname).get_charmap().keys()
        if found and not font.name.startswith("Last Resort"):  # which has a box for everything
            families.append(font.name)
            missing -= found
    return families


def plot_confusion(path: Path, labels: np.ndarray, predicted: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    """Draw the confusion matrix of the test images, each row as shares of its class.

    labels, predicted: int [N]. Of more than 200 classes those that most mistakes are of, and the others as one.
    """
    right = labels == predicted
    if len(classes) > _MAX_DRAWN:
        labels, predicted, classes = _most_mistaken(labels, predicted, classes)
    counts = confusion_matrix(labels, predicted, labels=range(len(classes)))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(14.0, 3.0 + 0.45 * len(classes))
    with rc_context({"font.family": font_families(name + "".join(classes))}):
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
        axes.set(
            xlabel="predicted",
            ylabel="true",
            title=f"{name}: {right.mean():.1%} of {len(right)} test images right",
        )
        if len(classes) <= _MAX_NUMBERED:
            # Names, and no formulas: "$_$" is none, and would end the run here.
            rotation = 90 if max(map(len, classes)) > 3 else 0
            axes.set_xticks(range(len(classes)), classes, rotation=rotation, parse_math=False)
            axes.set_yticks(range(len(classes)), classes, parse_math=False)
            for row, column in np.argwhere(counts):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
        figure.savefig(path, dpi=120, metadata={"Software": None})


def _most_mistaken(
    labels: np.ndarray, predicted: np.ndarray, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Number the 19 classes that most mistakes are of anew, and all others as the last one."""
    wrong = labels != predicted
    mistakes = np.bincount(np.concatenate([labels[wrong], predicted[wrong]]), minlength=len(classes))
    kept = np.sort(np.argsort(-mistakes, kind="stable")[: _MAX_NUMBERED - 1])
    number = np.full(len(classes), len(kept))
    number[kept] = np.arange(len(kept))
    names = (*(classes[label] for label in kept), f"{len(classes) - len(kept):,} others")
    return number[labels], number[predicted], names


def plot_learning(path: Path, fits: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Draw accuracy over epochs for each fit: validation solid, training dashed, the chosen rate bold."""
    text = name + "".join(fit["source"] for fit in fits.values())
    with rc_context({"font.family": font_families(text)}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for job, fit in fits.items():
            colour, marker = _FIT_STYLES[job]
            for rate in sorted({row["peak_learning_rate"] for row in fit["rows"]}):
                rows = [row for row in fit["rows"] if row["peak_learning_rate"] == rate]
                chosen = rate == fit["learning_rate"]
                epochs = [row["epoch"] for row in rows]
                label = f"{fit['mode']} ({fit['source']}), rate {rate:g}"
                axes.plot(
                    epochs,
                    [row["validation_accuracy"] for row in rows],
                    color=colour,
                    marker=marker if chosen else None,
                    markersize=4,
                    linewidth=2 if chosen else 0.8,
                    alpha=1 if chosen else 0.5,
                    label=label if chosen else f"{label} (not chosen)",
                )
                if chosen:
                    axes.plot(
                        epochs,
                        [row["train_accuracy"] for row in rows],
                        color=colour,
                        linestyle="--",
                        linewidth=1,
                        label=f"{fit['mode']}, training images",
                    )
        axes.set(xlabel="epoch", ylabel="accuracy (validation unless said)", title=f"{name}: learning", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
        figure.savefig(path, dpi=120, metadata={"Software": None})

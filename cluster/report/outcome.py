"""A run in words and tables, for a terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headstart.cluster.pipeline import Outcome
from headstart.cluster.report.sources import print_unavailable
from headstart.cluster.report.table import print_table

_LEFT_OUT_FIRST = ("k-NN", "ridge", "Euclidean", "seconds", "energy", "score")
"""Columns of the ranking that a narrow terminal goes without, in this order."""


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print what the run came to, as far as it went."""
    print_ranking(outcome, console)
    if outcome.choice is not None:
        console.print(
            f"\n[bold]Chosen: mode {outcome.choice['mode']} from {outcome.choice['source']}[/bold]: "
            f"{escape(outcome.choice['reason'])}"
        )
    if outcome.evaluation is not None:
        _print_evaluation(outcome, console)
    if outcome.manifest is not None:
        _print_package(outcome, console)


def print_ranking(outcome: Outcome, console: Console) -> None:
    """Print the sources, the best first, in columns for which there is room."""
    available = [entry for entry in outcome.ranking["ranking"] if entry["available"]]
    missing = [entry for entry in outcome.ranking["ranking"] if not entry["available"]]
    distances = [entry["distances"] or {"energy": None, "euclidean": None} for entry in available]
    columns = {
        "source": [entry["source"] for entry in available],
        "k-NN": [_share(entry["knn"]) for entry in available],
        "ridge": [_share(entry["ridge"]) for entry in available],
        "score": [_share(entry["score"]) for entry in available],
        "audition": [_share(entry["audition_accuracy"]) for entry in available],
        "energy": [_number(distance["energy"]) for distance in distances],
        "Euclidean": [_number(distance["euclidean"]) for distance in distances],
        "seconds": [f"{entry['seconds']:.1f}" for entry in available],
        "licence": [entry["licence"] for entry in available],
    }
    print_table(
        f"Sources for {outcome.summary['name']}, best audition first",
        columns,
        console,
        leave_out=_LEFT_OUT_FIRST,
        elsewhere="ranking.json",
        folded={"licence": 10},
    )
    console.print(
        "k-NN, ridge: leaving one training image out. audition: the best of a bank of heads, on validation. "
        f"energy, Euclidean: distance of the tasks' features under {outcome.ranking['probe']}, smaller is closer; "
        "- where a source has no sketch: finished runs have one.",
        style="dim",
    )
    if any(distance["energy"] is not None and distance["energy"] < 0 for distance in distances):
        console.print("Energies around 0, or below, are those of two samples of one task.", style="dim")
    print_unavailable({entry["source"]: entry["reason"] for entry in missing}, console)


def _print_evaluation(outcome: Outcome, console: Console) -> None:
    assert outcome.evaluation is not None
    evaluation, choice = outcome.evaluation, outcome.choice or {}
    table = Table(title=f"\nOn {evaluation['test']['num_samples']} test images", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("95% interval")
    scratch = evaluation["controls"]["scratch"]
    names = {"raw_pixels": "control: raw 16x16 pixels"}
    if scratch:
        chosen = next(entry for entry in outcome.ranking["ranking"] if entry["source"] == choice["source"])
        same = scratch["architecture"] == chosen["architecture"]
        names["scratch"] = f"control: {'the same architecture' if same else scratch['architecture']} from scratch"
    rows = [(f"{choice.get('source')}, {choice.get('mode')}", evaluation["test"])]
    rows += [(names[name], control) for name, control in evaluation["controls"].items() if control]
    for name, figures in rows:
        table.add_row(name, _share(figures["accuracy"]), _interval(figures["interval"]))
    console.print(table)
    if evaluation["verdict"] is not None:
        against = names[evaluation["verdict_control"]].removeprefix("control: ")
        console.print(
            f"[bold]Verdict: {evaluation['verdict']}[/bold]. Difference to the stronger control ({against}), image by "
            f"image: {_interval(evaluation['verdict_interval'], signed=True)} at 95%, McNemar's exact "
            f"{_p_value(evaluation['verdict_p_value'])}."
        )
    console.print(
        f"Temperature {evaluation['temperature']:.3f}, calibration error {evaluation['calibration_error']:.4f}; "
        f"{evaluation['num_test_images_also_in_training']} test images are also among those learned from."
    )
    if num := evaluation["num_test_images_nearly_in_training"]:
        console.print(f"Test images that look like one of those learned from, saved anew: {num}.")
    largest = evaluation["largest_class"]
    if largest["share"] >= evaluation["test"]["interval"][0]:
        console.print(
            f"Always naming the largest class, {escape(largest['name'])}, would be right for "
            f"{_share(largest['share'])} of the test images; class_accuracy in evaluation.json has each class."
        )
    if num := evaluation["num_repeated_test_images"]:
        console.print(f"Test images that repeat an earlier one: {num}. The intervals take them for new ones.")
    if num := evaluation["num_contents_of_several_classes"]:
        console.print(f"Images that the data has under more than one class: {num}.")


def _print_package(outcome: Outcome, console: Console) -> None:
    assert outcome.manifest is not None
    parity, latency = outcome.manifest["parity"], outcome.manifest["latency"]
    path = outcome.path.relative_to(Path.cwd()) if outcome.path.is_relative_to(Path.cwd()) else outcome.path
    console.print(
        f"\n[bold]Package: {_shown(path / 'package')}[/bold] (licence: {escape(outcome.manifest['licence'])})"
    )
    worst = max(parity["rows"], key=lambda row: row["relative_difference"])
    batches = ", ".join(str(row["batch"]) for row in parity["rows"])
    agreement = min(row["top1_agreement"] for row in parity["rows"])
    console.print(
        f"Parity with PyTorch at batches {batches}: logits within {worst['relative_difference']:.2g} of the largest, "
        f"top-1 agreement {agreement:.4f}."
    )
    if latency:
        shape = "x".join(map(str, latency["shape"]))
        console.print(
            f"Prediction p50 {latency['predict_p50_ms']:.3f} ms, bare session.run {latency['session_run_p50_ms']:.3f} "
            f"ms (ratio {latency['ratio']:.3f}), one {shape} image, {latency['provider']}."
        )
    for name, result in outcome.variants.items():
        _print_variant(path / f"package-{name}", name, result, console)
    console.print(f"Source: {_shown(path / 'source')}. Summary: {_shown(path / 'summary.json')}")


def _print_variant(path: Path, name: str, result: dict[str, Any], console: Console) -> None:
    if result["refused"]:
        console.print(f"[bold]No {name} package[/bold]: {escape(result['refused'])}")
        return
    variant, parity = result["manifest"]["variant"], result["manifest"]["parity"]
    agreement = min(row["top1_agreement"] for row in parity["rows"])
    console.print(
        f"[bold]{name}: {_shown(path)}[/bold]: accuracy {variant['accuracy']:.4f} on {variant['num_images']} "
        f"validation images (fp32 {variant['fp32_accuracy']:.4f}, {variant['max_loss']:g} may be lost), top-1 "
        f"agreement {agreement:.4f}; p50 {variant['latency_ms']:.3f} ms "
        f"(fp32 {variant['fp32_latency_ms']:.3f} ms, in turns)."
    )


def _shown(path: Path) -> str:
    """A path as Rich is given it, to which `[/x]` is a command."""
    return escape(str(path))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _p_value(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}"


def _interval(interval: list[float], *, signed: bool = False) -> str:
    form = "{:+.4f}" if signed else "{:.4f}"
    return "[" + ", ".join(form.format(value) for value in interval) + "]"

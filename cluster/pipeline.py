"""One recipe through every stage, from labelled images to a served model that is a source for the next.

    with Connection() as connection:
        summary = run(load_recipe("demo"), Path("runs/demo"), connection=connection)

Each stage is a function of the recipe and of the stages before it, and is skipped when these have not changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape

from headstart.cluster.connect import Connection
from headstart.cluster.recipe_file import recipe_yaml
from headstart.cluster.stages.choose import choose, chosen_model, train_control, tune_source, write_training_csv
from headstart.cluster.stages.context import Context, Reporter, cache_root
from headstart.cluster.stages.export import export, export_variants
from headstart.cluster.stages.finish import evaluate, register_source
from headstart.cluster.stages.rank import rank
from headstart.cluster.stages.run_directory import SUMMARY, Result, RunDirectory, Stage, fingerprint, write_json
from headstart.trainer.files import write_atomically
from headstart.trainer.inputs.dataset import some
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.recipe import Recipe
from headstart.trainer.selection.ranking import Target
from headstart.trainer.selection.registry import check_registry
from headstart.trainer.selection.sources import survey

Until = Literal["rank", "fit", "evaluate", "export", "register"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to; what its stages did not reach is None."""

    path: Path
    """The run directory."""
    summary: dict[str, Any]
    """The document of summary.json."""
    ranking: Result
    """The document of ranking.json."""
    choice: Result | None = None
    """The mode and source chosen, and why."""
    evaluation: Result | None = None
    """The document of evaluation.json."""
    manifest: Result | None = None
    """The document of package/manifest.json."""
    variants: dict[str, Result] = field(default_factory=dict)
    """By name: `manifest`, the document of package-NAME/manifest.json, or None and why it was `refused`."""


def open_run(recipe: Recipe, out: Path) -> RunDirectory:
    """Open `out` as the run directory of `recipe`; raises `RunError` where it cannot be."""
    return RunDirectory(out, {"name": recipe.name, "data": recipe.data.path})


def run(
    recipe: Recipe,
    out: Path,
    *,
    connection: Connection,
    cache: Path | None = None,
    reporter: Reporter | None = None,
    fresh: bool = False,
    until: Until = "register",
    settled: bool = False,
) -> Outcome:
    """Take `recipe` through the stages up to and with `until`; `settled` is that of `Context`.

    The summary of a run that ends early has null for what is not known yet; summary.json is written at the end
    alone, and removed where it is of another recipe or other inputs. Raises the errors of the rooms, each with the next
    step; what is finished stays and is not done again, and data or sources that cannot be alter nothing.
    """
    cache, reporter = cache or cache_root(), reporter or Reporter()
    with open_run(recipe, out) as directory:
        if until == "register":
            check_registry(cache)
        summary, written, text = directory.path / SUMMARY, directory.path / "recipe.yaml", recipe_yaml(recipe).encode()
        summarised = summary.exists()
        target = _read(recipe, cache, reporter, settled=settled)
        # A settled run has its own recipe, to which a variant may have come.
        if fresh or (not settled and written.exists() and written.read_bytes() != text):
            directory.remove_summary()
        if fresh:
            directory.start_over()
        write_atomically(written, text)
        context = Context(
            recipe=recipe, target=target, data_key=_data(target, directory).key, run=directory, cache=cache,
            connection=connection, reporter=reporter, settled=settled,
        )  # fmt: skip
        outcome = _stages(context, until)
        if until == "register":
            write_json(summary, outcome.summary)
        elif summarised and not summary.exists():
            _tell_outdated(outcome, reporter)
        directory.finish()
        return outcome


def _tell_outdated(outcome: Outcome, reporter: Reporter) -> None:
    """Say what is left of the run that the folder had the summary of."""
    later = [("evaluation.json", outcome.evaluation), ("package*", outcome.manifest), ("source", None)]
    left = [path.name for name, made in later if made is None for path in sorted(outcome.path.glob(name))]
    reporter.say(
        "[bold]summary.json is removed[/bold]: it is of another recipe, other data or other sources, or of before "
        f"--fresh. Also of those, until `headstart run` makes them anew: {', '.join(left)}"
    )


def _read(recipe: Recipe, cache: Path, reporter: Reporter, *, settled: bool) -> Target:
    """Read the data, and look whether the sources can be: what is wrong is told before anything is altered."""
    with reporter.bar("data") as progress:
        images = load_images(recipe.data, cache, progress)
    target = Target(images=images, parts=split_images(images, recipe.data.split, recipe.seed))
    if not settled:  # whose ranking stays
        survey(recipe.sources, cache, exclude_data=images.fingerprint, judged_on=target.judged_on)
    if images.skipped:
        reporter.say(escape(f"left out, being no images: {some(images.skipped)}"))
    if single := _single(target):
        reporter.say(
            escape(
                f"classes of one training image, which k-NN and ridge leave out and so never have right, as the "
                f"audition may: {some(single)}. Add images of them where there are any"
            )
        )
    return target


def _single(target: Target) -> list[str]:
    """Name the classes that have one image to learn from."""
    return [
        target.images.classes[i] for i in np.flatnonzero(np.bincount(target.images.labels[target.parts["train"]]) == 1)
    ]


def _data(target: Target, directory: RunDirectory) -> Stage:
    """The stage by which the others' inputs are named: the images' content and their division into parts."""
    images, parts = target.images, target.parts
    inputs: dict[str, object] = {
        "images": images.fingerprint,
        "skipped": list(images.skipped),
        "parts": {name: fingerprint(part.tolist()) for name, part in parts.items()},
    }
    result: Result = {
        "num_images": len(images),
        "classes": list(images.classes),
        "skipped": list(images.skipped),
        "parts": {name: len(part) for name, part in parts.items()},
    }
    return directory.stage("data", inputs, lambda: [], lambda: (result, []))


def _stages(context: Context, until: Until) -> Outcome:
    ranked = rank(context)
    if until == "rank":
        return _outcome(context, ranked)
    tuned = tune_source(context, ranked)
    if not (context.run.path / SUMMARY).exists():  # which tells of a whole run, as does its table
        write_training_csv(context.run.path / "training.csv", {"fit": tuned})
    chosen = choose(context, ranked, tuned)
    if until == "fit":
        return _outcome(context, ranked, chosen)
    control = train_control(context, ranked)
    write_training_csv(context.run.path / "training.csv", {"fit": tuned, "control": control})
    model = chosen_model(context, chosen, tuned)
    evaluated = evaluate(context, model, chosen, control, tuned)
    if until == "evaluate":
        return _outcome(context, ranked, chosen, evaluated)
    exported = export(context, model, chosen, evaluated)
    variants = export_variants(context, exported)
    if until == "register":
        register_source(context, model, chosen)
    return _outcome(context, ranked, chosen, evaluated, exported, variants)


def _outcome(
    context: Context,
    ranked: Stage,
    chosen: Stage | None = None,
    evaluated: Stage | None = None,
    exported: Stage | None = None,
    variants: Mapping[str, Stage] | None = None,
) -> Outcome:
    fields = ("source", "distance", "score", "audition_accuracy", "seconds", "available", "reason", "licence")
    evaluation = evaluated.result if evaluated else {}
    summary = {
        "schema": 1,
        "name": context.recipe.name,
        "target": context.recipe.data.path,
        "source": chosen.result["source"] if chosen else None,
        "mode": chosen.result["mode"] if chosen else None,
        "ranking": [{field: entry[field] for field in fields} for entry in ranked.result["ranking"]],
        "test": evaluation.get("test"),
        "controls": evaluation.get("controls"),
        "verdict": evaluation.get("verdict"),
        "verdict_interval": evaluation.get("verdict_interval"),
        "verdict_p_value": evaluation.get("verdict_p_value"),
        "package": "package" if exported else None,
        "variants": {name: _variant(name, stage.result) for name, stage in (variants or {}).items()},
        "stages": {
            name: {"seconds": stage.seconds, "skipped": stage.skipped} for name, stage in context.run.stages.items()
        },
        "num_backbone_images": context.run.num_backbone_images(),
    }
    return Outcome(
        path=context.run.path,
        summary=summary,
        ranking=ranked.result,
        choice=chosen.result if chosen else None,
        evaluation=evaluated.result if evaluated else None,
        manifest=exported.result["manifest"] if exported else None,
        variants={name: stage.result for name, stage in (variants or {}).items()},
    )


def _variant(name: str, result: Result) -> Result:
    """What the summary says of a variant; its figures are None where it was refused."""
    found = result["manifest"]["variant"] if result["manifest"] else {}
    figures = ("accuracy", "fp32_accuracy", "max_loss", "num_images", "latency_ms", "fp32_latency_ms")
    package = None if result["refused"] else f"package-{name}"
    return {"package": package, "refused": result["refused"], **{figure: found.get(figure) for figure in figures}}

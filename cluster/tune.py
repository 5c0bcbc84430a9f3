"""Search with Ray Tune: every trial is one bank of heads, trained at once on one source's cached features.

A trial of one head would spend its time starting a process; a bank trains the whole of `search` in the same time.
"""

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from headstart.cluster.connect import Connection
from headstart.cluster.pipeline import open_run
from headstart.cluster.recipe_file import recipe_document
from headstart.cluster.report.sources import print_unavailable
from headstart.cluster.report.table import print_table, stdout_console
from headstart.cluster.stages.context import Reporter, cache_root
from headstart.cluster.stages.distances import is_long, task_distances, too_far, why_too_far
from headstart.cluster.stages.rank import no_source
from headstart.cluster.stages.run_directory import fingerprint, read_json, write_json
from headstart.trainer.audition import audition, head_settings
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.errors import RecipeError, RunError, SourceError
from headstart.trainer.features import extract_features
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.recipe import Recipe
from headstart.trainer.selection.ranking import Target
from headstart.trainer.selection.sources import survey

Trials = dict[str, Any]

_FIGURES = ("accuracy", "loss", "learning_rate", "weight_decay", "seed", "num_heads")


def tune_heads(recipe: Recipe, out: Path, *, connection: Connection, cache: Path | None = None) -> Trials:
    """Run one trial a source and return them, the best first; the document is written to `out`/tune.json.

    Features are computed here, once, before the trials start. Each trial that has finished is kept in `out`, and not
    run again while the recipe and the features are the same. Raises `SourceError` when no source is available and
    `RunError` when a trial fails.
    """
    cache = cache or cache_root()
    # The folder is held as a run holds it, so that a run of the same recipe can follow in it, and no other's is used.
    with open_run(recipe, out) as directory:
        images = load_images(recipe.data, cache)
        target = Target(images=images, parts=split_images(images, recipe.data.split, recipe.seed))
        features, unavailable = source_features(recipe, target, cache)
        trials = _trials(recipe, target, features, directory.private, connection, unavailable)
        document = {
            "schema": 1,
            "name": recipe.name,
            "search": recipe_document(recipe)["search"],
            "trials": sorted(trials, key=lambda trial: (-trial["accuracy"], trial["loss"], trial["source"])),
            "unavailable": unavailable,
        }
        write_json(directory.path / "tune.json", document)
        return document


def source_features(recipe: Recipe, target: Target, cache: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return every available source's features of the known images, [N, D] each, and why the others have none.

    Raises `SourceError` where a source that the recipe names is unavailable, or none of `all` is there.
    """
    reporter, known = Reporter(), target.known()
    features: dict[str, torch.Tensor] = {}
    candidates, unavailable = survey(
        recipe.sources, cache, exclude_data=target.images.fingerprint, judged_on=target.judged_on
    )
    far: set[str] = set()
    if is_long(recipe, candidates):
        far = too_far(recipe, candidates, task_distances(recipe, target, candidates, cache, reporter)[0])
        unavailable |= dict.fromkeys(sorted(far), why_too_far(recipe))
    for candidate in candidates:
        name = candidate.card.name
        if name in far:
            continue
        try:
            with reporter.bar(f"features {name}") as progress:
                backbone = candidate.load(cache)
                features[name] = extract_features(backbone, known, cache, progress=progress).tensor()
        except SourceError as error:
            if recipe.sources != "all":
                raise
            unavailable[name] = str(error)
    if not features:
        raise no_source(unavailable)
    return features, unavailable


def _trials(
    recipe: Recipe,
    target: Target,
    features: dict[str, torch.Tensor],
    private: Path,
    connection: Connection,
    unavailable: dict[str, str],
) -> list[dict[str, Any]]:
    """Return the figures of each source's bank; `unavailable` gets why some have none.

    Those of trials that an earlier command finished are read from `private`/trials.
    """
    labels = torch.from_numpy(target.known().labels)
    settings = recipe_document(recipe)
    asked = fingerprint([settings["search"], settings["train"]["optimizer"], recipe.seed, len(target.parts["train"])])
    keys = {
        name: tensors_fingerprint({"features": tensor, "labels": labels}, asked) for name, tensor in features.items()
    }
    kept = {name: private / "trials" / f"{name}.json" for name in features}

    def finished() -> dict[str, dict[str, Any]]:
        found = {name: read_json(path) for name, path in kept.items()}
        return {name: one["figures"] for name, one in found.items() if one is not None and one["key"] == keys[name]}

    def keep(figures: dict[str, Any]) -> None:
        name = figures["config"]["source"]
        there = {figure: figures[figure] for figure in (*_FIGURES, "reason") if figure in figures}
        write_json(kept[name], {"key": keys[name], "figures": there})

    before = finished()
    if before:
        Reporter().say(f"{len(before)} of {len(features)} trials were finished by an earlier command")
    if missing := {name: tensor for name, tensor in features.items() if name not in before}:
        (private / "trials").mkdir(exist_ok=True)
        storage = private / "tune"
        shutil.rmtree(storage, ignore_errors=True)
        _run(recipe, target, missing, labels, storage, connection, keep)
        shutil.rmtree(storage, ignore_errors=True)
    all_figures = finished()
    unavailable |= {name: figures["reason"] for name, figures in all_figures.items() if "reason" in figures}
    trials = [{"source": name, **all_figures[name]} for name in features if "reason" not in all_figures[name]]
    if not trials:
        raise no_source(unavailable)
    return trials


def _run(
    recipe: Recipe,
    target: Target,
    features: dict[str, torch.Tensor],
    labels: torch.Tensor,
    storage: Path,
    connection: Connection,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Run a trial a source; `keep` is given what each comes to, when it has finished."""
    # Tune's trials leak their resources when it runs without Ray's dashboard.
    ray = connection.ray(num_workers=1, dashboard=True)
    from ray import tune

    class Keeper(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            keep(trial.last_result)

    stored = {name: ray.put((tensor.clone(), labels)) for name, tensor in features.items()}
    trial = tune.with_parameters(
        _trial,
        stored=stored,
        num_train=len(target.parts["train"]),
        num_classes=target.num_classes,
        recipe=recipe,
    )
    resources = {"cpu": 1, "gpu": min(1, ray.cluster_resources().get("GPU", 0))}
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"source": tune.grid_search(sorted(features))},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max"),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0, callbacks=[Keeper()]),
    )
    # Tune's own handler of SIGINT would return half the trials as if they were all.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's error is raised below, in one line
    # Even at verbose=0 Tune prints its configuration, and stdout is for the result.
    with Reporter().bar("tune"), contextlib.redirect_stdout(io.StringIO()):
        results = tuner.fit()
    if results.errors:
        reason = str(results.errors[0]).strip().splitlines()[-1].removeprefix("headstart.trainer.errors.")
        raise RunError(
            f"{len(results.errors)} of {len(results)} trials failed, the first with {reason}"
        ) from results.errors[0]


def print_trials(document: Trials, console: Console | None = None) -> None:
    """Print the trials as a table, the best first, in columns for which there is room."""
    console = console or stdout_console(120)
    trials = document["trials"]
    columns = {
        "source": [trial["source"] for trial in trials],
        "heads": [str(trial["num_heads"]) for trial in trials],
        "accuracy": [f"{trial['accuracy']:.4f}" for trial in trials],
        "loss": [f"{trial['loss']:.4f}" for trial in trials],
        "rate": [f"{trial['learning_rate']:g}" for trial in trials],
        "decay": [f"{trial['weight_decay']:g}" for trial in trials],
        "seed": [str(trial["seed"]) for trial in trials],
    }
    print_table(
        f"Banks of heads for {document['name']}, each with its best",
        columns,
        console,
        leave_out=("heads", "seed", "loss"),
        elsewhere="tune.json",
    )
    print_unavailable(document["unavailable"], console)


def _trial(
    config: dict[str, str], *, stored: dict[str, Any], num_train: int, num_classes: int, recipe: Recipe
) -> dict[str, float | str]:
    """Return the figures of one bank, or with `all` the `reason` why there are none."""
    import ray

    features, labels = ray.get(stored[config["source"]])
    try:
        found = audition(
            features[:num_train],
            labels[:num_train],
            features[num_train:],
            labels[num_train:],
            num_classes=num_classes,
            search=recipe.search,
            optimizer=recipe.train.optimizer,
            seed=recipe.seed,
            device="cuda" if torch.cuda.is_available() else "cpu",  # Ray hides what the trial was not given
        )
    except RecipeError as error:  # all of its heads diverged
        if recipe.sources != "all":
            raise
        return {"accuracy": 0.0, "reason": str(error)}
    setting = found.setting
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "learning_rate": setting.learning_rate,
        "weight_decay": setting.weight_decay,
        "seed": setting.seed,
        "num_heads": len(head_settings(recipe.search)),
    }

"""The stages that decide: fine-tuning the best source, training the control, choosing the mode."""

import csv
import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from headstart.cluster.fit import fit
from headstart.cluster.fit_worker import Row
from headstart.cluster.recipe_file import recipe_document
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.model import Model, auditioned, load_source
from headstart.cluster.stages.rank import tunable_source
from headstart.cluster.stages.run_directory import Result, Stage
from headstart.cluster.stages.run_directory import fingerprint as fingerprint_of
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.errors import RecipeError, SourceError
from headstart.trainer.evaluation import Choice, choose_mode
from headstart.trainer.features import CachedFeatures, extract_features
from headstart.trainer.files import write_atomically
from headstart.trainer.loop import Task
from headstart.trainer.recipe import Mode
from headstart.trainer.transfer import build_classifier


def tune_source(context: Context, ranked: Stage) -> Stage | None:
    """Fine-tune the best source under Ray Train; None where the mode trains no backbone."""
    mode: Mode = "finetune" if context.recipe.mode == "auto" else context.recipe.mode
    entry = tunable_source(ranked.result)
    if mode == "feature" or (entry is None and context.recipe.mode == "auto"):
        return None
    if entry is None:
        raise SourceError(f"mode {mode} trains a backbone, and every available source is a frozen graph; add another")
    rates = context.recipe.train.scratch_learning_rates if mode == "scratch" else ()
    return _fit_stage(context, "fit", mode, entry["source"], rates or (context.recipe.train.learning_rate,), ranked)


def train_control(context: Context, ranked: Stage) -> Stage | None:
    """Train the architecture from its own random start; None where that is the mode, or nothing can be trained."""
    entry = tunable_source(ranked.result)
    if entry is None or context.recipe.mode == "scratch":
        return None
    rates = context.recipe.train.scratch_learning_rates
    return _fit_stage(context, "control", "scratch", entry["source"], rates, ranked)


def _fit_stage(context: Context, name: str, mode: Mode, source: str, rates: Sequence[float], ranked: Stage) -> Stage:
    weights, storages = context.run.private / f"{name}.safetensors", context.run.private / "ray"
    train = recipe_document(context.recipe)["train"]
    inputs = {
        "ranked": ranked.key,
        "mode": mode,
        "source": source,
        "rates": list(rates),
        "train": train,
        "seed": context.recipe.seed,
    }

    def make() -> tuple[Result, list[CachedFeatures]]:
        backbone = load_source(context, source)
        head = auditioned(context, source).head if mode == "finetune" else None
        model = build_classifier(mode, backbone, context.target.num_classes, head=head, seed=context.recipe.seed)
        task = Task(
            train=context.target.part("train"),
            validation=context.target.part("validation"),
            preprocess=backbone.preprocess,
        )
        storage = storages / f"{name}-{fingerprint_of(inputs)[:12]}"
        with context.reporter.bar(f"{mode} {source}") as progress:
            done = [0]

            def on_epoch(row: Row, total: int) -> None:
                done[0] += 1
                progress(done[0], total)

            def on_wait() -> None:
                context.reporter.say(
                    "the training waits for a place in Ray: others have its CPUs or GPUs, or a machine of it is gone. "
                    "Half an hour at the most; Ctrl-C keeps what is finished"
                )

            fitted = fit(
                model,
                task,
                context.recipe.train,
                learning_rates=rates,
                seed=context.recipe.seed,
                connection=context.connection,
                storage=storage,
                on_epoch=on_epoch,
                on_wait=on_wait,
            )
        if fitted.diverged and not (mode == "finetune" and context.recipe.mode == "auto"):  # which has another model
            field = "scratch_learning_rates" if mode == "scratch" else "learning_rate"
            told = ", ".join(f"{rate:g}" for rate in rates)
            raise RecipeError(f"training {source} in mode {mode} diverged: train.{field} is {told}; set less")
        write_atomically(weights, save(fitted.weights))
        return {
            "mode": mode,
            "source": source,
            "learning_rate": fitted.learning_rate,
            "validation_accuracy": fitted.validation_accuracy,
            "diverged": fitted.diverged,
            "rows": fitted.rows,
        }, []

    stage = context.run.stage(name, inputs, lambda: [weights], make)
    for storage in storages.glob(f"{name}-*"):  # only now that nothing is lost with them; those of earlier recipes too
        shutil.rmtree(storage, ignore_errors=True)
    return stage


def fitted_model(context: Context, name: str, stage: Stage) -> Model:
    """Return the model that the stage `name` trained."""
    mode, source = stage.result["mode"], stage.result["source"]
    backbone = load_source(context, source)
    model = build_classifier("full", backbone, context.target.num_classes, head=None, seed=0)
    model.load_state_dict(load_file(context.run.private / f"{name}.safetensors"))
    fingerprint = tensors_fingerprint(model.backbone.state_dict(), backbone.architecture, mode)
    backbone = replace(backbone, module=model.backbone.eval(), fingerprint=fingerprint)
    return Model(source=source, mode=mode, backbone=backbone, head=model.head.eval())


def validation_logits(context: Context, model: Model, used: list[CachedFeatures]) -> Tensor:
    """Return logits [N, C] on validation; a frozen source has those images' features from its audition already."""
    frozen = model.mode == "feature"
    images = context.target.known() if frozen else context.target.part("validation")
    cached = extract_features(model.backbone, images, context.cache, tag=context.tag)
    used.append(cached)
    return model.logits(cached.tensor()[len(context.target.parts["train"]) if frozen else 0 :])


def choose(context: Context, ranked: Stage, tuned: Stage | None) -> Stage:
    """Choose the mode by validation accuracy; within one standard error the cheaper, `feature`."""
    best = ranked.result["ranking"][0]["source"]
    inputs = {
        "ranked": ranked.key,
        "best": best,  # another one under the same key, where a source has become available
        "tuned": tuned.key if tuned else None,
        "mode": context.recipe.mode,
    }

    def make() -> tuple[Result, list[CachedFeatures]]:
        if tuned is None or context.recipe.mode != "auto":
            mode = "feature" if tuned is None else tuned.result["mode"]
            why = f"the recipe asks for mode {context.recipe.mode}"
            if context.recipe.mode == "auto":
                why = "no available source can be fine-tuned"
            return {"mode": mode, "source": tuned.result["source"] if tuned else best, "reason": why}, []
        if tuned.result.get("diverged"):  # of which earlier versions said nothing
            why = f"fine-tuning diverged at train.learning_rate {tuned.result['learning_rate']:g}; less may do"
            return {"mode": "feature", "source": best, "reason": why}, []
        labels = context.target.part("validation").labels
        used: list[CachedFeatures] = []
        correct = [
            (validation_logits(context, model, used).argmax(1).numpy() == labels)
            for model in (auditioned(context, best), fitted_model(context, "fit", tuned))
        ]
        choice: Choice = choose_mode(*correct)
        return {
            "mode": choice.mode,
            "source": best if choice.mode == "feature" else tuned.result["source"],
            "reason": choice.reason,
            "difference": choice.difference,
            "standard_error": choice.standard_error,
        }, used

    return context.run.stage("choose", inputs, lambda: [], make)


def chosen_model(context: Context, chosen: Stage, tuned: Stage | None) -> Model:
    """Return the model that the choice fell on."""
    if chosen.result["mode"] == "feature":
        return auditioned(context, chosen.result["source"])
    assert tuned is not None  # only a fit makes another mode
    return fitted_model(context, "fit", tuned)


def write_training_csv(path: Path, fits: dict[str, Stage | None]) -> None:
    """Write an epoch a row for each fit, its job beside it; nothing was trained where there is no file."""
    stages = {name: stage.result for name, stage in fits.items() if stage is not None}
    rows = [{"job": name, "mode": fit["mode"], **row} for name, fit in stages.items() for row in fit["rows"]]
    if not rows:
        path.unlink(missing_ok=True)  # an earlier recipe's
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())

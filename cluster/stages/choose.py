"""The stages that decide: ranking the sources, fine-tuning the best, training the control, choosing the mode."""

import csv
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headstart.cluster.fit import Row, fit
from headstart.cluster.recipe_file import recipe_document
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.run_directory import Result, Stage, write_json
from headstart.cluster.stages.run_directory import fingerprint as fingerprint_of
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.errors import SourceError
from headstart.trainer.evaluation import Choice, choose_mode
from headstart.trainer.features import CachedFeatures, extract_features
from headstart.trainer.files import write_atomically
from headstart.trainer.loop import Task
from headstart.trainer.recipe import Mode
from headstart.trainer.selection.ranking import assess, make_sketch, sketch_distances, sketched
from headstart.trainer.selection.sources import Candidate, catalog, resolve
from headstart.trainer.transfer import build_classifier

PROBE = "mobilenet-v2-imagenet"
"""The one backbone under which tasks are compared: small, packaged, and of a broad source task."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A backbone and the head on it: what is evaluated, exported and registered."""

    source: str
    mode: Mode
    backbone: Backbone
    head: nn.Linear

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [N, C] for features [N, D] of this model's backbone."""
        with torch.no_grad():
            logits: Tensor = self.head(features)
        return logits


def load_probe(context: Context) -> Backbone:
    """Return the probe backbone, or raise `SourceError` when its weights are not to be had."""
    return Candidate(card=catalog()[PROBE]).load(context.cache)


def rank(context: Context) -> Stage:
    """Rank the sources; writes ranking.json and each source's best head."""
    recipe = context.recipe
    candidates = resolve(recipe.sources, context.cache, exclude_data=context.target.images.fingerprint)
    document = recipe_document(recipe)
    inputs = {
        "data": context.data_key,
        "sources": [candidate.fingerprint for candidate in candidates],
        "search": document["search"],
        "optimizer": recipe.train.optimizer,
        "seed": recipe.seed,
    }
    heads = context.run.private / "heads"

    def make() -> tuple[Result, list[CachedFeatures]]:
        used: list[CachedFeatures] = []
        entries = [_audition(context, candidate, heads, used) for candidate in candidates]
        if not any(entry["available"] for entry in entries):
            reasons = "\n".join(f"  {entry['source']}: {entry['reason']}" for entry in entries)
            raise SourceError(f"no source can be used here:\n{reasons}")
        _add_distances(context, candidates, entries, used)
        # The best audition first; a tie goes to the better score, then to the order of the recipe.
        entries.sort(key=lambda e: (not e["available"], -(e["audition_accuracy"] or 0), -(e["score"] or 0)))
        result = {"schema": 1, "target": context.recipe.name, "probe": PROBE, "ranking": entries}
        write_json(context.run.path / "ranking.json", result)
        return result, used

    def nothing_new(result: Result) -> bool:
        lacking = {entry["source"] for entry in result["ranking"] if not entry["available"]}
        return not any(_loads(context, candidate) for candidate in candidates if candidate.card.name in lacking)

    return context.run.stage(
        "rank", inputs, lambda: [context.run.path / "ranking.json", *heads.glob("*.safetensors")], make, nothing_new
    )


def _loads(context: Context, candidate: Candidate) -> bool:
    """Say whether a source that was unavailable has become available."""
    try:
        candidate.load(context.cache)
    except SourceError:
        return False
    return True


def _audition(context: Context, candidate: Candidate, heads: Path, used: list[CachedFeatures]) -> dict[str, Any]:
    card = candidate.card
    entry: dict[str, Any] = {
        "source": card.name,
        "task": card.task,
        "licence": card.licence,
        "architecture": card.architecture,
        "available": False,
        "tunable": False,
        "reason": None,
        "distance": None,
        "distances": None,
        "score": None,
        "knn": None,
        "ridge": None,
        "audition_accuracy": None,
        "seconds": None,
    }
    try:
        with context.reporter.bar(f"audition {card.name}") as progress:
            backbone = candidate.load(context.cache)
            found = assess(backbone, context.target, context.recipe, context.cache, tag=context.tag, progress=progress)
    except SourceError as error:
        if context.recipe.sources != "all":
            raise
        return entry | {"reason": str(error)}
    used.append(found.features)
    heads.mkdir(exist_ok=True)
    save_head(heads / f"{card.name}.safetensors", found.head)
    return entry | {
        "available": True,
        "tunable": backbone.tunable,
        "score": found.score,
        "knn": found.knn,
        "ridge": found.ridge,
        "audition_accuracy": found.audition_accuracy,
        "seconds": round(found.seconds, 3),
    }


def _add_distances(
    context: Context,
    candidates: Sequence[Candidate],
    entries: list[dict[str, Any]],
    used: list[CachedFeatures],
) -> None:
    """Measure the distance to the sources that have a sketch, where there are any and the probe is to be had."""
    sketches = {c.card.name: sketch for c in candidates if (sketch := c.sketch()) is not None}
    if not sketches:
        return
    try:
        probe = load_probe(context)
    except SourceError as error:
        context.reporter.say(f"no task distances: {error}")
        return
    mine, cached = make_sketch(probe, sketched(context.target, context.recipe.seed), context.cache, tag=context.tag)
    used.append(cached)
    comparable = {name: sketch for name, sketch in sketches.items() if sketch.probe == mine.probe}
    distances = dict(zip(comparable, sketch_distances(mine, list(comparable.values())), strict=True))
    for entry in entries:
        if entry["source"] in distances:
            entry["distances"] = distances[entry["source"]]
            entry["distance"] = entry["distances"]["energy"]


def tunable_source(ranking: Result) -> dict[str, Any] | None:
    """Return the best available source whose backbone can be trained, or None."""
    return next((entry for entry in ranking["ranking"] if entry["available"] and entry["tunable"]), None)


def load_source(context: Context, name: str) -> Backbone:
    """Load a source of the ranking by its name."""
    candidates = resolve(context.recipe.sources, context.cache, exclude_data=context.target.images.fingerprint)
    return next(c for c in candidates if c.card.name == name).load(context.cache)


def auditioned(context: Context, name: str) -> Model:
    """Return the frozen source with its best head: the model of mode `feature`."""
    head = load_head(context.run.private / "heads" / f"{name}.safetensors")
    return Model(source=name, mode="feature", backbone=load_source(context, name), head=head)


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
    weights = context.run.private / f"{name}.safetensors"
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
        storage = context.run.private / "ray" / f"{name}-{fingerprint_of(inputs)[:12]}"
        with context.reporter.bar(f"{mode} {source}") as progress:
            done = [0]

            def on_epoch(row: Row, total: int) -> None:
                done[0] += 1
                progress(done[0], total)

            fitted = fit(
                model,
                task,
                context.recipe.train,
                learning_rates=rates,
                seed=context.recipe.seed,
                connection=context.connection,
                storage=storage,
                on_epoch=on_epoch,
            )
        save_file(fitted.weights, weights)
        shutil.rmtree(storage, ignore_errors=True)
        return {
            "mode": mode,
            "source": source,
            "learning_rate": fitted.learning_rate,
            "validation_accuracy": fitted.validation_accuracy,
            "rows": fitted.rows,
        }, []

    return context.run.stage(name, inputs, lambda: [weights], make)


def fitted_model(context: Context, name: str, stage: Stage) -> Model:
    """Return the model that the stage `name` trained."""
    mode, source = stage.result["mode"], stage.result["source"]
    backbone = load_source(context, source)
    model = build_classifier(
        "scratch" if mode == "scratch" else "full", backbone, context.target.num_classes, head=None, seed=0
    )
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
    inputs = {"ranked": ranked.key, "tuned": tuned.key if tuned else None, "mode": context.recipe.mode}

    def make() -> tuple[Result, list[CachedFeatures]]:
        if tuned is None or context.recipe.mode != "auto":
            mode = "feature" if tuned is None else tuned.result["mode"]
            why = f"the recipe asks for mode {context.recipe.mode}"
            if context.recipe.mode == "auto":
                why = "no available source can be fine-tuned"
            return {"mode": mode, "source": tuned.result["source"] if tuned else best, "reason": why}, []
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
    """Write an epoch a row for each fit, its job beside it."""
    stages = {name: stage.result for name, stage in fits.items() if stage is not None}
    rows = [{"job": name, "mode": fit["mode"], **row} for name, fit in stages.items() for row in fit["rows"]]
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())


def save_head(path: Path, head: nn.Linear) -> None:
    """Store a head as safetensors: weight [C, D], bias [C]."""
    save_file({name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}, path)


def load_head(path: Path) -> nn.Linear:
    """Read a head that `save_head` wrote."""
    state = load_file(path)
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    head.load_state_dict(state)
    return head.eval()

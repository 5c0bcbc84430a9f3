"""The stages that make packages: the proven fp32 one, and the variants beside it that the recipe asks for."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.markup import escape
from torch import nn

from headstart.cluster.stages.context import Context
from headstart.cluster.stages.model import Model, ranked_source
from headstart.cluster.stages.run_directory import Result, Stage, fingerprint
from headstart.serving.errors import PackageError
from headstart.serving.export import OnnxStage, export_package
from headstart.serving.manifest import Drift
from headstart.serving.variants import PARITY_TOLERANCES, make_variant
from headstart.trainer.features import CachedFeatures, extract_features
from headstart.trainer.inputs.batches import to_pixels
from headstart.trainer.inputs.dataset import LabelledImages

NUM_PARITY_SAMPLES = 16
LATENCY_RUNS = 200
NUM_CALIBRATION_IMAGES = 128
MAX_VARIANT_IMAGES = 2000
"""Validation images that a variant and fp32 are compared on, one by one."""
MAX_DRIFT_IMAGES = 1000
"""Training images that a tuned backbone, whose features nobody has seen yet, is run on for the drift record."""


def export(context: Context, model: Model, chosen: Stage, evaluated: Stage) -> Stage:
    """Write the package: one ONNX graph from uint8 images to probabilities, proven against PyTorch."""
    package = context.run.path / "package"
    recipe = context.recipe
    inputs = {
        "model": chosen.key,
        "temperature": evaluated.result["temperature"],
        "export": {name: getattr(recipe.export, name) for name in ("opset", "tolerance", "features")},
        "name": recipe.name,
    }
    card = ranked_source(context, model.source).card

    def reference(images: np.ndarray) -> np.ndarray:
        pixels = to_pixels(list(images), model.backbone.preprocess)
        logits: np.ndarray = model.logits(model.backbone.features(pixels)).numpy()
        return logits

    def make() -> tuple[Result, list[CachedFeatures]]:
        backbone = model.backbone
        middle: nn.Module | OnnxStage
        if backbone.onnx is None:
            assert backbone.module is not None  # a backbone has a module or a graph
            middle = backbone.module
        else:
            graph = backbone.onnx
            middle = OnnxStage(path=graph.path, input=graph.input_name, output=graph.output_name)
        used: list[CachedFeatures] = []
        with context.reporter.bar("export") as progress:
            drift = _drift(context, model, used, progress) if recipe.export.features else None
            manifest = export_package(
                package,
                name=recipe.name,
                stages=[backbone.preprocess, middle, model.head],
                labels=context.target.images.classes,
                temperature=evaluated.result["temperature"],
                reference=reference,
                samples=_samples(context),
                preprocessing=asdict(backbone.preprocessing),
                licence=card.licence,
                drift=drift,
                opset=recipe.export.opset,
                tolerance=recipe.export.tolerance,
                latency_runs=LATENCY_RUNS,
                provenance={
                    "recipe": fingerprint(inputs),
                    "data": context.target.images.fingerprint,
                    "source": model.source,
                    "mode": model.mode,
                    "backbone": backbone.fingerprint,
                },
            )
        for name in PARITY_TOLERANCES:  # those of an earlier package
            shutil.rmtree(_variant_folder(context, name), ignore_errors=True)
        return {"manifest": asdict(manifest)}, used

    return context.run.stage("export", inputs, lambda: [p for p in package.iterdir() if p.is_file()], make)


def _drift(
    context: Context, model: Model, used: list[CachedFeatures], progress: Callable[[int, int], None]
) -> Drift | None:
    """Moments of the training images' features: of all where an audition has cached them, else of some.

    None where all images have the same features, so that there is no distance to measure drift by.
    """
    frozen, train = model.mode == "feature", context.target.part("train")
    images = context.target.known() if frozen else _drawn(train, MAX_DRIFT_IMAGES, context.recipe.seed)
    cached = extract_features(model.backbone, images, context.cache, tag=context.tag, progress=progress)
    used.append(cached)
    features = cached.tensor()[: len(train)].double()
    mean = features.mean(dim=0)
    spread = float((features - mean).square().sum(dim=1).mean().sqrt())
    # As many digits as float32 has.
    means = tuple(float(f"{value:.7g}") for value in mean.tolist())
    return Drift(mean=means, spread=spread, num_images=len(features)) if spread > 0 else None


def _drawn(images: LabelledImages, number: int, seed: int) -> LabelledImages:
    """At most `number` of the images, drawn without looking."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:number]
    return images.subset(np.sort(chosen))


def export_variants(context: Context, exported: Stage) -> dict[str, Stage]:
    """Write the variants that the recipe asks for beside the package; one that loses too much is told and left out."""
    return {name: _export_variant(context, name, exported) for name in context.recipe.export.variants}


def _export_variant(context: Context, name: str, exported: Stage) -> Stage:
    seed, max_loss = context.recipe.seed, context.recipe.export.max_loss
    folder = _variant_folder(context, name)
    inputs = {
        "package": exported.key,
        "files": exported.result["manifest"]["files"],
        "data": context.data_key,
        "max_loss": max_loss,
        "seed": seed,
    }

    def make() -> tuple[Result, list[CachedFeatures]]:
        validation = context.target.part("validation")
        judged = _drawn(validation, MAX_VARIANT_IMAGES, seed)
        calibration = _drawn(context.target.part("train"), NUM_CALIBRATION_IMAGES, seed)
        with context.reporter.bar(f"export {name}") as progress:

            def labelled() -> Iterator[tuple[np.ndarray, int]]:
                for index, label in enumerate(judged.labels):
                    yield judged.image(index), int(label)
                    progress(index + 1, len(judged))

            try:
                manifest = make_variant(
                    name,
                    context.run.path / "package",
                    folder,
                    samples=_samples(context),
                    validation=labelled(),
                    calibration=map(calibration.image, range(len(calibration))),
                    max_loss=max_loss,
                    latency_runs=LATENCY_RUNS,
                )
            except PackageError as error:
                shutil.rmtree(folder, ignore_errors=True)
                context.reporter.say(f"[bold]No {name} package[/bold]: {escape(str(error))}")
                return {"manifest": None, "refused": str(error)}, []
        return {"manifest": asdict(manifest), "refused": None}, []

    return context.run.stage(f"export-{name}", inputs, lambda: folder.iterdir() if folder.exists() else [], make)


def _variant_folder(context: Context, name: str) -> Path:
    return context.run.path / f"package-{name}"


def _samples(context: Context) -> list[np.ndarray]:
    """Validation images for the proof of parity, drawn: the first ones may be of one class."""
    drawn = _drawn(context.target.part("validation"), NUM_PARITY_SAMPLES, context.recipe.seed)
    return [drawn.image(i) for i in range(len(drawn))]

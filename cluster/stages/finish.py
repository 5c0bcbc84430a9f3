"""The stages that conclude: evaluation with its controls, and the way back into the list of sources."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headstart.cluster.report.plots import plot_confusion, plot_learning
from headstart.cluster.stages.choose import fitted_model, validation_logits
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.distances import load_probe
from headstart.cluster.stages.model import Model, ranked_source
from headstart.cluster.stages.run_directory import Result, Stage, write_json
from headstart.trainer.backbones.weights import fetch_weights, is_fetchable
from headstart.trainer.errors import SourceError
from headstart.trainer.evaluation import (
    accuracy_interval,
    expected_calibration_error,
    fit_temperature,
    mcnemar_p_value,
    paired_interval,
    raw_pixels_control,
    verdict,
)
from headstart.trainer.features import CachedFeatures, extract_features
from headstart.trainer.inputs.batches import pixel_batches
from headstart.trainer.inputs.dataset import PARTS, LabelledImages
from headstart.trainer.inputs.near_copies import near_copies
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.inputs.split import duplicates_between, num_contents_of_several_classes, num_repeats
from headstart.trainer.selection.ranking import make_sketch, sketched
from headstart.trainer.selection.registry import register, registered_name
from headstart.trainer.selection.sources import SourceCard, image_id, write_source

RAW_SIDE = 16
EVALUATION_SCHEMA = 6
"""2: Wilson's intervals of the accuracies, and `verdict_p_value`. 3: `class_accuracy` of a class without test images is
None; the control from scratch says its `architecture`. 4: `num_contents_of_several_classes`. 5:
`num_repeated_test_images`, `largest_class`. 6: `num_test_images_nearly_in_training`."""


def evaluate(context: Context, model: Model, chosen: Stage, control: Stage | None, tuned: Stage | None) -> Stage:
    """Measure the chosen model and its controls on the test images; writes evaluation.json and two pictures."""
    inputs = {
        "schema": EVALUATION_SCHEMA,
        "model": chosen.key,
        "control": control.key if control else None,
        "tuned": tuned.key if tuned else None,
        "seed": context.recipe.seed,
    }
    path = context.run.path
    files = [path / "evaluation.json", path / "confusion.png"]
    if tuned or control:
        files.append(path / "learning.png")

    def make() -> tuple[Result, list[CachedFeatures]]:
        used: list[CachedFeatures] = []
        validation, test = context.target.part("validation"), context.target.part("test")
        with context.reporter.bar("evaluate") as progress:
            logits = _logits(context, model, test, used, progress)
        temperature = fit_temperature(validation_logits(context, model, used).numpy(), validation.labels)
        correct = _correct(logits, test)
        controls: dict[str, np.ndarray] = {}
        if control is not None:
            scratch = fitted_model(context, "control", control)
            with context.reporter.bar("evaluate scratch") as progress:
                controls["scratch"] = _correct(_logits(context, scratch, test, used, progress), test)
        pixels = _pixels(context)
        controls["raw_pixels"] = _raw_pixels(context, pixels)
        result = _conclude(context, chosen.result, logits, temperature, correct, controls)
        result["num_test_images_nearly_in_training"] = _num_near_copies(context, pixels)
        if control is not None:  # of a frozen graph nothing can be trained: another source's architecture is
            result["controls"]["scratch"]["architecture"] = scratch.backbone.architecture
        write_json(path / "evaluation.json", result)
        plot_confusion(path / "confusion.png", test.labels, logits.argmax(1).numpy(), test.classes, context.recipe.name)
        fits = {name: stage.result for name, stage in (("fit", tuned), ("control", control)) if stage}
        if fits:
            plot_learning(path / "learning.png", fits, context.recipe.name)
        else:
            (path / "learning.png").unlink(missing_ok=True)  # an earlier recipe's
        return result, used

    return context.run.stage("evaluate", inputs, lambda: files, make)


def _logits(
    context: Context,
    model: Model,
    images: LabelledImages,
    used: list[CachedFeatures],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    cached = extract_features(model.backbone, images, context.cache, tag=context.tag, progress=progress)
    used.append(cached)
    return model.logits(cached.tensor())


def _correct(logits: Tensor, images: LabelledImages) -> np.ndarray:
    correct: np.ndarray = (logits.argmax(1) == torch.from_numpy(images.labels)).numpy()
    return correct


def _pixels(context: Context) -> dict[str, np.ndarray]:
    """Return the 16x16 pixels of the images of each part, [N, D]; grey ones where all images are."""
    channels: Literal[1, 3] = 1 if bool(context.target.images.grey.all()) else 3
    preprocess = Preprocess(
        Preprocessing(resize=RAW_SIDE, crop=RAW_SIDE, channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    )

    def pixels(images: LabelledImages) -> np.ndarray:
        batches = np.split(np.arange(len(images)), range(256, len(images), 256))
        return torch.cat(list(pixel_batches(images, batches, preprocess))).flatten(1).numpy()

    return {name: pixels(context.target.part(name)) for name in PARTS}


def _raw_pixels(context: Context, pixels: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which test images a logistic regression on their pixels has right."""
    train, validation, test = (context.target.part(name).labels for name in PARTS)
    with context.reporter.bar("evaluate raw pixels") as progress:
        predicted = raw_pixels_control(
            pixels["train"], train, pixels["validation"], validation, pixels["test"], progress=progress
        )
    correct: np.ndarray = predicted == test
    return correct


def _num_near_copies(context: Context, pixels: Mapping[str, np.ndarray]) -> int:
    """Count the test images that are known ones saved anew; those of the very same content are counted elsewhere."""
    known = set(context.target.known().digests)
    new = np.array([digest not in known for digest in context.target.part("test").digests])
    near = near_copies(pixels["test"], np.concatenate([pixels["train"], pixels["validation"]]))
    return int((near & new).sum())


def _conclude(
    context: Context,
    choice: Result,
    logits: Tensor,
    temperature: float,
    correct: np.ndarray,
    controls: dict[str, np.ndarray],
) -> Result:
    """Compare with the stronger control, so that `transfer` means better than both."""
    test = context.target.part("test")
    difference, p_value, against = None, None, None
    if choice["mode"] != "scratch":  # which takes nothing over, so that there is nothing to judge
        against = max(controls, key=lambda name: controls[name].mean())
        difference = paired_interval(correct, controls[against], seed=context.recipe.seed)
        p_value = mcnemar_p_value(correct, controls[against])
    probabilities = torch.softmax(logits / temperature, dim=1)
    known, tests = (
        np.concatenate([context.target.parts[p] for p in ("train", "validation")]),
        context.target.parts["test"],
    )
    return {
        "schema": EVALUATION_SCHEMA,
        "choice": choice,
        "test": _accuracy(correct) | {"num_samples": len(test)},
        "controls": {
            name: _accuracy(controls[name]) if name in controls else None for name in ("scratch", "raw_pixels")
        },
        "verdict": None if difference is None or p_value is None else verdict(difference, p_value),
        "verdict_interval": list(difference) if difference else None,
        "verdict_p_value": p_value,
        "verdict_control": against,
        "temperature": temperature,
        "calibration_error": expected_calibration_error(probabilities.numpy(), test.labels),
        "class_accuracy": {
            name: float(of_class.mean()) if len(of_class) else None  # a test part that the data brings may lack a class
            for label, name in enumerate(test.classes)
            for of_class in [correct[test.labels == label]]
        },
        "largest_class": _largest_class(test),
        "num_test_images_also_in_training": duplicates_between(context.target.images, known, tests),
        "num_repeated_test_images": num_repeats(context.target.images, tests),
        "num_contents_of_several_classes": num_contents_of_several_classes(context.target.images),
    }


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
    return {"accuracy": float(correct.mean()), "interval": list(accuracy_interval(correct))}


def _largest_class(images: LabelledImages) -> dict[str, Any]:
    """Return the class that most images have, and the share of them: what always naming it would be right for."""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    return {"name": images.classes[int(counts.argmax())], "share": float(counts.max() / counts.sum())}


def register_source(context: Context, model: Model, chosen: Stage) -> Stage:
    """Write the run's `source/` folder and put a copy into the cache's list of sources."""
    folder = context.run.path / "source"
    origin = ranked_source(context, model.source)
    seen, lacks = frozenset(map(image_id, context.target.known().digests)), ""
    # From scratch nothing is taken over, and so nothing that the source has seen.
    if model.mode != "scratch" and origin.base is not None:
        earlier = origin.seen()
        seen |= earlier or frozenset()
        lacks = origin.card.seen_lacks or (origin.card.name if earlier is None else "")
    card = _card(context, model, origin.card, lacks)
    inputs = {
        "model": chosen.key,
        "data": context.data_key,
        "name": card.name,
        "seen": sorted(map(bytes.hex, seen)),
        "lacks": lacks,
    }

    def make() -> tuple[Result, list[CachedFeatures]]:
        try:
            probe = load_probe(context.cache)
        except SourceError as error:
            raise SourceError(f"the run is finished, but cannot become a source without the probe: {error}") from error
        with context.reporter.bar("sketch") as progress:
            images = sketched(context.target, context.recipe.seed)
            sketch, cached = make_sketch(probe, images, context.cache, tag=context.tag, progress=progress)
        state = model.backbone.module.state_dict() if model.backbone.module is not None else None
        graph = None
        if state is None and not is_fetchable(origin.card.weights):
            graph = fetch_weights(origin.card.weights, origin.card.sha256, context.cache, base=origin.base).path
        write_source(folder, card, state, model.head.state_dict(), sketch, seen=seen, graph=graph)
        return {"name": card.name}, [cached]

    stage = context.run.stage("register", inputs, lambda: sorted(folder.iterdir()), make)
    register(folder, context.cache)
    return stage


def _card(context: Context, model: Model, source: SourceCard, lacks: str) -> SourceCard:
    images = context.target.images
    return SourceCard(
        name=registered_name(context.recipe.name, images.fingerprint, context.cache),
        task=f"{len(images.classes)} classes: {', '.join(images.classes[:10])}",
        architecture=source.architecture,
        weights=source.weights,
        sha256=source.sha256,
        licence=source.licence,
        preprocessing=source.preprocessing,
        classes=images.classes,
        data_fingerprint=images.fingerprint,
        seen_lacks=lacks,
        notes=f"made by Headstart from {model.source} in mode {model.mode}"
        + (f"; which images {lacks} learned from is not known" if lacks else ""),
    )

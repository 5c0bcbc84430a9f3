"""What the evaluation reports, from outcomes that are known."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from headstart.cluster.stages import finish
from headstart.cluster.stages.choose import fitted_model
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.finish import _conclude, _num_near_copies, _pixels, _raw_pixels, evaluate, register_source
from headstart.cluster.stages.model import Model, load_source
from headstart.cluster.stages.run_directory import Stage, write_json
from headstart.trainer.backbones.card import card_to_yaml
from headstart.trainer.backbones.weights import file_sha256
from headstart.trainer.errors import SourceError
from headstart.trainer.evaluation import (
    accuracy_interval,
    fit_temperature,
    mcnemar_p_value,
    paired_interval,
    raw_pixels_control,
)
from headstart.trainer.inputs.batches import to_pixels
from headstart.trainer.inputs.dataset import ImageArrays
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.recipe import Mode
from headstart.trainer.selection.ranking import Target
from headstart.trainer.selection.source_folder import WEIGHTS, read_card, read_seen
from headstart.trainer.selection.sources import SourceCard, catalog, find_source, image_id
from headstart.trainer.transfer import build_classifier


def right(num: int, of: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(of) < num


def conclude(context: Context, mode: str, correct: np.ndarray, controls: dict[str, np.ndarray]) -> dict:
    labels = torch.from_numpy(context.target.part("test").labels)
    logits = 3 * torch.nn.functional.one_hot(torch.where(torch.from_numpy(correct), labels, (labels + 1) % 10), 10)
    return _conclude(context, {"mode": mode}, logits.float(), 1.5, correct, controls)


def test_a_model_is_compared_with_the_stronger_control_image_by_image(context: Context):
    labels = context.target.part("test").labels
    correct, weak, strong = right(330, 363, 0), right(200, 363, 1), right(280, 363, 2)
    for controls in ({"scratch": weak, "raw_pixels": strong}, {"scratch": strong, "raw_pixels": weak}):
        found = conclude(context, "feature", correct, controls)
        against = next(name for name, outcome in controls.items() if outcome is strong)
        assert found["verdict_control"] == against
        assert found["verdict_interval"] == list(paired_interval(correct, strong, seed=4))
        assert found["verdict_p_value"] == mcnemar_p_value(correct, strong)
        assert found["verdict"] == "transfer"
        assert found["test"] == {
            "accuracy": pytest.approx(330 / 363), "interval": list(accuracy_interval(correct)), "num_samples": 363,
        }  # fmt: skip
        assert found["controls"] == {
            name: {"accuracy": pytest.approx(outcome.mean()), "interval": list(accuracy_interval(outcome))}
            for name, outcome in controls.items()
        }
    shares = {str(label): correct[labels == label].mean() for label in range(10)}
    assert found["class_accuracy"] == pytest.approx(shares)
    assert len(set(shares.values())) > 5
    sure = np.exp(2) / (np.exp(2) + 9)  # logits 3 at temperature 1.5
    assert found["calibration_error"] == pytest.approx(330 / 363 - sure, abs=1e-6)
    assert found["num_test_images_also_in_training"] == 3
    assert found["num_repeated_test_images"] == 1
    assert found["largest_class"] == {
        "name": str(np.bincount(labels).argmax()), "share": pytest.approx(np.bincount(labels).max() / 363)
    }  # fmt: skip
    assert found["num_contents_of_several_classes"] == 0
    images = context.target.images
    twice = dataclasses.replace(images, digests=(*images.digests[:1], images.digests[0], *images.digests[2:]))
    context = dataclasses.replace(context, target=dataclasses.replace(context.target, images=twice))
    assert images.labels[0] != images.labels[1]
    assert conclude(context, "feature", correct, controls)["num_contents_of_several_classes"] == 1


def test_a_class_without_test_images_has_no_accuracy(context: Context, tmp_path: Path):
    images, parts = context.target.images, context.target.parts
    without_nines = parts["test"][images.labels[parts["test"]] != 9]
    context = dataclasses.replace(context, target=Target(images=images, parts=parts | {"test": without_nines}))
    correct = right(len(without_nines), len(without_nines), 0)
    found = conclude(context, "feature", correct, {"raw_pixels": ~correct})
    assert found["class_accuracy"] == {str(label): 1.0 for label in range(9)} | {"9": None}
    write_json(tmp_path / "evaluation.json", found)


def test_a_model_worse_than_its_control_is_no_transfer(context: Context):
    found = conclude(context, "finetune", right(200, 363, 0), {"raw_pixels": right(300, 363, 1)})
    assert found["verdict"] == "no transfer"
    assert found["verdict_interval"][1] < 0
    assert found["controls"]["scratch"] is None


def test_a_model_from_scratch_has_no_verdict(context: Context):
    found = conclude(context, "scratch", right(330, 363, 0), {"raw_pixels": right(200, 363, 1)})
    assert [found[name] for name in ("verdict", "verdict_interval", "verdict_p_value", "verdict_control")] == [None] * 4
    assert found["controls"]["raw_pixels"]["accuracy"] == pytest.approx(200 / 363)


@pytest.mark.parametrize("coloured", [False, True])
def test_the_raw_pixel_control_learns_from_training_images_and_is_chosen_on_validation_images(
    context: Context, coloured: bool
):
    if coloured:  # all but the first 100
        images = context.target.images
        tints = np.random.default_rng(0).random((len(images), 1, 1, 3))
        tints[:100] = 1
        storage = ImageArrays((np.stack([images.image(i) for i in range(len(images))]) * tints).astype(np.uint8))
        images = dataclasses.replace(images, storage=storage, grey=storage.grey())
        context = dataclasses.replace(context, target=dataclasses.replace(context.target, images=images))
    num = 3 if coloured else 1
    preprocess = Preprocess(Preprocessing(resize=16, crop=16, channels=num, mean=(0.0,) * num, std=(1.0,) * num))
    parts = [context.target.part(name) for name in ("train", "validation", "test")]
    train, validation, test = (
        to_pixels([part.image(i) for i in range(len(part))], preprocess).flatten(1).numpy() for part in parts
    )
    predicted = raw_pixels_control(train, parts[0].labels, validation, parts[1].labels, test)
    np.testing.assert_array_equal(_raw_pixels(context, _pixels(context)), predicted == parts[2].labels)


def test_test_images_that_are_known_ones_saved_anew_are_counted(context: Context):
    target = context.target
    arrays = [target.images.image(i) for i in range(len(target.images))]
    assert _num_near_copies(context, _pixels(context)) == 0  # but 3 of the very same content
    known = [*target.parts["train"][:2], *target.parts["validation"][:1]]
    for copy, original in zip(target.parts["test"], known, strict=False):
        arrays[copy] = arrays[original] // 8 * 8
    storage = ImageArrays(tuple(arrays))
    images = dataclasses.replace(target.images, storage=storage, digests=storage.digests())
    copied = dataclasses.replace(context, target=dataclasses.replace(target, images=images))
    assert _num_near_copies(copied, _pixels(copied)) == 3


SOURCE = "mtcnn-onet"  # small, and packaged


def small(context: Context, shared_weights: Path, *, start: int = 0, name: str = "mine") -> Context:
    """A run on 70 of the digits, with the packaged weights at hand."""
    if not (context.cache / "weights").exists():
        (context.cache / "weights").symlink_to(shared_weights)
    images = context.target.images.subset(range(start, start + 70))
    parts = {"train": np.arange(20), "validation": np.arange(20, 30), "test": np.arange(30, 70)}
    recipe = dataclasses.replace(context.recipe, name=name)
    return dataclasses.replace(context, target=Target(images=images, parts=parts), recipe=recipe)


def stage(key: str, mode: Mode, **result: object) -> Stage:
    return Stage(key=key, result={"mode": mode, "source": SOURCE, **result}, seconds=0, skipped=False)


def trained(context: Context, name: str, mode: Mode, favoured: int) -> Stage:
    """What `fit` and `control` leave behind, but for the training: of a model that says one class of most images."""
    model = build_classifier(mode, load_source(context, SOURCE), 10, head=None, seed=1)
    model.head.bias.data[favoured] += 1
    save_file(model.state_dict(), context.run.private / f"{name}.safetensors")
    row = {"peak_learning_rate": 0.1, "epoch": 1, "validation_accuracy": 0.5, "train_accuracy": 0.5}
    return stage(name, mode, rows=[row], learning_rate=0.1)


def test_the_model_and_its_control_are_each_measured_on_the_test_images(
    context: Context, shared_weights: Path, monkeypatch: pytest.MonkeyPatch
):
    context = small(context, shared_weights)
    tuned, control = trained(context, "fit", "full", 1), trained(context, "control", "scratch", 0)
    chosen, model = stage("chosen", "full"), fitted_model(context, "fit", tuned)
    for name, trained_one in (("fit", tuned), ("control", control)):
        module = fitted_model(context, name, trained_one).backbone.module
        assert module is not None
        assert not module.training  # or batch norm would go by the images beside
    plotted: list[np.ndarray] = []
    plot = finish.plot_confusion
    monkeypatch.setattr(finish, "plot_confusion", lambda *given: (plotted.extend(given[1:3]), plot(*given)))
    found = evaluate(context, model, chosen, control, tuned)

    def logits(model: Model, part: str) -> torch.Tensor:
        images = context.target.part(part)
        pixels = to_pixels([images.image(i) for i in range(len(images))], model.backbone.preprocess)
        return model.logits(model.backbone.features(pixels))

    labels = {name: context.target.part(name).labels for name in context.target.parts}
    accuracies = [
        (logits(one, "test").argmax(1).numpy() == labels["test"]).mean()
        for one in (model, fitted_model(context, "control", control))
    ]
    assert accuracies[0] != accuracies[1]
    np.testing.assert_array_equal(plotted, [labels["test"], logits(model, "test").argmax(1).numpy()])
    assert [found.result["test"]["accuracy"], found.result["controls"]["scratch"]["accuracy"]] == accuracies
    assert found.result["controls"]["scratch"]["architecture"] == catalog()[SOURCE].architecture
    assert found.result["controls"]["raw_pixels"]["accuracy"] == _raw_pixels(context, _pixels(context)).mean()
    assert found.result["num_test_images_nearly_in_training"] == 0
    temperature = fit_temperature(logits(model, "validation").numpy(), labels["validation"])
    assert found.result["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert found.result["choice"] == chosen.result
    assert json.loads((context.run.path / "evaluation.json").read_text()) == found.result
    assert context.run.num_backbone_images() == 40 + 10 + 40
    # What it rests on, and what it wrote, is what it is made anew for.
    written = context.run.path / "learning.png"
    written.unlink()
    assert evaluate(context, model, chosen, control, tuned).key == found.key
    assert written.is_file()
    other_seed = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, seed=5))
    again = [
        evaluate(context, model, chosen, None, tuned),
        evaluate(context, model, chosen, None, None),
        evaluate(context, model, stage("another", "full"), None, None),
        evaluate(other_seed, model, chosen, None, None),
    ]
    monkeypatch.setattr(finish, "EVALUATION_SCHEMA", finish.EVALUATION_SCHEMA + 1)
    again.append(evaluate(other_seed, model, chosen, None, None))
    assert len({found.key, *(one.key for one in again)}) == 6
    assert not written.exists()  # nothing was trained for the last ones


def test_what_a_run_registers_has_seen_what_its_source_has_if_it_took_that_over(context: Context, shared_weights: Path):
    first = small(context, shared_weights, name="first")
    second = small(context, shared_weights, name="second", start=70)
    ids = [frozenset(map(image_id, one.target.known().digests)) for one in (first, second)]

    def registered(context: Context, source: str, mode: Mode) -> tuple[SourceCard, frozenset[bytes] | None]:
        backbone = load_source(context, source)
        model = Model(source=source, mode=mode, backbone=backbone, head=torch.nn.Linear(backbone.num_features, 10))
        register_source(context, model, stage(f"{source} {mode}", mode))
        folder = context.cache / "sources" / context.recipe.name
        card = read_card(folder)
        return card, read_seen(folder, card)

    card, seen = registered(first, SOURCE, "full")
    origin = catalog()[SOURCE]
    for field in ("architecture", "licence", "preprocessing"):
        assert getattr(card, field) == getattr(origin, field)
    assert (card.classes, card.data_fingerprint) == (tuple("0123456789"), first.target.images.fingerprint)
    assert card.weights == WEIGHTS  # of its own, where they were trained
    assert (seen, card.notes) == (ids[0], f"made by Headstart from {SOURCE} in mode full")
    assert registered(second, "first", "scratch")[1] == ids[1]
    assert registered(second, "first", "full")[1] == ids[0] | ids[1]
    # As earlier versions left it: what follows from it lacks its images, to the last.
    (first.cache / "sources/first/card.yaml").write_text(card_to_yaml(dataclasses.replace(card, seen_sha256="")))
    end = "; which images first learned from is not known"
    child, seen = registered(second, "first", "full")
    assert (seen, child.seen_lacks) == (ids[1], "first")
    assert child.notes == "made by Headstart from first in mode full" + end
    grandchild, seen = registered(small(context, shared_weights, name="third", start=140), "second", "full")
    assert grandchild.seen_lacks == "first"
    assert grandchild.notes == "made by Headstart from second in mode full" + end
    assert seen is not None
    assert seen > ids[1]
    card, seen = registered(second, "first", "scratch")
    assert (seen, card.seen_lacks, card.notes) == (ids[1], "", "made by Headstart from first in mode scratch")
    # The registry was emptied, the run is as it was, and the command is given once more.
    (first.cache / "sources/second").unlink()
    second.run.attempt = "another"
    assert registered(second, "first", "scratch")[0] == card


def test_a_graph_of_ones_own_goes_with_the_run_that_it_became(context: Context, shared_weights: Path, tmp_path: Path):
    given = tmp_path / "given"
    given.mkdir()
    graph = helper.make_graph(
        [helper.make_node("GlobalMaxPool", ["images"], ["most"]), helper.make_node("Flatten", ["most"], ["flat"])], "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["batch", 1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=10)
    onnx.save(model, given / "net.onnx")
    grey = Preprocessing(resize=8, crop=8, channels=1, mean=(0.5,), std=(0.5,))
    digest = file_sha256(given / "net.onnx")
    card = SourceCard(
        name="given", task="t", architecture="onnx:flat", weights="net.onnx", sha256=digest, preprocessing=grey
    )
    (given / "card.yaml").write_text(card_to_yaml(card))
    first = small(context, shared_weights, name="first")
    first = dataclasses.replace(first, recipe=dataclasses.replace(first.recipe, sources=(f"source:{given}",)))
    backbone = load_source(first, "given")
    frozen = Model(source="given", mode="feature", backbone=backbone, head=torch.nn.Linear(1, 10))
    register_source(first, frozen, stage("a", "feature"))
    shutil.rmtree(given)
    registered = find_source("first", "all", first.cache)
    assert registered.card.sha256 == digest
    assert registered.load(first.cache).fingerprint == backbone.fingerprint

    second = small(context, shared_weights, name="second", start=70)
    frozen = dataclasses.replace(frozen, source="first", backbone=load_source(second, "first"))
    register_source(second, frozen, stage("b", "feature"))
    (second.cache / "sources/first").unlink()
    assert find_source("second", "all", second.cache).load(second.cache).fingerprint == backbone.fingerprint


def test_a_source_is_made_anew_for_another_name_model_or_data(
    context: Context, shared_weights: Path, monkeypatch: pytest.MonkeyPatch
):
    context = small(context, shared_weights)
    fewer = Target(images=context.target.images, parts=context.target.parts | {"train": np.arange(10)})
    seeds: list[int] = []
    sketched = finish.sketched
    monkeypatch.setattr(finish, "sketched", lambda target, seed: (seeds.append(seed), sketched(target, seed))[1])
    backbone = load_source(context, SOURCE)
    model = Model(source=SOURCE, mode="full", backbone=backbone, head=torch.nn.Linear(backbone.num_features, 10))
    keys = [
        register_source(one, model, stage(key, "full")).key
        for one, key in (
            (context, "a"), (context, "a"), (context, "b"), (dataclasses.replace(context, data_key="other"), "b"),
            (dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, name="yours")), "b"),
            (dataclasses.replace(context, target=fewer), "b"),
        )
    ]  # fmt: skip
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5
    assert seeds == [context.recipe.seed] * 5
    assert sorted(path.name for path in (context.cache / "sources").glob("[!.]*")) == ["mine", "yours"]

    def fails(context: Context) -> None:
        raise SourceError("no network")

    monkeypatch.setattr(finish, "load_probe", fails)
    with pytest.raises(SourceError, match=r"^the run is finished, but .* without the probe: no network"):
        register_source(context, model, stage("c", "full"))

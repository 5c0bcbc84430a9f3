"""The whole way on a folder of real images: what it writes, what it skips, what it says after being killed."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from headstart.cluster import pipeline
from headstart.cluster.connect import Connection
from headstart.cluster.pipeline import Outcome, run
from headstart.cluster.recipe_file import load_recipe
from headstart.cluster.stages.context import Context, Reporter
from headstart.cluster.stages.run_directory import Stage
from headstart.serving.runtime import Predictor
from headstart.trainer.errors import DataError, SourceError
from headstart.trainer.evaluation import expected_calibration_error
from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.recipe import Data, Recipe, Split
from headstart.trainer.selection import sources

Run = Callable[..., Any]
KILL_TIMEOUT = 240
RECIPE = {
    "name": "digits",
    "data": {"path": "", "split": {"train": 200, "validation": 60, "test": "rest"}},
    "sources": ["mtcnn-onet", "mobilenet-v2-imagenet"],
    "train": {"epochs": 2, "batch_size": 20},
    "search": {"epochs": 30},
    # Generous: of 60 validation images one more that is wrong is 0.017.
    "export": {"variants": ["int8"], "max_loss": 0.1},
}


class House:
    """A folder with data, a recipe and a cache, in which the command line runs as a user runs it."""

    def __init__(self, root: Path, weights: Path, write_digits: Run) -> None:
        self.root, self.cache = root, root / "cache"
        self.cache.mkdir(parents=True)
        (self.cache / "weights").symlink_to(weights)
        data = write_digits(root / "images", 34)
        (root / "recipe.yaml").write_text(
            yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"path": str(data)}})  # type: ignore[operator]
        )
        self.run_directory = root / "runs/digits"

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "headstart.cluster.cli", *map(str, arguments)],
            cwd=self.root, env=os.environ | {"HEADSTART_CACHE": str(self.cache)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments: object) -> Any:
        process = self.start(*arguments, "--json")
        out, err = process.communicate(timeout=KILL_TIMEOUT)
        assert process.returncode == 0, err[-3000:]
        return json.loads(out)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, shared_weights: Path, write_digits: Run) -> House:
    return House(tmp_path_factory.mktemp("house"), shared_weights, write_digits)


@pytest.fixture(scope="module")
def summary(house: House) -> Any:
    return house("run", "recipe.yaml")


def test_classes_that_leaving_one_out_cannot_have_right_are_told(context: Context, monkeypatch: pytest.MonkeyPatch):
    def said(split: Split) -> str:
        reporter = Reporter(Console(file=(file := io.StringIO()), width=200))
        recipe = replace(context.recipe, data=Data(path="sklearn:digits", split=split))
        run(recipe, context.cache / "few", connection=context.connection, cache=context.cache, reporter=reporter)
        return file.getvalue()

    outcome = Outcome(path=context.cache / "few", summary={}, ranking={})
    monkeypatch.setattr(pipeline, "_stages", lambda context, until: outcome)
    assert "audition may: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9. Add images" in said(Split(train=10))
    assert "classes of one training image" not in said(Split(train=20))


@pytest.mark.timeout(KILL_TIMEOUT + 60)
def test_the_summary_says_everything(house: House, summary: Any):
    assert json.loads((house.run_directory / "summary.json").read_text()) == summary
    assert set(summary) == {
        "schema", "name", "target", "source", "mode", "ranking", "test", "controls", "verdict", "verdict_interval",
        "verdict_p_value", "package", "variants", "stages", "num_backbone_images",
    }  # fmt: skip
    assert summary["schema"] == 1
    assert summary["mode"] in ("feature", "finetune")
    assert summary["test"]["num_samples"] == 80
    low, high = summary["test"]["interval"]
    assert low <= summary["test"]["accuracy"] <= high
    assert summary["test"]["accuracy"] > 0.8
    for control in ("scratch", "raw_pixels"):
        assert 0 <= summary["controls"][control]["accuracy"] <= 1
    assert summary["verdict"] in ("transfer", "no transfer", "unclear")
    assert 0 < summary["verdict_p_value"] <= 1
    assert summary["verdict"] == "unclear" or summary["verdict_p_value"] <= 0.05
    for entry in summary["ranking"]:
        assert set(entry) == {
            "source", "distance", "score", "audition_accuracy", "seconds", "available", "reason", "licence",
        }  # fmt: skip
        assert entry["available"]
    auditions = [entry["audition_accuracy"] for entry in summary["ranking"]]
    assert auditions == sorted(auditions, reverse=True)
    assert list(summary["stages"]) == [
        "data", "rank", "fit", "choose", "control", "evaluate", "export", "export-int8", "register"
    ]  # fmt: skip
    assert not any(stage["skipped"] for stage in summary["stages"].values())


def test_only_the_chosen_one_sees_the_test_images(summary: Any):
    # 260 known images under each of two sources, of which one is the probe; 60 for validation under the fine-tuned
    # backbone; the 80 for test under the chosen one, and under the control. A fine-tuned one also sees the 200 that it
    # was trained on, for the drift record.
    tuned = 200 if summary["mode"] == "finetune" else 0
    assert summary["num_backbone_images"] == 2 * 260 + 60 + 80 + 80 + tuned


def test_the_package_records_drift_and_has_a_variant_beside_it(house: House, summary: Any):
    package, int8 = (house.run_directory / name for name in ("package", "package-int8"))
    drift = json.loads((package / "manifest.json").read_text())["drift"]
    assert (drift["output"], drift["num_images"]) == ("features", 200)
    predictor = Predictor(package)
    # The 340 images were divided without looking, so that all of them are like those for training.
    images = np.stack(
        [np.asarray(Image.open(p).convert("RGB")) for p in sorted((house.root / "images").glob("*/*.png"))]
    )
    features = np.concatenate(
        [predictor.session.run(["features"], {"images": part})[0] for part in np.split(images, 20)]
    )
    assert np.linalg.norm(features.mean(0) - drift["mean"]) < 0.15 * drift["spread"]
    assert np.linalg.norm(features - drift["mean"], axis=1).mean() == pytest.approx(drift["spread"], rel=0.1)
    found = summary["variants"]["int8"]
    assert (found["package"], found["refused"], found["num_images"], found["max_loss"]) == (
        "package-int8",
        None,
        60,
        0.1,
    )
    manifest = Predictor(int8).manifest
    assert manifest.variant.accuracy == found["accuracy"] > found["fp32_accuracy"] - 0.1
    assert manifest.variant.calibration_images == 128  # of the 200 for training
    assert manifest.provenance["source"] == summary["source"]
    assert (int8 / "model.onnx").stat().st_size < 0.5 * (package / "model.onnx").stat().st_size


def test_the_run_directory_holds_what_it_should(house: House, summary: Any):
    names = {path.name for path in house.run_directory.iterdir() if not path.name.startswith(".")}
    assert names == {
        "recipe.yaml", "ranking.json", "training.csv", "evaluation.json", "package", "package-int8", "source",
        "confusion.png", "learning.png", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (house.run_directory / "package").iterdir()} >= {"model.onnx", "manifest.json"}
    assert {path.name for path in (house.run_directory / "source").iterdir()} == {
        "card.yaml", "weights.safetensors", "sketch.safetensors", "seen.bin"
    }  # fmt: skip
    for picture in ("confusion.png", "learning.png"):
        with Image.open(house.run_directory / picture) as image:
            assert np.asarray(image.convert("L")).std() > 5
    rows = (house.run_directory / "training.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 + 3 * 2


def test_the_sketch_is_what_the_next_run_compares(house: House, summary: Any):
    sketch = house.run_directory / "source/sketch.safetensors"
    tensors = load_file(sketch)
    assert list(tensors["features"].shape) == [260, 1280]
    assert str(tensors["features"].dtype) == "torch.float32"
    assert len(tensors["labels"]) == 260
    np.testing.assert_allclose(tensors["mean"], tensors["features"].mean(0), rtol=1e-5)
    with safe_open(sketch, framework="pt") as file:
        assert set(file.metadata()) >= {"probe", "precision", "centre"}


def test_a_second_run_passes_no_image_and_changes_nothing(house: House, summary: Any):
    started = time.monotonic()
    again = house("run", "recipe.yaml")
    assert again["num_backbone_images"] == 0
    assert all(stage["skipped"] for stage in again["stages"].values())
    assert without_timings(again) == without_timings(summary)
    assert time.monotonic() - started < 60


def test_the_package_predicts_files(house: House, summary: Any):
    files = sorted((house.root / "images").glob("*/*.png"))[::17]
    found = house("predict", house.run_directory / "package", *files)
    assert [Path(entry["file"]) for entry in found] == files
    for entry in found:
        assert set(entry) == {"file", "label", "probability", "probabilities"}
        assert set(entry["probabilities"]) == set("0123456789")
        assert entry["probability"] == max(entry["probabilities"].values())
    right = np.mean([entry["label"] == Path(entry["file"]).parent.name for entry in found])
    assert right > 0.8


def part(house: House, name: str) -> LabelledImages:
    """The images of the run that are for training, validation or test."""
    recipe = load_recipe(str(house.root / "recipe.yaml"))
    images = load_images(recipe.data, house.cache)
    return images.subset(split_images(images, recipe.data.split, recipe.seed)[name])


def test_the_drift_record_is_that_of_the_training_images(house: House, summary: Any):
    predictor, train = Predictor(house.run_directory / "package"), part(house, "train")
    features = np.concatenate(
        [predictor.session.run(["features"], {"images": train.image(index)[None]})[0] for index in range(len(train))]
    ).astype(np.float64)
    drift = predictor.manifest.drift
    assert drift is not None
    np.testing.assert_allclose(drift.mean, features.mean(0), rtol=1e-4, atol=1e-4)
    distances = np.linalg.norm(features - features.mean(0), axis=1)
    assert drift.spread == pytest.approx(np.sqrt(np.square(distances).mean()), rel=1e-4)


def test_the_evaluation_is_what_the_package_says_of_the_test_images(house: House, summary: Any):
    test = part(house, "test")
    predictor = Predictor(house.run_directory / "package")
    probabilities = np.concatenate([predictor.predict(test.image(index)[None])[1] for index in range(len(test))])
    right = probabilities.argmax(1) == test.labels
    found = json.loads((house.run_directory / "evaluation.json").read_text())
    assert found["test"]["accuracy"] == right.mean()
    assert found["class_accuracy"] == {
        name: pytest.approx(right[test.labels == label].mean()) for label, name in enumerate(test.classes)
    }
    assert found["temperature"] == predictor.manifest.temperature
    assert found["calibration_error"] == pytest.approx(expected_calibration_error(probabilities, test.labels), abs=1e-4)
    controls = {name: control["accuracy"] for name, control in found["controls"].items()}
    assert controls[found["verdict_control"]] == max(controls.values())  # transfer is better than both
    low, high = found["verdict_interval"]
    assert low <= right.mean() - max(controls.values()) <= high
    assert found["num_test_images_also_in_training"] == 0


def test_the_finished_run_is_a_source_for_another_task(house: House, summary: Any, write_digits: Run):
    other = write_digits(house.root / "other", 20, num_classes=4, start=100)
    found = house(
        "rank", "folder", "--set", f"data.path={other}", "--set", "sources=[mobilenet-v2-imagenet, digits]",
        "--out", house.root / "runs/other",
    )  # fmt: skip
    entries = {entry["source"]: entry for entry in found["ranking"]}
    assert entries["digits"]["audition_accuracy"] > 0.8
    assert 0 < entries["digits"]["distances"]["energy"] < 20
    assert entries["mobilenet-v2-imagenet"]["distances"] is None


def test_a_run_that_finished_in_between_is_ranked_by_run_and_not_by_evaluate(
    house: House, summary: Any, write_digits: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cards = {"mtcnn-onet": sources.catalog()["mtcnn-onet"]}
    monkeypatch.setattr(sources, "catalog", lambda: cards)
    other = write_digits(tmp_path / "other", 20, num_classes=4, start=100)
    recipe = load_recipe("folder", [f"data.path={other}", "search.epochs=2"])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/weights").symlink_to(house.cache / "weights")

    def rank(*, settled: bool) -> tuple[bool, list[str]]:
        with Connection(None) as connection:
            found = run(
                recipe, tmp_path / "run", connection=connection, cache=tmp_path / "cache", until="rank", settled=settled
            )
        return found.summary["stages"]["rank"]["skipped"], [one["source"] for one in found.summary["ranking"]]

    assert rank(settled=True) == (False, ["mtcnn-onet"])
    (tmp_path / "cache/sources").symlink_to(house.cache / "sources")
    assert rank(settled=True) == (True, ["mtcnn-onet"])
    skipped, names = rank(settled=False)
    assert not skipped
    assert {"mtcnn-onet", "digits"} <= set(names)
    assert rank(settled=True) == (True, names)


def test_of_an_edited_recipe_there_is_no_summary_before_its_end(context: Context, monkeypatch: pytest.MonkeyPatch):
    console = Console(record=True, width=300, stderr=True)

    def command(until: pipeline.Until, epochs: int, *, settled: bool = False, fresh: bool = False) -> bool:
        recipe = replace(context.recipe, train=replace(context.recipe.train, epochs=epochs))
        run(
            recipe, folder, connection=context.connection, cache=context.cache, until=until, settled=settled,
            reporter=Reporter(console), fresh=fresh,
        )  # fmt: skip
        return (folder / "summary.json").exists()

    folder = context.cache / "edited"
    monkeypatch.setattr(pipeline, "_read", lambda *arguments, **more: context.target)
    monkeypatch.setattr(pipeline, "_stages", lambda context, until: Outcome(path=folder, summary={}, ranking={}))
    assert command("register", epochs=1)
    for made in ("evaluation.json", "package/model.onnx", "package-int8/model.onnx", "source/card.yaml"):
        (folder / made).parent.mkdir(exist_ok=True)
        (folder / made).touch()
    assert command("rank", epochs=1)
    assert command("export", epochs=2, settled=True)
    assert console.export_text() == ""
    assert not command("rank", epochs=3)
    told = (
        "summary.json is removed: it is of another recipe, other data or other sources, or of before --fresh. Also of "
    )
    told += "those, until `headstart run` makes them anew: evaluation.json, package, package-int8, source"
    assert console.export_text().strip() == told
    assert not command("rank", epochs=3)
    assert command("register", epochs=3)
    assert not command("rank", epochs=3, fresh=True)


def test_the_table_of_a_whole_run_is_left_by_a_fit_that_trains_nothing(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    summary, table = (context.run.path / name for name in ("summary.json", "training.csv"))
    result = {"ranking": [], "source": "", "mode": "full", "rows": [{"epoch": 1}]}
    fitted = Stage(key="", result=result, seconds=0, skipped=True)
    for name in ("rank", "tune_source", "choose"):
        monkeypatch.setattr(pipeline, name, lambda *arguments: fitted)
    summary.touch()
    table.write_text("rows of fit and control")
    pipeline._stages(context, "fit")
    assert table.read_text() == "rows of fit and control"
    summary.unlink()
    pipeline._stages(context, "fit")
    assert table.read_text().split() == ["job,mode,epoch", "fit,full,1"]
    monkeypatch.setattr(pipeline, "tune_source", lambda *arguments: None)
    pipeline._stages(context, "fit")
    assert not table.exists()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"sources": ("typo",)}, SourceError),
        ({"data": Data(path="sklearn:digits", split=Split(train=99_999))}, DataError),
    ],
)
def test_a_recipe_that_cannot_be_costs_nothing_of_the_run_before(
    context: Context, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], error: type[Exception]
):
    def command(recipe: Recipe, *, fresh: bool = False) -> None:
        run(recipe, folder, connection=context.connection, cache=context.cache, fresh=fresh)

    folder = context.cache / "mistyped"
    monkeypatch.setattr(pipeline, "_stages", lambda context, until: Outcome(path=folder, summary={}, ranking={}))
    command(context.recipe)
    kept = [folder / name for name in ("summary.json", "recipe.yaml", ".stages/data.json")]
    before = [path.read_bytes() for path in kept]
    for fresh in (False, True):
        with pytest.raises(error):
            command(replace(context.recipe, seed=5, **wrong), fresh=fresh)
        assert [path.read_bytes() for path in kept] == before


@pytest.mark.timeout(KILL_TIMEOUT + 60)
def test_a_source_made_from_a_source_has_seen_its_images_too(house: House, summary: Any, write_digits: Run):
    digits = house.run_directory / "source/seen.bin"
    assert digits.stat().st_size == 16 * 260
    house(
        "run", "folder", "--set", f"data.path={write_digits(house.root / 'more', 20, num_classes=2, start=120)}",
        "--set", "name=more", "--set", "sources=[digits]", "--set", "mode=feature", "--set", "search.epochs=2",
        "--set", "train.epochs=1", "--set", "train.batch_size=8", "--set", "train.workers=1",
        "--set", "export.variants=[]",
    )  # fmt: skip
    parts = json.loads((house.root / "runs/more/.stages/data.json").read_text())["result"]["parts"]
    seen = (house.root / "runs/more/source/seen.bin").read_bytes()
    images = {seen[start : start + 16] for start in range(0, len(seen), 16)}
    assert len(images) == 260 + parts["train"] + parts["validation"]
    assert images >= {digits.read_bytes()[start : start + 16] for start in range(0, 16 * 260, 16)}
    assert "not known" not in (house.root / "runs/more/source/card.yaml").read_text()


def test_a_run_never_judges_by_images_that_a_source_learned_from(house: House, summary: Any):
    grown = shutil.copytree(house.root / "images", house.root / "grown")
    Image.new("RGB", (24, 24), (1, 2, 3)).save(grown / "0" / "one-more.png")
    process = house.start(
        "rank", "recipe.yaml", "--set", f"data.path={grown}", "--set", "sources=[digits]",
        "--out", house.root / "runs/grown",
    )  # fmt: skip
    _, err = process.communicate(timeout=KILL_TIMEOUT)
    assert process.returncode == 2
    assert re.search(r"digits has learned from \d+ of the 141\s+images that this run validates and tests on", err)


def test_a_run_never_ranks_what_was_made_from_its_own_data(house: House, summary: Any):
    process = house.start("rank", "recipe.yaml", "--set", "sources=[digits]", "--out", house.root / "runs/leak")
    _, err = process.communicate(timeout=KILL_TIMEOUT)
    assert process.returncode == 2
    assert "own data" in err


def test_evaluate_and_export_take_a_run_directory(house: House, summary: Any):
    assert house("evaluate", house.run_directory)["test"] == summary["test"]
    shutil.rmtree(house.run_directory / "package")
    manifest = house("export", house.run_directory)
    assert manifest["labels"] == list("0123456789")
    assert [row["batch"] for row in manifest["parity"]["rows"]] == [1, 2, 16]
    assert (house.run_directory / "package/model.onnx").is_file()
    assert (house.run_directory / "package-int8/model.onnx").is_file()


def test_a_variant_is_exported_afterwards_and_kept(house: House, summary: Any):
    manifest = house("export", house.run_directory, "--variant", "fp16")
    assert manifest["variant"]["name"] == "fp16"
    assert manifest["variant"]["num_images"] == 60
    recipe = yaml.safe_load((house.run_directory / "recipe.yaml").read_text())
    assert recipe["export"]["variants"] == ["int8", "fp16"]
    assert (house.run_directory / "package-fp16/model.onnx").is_file()


def without_timings(summary: Any) -> Any:
    kept = {key: value for key, value in summary.items() if key not in ("stages", "num_backbone_images", "target")}
    kept["ranking"] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in summary["ranking"]]
    kept["variants"] = {
        name: {k: v for k, v in found.items() if not k.endswith("_ms")} for name, found in summary["variants"].items()
    }
    return kept


def disturbed_stage(house: House) -> str:
    """The stage at work: the one after the last record."""
    done = {path.stem for path in (house.run_directory / ".stages").glob("*.json")}
    order = ["data", "rank", "fit", "choose", "control", "evaluate", "export", "export-int8", "register"]
    return next((name for name in order if name not in done), "")


def wait_until(house: House, process: subprocess.Popen[str], stage: str) -> None:
    """Wait until the command is well inside `stage`."""
    private, deadline = house.run_directory / ".stages", time.monotonic() + KILL_TIMEOUT
    inside = {
        "rank": lambda: any(house.cache.glob("features/*/00000.safetensors")),
        "fit": lambda: any((private / "ray").glob("fit-*/attempt-*/rows.jsonl")),
        "control": lambda: any((private / "ray").glob("control-*/attempt-*/rows.jsonl")),
        "export": lambda: True,
        "export-int8": lambda: True,
    }
    while disturbed_stage(house) != stage or not inside[stage]():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, f"never reached {stage}"
        time.sleep(0.02)


@pytest.fixture
def fresh_house(tmp_path: Path, shared_weights: Path, write_digits: Run) -> House:
    return House(tmp_path / "house", shared_weights, write_digits)


def full(summary: Any) -> Any:
    """Everything but the timings: also the count of images, and what counts as skipped."""
    skipped = {name: stage["skipped"] for name, stage in summary["stages"].items()}
    return without_timings(summary) | {"skipped": skipped, "images": summary["num_backbone_images"]}


@pytest.mark.slow
@pytest.mark.timeout(3 * KILL_TIMEOUT)
def test_a_run_that_is_killed_in_every_stage_ends_with_the_summary_of_an_undisturbed_one(
    fresh_house: House, summary: Any
):
    for stage in ("rank", "fit", "control", "export", "export-int8"):
        process = fresh_house.start("run", "recipe.yaml", "--json")
        wait_until(fresh_house, process, stage)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (fresh_house.run_directory / "summary.json").exists()
    assert full(fresh_house("run", "recipe.yaml")) == full(summary)


@pytest.mark.slow
@pytest.mark.timeout(3 * KILL_TIMEOUT)
def test_ctrl_c_in_any_stage_is_130_and_the_same_command_goes_on(fresh_house: House, summary: Any):
    for stage in ("rank", "fit", "export"):
        process = fresh_house.start("run", "recipe.yaml", "--json")
        wait_until(fresh_house, process, stage)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, f"{stage}: {err[-3000:]}"
        assert out == ""
        assert "the same command goes on" in err
        assert "Traceback" not in err
    assert full(fresh_house("run", "recipe.yaml")) == full(summary)

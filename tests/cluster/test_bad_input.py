"""Everything a user can get wrong: a message with the next step, exit code 2, earlier results as they were."""

import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from headstart.cluster import pipeline
from headstart.cluster.stages import model, run_directory
from headstart.trainer import features, files
from headstart.trainer.selection.registry import register

Run = Callable[..., Any]
SOURCE = "sources=[mtcnn-onet]"


@pytest.fixture
def folder(tmp_path: Path, write_digits: Run) -> Path:
    return write_digits(tmp_path / "images", 8, num_classes=3)


def rank(headstart: Run, path: object, *options: str) -> Any:
    return headstart("rank", "folder", "--set", f"data.path={path}", "--set", SOURCE, *options)


def refused(ended: Any, *said: str) -> None:
    assert ended.code == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    for words in said:
        assert words in ended.stderr


def test_the_folder_is_good_to_begin_with(headstart: Run, folder: Path):
    ended = rank(headstart, folder, "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json()["ranking"][0]["source"] == "mtcnn-onet"


def test_missing_folder(headstart: Run, folder: Path, tmp_path: Path):
    refused(rank(headstart, tmp_path / "nowhere"), str(tmp_path / "nowhere"))
    ended = rank(headstart, folder)  # the same command, corrected, in the same run directory
    assert ended.code == 0, ended.stderr


def test_a_class_with_no_image(headstart: Run, folder: Path):
    (folder / "empty").mkdir()
    refused(rank(headstart, folder), "empty")


def test_one_class_only(headstart: Run, tmp_path: Path, write_digits: Run):
    refused(rank(headstart, write_digits(tmp_path / "one", 8, num_classes=1)), "class")


def test_too_few_images_for_the_split(headstart: Run, folder: Path):
    refused(rank(headstart, folder, "--set", "data.split.train=300"), "300", "24")


def test_a_corrupt_image(headstart: Run, folder: Path):
    bad = next(folder.glob("0/*.png"))
    bad.write_bytes(bad.read_bytes()[:60])
    refused(rank(headstart, folder), str(bad), "skip")
    ended = rank(headstart, folder, "--set", "data.unreadable=skip", "--json")
    assert ended.code == 0, ended.stderr
    assert f"left out, being no images: {bad}" in "".join(ended.stderr.splitlines())


def test_labels_that_name_a_missing_image(headstart: Run, folder: Path, tmp_path: Path):
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(folder.glob("*/*.png"))]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,label", *rows, "images/gone.png,1"]) + "\n")
    refused(rank(headstart, table), "gone.png")


def test_unknown_source(headstart: Run, folder: Path):
    refused(
        headstart("rank", "folder", "--set", f"data.path={folder}", "--set", "sources=[mtcnn-onett]"),
        "mtcnn-onett", "mtcnn-onet",
    )  # fmt: skip


def test_unknown_architecture(headstart: Run, folder: Path):
    refused(
        headstart("rank", "folder", "--set", f"data.path={folder}", "--set", "sources=['torchvision:resnet5']"),
        "resnet5", "resnet50",
    )  # fmt: skip


def test_unknown_recipe_key(headstart: Run, folder: Path):
    refused(rank(headstart, folder, "--set", "train.epoch=3"), "train.epoch", "did you mean epochs")


def test_weights_with_a_wrong_digest(headstart: Run, folder: Path, cache: Path, shared_weights: Path):
    assert rank(headstart, folder).code == 0
    (cache / "weights").unlink()
    (cache / "weights").mkdir()
    for stored in shared_weights.iterdir():
        if "onet" in stored.name and stored.stat().st_size:
            content = bytearray(stored.read_bytes())
            content[len(content) // 2] ^= 1
            (cache / "weights" / stored.name).write_bytes(content)
    refused(rank(headstart, folder, "--fresh"), "c13681b7")


def test_weights_that_do_not_fit_their_architecture(headstart: Run, folder: Path, tmp_path: Path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "mine.safetensors")
    source = f"sources=['file:{tmp_path}/mine.safetensors#resnet18']"
    refused(headstart("rank", "folder", "--set", f"data.path={folder}", "--set", source), "layer1.0.conv1.weight")


def test_features_that_are_not_finite(headstart: Run, folder: Path, tmp_path: Path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["bn1.weight"] = torch.full((64,), 3e38)  # finite itself; what it makes of an image is not
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "mine.safetensors")
    source = f"sources=['file:{tmp_path}/mine.safetensors#resnet18']"
    refused(
        headstart("rank", "folder", "--set", f"data.path={folder}", "--set", source),
        "NaN or infinite features",
        ".png",
    )


def test_a_full_disk_in_the_middle_of_the_cache(
    headstart: Run, tmp_path: Path, write_digits: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_digits(tmp_path / "many", 40)
    written = features.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == "00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, content)

    monkeypatch.setattr(features, "write_atomically", full)
    refused(rank(headstart, folder), "No space left", "HEADSTART_CACHE")
    whole = [path.name for path in cache.glob("features/*/*.safetensors")]
    assert whole == ["00000.safetensors"]
    assert not list(cache.glob("features/*/.*.tmp"))
    monkeypatch.setattr(features, "write_atomically", written)
    assert rank(headstart, folder).code == 0


@pytest.mark.parametrize("file", ["recipe.yaml", "mtcnn-onet.safetensors", "ranking.json"])
def test_a_full_disk_under_the_run_directory(headstart: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    written = files.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, content)

    with monkeypatch.context() as patch:
        for module in (pipeline, model, run_directory):
            patch.setattr(module, "write_atomically", full)
        refused(rank(headstart, folder), "No space left", file, "--out")
    assert rank(headstart, folder).code == 0


@pytest.mark.parametrize("taken", ["mine", "mine-photographs"])
def test_a_folder_that_the_demo_cannot_have_is_told_before_its_first_run(headstart: Run, tmp_path: Path, taken: str):
    (tmp_path / taken).write_text("a file")
    ended = headstart("demo", "--out", tmp_path / "mine")
    refused(ended, f"{taken} exists and is no run directory", "--out")
    assert ended.stderr.startswith("error: ")  # no bar, no line of progress


@pytest.mark.usefixtures("unprivileged")
def test_a_list_of_sources_that_takes_none_is_told_before_a_run(headstart: Run, folder: Path, cache: Path):
    (cache / "sources").mkdir(mode=0o500)
    ended = headstart("run", "folder", "--set", f"data.path={folder}", "--set", SOURCE)
    refused(ended, "cannot register a source", "HEADSTART_CACHE")
    assert ended.stderr.startswith("error: ")
    assert rank(headstart, folder).code == 0  # which registers nothing


@pytest.mark.usefixtures("cache")
def test_a_search_at_an_address_where_nobody_answers_is_told_before_its_features(folder: Path, tmp_path: Path):
    arguments = ("folder", "--set", f"data.path={folder}", "--set", SOURCE, "--address", "127.0.0.1:1")
    for command in ("tune", "fit"):
        # In a process of its own: Ray remembers for good that it was first imported without a token.
        ended = subprocess.run(
            [sys.executable, "-m", "headstart.cluster.cli", command, *arguments],
            capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert ended.returncode == 2, ended.stderr
        assert ended.stdout == ""
        assert ended.stderr.startswith("error: cannot connect to Ray at 127.0.0.1:1")


def test_the_run_directory_of_another_recipe(headstart: Run, folder: Path, tmp_path: Path, write_digits: Run):
    assert rank(headstart, folder).code == 0
    before = (tmp_path / "runs/folder/ranking.json").read_bytes()
    other = write_digits(tmp_path / "other", 8, num_classes=3, start=10)
    refused(rank(headstart, other), "--out")
    assert (tmp_path / "runs/folder/ranking.json").read_bytes() == before


def test_usage_errors_are_2_and_crashes_1(headstart: Run, folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert headstart("rank").code == 2
    assert headstart("frobnicate").code == 2

    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("headstart.cluster.pipeline.rank", crash)
    ended = rank(headstart, folder)
    assert ended.code == 1
    assert "ZeroDivisionError: a bug" in ended.stderr


def test_predict_refuses_what_is_no_package(headstart: Run, tmp_path: Path):
    refused(headstart("predict", tmp_path / "nowhere", tmp_path / "a.png"), "nowhere")


def test_evaluate_refuses_what_is_no_run(headstart: Run, tmp_path: Path):
    refused(headstart("evaluate", tmp_path), "recipe.yaml")


def test_a_damaged_entry_of_the_registry_stops_only_who_names_it(
    headstart: Run, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    from headstart.trainer.selection import sources

    few = {"mtcnn-onet": sources.catalog()["mtcnn-onet"]}
    monkeypatch.setattr(sources, "catalog", lambda: few)
    (cache / "sources/broken").mkdir(parents=True)
    (cache / "sources/broken/card.yaml").write_text("name: [cut")
    ended = headstart("rank", "folder", "--set", f"data.path={folder}", "--set", "sources=all", "--json")
    assert ended.code == 0, ended.stderr
    best, broken = ended.json()["ranking"]
    assert (best["source"], best["available"]) == ("mtcnn-onet", True)
    assert (broken["source"], broken["available"], broken["task"]) == ("broken", False, None)
    assert "broken/card.yaml cannot be used" in broken["reason"]
    refused(
        headstart("rank", "folder", "--set", f"data.path={folder}", "--set", "sources=[broken]"),
        "broken/card.yaml cannot be used",
    )


def test_a_source_of_an_earlier_version_is_used_and_told(headstart: Run, folder: Path, cache: Path, tmp_path: Path):
    from headstart.trainer.selection import sources

    sketch = sources.Sketch(
        features=torch.zeros(2, 2), labels=torch.arange(2), mean=torch.zeros(2), probe="of another version"
    )
    card = replace(sources.catalog()["mtcnn-onet"], name="old")
    sources.write_source(tmp_path / "source", card, None, {"bias": torch.zeros(2)}, sketch)
    register(tmp_path / "source", cache)
    child = replace(card, name="child", seen_lacks="old")
    sources.write_source(tmp_path / "child", child, None, {"bias": torch.zeros(2)}, sketch, seen={bytes(16)})
    register(tmp_path / "child", cache)
    ended = headstart("rank", "folder", "--set", f"data.path={folder}", "--set", "sources=[old, child]", "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json()["ranking"][0]["available"]
    told = " ".join(ended.stderr.split())
    said = "not known which images these sources learned from, this run's may be among them: old, child"
    assert told.count(said) == 1

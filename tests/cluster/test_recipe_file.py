"""Recipes: read, overridden, and refused with the field and what it accepts."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from headstart.cluster.recipe_file import load_recipe, recipe_document, recipe_yaml
from headstart.trainer.errors import RecipeError
from headstart.trainer.recipe import Data, Recipe

MINIMAL = {"name": "x", "data": {"path": "sklearn:digits"}}


def write(folder: Path, document: object) -> str:
    path = folder / "recipe.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def test_defaults_are_those_of_the_dataclasses(tmp_path: Path):
    assert load_recipe(write(tmp_path, MINIMAL)) == Recipe(name="x", data=Data(path="sklearn:digits"))


def test_folder_shows_every_field_with_its_default():
    document = recipe_document(load_recipe("folder", ["data.path=sklearn:digits"]))
    assert document == recipe_document(Recipe(name="folder", data=Data(path="sklearn:digits")))
    shown = yaml.safe_load(files("headstart.cluster.recipes").joinpath("folder.yaml").read_text())
    assert _keys(shown) == _keys(document)


def _keys(document: object) -> object:
    return {key: _keys(value) for key, value in document.items()} if isinstance(document, dict) else None


@pytest.mark.parametrize("name", ["demo", "1e5", "7E3", "1.e5", "12", "null", "on"])
def test_a_recipe_written_down_reads_back_the_same(tmp_path: Path, name: str):
    recipe = load_recipe("demo", ["train.learning_rate=1e-4", "seed=7", f"name='{name}'"])
    (tmp_path / "again.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 0.001),
        ("train.learning_rate=1", ("train", "learning_rate"), 1.0),
        ("sources=[a, b]", ("sources",), ["a", "b"]),
        ("data.split.test=0.1", ("data", "split", "test"), 0.1),
        ("data.split={train: 10, validation: 5}", ("data", "split", "train"), 10),
        ("name=other", ("name",), "other"),
    ],
)
def test_overrides(tmp_path: Path, override: str, field: tuple[str, ...], value: object):
    found = recipe_document(load_recipe(write(tmp_path, MINIMAL), [override]))
    for part in field:
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"name": "x"}, "data: this field is required"),
        (MINIMAL | {"bogus": 1}, "bogus: no such field"),
        (MINIMAL | {"train": {"epoch": 3}}, "train.epoch: no such field. did you mean epochs?"),
        (MINIMAL | {"train": {"epochs": "three"}}, "train.epochs: Input should be a valid integer"),
        (MINIMAL | {"train": {"epochs": True}}, "train.epochs"),
        (MINIMAL | {"train": {"epochs": 0}}, "train.epochs is 0; accepted: 1 to 10,000"),
        (MINIMAL | {"train": {"epochs": 10_001}}, "train.epochs is 10001; accepted: 1 to 10,000"),
        (MINIMAL | {"search": {"epochs": 10**9}}, "search.epochs is 1000000000; accepted: 1 to 100,000"),
        (MINIMAL | {"train": {"batch_size": 33}}, "accepted: a multiple of train.workers (2)"),
        (MINIMAL | {"train": {"batch_size": 2}}, "with two images or more for each"),
        (
            MINIMAL | {"train": {"precision": "fp8"}},
            "train.precision: Input should be 'auto', 'fp32' or 'bf16'",
        ),
        (MINIMAL | {"train": 3}, "train is 3; accepted: a mapping of epochs, batch_size, "),
        (
            {"name": "x", "data": {"path": "a", "split": 0.5}},
            "data.split is 0.5; accepted: a mapping of train, validation, test",
        ),
        (MINIMAL | {"mode": "linear"}, "mode: Input should be"),
        (MINIMAL | {"sources": []}, "sources is ()"),
        (MINIMAL | {"shortlist": -1}, "shortlist is -1; accepted: 0 or more"),
        (MINIMAL | {"sources": "mobilenet"}, "sources: Input should be 'all'"),
        (MINIMAL | {"sources": "mobilenet"}, "sources: Input should be a list, such as [mobilenet]; found 'mobilenet'"),
        (MINIMAL | {"export": {"variants": "fp16"}}, "export.variants: Input should be a list, such as [fp16]"),
        (MINIMAL | {"seed": -1}, "seed is -1; accepted: 0 to 2**32 - 1"),
        (MINIMAL | {"name": "a/b"}, "name is 'a/b'; accepted: up to 100 letters"),
        (MINIMAL | {"export": {"opset": 17}}, "export.opset is 17; accepted: 18 to 23"),
        (MINIMAL | {"search": {"learning_rates": []}}, "search.learning_rates is ()"),
        (MINIMAL | {"search": {"weight_decays": [float("inf")]}}, "search.weight_decays is (inf,); accepted: finite"),
        (MINIMAL | {"search": {"weight_decays": [-1]}}, "search.weight_decays is (-1.0,); accepted: finite, 0 or more"),
        (MINIMAL | {"search": {"seeds": [0, 2**32]}}, "search.seeds is (0, 4294967296); accepted: 0 to 2**32 - 1"),
        (MINIMAL | {"search": {"seeds": [-1]}}, "search.seeds is (-1,); accepted: 0 to 2**32 - 1"),
        ({"name": "x", "data": {"path": 3}}, "data.path: Input should be a valid string; found 3"),
        ({"name": "x", "data": {"path": " "}}, "data.path is ' '; accepted: a folder"),
        ({"name": "x", "data": {"path": "a", "kind": "text"}}, "data.kind: Input should be 'images'"),
        ({"name": "x", "data": {"path": "a", "split": {"train": 1.5}}}, "data.split.train is 1.5; accepted"),
        (
            {"name": "x", "data": {"path": "a", "split": {"train": "rest", "test": "rest"}}},
            "`rest` for one part at most",
        ),
        (
            {"name": "x", "data": {"path": "a", "split": {"train": 0.8, "validation": 0.4}}},
            "add up to 1 at most",
        ),
        ("- 1\n", "accepted: a mapping"),
        ("", "is empty; accepted: a mapping; `headstart recipes show folder` has every field"),
        ("a: [", "is not YAML"),
        ("a: [", "Mend that place; `headstart recipes show folder`"),
        ("name: 2026-13-01", "month must be in 1..12"),
        ("name: x\nseed: 1\nseed: 2", "the key 'seed' is there twice"),
        ("train:\n  epochs: 1\n  'epochs': 2", "the key 'epochs' is there twice\n  in \"<unicode string>\", line 3"),
        ("name: 2026-11-21\ndata: {path: a}", "accepted: text, numbers"),
    ],
)
def test_what_cannot_be_is_refused_by_field(tmp_path: Path, document: object, said: str):
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, document))
    assert said in str(refused.value)


def test_a_key_may_take_the_place_of_a_merged_one(tmp_path: Path):
    text = "name: x\ndata: {path: a}\ntrain: {<<: {epochs: 1, batch_size: 8}, epochs: 2}"
    train = load_recipe(write(tmp_path, text)).train
    assert (train.epochs, train.batch_size) == (2, 8)


@pytest.mark.parametrize("content", [None, b"name: \xff"])
def test_a_file_that_cannot_be_read_is_told_what_can(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"cannot read recipe .*\.yaml.*\.yaml file in UTF-8, or one of .*demo"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_every_problem_is_told_at_once(tmp_path: Path):
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, MINIMAL | {"bogus": 1, "mode": "none", "train": {"epochs": 0}}))
    for field in ("bogus", "mode", "train.epochs"):
        assert field in str(refused.value)


def test_an_unknown_name_is_told_the_near_one():
    with pytest.raises(RecipeError, match=r"^no recipe 'demmo'; did you mean demo\? Accepted: the path"):
        load_recipe("demmo")
    with pytest.raises(RecipeError, match=r"^no recipe 'mine'\. Accepted: the path"):
        load_recipe("mine")


@pytest.mark.parametrize(
    "override",
    ["epochs", "=3", "train..epochs=3", "name.x=3", "name=2026-13-01", "data={path: a, path: b}"],
)
def test_a_malformed_override_is_refused(tmp_path: Path, override: str):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(write(tmp_path, MINIMAL), [override])


def test_what_an_override_asks_for_is_not_blamed_on_the_recipe_alone():
    with pytest.raises(RecipeError, match=r"^recipe demo, as --set changes it, cannot be used:\n  seed is -1"):
        load_recipe("demo", ["seed=-1"])


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sources = ["file:w.pth#resnet18", "onnx:net.onnx", "source:runs/a", "torchvision:resnet18", "mtcnn-onet"]
    recipe = load_recipe(write(tmp_path, {"name": "x", "data": {"path": "images"}, "sources": sources}))
    assert recipe.data.path == str(tmp_path / "images")
    assert recipe.sources == (
        f"file:{tmp_path}/w.pth#resnet18",
        f"onnx:{tmp_path}/net.onnx",
        f"source:{tmp_path}/runs/a",
        "torchvision:resnet18",
        "mtcnn-onet",
    )

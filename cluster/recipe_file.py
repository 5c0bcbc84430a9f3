"""Recipes as YAML files: found by path or shipped name, overridden by `--set`, checked field by field."""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

from headstart.trainer.errors import RecipeError
from headstart.trainer.recipe import Data, Export, Recipe, Search, Split, Train

_SHIPPED = "headstart.cluster.recipes"
_EXAMPLE = "`headstart recipes show folder` has every field"
_NAMED_DATA = re.compile(r"[a-z0-9]+:\w")
_SECTIONS: dict[tuple[str, ...], type] = {
    (): Recipe,
    ("data",): Data,
    ("data", "split"): Split,
    ("train",): Train,
    ("search",): Search,
    ("export",): Export,
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML is not: 1e-3 is a number and no word, and a key that is there twice is an error."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Refuse a key that is there twice; `<<` adds its keys later, and those may be there as well."""
        mapping = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ComposerError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return mapping


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads back: text that is a number there, 1e5, is quoted."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with Headstart."""
    names = (entry.name for entry in files(_SHIPPED).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """Return the YAML of a recipe that comes with Headstart; raises `RecipeError` where none is called `name`."""
    if name not in (names := shipped_recipes()):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise RecipeError(f"no recipe {name!r}{hint} {_accepted()}")
    return files(_SHIPPED).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a path or a shipped name and apply `KEY.KEY=VALUE` overrides, each a YAML value.

    Relative paths in it are made absolute. Raises `RecipeError` naming each field that cannot be and what it accepts.
    """
    document = parse_document(_read(reference), reference)
    for override in overrides:
        _override(document, override)
    try:
        text = json.dumps(document)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe {reference}: {error}; accepted: text, numbers, lists and mappings") from error
    try:
        recipe = TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(detail) for detail in error.errors())
        listed = "\n".join(f"  {problem}" for problem in problems)
        given = f"{reference}, as --set changes it," if overrides else reference
        raise RecipeError(f"recipe {given} cannot be used:\n{listed}") from None
    return _absolute(recipe)


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as the plain mapping that its YAML file holds."""
    document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return document


def recipe_yaml(recipe: Recipe) -> str:
    """Return the recipe, every default filled in, as YAML that `load_recipe` reads back."""
    return yaml.dump(recipe_document(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(reference: str) -> str:
    path = Path(reference)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {reference}: {error}. {_accepted()}") from error
    return shipped_text(reference)


def parse_document(text: str, reference: str) -> dict[str, Any]:
    """Return the mapping that a recipe's YAML holds, as it is written; raises `RecipeError`, naming `reference`."""
    try:
        document = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has, 2026-13-01
        raise RecipeError(f"recipe {reference} is not YAML: {error}\nMend that place; {_EXAMPLE}") from error
    if not isinstance(document, dict):
        found = "empty" if document is None else f"a {type(document).__name__}"
        raise RecipeError(f"recipe {reference} is {found}; accepted: a mapping; {_EXAMPLE}")
    return document


def _accepted() -> str:
    return f"Accepted: the path of a .yaml file in UTF-8, or one of {', '.join(shipped_recipes())}"


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r}; accepted: KEY=VALUE, such as --set train.epochs=3")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"--set {key}: {text!r} is not a YAML value: {error}") from error
    for part in parts[:-1]:
        inner = document.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {key}: {part} is {inner!r} and has no fields")
        document = inner
    document[parts[-1]] = value


def _explain(detail: ErrorDetails) -> str:
    """Turn one of pydantic's errors into 'field: what is wrong; what is accepted'."""
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "unexpected_keyword_argument":
        accepted = [field.name for field in dataclasses.fields(_SECTIONS.get(tuple(location[:-1]), Recipe))]
        close = difflib.get_close_matches(location[-1], accepted, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{'.'.join(location)}: no such field. {hint}Accepted: {', '.join(accepted)}"
    if detail["type"] == "dataclass_type":
        accepted = [field.name for field in dataclasses.fields(_SECTIONS.get(tuple(location), Recipe))]
        return f"{'.'.join(location)} is {detail['input']!r}; accepted: a mapping of {', '.join(accepted)}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{'.'.join(location)}: this field is required"
    # A union's error names its member behind the field ("sources.tuple[str, ...]"); the field is what the user wrote.
    names = [part for part in location if re.fullmatch(r"\w+", part) and part not in ("int", "float")]
    if detail["type"] == "tuple_type" and isinstance(detail["input"], str | int | float):
        return f"{'.'.join(names)}: Input should be a list, such as [{detail['input']}]; found {detail['input']!r}"
    return f"{'.'.join(names)}: {detail['msg']}; found {detail['input']!r}"


def _absolute(recipe: Recipe) -> Recipe:
    """Make the paths absolute, so that the recipe means the same from another folder and on another machine."""
    sources = recipe.sources
    if sources != "all":
        sources = tuple(_absolute_source(source) for source in sources)
    data = recipe.data
    if not _NAMED_DATA.match(data.path):
        data = dataclasses.replace(data, path=str(Path(data.path).expanduser().absolute()))
    return dataclasses.replace(recipe, data=data, sources=sources)


def _absolute_source(source: str) -> str:
    kind, colon, path = source.partition(":")
    if kind not in ("file", "onnx", "source") or not path:
        return source
    return f"{kind}{colon}{Path(path).expanduser().absolute()}"

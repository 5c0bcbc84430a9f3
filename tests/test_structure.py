"""The shape of the house: names, arrows, what is packed, and what stays out of a serving container."""

import ast
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "trainer", "serving", "cluster")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "trainer": {"trainer", "kernels"},
    "serving": {"serving"},
    "cluster": set(ROOMS),
}
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module's name, and whether the import stands at the top level of the file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", id(node) in top))
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path):
    room = path.relative_to(ROOT).parts[0]
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "headstart" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[room], f"{path} imports {name}"
        if room != "cluster":
            assert parts[0] != "ray", f"{path} imports {name}: Ray is in cluster/ alone"
        if room in ("kernels", "trainer"):
            assert parts[0] != "pydantic", f"{path} imports {name}: the GPU machines have no pydantic"
        if room == "serving" and path.name != "export.py":
            assert parts[0] != "torch", f"{path} imports {name}: only export.py may"
        if room == "serving" and path.name not in ("export.py", "graph.py", "arithmetic.py"):
            assert parts[0] != "onnx", f"{path} imports {name}: what a server imports may not"


def test_the_command_line_imports_only_typer_and_the_standard_library():
    allowed = {"typer", *sys.stdlib_module_names}
    for path in (ROOT / "cluster/cli.py", *(ROOT / "cluster/commands").glob("*.py")):
        for node in ast.parse(path.read_text()).body:  # `if TYPE_CHECKING:` is not run
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            others = {name for name in names if not name.startswith("headstart.cluster.commands")}
            assert {name.split(".")[0] for name in others} <= allowed, path


def loaded_after(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_neither_torch_nor_ray():
    code = (
        "sys.argv = ['headstart', '--help']\nfrom headstart.cluster.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert not {"torch", "ray", "onnxruntime", "numpy"} & loaded_after(code)


def test_the_serving_side_loads_neither_torch_nor_ray():
    names = ("runtime", "package", "images", "parity")
    loaded = loaded_after("import " + ", ".join(f"headstart.serving.{name}" for name in names))
    assert not {"torch", "ray", "onnx", "pydantic", "yaml"} & loaded
    assert not {"torch", "ray", "pydantic", "yaml"} & loaded_after("import headstart.serving.graph")


def test_rooms_have_no_init_of_their_own():
    assert not [room for room in ROOMS if (ROOT / room / "__init__.py").exists()]


def test_every_folder_with_code_or_data_is_packed():
    packages = set(CONFIG["tool"]["setuptools"]["packages"])
    data = CONFIG["tool"]["setuptools"]["package-data"]
    for room in ROOMS:
        for folder in [ROOT / room, *(p for p in (ROOT / room).rglob("*") if p.is_dir())]:
            name = "headstart." + ".".join(folder.relative_to(ROOT).parts)
            if folder.name == "__pycache__":
                continue
            if any(folder.glob("*.py")):
                assert name in packages, f"{folder} is not in [tool.setuptools] packages"
            if any(folder.glob("*.yaml")):
                assert "*.yaml" in data.get(name, []), f"{folder} has no package-data entry"


def test_bare_names_do_not_find_our_folders(tmp_path: Path):
    for name in ("kernels", "trainer", "serving", "cluster"):
        code = f"import {name}; print(list({name}.__path__))"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert str(ROOT) not in done.stdout, f"import {name} finds our folder"


READ_DATA = (
    "from importlib.resources import files\n"
    "found = {p: sorted(f.name for f in files(p).iterdir() if f.name.endswith('.yaml'))"
    " for p in ('headstart.trainer.catalog', 'headstart.cluster.recipes')}\n"
    "assert all(files(p).joinpath(n).read_text() for p in found for n in found[p])\nprint(json.dumps(found))"
)


def test_data_files_are_in_the_editable_install_and_in_the_wheel(tmp_path: Path):
    from headstart.cluster.jobs import build_wheel

    wheel = build_wheel(tmp_path)
    expected = {
        f"headstart.{folder.replace('/', '.')}": sorted(p.name for p in (ROOT / folder).glob("*.yaml"))
        for folder in ("trainer/catalog", "cluster/recipes")
    }
    assert all(expected.values())
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    # -S leaves the editable install out, so that only the unpacked wheel can be found.
    for command in (["-c"], ["-S", "-c"]):
        script = f"import json, sys\nif '-S' in {command!r}: sys.path.insert(0, {str(unpacked)!r})\n{READ_DATA}"
        done = subprocess.run(
            [sys.executable, *command, script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == expected


def test_every_shipped_recipe_can_be_read():
    from headstart.cluster.recipe_file import load_recipe, recipe_yaml, shipped_recipes

    assert {"demo", "folder", "cifar10-resnet50"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe_yaml(recipe)


def test_typing_links_name_the_rooms():
    for room in ROOMS:
        assert (ROOT / ".typing/headstart" / room).resolve() == ROOT / room

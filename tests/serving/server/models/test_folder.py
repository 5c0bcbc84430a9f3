"""What is read of a repository's folder while others write to it."""

import os
import shutil
from pathlib import Path

import pytest

from headstart.serving.server.models.folder import scan, snapshot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models" / "demo" / "1" / "more").mkdir(parents=True)
    for name in ("model.onnx", "manifest.json", "more/weights.bin"):
        (tmp_path / "models" / "demo" / "1" / name).write_text(name)
    return tmp_path / "models"


def test_a_file_that_is_gone_once_it_was_listed_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch):
    def removed(path: Path) -> os.stat_result:
        if path.name == ".model.onnx.Xy12" and path.exists():
            path.unlink()
            gone.append(path)
        return lstat(path)

    lstat, gone = Path.lstat, []
    before = scan(root)["demo"].versions
    (root / "demo" / "1" / ".model.onnx.Xy12").touch()
    monkeypatch.setattr(Path, "lstat", removed)
    assert scan(root)["demo"].versions == before
    assert gone
    assert {*before} == {1}


def test_a_folder_that_is_gone_once_it_was_listed_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch):
    def removed(path: Path) -> os.stat_result:
        if path.name == "more":
            shutil.rmtree(path, ignore_errors=True)
        return lstat(path)

    lstat = Path.lstat
    monkeypatch.setattr(Path, "lstat", removed)
    assert [path for path, *_ in scan(root)["demo"].versions[1]] == ["manifest.json", "model.onnx"]


def test_a_version_that_is_gone_is_no_empty_one(root: Path):
    with pytest.raises(FileNotFoundError):
        snapshot(root / "demo" / "2")

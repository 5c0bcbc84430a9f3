"""What is read of a repository's folder while others write to it."""

import os
import shutil
from pathlib import Path

import pytest

from headstart.serving.server.models import folder
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


def test_a_root_that_comes_to_lead_elsewhere_while_it_is_read_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    def moved(path: Path) -> folder.Snapshot:
        if not (root.parent / "new").exists():
            shutil.copytree(root, root.parent / "new")
            (root.parent / "next").symlink_to("new")
            (root.parent / "next").replace(link)
            shutil.rmtree(root)
        return plain(path)

    plain, link = folder.snapshot, root.parent / "current"
    link.symlink_to(root.name)
    monkeypatch.setattr(folder, "snapshot", moved)
    found = scan(link)["demo"]
    assert found.path == root.parent / "new" / "demo"
    assert found.versions == {1: plain(found.path / "1")}


def test_equal_files_of_two_file_systems_are_not_the_same(root: Path, monkeypatch: pytest.MonkeyPatch):
    """As of two read-only images: their inodes count from 1, and all their files are of one time."""

    def of_another(path: Path) -> os.stat_result:
        fields = list(lstat(path))
        fields[2] += 1
        return os.stat_result(fields)

    lstat, before = Path.lstat, [one[-2:] for one in snapshot(root / "demo" / "1")]
    monkeypatch.setattr(Path, "lstat", of_another)
    after = [one[-2:] for one in snapshot(root / "demo" / "1")]
    assert after == [(inode, device + 1) for inode, device in before]

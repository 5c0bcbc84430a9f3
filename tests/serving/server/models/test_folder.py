"""What is read of a repository's folder while others write to it."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.serving.server.models import folder
from headstart.serving.server.models.folder import Opening, scan, snapshot


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


@pytest.mark.parametrize(("number", "is_told"), [(errno.EACCES, False), (errno.EIO, True)], ids=["EACCES", "EIO"])
def test_a_folder_within_a_version_that_cannot_be_listed(
    root: Path, number: int, is_told: bool, monkeypatch: pytest.MonkeyPatch
):
    """Another user's is told by the load, once for the same files; of a disk that fails nothing is known."""

    def fails(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "more":
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", fails)
    found = scan(root)["demo"]
    assert found.is_readable is not is_told
    assert found.refused == ({"": "it cannot be read (Input/output error)"} if is_told else {})
    assert [path for path, *_ in found.versions.get(1, ())] == (
        [] if is_told else ["manifest.json", "model.onnx", "more"]
    )


def test_a_version_that_is_a_link_is_of_one_folder(root: Path, monkeypatch: pytest.MonkeyPatch):
    def moved(path: Path) -> os.stat_result:
        if link.readlink() == Path(".a"):
            link.unlink()
            link.symlink_to(".b")
        return lstat(path)

    lstat, link, demo = Path.lstat, root / "demo" / "1", root / "demo"
    link.rename(demo / ".a")
    (demo / ".b").mkdir()
    link.symlink_to(".a")
    whole = snapshot(demo / ".a")
    monkeypatch.setattr(Path, "lstat", moved)
    assert scan(root)["demo"].versions == {1: whole}


def test_what_is_removed_while_we_look_takes_nothing_else_with_it(root: Path, monkeypatch: pytest.MonkeyPatch):
    def removed(path: Path) -> Path:
        if path.name == "2":
            shutil.rmtree(path, ignore_errors=True)
        return resolve(path)

    def gone(path: Path) -> Iterator[Path]:
        if path.name == "other":
            shutil.rmtree(path)
        return iterdir(path)

    resolve, iterdir = Path.resolve, Path.iterdir
    for name in ("demo/2", "other/1"):
        shutil.copytree(root / "demo" / "1", root / name)
    assert {name: [*found.versions] for name, found in scan(root).items()} == {"demo": [1, 2], "other": [1]}
    monkeypatch.setattr(Path, "resolve", removed)
    monkeypatch.setattr(Path, "iterdir", gone)
    assert {name: [*found.versions] for name, found in scan(root).items()} == {"demo": [1]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"latest\xff", "it cannot be read"),
        (b"latest" + b" " * 200, "it has more than 200 bytes"),
        (b"newest", "the policy 'newest' is not known; accepted: latest, "),
    ],
    ids=["no text", "long", "unknown"],
)
def test_a_policy_that_cannot_be_used_says_why(root: Path, content: bytes, reason: str):
    (root / "demo" / "policy").write_bytes(content)
    found = scan(root)["demo"]
    assert found.policy is None
    assert found.refused["policy"].startswith(f"the file is not used: {reason}")


def test_the_mark_of_what_is_opened_is_of_the_manifest_and_the_sizes(root: Path):
    def mark() -> str:
        return Opening.of("demo", 1, snapshot(version), version).mark

    version = root / "demo" / "1"
    whole = mark()
    (version / "model.onnx").write_text("model.onnx")
    assert mark() == whole, "written again as it was"
    os.truncate(version / "model.onnx", 5)
    assert mark() != whole, "half a copy"
    (version / "model.onnx").write_text("model.onnx")
    (version / "manifest.json").write_text("MANIFEST.json")
    assert mark() != whole, "other digests"
    (version / "manifest.json").unlink()
    assert Opening.of("demo", 1, (), version).mark == Opening.of("demo", 1, (), root).mark, "without a manifest"


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

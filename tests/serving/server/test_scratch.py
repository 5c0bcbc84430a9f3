"""Temporary folders of a server: gone with it, and kept while anybody holds them."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from headstart.serving.server.errors import StartError
from headstart.serving.server.scratch import Scratch, sweep

PROGRAM = """
import sys
from headstart.serving.server.scratch import Scratch
scratch = Scratch()
(scratch.path / "model.onnx").write_bytes(b"x" * 1000)
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_deleted_and_what_a_process_holds_is_not(place: Path):
    with Scratch() as ours:
        (ours.path / "kept").touch()
        theirs = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(place)},
        )  # fmt: skip
        assert theirs.stdout is not None
        left = Path(theirs.stdout.readline().strip())
        assert left.parent == place
        assert left.stat().st_mode & 0o077 == 0
        sweep()
        assert (left / "model.onnx").exists()
        theirs.kill()
        theirs.communicate()
        assert (left / "model.onnx").exists()
        sweep()
        assert not left.exists()
        assert (ours.path / "kept").exists()
    assert not ours.path.exists()
    ours.close()  # once more is nothing


def test_a_temporary_folder_that_a_cleaner_took_is_made_again(place: Path):
    place.rmdir()
    with Scratch() as scratch:
        assert scratch.path.parent == place
        assert place.stat().st_mode & 0o077 == 0


def test_where_no_temporary_folder_may_be_written_to_the_operator_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", None)  # as before the first look
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(StartError, match="name it with TMPDIR"):
        sweep()


def test_descriptors_are_given_back(place: Path):
    before = len([*Path("/proc/self/fd").iterdir()])
    with Scratch():
        sweep()  # finds it held
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_another_users_folder_is_not_swept(place: Path, monkeypatch: pytest.MonkeyPatch):
    (theirs := place / "headstart-serve-theirs").mkdir()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    sweep()
    assert theirs.exists()


def test_a_file_system_without_locks_will_do(place: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with Scratch() as scratch:
        sweep()
        assert scratch.path.exists()
    assert not scratch.path.exists()


def test_a_file_system_that_gives_folders_another_owner_will_do(place: Path, monkeypatch: pytest.MonkeyPatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with Scratch() as scratch:
        sweep()
        assert scratch.path.exists()
    assert not scratch.path.exists()


def test_only_folders_of_a_server_are_swept(place: Path):
    other, link, file = place / "headstart-abc", place / "headstart-serve-link", place / "headstart-serve-file"
    other.mkdir()
    link.symlink_to(other)
    file.touch()
    sweep()
    assert other.exists()
    assert link.is_symlink()
    assert file.exists()


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_folder_that_is_swept_before_it_is_held_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    make, made, lock = tempfile.mkdtemp, [], fcntl.flock

    def swept_once(*arguments: object, **options: object) -> str:
        path = make(*arguments, **options)
        made.append(Path(path))
        if len(made) == 1 and when == "before it is opened":
            sweep()
        return path

    def locked(held: int, how: int) -> None:
        if len(made) == 1 and when == "before it is locked":
            shutil.rmtree(made[0])
        lock(held, how)

    monkeypatch.setattr(tempfile, "mkdtemp", swept_once)
    monkeypatch.setattr(fcntl, "flock", locked)
    with Scratch() as scratch:
        assert [path.exists() for path in made] == [False, True]
        assert scratch.path == made[1]

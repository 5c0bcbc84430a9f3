"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from headstart.trainer.files import sweep, write_atomically


def test_two_writers_with_one_process_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in two containers that share a folder."""
    path, plain, others = tmp_path / "file", os.fsync, [b"the other's"]

    def between(descriptor: int) -> None:
        plain(descriptor)
        if others:
            write_atomically(path, others.pop())
            assert path.read_bytes() == b"the other's"

    monkeypatch.setattr(os, "fsync", between)
    write_atomically(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomically(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_killed_writes_have_left_is_swept_up_once_nobody_can_be_writing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    for name in ("old", "young"):
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / name, b"half")
    for name in (".notes.tmp", "mine.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    (old,) = tmp_path.glob(".old.*")
    for path in tmp_path.iterdir():
        if ".young." not in path.name:
            os.utime(path, (1e9, 1e9))
    sweep(tmp_path, 60)
    assert not old.exists()
    (young,) = tmp_path.glob(".young.*")
    sweep(tmp_path, 0)
    assert not young.exists()
    assert {path.name for path in tmp_path.iterdir()} == {".notes.tmp", "mine.0123456789abcdef.tmp"}

"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from headstart.trainer.files import write_atomically


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

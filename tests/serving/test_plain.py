"""Files of others: read where they are plain and small, and refused unread otherwise."""

import os
import socket
from pathlib import Path

import pytest

from headstart.serving.plain import read_plain


def test_a_plain_file_is_read_up_to_a_bound(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_plain(path, 4)


@pytest.mark.timeout(30)
def test_what_is_no_plain_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"secret")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        for path in (*(tmp_path / name for name in ("fifo", "link", "endless", "socket")), Path("/dev/null")):
            with pytest.raises(ValueError, match="a link or not a plain file"):
                read_plain(path, 5)
    before = len([*Path("/proc/self/fd").iterdir()])
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "absent", FileNotFoundError)):
        with pytest.raises(error):
            read_plain(path, 5)
    assert len([*Path("/proc/self/fd").iterdir()]) == before

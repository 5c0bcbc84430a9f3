"""Files and JSON of others: read where they are plain and small, and refused otherwise."""

import json
import os
import socket
from pathlib import Path

import pytest

from headstart.serving.plain import parse_plain, read_plain


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


def test_a_document_is_read_as_it_was_written():
    text = '{"a": [1, -9223372036854775808, 18446744073709551615, 1e308, true, null, "\\u00e9", {"b": {}}]}'
    assert parse_plain(text.encode()) == json.loads(text)
    assert parse_plain(b"[" * 32 + b"]" * 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 33 + "]" * 33, "nested more than 32 deep"),
        ('{"a":' * 100_000, "nested more than 32 deep"),
        ('{"a": [1e999]}', "too large for a float"),
        ("NaN", "NaN is not a number"),
        ("18446744073709551616", "number 18446744073709551616 is too large for 64 bits"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        ('["\\udfff"]', "surrogates not allowed"),
        ("{", "Expecting"),
    ],
)
def test_what_could_not_be_written_down_again_is_refused(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        parse_plain(text.encode())

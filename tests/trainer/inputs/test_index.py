import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headstart.trainer.errors import RunError
from headstart.trainer.inputs import index
from headstart.trainer.inputs.index import check_images


@pytest.fixture
def paths(tmp_path, make_image):
    return [str(make_image(tmp_path / "images" / f"{i}.png", i)) for i in range(20)]


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded, in no order."""
    names = []
    real = index.read_image

    def counting(content, *, name):
        names.append(Path(name).name)
        return real(content, name=name)

    monkeypatch.setattr(index, "read_image", counting)
    return names


def test_a_file_is_decoded_once(tmp_path, paths, decoded):
    first = check_images(paths, tmp_path / "cache")
    assert sorted(decoded) == sorted(Path(path).name for path in paths)
    assert check_images(paths, tmp_path / "cache") == first
    assert len(decoded) == 20


def test_an_unreadable_file_is_decoded_once(tmp_path, paths, decoded):
    Path(paths[4]).write_bytes(b"no image")
    first = check_images(paths, tmp_path)
    assert [i for i, outcome in enumerate(first) if outcome.error] == [4]
    assert first[4].error.startswith("is not an image that Pillow")
    assert check_images(paths, tmp_path) == first
    assert len(decoded) == 20


def test_an_error_is_believed_from_the_same_pillow_only(tmp_path, paths, decoded, monkeypatch):
    Path(paths[4]).write_bytes(b"no image")
    check_images(paths, tmp_path)
    monkeypatch.setattr(index, "_DECODER", "another")
    decoded.clear()
    check_images(paths, tmp_path)
    assert decoded == ["4.png"]


def test_a_changed_file_is_decoded_again(tmp_path, paths, decoded, make_image):
    before = check_images(paths, tmp_path)
    make_image(Path(paths[7]), 99)
    os.utime(paths[8], ns=(1, 1))
    decoded.clear()
    after = check_images(paths, tmp_path)
    assert sorted(decoded) == ["7.png", "8.png"]
    assert after[7].sha256 != before[7].sha256
    assert after[8] == before[8]


def test_a_change_that_keeps_size_and_modification_time_is_seen(tmp_path, paths):
    before = check_images(paths, tmp_path)
    file = Path(paths[3])
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert check_images(paths, tmp_path)[3].sha256 != before[3].sha256


def test_a_file_that_cannot_be_opened_is_not_remembered(tmp_path, paths, make_image):
    Path(paths[0]).unlink()
    assert check_images(paths, tmp_path)[0].error == "cannot be read: No such file or directory"
    make_image(Path(paths[0]))
    assert check_images(paths, tmp_path)[0].error == ""


def test_grey_is_found(tmp_path, make_image):
    from PIL import Image

    Image.new("RGB", (3, 3), (9, 9, 9)).save(tmp_path / "grey.png")
    outcomes = check_images([str(tmp_path / "grey.png"), str(make_image(tmp_path / "colour.png"))], tmp_path)
    assert [outcome.grey for outcome in outcomes] == [True, False]


def test_order_and_progress_over_several_chunks(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(index, "_CHUNK", 8)
    calls = []
    many = check_images(paths, tmp_path / "a", lambda done, total: calls.append((done, total)))
    assert calls == [(8, 20), (16, 20), (20, 20)]
    assert many == [check_images([path], tmp_path / "b")[0] for path in paths]


def test_what_was_checked_before_a_kill_stays(tmp_path, paths, decoded, monkeypatch):
    monkeypatch.setattr(index, "_CHUNK", 8)

    def stop(done, total):
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_images(paths, tmp_path, stop)
    decoded.clear()
    check_images(paths, tmp_path)
    assert len(decoded) == 4


def test_a_name_that_is_no_text_is_taken(tmp_path, make_image):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    make_image(tmp_path / "a.png").rename(path)
    assert check_images([path], tmp_path) == check_images([path], tmp_path)
    assert check_images([path], tmp_path)[0].error == ""


def test_a_damaged_index_is_built_anew(tmp_path, paths):
    first = check_images(paths, tmp_path)
    (tmp_path / "images.sqlite").write_bytes(b"damaged" * 1000)
    assert check_images(paths, tmp_path) == first
    assert check_images(paths, tmp_path) == first


@pytest.mark.parametrize("content", [None, b"this is no database" * 200], ids=["new", "damaged"])
def test_a_group_that_shares_a_cache_shares_its_index(tmp_path, paths, content):
    index = tmp_path / "cache" / "images.sqlite"
    before = os.umask(0o002)
    try:
        if content is not None:
            index.parent.mkdir()
            index.write_bytes(content)
            index.chmod(0o600)
        check_images(paths, tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE(index.stat().st_mode) == 0o664


@pytest.mark.usefixtures("unprivileged")
def test_an_index_that_may_only_be_read_is_enough_for_known_images(tmp_path, paths):
    known = check_images(paths[:-1], tmp_path)
    for path in (tmp_path, tmp_path / "images.sqlite"):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert check_images(paths[:-1], tmp_path) == known
        with pytest.raises(
            RunError, match=r"images\.sqlite cannot be used: .*readonly.* make it and its folder writable"
        ):
            check_images(paths, tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_said(tmp_path, paths, monkeypatch):
    class Full(sqlite3.Connection):
        def executemany(self, *_):
            raise sqlite3.OperationalError("database or disk is full")

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: real(*args, factory=Full, **options))
    with pytest.raises(RunError, match=r"images\.sqlite cannot be used: database or disk is full; free some space"):
        check_images(paths, tmp_path)
    monkeypatch.undo()
    assert len(check_images(paths, tmp_path)) == 20


def test_a_cache_that_cannot_be_made_is_said(tmp_path, paths):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"{os.strerror(errno.ENOTDIR)}; set HEADSTART_CACHE"):
        check_images(paths, tmp_path / "file" / "cache")


CHECK = "import sys; from pathlib import Path; from headstart.trainer.inputs import index; index._CHUNK = 2; \
print([c.sha256 for c in index.check_images(sys.argv[2:], Path(sys.argv[1]))])"


def test_two_processes_and_two_threads_share_an_index(tmp_path, paths):
    command = [sys.executable, "-c", CHECK, str(tmp_path / "cache"), *paths]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    thread = threading.Thread(target=check_images, args=(paths, tmp_path / "cache"))
    thread.start()
    thread.join()
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = [outcome.sha256 for outcome in check_images(paths, tmp_path / "cache")]
    assert answers == [str(expected)] * 2

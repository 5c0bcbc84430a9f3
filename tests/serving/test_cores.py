"""A container's limit on CPU time, read from files as the kernel writes them."""

from pathlib import Path

import pytest

from headstart.serving.cores import limit


@pytest.mark.parametrize(
    ("own", "groups", "cores"),
    [
        ("0::/\n", {"": "200000 100000"}, 2),
        ("0::/\n", {"": "150000 100000"}, 2),
        ("0::/\n", {"": "5000 100000"}, 1),
        ("0::/\n", {"": "max 100000"}, None),
        ("0::/\n", {}, None),
        ("9:cpu:/x\n0::/a.slice/b\n", {"a.slice": "300000 100000", "a.slice/b": "max 100000"}, 3),
        ("0::/a.slice/b\n", {"a.slice": "300000 100000", "a.slice/b": "100000 100000"}, 1),
        ("0::/../elsewhere\n", {"": "400000 100000"}, 4),
        ("9:cpu:/x\n", {"": "200000 100000"}, None),
    ],
    ids=["2", "1.5", ".05", "no limit", "no file", "of a parent", "of both", "out of sight", "version 1"],
)
def test_the_limit_is_the_least_of_all_groups(tmp_path: Path, own: str, groups: dict[str, str], cores: int | None):
    (tmp_path / "own").write_text(own)
    for name, text in groups.items():
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{text}\n")
    assert limit(tmp_path / "own", tmp_path / "root") == cores


def test_where_there_are_no_control_groups_there_is_no_limit(tmp_path: Path):
    assert limit(tmp_path / "none") is None

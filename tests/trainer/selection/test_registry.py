"""The registry of finished runs: whole whenever it is read, by whomever, and nobody's source lost."""

import os
import shutil
import stat

import pytest

from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.selection.registry import check_registry, register, registered_name
from headstart.trainer.selection.source_folder import read_card
from headstart.trainer.selection.sources import registered, resolve

MINE, OTHERS = "ab" * 32, "cd" * 32


def test_registry(finished, tmp_path):
    cache = tmp_path / "cache"
    assert registered(cache) == {}
    entry = register(finished("mine") / "source", cache)
    assert entry == cache / "sources" / "mine"
    assert {path.name for path in entry.iterdir()} == {"card.yaml", "weights.safetensors", "sketch.safetensors"}
    first = read_card(registered(cache)["mine"])
    register(finished("mine", seed=1) / "source", cache)
    assert read_card(registered(cache)["mine"]).sha256 != first.sha256
    assert sorted(registered(cache)) == ["mine"]
    assert (
        len([p for p in (cache / "sources").rglob("card.yaml") if not p.parent.is_symlink()]) == 1
    )  # the old one is gone
    (candidate,) = resolve(("mine",), cache)
    assert candidate.load(cache).num_features == 1152
    sketch = candidate.sketch()
    assert sketch is not None
    assert sketch.probe == MINE


def test_registering_again_when_killed_before(finished, tmp_path):
    cache, run = tmp_path / "cache", finished("mine")
    left = cache / "sources" / ".mine"
    (left / "part").mkdir(parents=True)
    (left / "part" / "card.yaml").write_text("half")
    (left / "0").mkdir()
    (left / "link").symlink_to("0")
    assert registered(cache) == {}
    register(run / "source", cache)
    assert read_card(registered(cache)["mine"]).data_fingerprint == OTHERS
    assert len(list(left.iterdir())) == 1


def test_an_entry_that_is_a_folder_and_no_link_is_replaced_too(finished, tmp_path):
    cache, run = tmp_path / "cache", finished("mine", seed=1)
    entry = register(finished("mine") / "source", cache)
    shutil.copytree(entry, tmp_path / "real")
    shutil.rmtree(cache / "sources")
    entry.parent.mkdir()
    (tmp_path / "real").rename(entry)
    register(run / "source", cache)
    assert read_card(registered(cache)["mine"]).sha256 == read_card(run / "source").sha256
    assert entry.is_symlink()
    assert len(list((cache / "sources" / ".mine").iterdir())) == 1


def test_what_cannot_be_registered_leaves_the_earlier_one_and_no_copy(finished, tmp_path):
    entry = register(finished("mine") / "source", tmp_path / "cache")
    (versions := entry.with_name(".mine")).joinpath("link").mkdir()  # where the new link has to go
    first = read_card(entry).sha256
    for _ in range(2):
        with pytest.raises(RunError, match="cannot register mine"):
            register(finished("mine", seed=1) / "source", tmp_path / "cache")
    assert read_card(entry).sha256 == first
    assert sorted(path.name for path in versions.iterdir()) == ["0", "link"]


def test_a_name_that_another_run_took_meanwhile_is_not_taken_from_it(finished, tmp_path):
    cache = tmp_path / "cache"
    assert registered_name("mine", MINE, cache) == registered_name("mine", OTHERS, cache) == "mine"
    entry = register(finished("mine", data=OTHERS) / "source", cache)
    with pytest.raises(RunError, match=r"mine was made by another run, of other data.* run the same command again"):
        register(finished("mine", data=MINE, seed=1) / "source", cache)
    assert read_card(entry).data_fingerprint == OTHERS
    assert registered_name("mine", MINE, cache) == "mine-abababab"


def test_a_source_that_was_registered_anew_since_it_was_found_is_told(finished, tmp_path):
    register(finished("mine") / "source", tmp_path)
    (candidate,) = resolve(("mine",), tmp_path)
    register(finished("mine", seed=1) / "source", tmp_path)
    with pytest.raises(SourceError, match="mine cannot be used: another run was registered under its name meanwhile"):
        candidate.load(tmp_path)


def test_a_registered_source_has_the_permissions_of_the_registry(finished, tmp_path):
    run = finished("mine")
    for path in (run / "source", *(run / "source").iterdir()):
        path.chmod(0o700)
    before = os.umask(0o002)
    try:
        entry = register(run / "source", tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o775
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o664}


@pytest.mark.usefixtures("unprivileged")
def test_an_earlier_copy_that_cannot_be_removed_is_left(finished, tmp_path):
    old = register(finished("mine") / "source", tmp_path).resolve()
    old.chmod(0o500)
    try:
        entry = register(finished("mine", seed=1) / "source", tmp_path)
    finally:
        old.chmod(0o700)
    assert read_card(entry) == read_card(finished("mine", seed=1) / "source")
    assert entry.resolve() != old


def test_a_folder_without_a_card_keeps_its_name(tmp_path):
    (tmp_path / "sources" / "mine").mkdir(parents=True)
    assert registered_name("mine", MINE, tmp_path) == "mine-abababab"


@pytest.mark.parametrize(
    ("name", "said"), [("english-g2", "cannot be registered"), *((n, "name is") for n in ("a/b", "..", ".hidden"))]
)
def test_names_that_cannot_be_registered(name, said, finished, tmp_path):
    run = finished("x")
    card = (run / "source" / "card.yaml").read_text().replace("name: x", f"name: {name!r}")
    (run / "source" / "card.yaml").write_text(card)
    with pytest.raises(SourceError, match=said):
        register(run / "source", tmp_path / "cache")


def test_registered_name_gives_way_to_other_tasks(finished, tmp_path):
    cache = tmp_path / "cache"
    assert registered_name("mine", MINE, cache) == "mine"
    register(finished("mine", data=OTHERS) / "source", cache)
    assert registered_name("mine", OTHERS, cache) == "mine"
    assert registered_name("mine", MINE, cache) == "mine-abababab"
    assert registered_name("english-g2", MINE, cache) == "english-g2-abababab"


def test_an_entry_whose_card_cannot_be_read_keeps_its_name(finished, tmp_path):
    cache = tmp_path / "cache"
    register(finished("mine", data=MINE) / "source", cache)
    (cache / "sources" / "mine" / "card.yaml").write_bytes(b"\xff")
    assert registered_name("mine", MINE, cache) == "mine-abababab"
    register(finished("yours", data=OTHERS) / "source", cache)
    (cache / "sources" / "yours").rename(cache / "sources" / "old-yours")
    assert registered_name("old-yours", OTHERS, cache) == "old-yours-cdcdcdcd"


@pytest.mark.usefixtures("unprivileged")
def test_a_registry_that_takes_no_source_is_told_before_there_is_one(finished, tmp_path):
    check_registry(tmp_path)
    register(finished("mine") / "source", tmp_path)
    check_registry(tmp_path)
    assert sorted(registered(tmp_path)) == ["mine"]
    (tmp_path / "sources" / "..check.lock").unlink()
    (tmp_path / "sources").chmod(0o500)
    with pytest.raises(RunError, match=r"cannot register a source in .*sources: .*HEADSTART_CACHE"):
        check_registry(tmp_path)

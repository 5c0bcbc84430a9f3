"""Stages: skipped when nothing changed, done again when something did, whole after being killed."""

import errno
import fcntl
import json
import math
import os
from pathlib import Path

import pytest

from headstart.cluster.stages import run_directory
from headstart.cluster.stages.run_directory import RunDirectory, write_json
from headstart.trainer.errors import RunError

IDENTITY = {"name": "x", "data": "sklearn:digits"}


class Work:
    """A stage that writes one file and counts how often it ran."""

    def __init__(self, folder: Path) -> None:
        self.file, self.runs = folder / "out.txt", 0

    def __call__(self):
        self.runs += 1
        self.file.write_text(f"run {self.runs}")
        return {"runs": self.runs}, []


def do(folder: Path, work: Work, inputs: dict, *, finish: bool = True, fresh: bool = False):
    with RunDirectory(folder, IDENTITY) as run:
        if fresh:
            run.start_over()
        stage = run.stage("work", inputs, lambda: [work.file], work)
        if finish:
            run.finish()
        return stage


def test_a_stage_is_skipped_while_its_inputs_and_files_are_the_same(tmp_path: Path):
    folder = tmp_path / "run"
    work = Work(folder)
    first = do(folder, work, {"a": 1})
    second = do(folder, work, {"a": 1})
    assert (first.skipped, second.skipped, work.runs) == (False, True, 1)
    assert second.result == {"runs": 1}
    assert second.seconds == 0


@pytest.mark.parametrize("damage", ["inputs", "missing", "altered", "fresh"])
def test_a_stage_runs_again_when_something_changed(tmp_path: Path, damage: str):
    folder = tmp_path / "run"
    work = Work(folder)
    do(folder, work, {"a": 1})
    if damage == "missing":
        work.file.unlink()
    if damage == "altered":
        work.file.write_text("something else")
    again = do(folder, work, {"a": 2 if damage == "inputs" else 1}, fresh=damage == "fresh")
    assert not again.skipped
    assert work.runs == 2


def test_a_result_that_the_world_has_outrun_is_made_again(tmp_path: Path):
    folder = tmp_path / "run"
    work = Work(folder)
    for still_true, runs in ((True, 1), (True, 1), (False, 2), (True, 2)):
        with RunDirectory(folder, IDENTITY) as run:
            run.stage("work", {}, lambda: [work.file], work, lambda result, answer=still_true: answer)
            run.finish()
        assert work.runs == runs


@pytest.mark.parametrize(
    ("change", "kept"), [("nothing", True), ("a file is gone", True), ("inputs", False), ("the world", False)]
)
def test_a_summary_goes_with_the_inputs_that_it_is_of(tmp_path: Path, change: str, kept: bool):
    folder = tmp_path / "run"
    work = Work(folder)
    do(folder, work, {"a": 1})
    (folder / "summary.json").write_text("{}")
    if change == "a file is gone":
        work.file.unlink()
    with RunDirectory(folder, IDENTITY) as run:
        inputs = {"a": 2 if change == "inputs" else 1}
        run.stage("work", inputs, lambda: [work.file], work, lambda result: change != "the world")
        run.stage("another", {}, lambda: [], lambda: ({}, []))  # the first of its kind, as of a variant
    assert (folder / "summary.json").exists() == kept


def test_what_an_unfinished_attempt_did_counts_as_done_by_the_command_that_ends_it(tmp_path: Path):
    folder = tmp_path / "run"
    work = Work(folder)
    do(folder, work, {"a": 1}, finish=False)
    resumed = do(folder, work, {"a": 1})
    assert work.runs == 1
    assert not resumed.skipped
    assert do(folder, work, {"a": 1}).skipped


def test_a_failing_stage_leaves_no_record(tmp_path: Path):
    folder = tmp_path / "run"

    def fail():
        raise RuntimeError("no")

    with RunDirectory(folder, IDENTITY) as run, pytest.raises(RuntimeError):
        run.stage("work", {}, lambda: [], fail)
    work = Work(folder)
    assert not do(folder, work, {}).skipped
    assert work.runs == 1


def test_the_folder_of_another_recipe_is_refused_and_untouched(tmp_path: Path):
    folder = tmp_path / "run"
    work = Work(folder)
    do(folder, work, {"a": 1})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"run of another recipe.*data.*--out"):
        RunDirectory(folder, IDENTITY | {"data": "elsewhere"})
    with pytest.raises(RunError, match="another recipe"):
        RunDirectory(folder, IDENTITY | {"name": "y"})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_folder_of_another_recipe_that_made_nothing_is_taken_over(tmp_path: Path):
    folder = tmp_path / "run"
    other = IDENTITY | {"data": "mistyped"}
    with RunDirectory(folder, other), pytest.raises(RunError, match="at work in"):
        RunDirectory(folder, IDENTITY)
    assert not do(folder, Work(folder), {"a": 1}).skipped
    with pytest.raises(RunError, match="run of another recipe"):
        RunDirectory(folder, other)


@pytest.mark.parametrize("left", ["package/model.onnx", "tune.json", ".stages/tune/trial"])
def test_what_another_recipe_left_without_a_stage_is_kept(tmp_path: Path, left: str):
    folder = tmp_path / "run"
    with RunDirectory(folder, IDENTITY | {"data": "elsewhere"}):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_text("of an earlier run, whose --fresh did not get far, or of a search")
    with pytest.raises(RunError, match="run of another recipe"):
        RunDirectory(folder, IDENTITY)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(RunError, match="is no run directory"):
        RunDirectory(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_whose_run_was_killed_before_its_first_file_is_no_stranger(tmp_path: Path):
    (tmp_path / ".stages/precious").mkdir(parents=True)
    with pytest.raises(RunError, match="is no run directory"):
        RunDirectory(tmp_path, IDENTITY)
    (tmp_path / ".stages/precious").rmdir()
    assert not do(tmp_path, Work(tmp_path), {}).skipped


def test_a_folder_whose_first_run_could_write_nothing_is_no_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "run"

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_atomically", full)
        with pytest.raises(RunError, match="Free space"):
            RunDirectory(folder, IDENTITY)
    assert not do(folder, Work(folder), {}).skipped
    with RunDirectory(folder, IDENTITY) as run, monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_atomically", full)
        with pytest.raises(RunError, match="Free space"):
            run.start_over()
    with pytest.raises(RunError, match="run of another recipe"):
        RunDirectory(folder, IDENTITY | {"name": "y"})
    assert not do(folder, Work(folder), {}).skipped


def test_a_path_that_is_not_utf8_is_kept(tmp_path: Path):
    folder, data = tmp_path / "run", os.fsdecode(b"/data/caf\xe9")
    RunDirectory(folder, IDENTITY | {"data": data})
    identity = json.loads((folder / ".stages/identity.json").read_text(encoding="utf-8"))
    assert identity["data"] == data


def test_two_processes_do_not_share_a_folder(tmp_path: Path):
    with RunDirectory(tmp_path / "run", IDENTITY), pytest.raises(RunError, match="at work in"):
        RunDirectory(tmp_path / "run", IDENTITY)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RunError, match=r"cannot lock .*lock: .*No locks available.*--out"):
        RunDirectory(tmp_path / "run", IDENTITY)


def test_a_damaged_record_says_which_file(tmp_path: Path):
    folder = tmp_path / "run"
    do(folder, Work(folder), {})
    record = folder / ".stages" / "work.json"
    record.write_text(json.dumps({"key": 1})[:-3])
    with pytest.raises(RunError, match=r"work\.json is damaged"):
        do(folder, Work(folder), {})


def test_a_file_name_that_is_no_text_can_be_written_down(tmp_path: Path):
    document = {"skipped": ["caf\udce9.png", "é.png"]}
    write_json(tmp_path / "x.json", document)
    assert "é.png" in (tmp_path / "x.json").read_text()
    assert json.loads((tmp_path / "x.json").read_text()) == document


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path, number: float):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"figure": number})
    assert not list(tmp_path.iterdir())


def test_what_killed_writes_left_in_the_folder_goes_when_the_next_command_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = Work(tmp_path)
    do(tmp_path, work, {"epochs": 1})

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        for folder in (tmp_path, tmp_path / ".stages"):
            with pytest.raises(KeyboardInterrupt):
                write_json(folder / "ranking.json", {})
    assert len(list(tmp_path.rglob("*.tmp"))) == 2
    do(tmp_path, work, {"epochs": 1})
    assert list(tmp_path.rglob("*.tmp")) == []

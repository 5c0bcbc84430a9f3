"""The run directory: stages that are skipped when their inputs have not changed, and survive being killed.

Each finished stage leaves a record under `<run>/.stages/`: the fingerprint of its inputs, the SHA-256 of the files
it wrote, and its result. A stage runs again when its inputs differ or a file of it is missing or altered.

`summary.json` is there only while it tells of the run as it is: a stage whose inputs have changed removes it.

A command that is killed and given again is one *attempt*: the stages it had finished count as done by it, so that the
summary of a disturbed run is that of an undisturbed one.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from headstart.cluster import interrupt
from headstart.trainer.errors import RunError
from headstart.trainer.features import CachedFeatures
from headstart.trainer.files import sweep, write_atomically

SUMMARY = "summary.json"
# What a run that has finished no stage leaves behind: in its folder, and in `.stages/` there.
_CLAIMED = frozenset({".stages"})
_OPENED = frozenset({"lock", "identity.json", "attempt.json"})
# What writing meets where a disk is full, a quota is spent or a folder is not one's own.
_NO_PLACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})

Result = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage left behind."""

    key: str
    """SHA-256 of its inputs; part of the inputs of the stages that follow."""
    result: Result
    seconds: float
    skipped: bool


def fingerprint(value: object) -> str:
    """Return the SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, document: object) -> None:
    """Write a JSON document, whole or not at all; a byte of a file's name that is not UTF-8 becomes `\\udcXX`.

    Raises `ValueError` for NaN and infinities, which JSON has no words for.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_atomically(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}. Free space there, or give --out another folder") from error


class RunDirectory:
    """One run's folder, held by one process at a time."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        """Open or make the folder.

        `identity` says whose run it is (name, data): a folder of another run is refused with `RunError` and left
        as it is, or taken over where nothing was made in it, as after a mistyped path.
        """
        self.path = path.absolute()
        self.private = self.path / ".stages"
        self.stages: dict[str, Stage] = {}
        self._check_folder()
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            self._lock = (lock := self.private / "lock").open("w")
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error}. Give --out a folder that can be written") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RunError(f"another headstart is at work in {self.path}; wait for it, or give --out") from error
        except OSError as error:
            self._lock.close()
            raise RunError(f"cannot lock {lock}: {error}. Give --out a folder on a file system with locks") from error
        for folder in (self.path, self.private):
            sweep(folder, 0)
        try:  # under the lock: until it is free, the other run may yet make something
            self._check_identity(identity)
        except RunError:
            self._lock.close()
            raise
        write_json(self.private / "identity.json", identity)
        self.attempt = self._open_attempt()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, OSError) and error.errno in _NO_PLACE:
            raise RunError(
                f"cannot go on in {self.path}: {error}. Free space there, mend its permissions, or give another folder "
                "(--out for the run, HEADSTART_CACHE for the cache), and run the same command again: what is finished "
                "is kept"
            ) from error

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    def stage(
        self,
        name: str,
        inputs: Mapping[str, object],
        outputs: Callable[[], Iterable[Path]],
        make: Callable[[], tuple[Result, Iterable[CachedFeatures]]],
        still_true: Callable[[Result], bool] = lambda _: True,
    ) -> Stage:
        """Run `make`, or skip it when it ran before on the same inputs and its files are whole.

        `make` returns the stage's result and the cached features it used, whose images are counted. `outputs` lists
        the files it wrote, once it has. `still_true` is asked about an earlier result that the world may have outrun.
        """
        interrupt.check()
        key = fingerprint({"stage": name, **inputs})
        record_path = self.private / f"{name}.json"
        record = read_json(record_path)
        holds = record is not None and record["key"] == key and still_true(record["result"])
        if record is not None and not holds:
            self.remove_summary()
        if not holds or not self._whole(record["files"]):
            started = time.perf_counter()
            result, used = make()
            record = {
                "key": key,
                "attempt": self.attempt,
                "seconds": round(time.perf_counter() - started, 3),
                "files": {str(path.relative_to(self.path)): file_digest(path) for path in sorted(outputs())},
                "images": {cached.directory.name: cached.num_computed(self.attempt) for cached in used},
                "result": result,
            }
            write_json(record_path, record)
        mine = record["attempt"] == self.attempt
        stage = Stage(key=key, result=record["result"], seconds=record["seconds"] if mine else 0.0, skipped=not mine)
        self.stages[name] = stage
        return stage

    def start_over(self) -> None:
        """Forget the stages, and begin another attempt; the run's earlier files stay until they are replaced."""
        for old in self.private.iterdir():
            if old.name not in ("lock", "identity.json"):  # without which a killed run's folder is nobody's
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        self.attempt = self._open_attempt()

    def remove_summary(self) -> None:
        """Remove the summary, because it is of another recipe or of inputs that are others by now."""
        (self.path / SUMMARY).unlink(missing_ok=True)

    def result(self, name: str) -> Result | None:
        """Return what a stage came to when it was last run; None where it never was."""
        record = read_json(self.private / f"{name}.json")
        return None if record is None else record["result"]

    def num_backbone_images(self) -> int:
        """Count the images that this attempt's stages passed through a backbone."""
        images: dict[str, int] = {}
        for name in self.stages:
            record = read_json(self.private / f"{name}.json")
            if record is not None and record["attempt"] == self.attempt:
                images |= record["images"]
        return sum(images.values())

    def finish(self) -> None:
        """End the attempt: the next command on this folder starts another."""
        interrupt.check()
        write_json(self.private / "attempt.json", {"id": self.attempt, "finished": True})

    def _whole(self, files: Mapping[str, str]) -> bool:
        paths = {self.path / name: digest for name, digest in files.items()}
        return all(path.is_file() and file_digest(path) == digest for path, digest in paths.items())

    def _open_attempt(self) -> str:
        found = read_json(self.private / "attempt.json")
        if found is not None and not found["finished"]:
            return str(found["id"])
        attempt = uuid.uuid4().hex
        write_json(self.private / "attempt.json", {"id": attempt, "finished": False})
        return attempt

    def _check_folder(self) -> None:
        if (self.private / "lock").exists() or not self.path.exists():  # the first file that a run makes
            return
        # An empty `.stages` is what a run leaves that was killed before it made that file.
        if not self.path.is_dir() or any(path != self.private for path in self.path.rglob("*")):
            raise RunError(f"{self.path} exists and is no run directory; give --out a new or empty folder")

    def _check_identity(self, identity: Mapping[str, object]) -> None:
        found = read_json(self.private / "identity.json") or identity
        differences = [key for key in identity if found.get(key) != identity[key]]
        if differences and not self._is_bare():
            told = ", ".join(f"{key} {found.get(key)!r} there, {identity[key]!r} here" for key in differences)
            raise RunError(
                f"{self.path} is the run of another recipe ({told}). Give --out another folder, or another name by "
                "--set name=NAME; to use this folder again, remove it first"
            )

    def _is_bare(self) -> bool:
        """Whether nothing can be lost here: no stage, search or earlier run has left a file."""
        known = ((self.path, _CLAIMED), (self.private, _OPENED))
        return all(path.name in names for folder, names in known for path in folder.iterdir())


def read_json(path: Path) -> Any:
    """Return a JSON document that `write_json` wrote, None where there is none; raises `RunError` for a damaged one."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it and run the same command again") from error

"""A repository behind a URL: an fsspec file system's NAME/VERSION/, copied to a private folder and kept up with.

Of each model the versions are copied that its policy would serve, and the one it would fall back on, not counting
those that were seen not to load; a copy stays for as long as its version lies at the URL, since it may be what serves.

The folder is what a `Repository` serves. Each version lies apart and is reached by a link that is replaced in one
step, so that a look at the folder finds a version as it was or as it is. Whether it is sound is the repository's to
say: half of an upload is copied as it is, refused there with a reason, and copied anew when the URL's listing changes.
"""

import collections
import contextlib
import itertools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headstart.serving.errors import PackageError, first_line
from headstart.serving.server.errors import StartError
from headstart.serving.server.models.folder import ELSEWHERE, POLICY_FILE
from headstart.serving.server.models.policy import Policy
from headstart.serving.server.models.remote import Files, Remote, digest, without_secrets
from headstart.serving.server.scratch import Scratch, check_room

LOOK_S = 10.0
"""Seconds between two listings, which object stores charge for."""
_CANDIDATES = 2  # versions that are copied of those that may take the requests: the best, and one to fall back on
_STORE = ".versions"
_CHUNK = 8 << 20
_NOT_COPIED = "it cannot be copied, for which the server's log has the reason; it is tried again"
_KEPT_S = 5.0  # what was replaced is deleted later than that: somebody may be reading it
_PAUSE_S = 300.0  # at most, between two attempts at what cannot be copied: each may read all of it, which costs
_JOIN_S = 5.0  # a listing that hangs is not waited for
_LOG = logging.getLogger(__name__)


class Mirror:
    """Copies what a URL holds to `folder`, again and again, in a thread of its own.

        mirror = Mirror("s3://bucket/models")
        mirror.start()  # the first look: blocks until what is there has been copied
        repository = Repository(mirror.folder)
        mirror.refuse("demo", [7, 6])  # so 5 and 4 are copied too
        mirror.close()  # deletes the copy

    A URL that cannot be reached later changes nothing, nor does one whose listing is empty all at once, as that of a
    bucket without its permissions is; a version that cannot be copied leaves the one that was there. All of it is in
    the log, once for each reason, and tried again, a copy after pauses that grow.

    Args:
        url: what fsspec understands.
        policy_of: the rule of a model, by its name, where it has no file NAME/policy; by default latest.
        look_s: seconds between two looks.

    Raises:
        StartError: fsspec, or the package that its protocol needs, is not installed; the URL is none.
    """

    def __init__(
        self, url: str, *, policy_of: Callable[[str], Policy] = lambda name: Policy(), look_s: float = LOOK_S
    ) -> None:
        self._remote = Remote(url)
        self.url = self._remote.url
        """The URL, without a password in it."""
        self._scratch = Scratch()
        self.folder = self._scratch.path.resolve()
        """The copy: readable by this user alone."""
        (self.folder / _STORE).mkdir()
        self._policy_of = policy_of
        self._look_s = look_s
        self._copied: dict[tuple[str, str], str] = {}  # (name, version) or (name, "policy") -> what the listing said
        self._failed: dict[tuple[str, str], tuple[str, float, float]] = {}  # what it said, the pause, and its end
        self._refused: dict[str, set[int]] = {}
        self._told: dict[str, str] = {}
        self._number = 0
        self._replaced: collections.deque[tuple[float, Path]] = collections.deque()  # and when
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Copy what is there, and go on looking.

        Raises:
            StartError: the URL cannot be listed.
        """
        if problem := self.look():
            raise StartError(
                f"{self.url} cannot be listed: {problem}; check the URL, the network and the credentials of its "
                "file system, and copy packages to NAME/1 there"
            )
        self._thread = threading.Thread(target=self._watch, name="mirror", daemon=True)
        self._thread.start()

    def refuse(self, name: str, versions: Iterable[int]) -> None:
        """Say which versions of a model cannot be loaded as they are: older ones are copied at once."""
        self._refused[name] = set(versions)
        self._awake.set()

    def look(self) -> str:
        """List the URL and copy what has changed.

        Returns:
            why the URL could not be listed, or an empty string.
        """
        with self._looking:
            return self._look()

    def close(self) -> None:
        """Stop, also within a file, and delete the copy."""
        self._stopping.set()
        self._awake.set()
        if self._thread:
            self._thread.join(_JOIN_S)
        self._scratch.close()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            self._awake.wait(self._look_s)
            self._awake.clear()
            if not self._stopping.is_set():
                try:
                    self.look()
                except Exception:  # no space for the folder itself; without this thread nothing is deployed any more
                    _LOG.exception("the look at %s failed; it is tried again", self.url)

    def _look(self) -> str:
        try:
            found = self._remote.listing()
        except Exception as error:  # file systems raise what their libraries raise
            problem = f"{type(error).__name__}: {without_secrets(first_line(error))}"
            self._tell("", f"{self.url} cannot be listed, what was copied stays: {problem}")
            return problem
        if not found and self._copied:
            self._tell("", f"{self.url} is empty all at once; what was copied stays until something else lies there")
            return ""
        self._told.pop("", None)
        self.folder.mkdir(mode=0o700, exist_ok=True)  # a cleaner of temporary folders may have taken it
        while self._replaced and time.monotonic() - self._replaced[0][0] >= _KEPT_S:
            shutil.rmtree(self._replaced.popleft()[1], ignore_errors=True)
        policies = [one for one in found if one[1] == POLICY_FILE]
        gone = [one for one in self._copied if one not in found]
        for key in itertools.chain(policies, self._chosen(found), gone):
            if self._stopping.is_set():
                break
            self._keep_up(key, found.get(key, {}))
        with contextlib.suppress(OSError):  # no space: the index lacks what was not copied
            self._list(found)
        return ""

    def _keep_up(self, key: tuple[str, str], files: Files) -> None:
        """Copy what has changed, and delete what has no files any more; a failure concerns this one alone."""
        name, says = "/".join(key), digest(files)
        said, pause, again_at = self._failed.get(key, ("", 0.0, 0.0))
        if said == says and time.monotonic() < again_at:
            return
        try:
            if not files:
                self._remove(key)
            elif self._copied.get(key) != says or not self._is_whole(key, files):
                self._follow(key, files, says)
            self._failed.pop(key, None)
        except Exception as error:  # as above; and no space, a disk that fails, or a file that is a folder as well
            pause = min(2 * pause, _PAUSE_S) if said == says else self._look_s
            self._failed[key] = says, pause, time.monotonic() + pause
            problem = getattr(error, "strerror", None) or without_secrets(first_line(error))
            self._tell(name, f"{name} of {self.url} cannot be {'copied' if files else 'deleted'}: {problem}")

    def _chosen(self, found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """The versions to copy; asked for once the policies are."""
        by_name: dict[str, list[int]] = {}
        for name, version in found:
            if version != POLICY_FILE:
                by_name.setdefault(name, []).append(int(version))
        for name, versions in by_name.items():
            policy = self._policy(name)
            refused = self._refused.get(name, set())
            sound = [one for one in policy.candidates(versions) if one not in refused]
            wanted = {*sound[:_CANDIDATES], policy.canary(versions)}
            for number in sorted(versions, reverse=True):
                key = (name, str(number))
                if number in wanted or key in self._copied:
                    yield key

    def _list(self, found: Iterable[tuple[str, str]]) -> None:
        """Write beside each model's copies which other versions lie at the URL, for the index."""
        elsewhere: dict[str, list[str]] = {}
        for key in found:
            name, version = key
            if version != POLICY_FILE and key not in self._copied:
                elsewhere.setdefault(name, []).append(f"{version} {_NOT_COPIED if key in self._failed else ''}\n")
        for before in self.folder.glob(f"*/{ELSEWHERE}"):
            if before.parent.name not in elsewhere:
                before.unlink()
                with contextlib.suppress(OSError):  # there are copies
                    before.parent.rmdir()
        for name, lines in elsewhere.items():
            (self.folder / name).mkdir(exist_ok=True)
            new = self.folder / _STORE / "elsewhere"
            new.write_text("".join(lines))
            new.replace(self.folder / name / ELSEWHERE)

    def _policy(self, name: str) -> Policy:
        with contextlib.suppress(OSError, UnicodeDecodeError, PackageError):  # none, or one that the repository refuses
            return Policy.parse((self.folder / name / POLICY_FILE).read_text(encoding="utf-8")[:200])
        return self._policy_of(name)

    def _is_whole(self, key: tuple[str, str], files: Iterable[str]) -> bool:
        """Whether a copy still has its files, which whoever cleans temporary folders may have deleted."""
        place = self.folder.joinpath(*key)
        return all((place / inner).is_file() for inner in files)

    def _follow(self, key: tuple[str, str], files: Files, says: str) -> None:
        """Copy a version, or a policy, and put it in the place of the one before."""
        name, version = key
        check_room(self.folder, sum(entry["size"] or 0 for entry in files.values()))
        self._number += 1
        new = self.folder / _STORE / str(self._number)
        try:
            for inner, entry in files.items():
                self._copy(entry, new / inner if inner else new)
            place = self.folder / name / version
            place.parent.mkdir(parents=True, exist_ok=True)
            before = place.resolve()
            if version != POLICY_FILE:
                link = self.folder / _STORE / "link"
                link.unlink(missing_ok=True)
                link.symlink_to(Path("..") / _STORE / new.name)
                link.replace(place)
                if before != place:
                    self._replaced.append((time.monotonic(), before))
            else:
                new.replace(place)
        except Exception:
            if new.is_dir():
                shutil.rmtree(new, ignore_errors=True)
            else:
                new.unlink(missing_ok=True)
            raise
        self._copied[key] = says
        self._told.pop(f"{name}/{version}", None)
        _LOG.info("%s/%s was copied from %s", name, version, self.url)

    def _copy(self, entry: Mapping[str, Any], target: Path) -> None:
        """Copy a file: as many bytes as its listing says, so that one that grows does not fill the disk."""
        expected, copied = entry["size"], 0
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._remote.files.open(entry["path"], "rb", block_size=_CHUNK) as source, target.open("xb") as file:
            while piece := source.read(_CHUNK):
                copied += len(piece)
                if self._stopping.is_set():
                    raise PackageError("the server stops")
                if expected is not None and copied > expected:
                    break
                file.write(piece)
        if expected is not None and copied != expected:
            raise PackageError(f"{target.name} has not the {expected} bytes that its listing says: it is being written")

    def _remove(self, key: tuple[str, str]) -> None:
        name, version = key
        place = self.folder / name / version
        before = place.resolve()
        place.unlink(missing_ok=True)
        if before != place:
            self._replaced.append((time.monotonic(), before))
        with contextlib.suppress(OSError):  # others are there, or the folder itself is gone
            place.parent.rmdir()
        del self._copied[key]
        if version != POLICY_FILE:
            self._refused.get(name, set()).discard(int(version))
        _LOG.info("%s/%s is gone from %s", name, version, self.url)

    def _tell(self, what: str, message: str) -> None:
        """Log a failure once, and not at each look for as long as it lasts."""
        if self._told.get(what) != message and not self._stopping.is_set():
            self._told[what] = message
            _LOG.warning("%s; it is tried again", message)

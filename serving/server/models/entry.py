"""One name of a repository: what lies in its folder, what is loaded of it, and who answers its requests."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from headstart.serving.server.errors import ServeError, not_found, unavailable
from headstart.serving.server.models.folder import Folder, Snapshot
from headstart.serving.server.models.memory import Taken
from headstart.serving.server.models.model import LoadedModel
from headstart.serving.server.models.policy import VERSION, Policy
from headstart.serving.server.scheduling.batching import Scheduler

_UNLOADED = "unloaded by request; load it by request"
_CHANGING = "its files are still changing; it is opened when two looks in a row saw the same"

State = Literal["READY", "LOADING", "UNAVAILABLE"]


@dataclass(kw_only=True)
class Served:
    """A loaded version with its scheduler."""

    model: LoadedModel
    scheduler: Scheduler
    files: Snapshot
    """What its folder held when it was loaded."""
    memory: Taken
    """What it takes."""


@dataclass(kw_only=True)
class Attempt:
    """A load that failed."""

    files: Snapshot
    reason: str
    again_at: float | None = None
    """`monotonic` seconds of the next attempt with the same files; None waits for others."""


@dataclass(kw_only=True)
class Entry:
    """One name: what is there, what is loaded, and who answers."""

    name: str
    folder: Folder = field(default_factory=Folder)
    policy: Policy = field(default_factory=Policy)
    served: dict[int, Served] = field(default_factory=dict)
    base: Served | None = None
    canary: Served | None = None
    count: int = 0
    """Requests that left the version to us while there was a canary."""
    changing: set[int] = field(default_factory=set)
    """Versions whose files are not those of the look before, as while they are copied: they are not opened yet."""
    loading: set[int] = field(default_factory=set)
    failed: dict[int, Attempt] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)
    """Of those that failed, what waits for other files, as it was last told."""
    told: dict[str, str] = field(default_factory=dict)
    """Of the folder's names that are no version, the reasons as they were last told."""
    absent: str = ""
    """What the policy names that is not there, in words, as it was last told."""
    unloaded: bool = False
    """By request, until it is loaded by request."""

    def see(self, folder: Folder, *, at_once: bool) -> None:
        """Note what is on the disk; where that could not be listed, what was there before is taken to be there.

        Args:
            at_once: whether what has changed is whole already, or is to be tried as if it were.
        """
        if not folder.is_readable:
            self.folder = replace(self.folder, refused=folder.refused)
            return
        before, self.folder = self.folder.versions, folder
        self.changing = {one for one, files in folder.versions.items() if not at_once and files != before.get(one)}
        settled = {*folder.versions} - self.changing
        self.failed = {one: attempt for one, attempt in self.failed.items() if one in settled}

    def choose(self, version: str | None) -> Served | None:
        """Who answers the next request."""
        if version:
            return self.served.get(int(version)) if VERSION.fullmatch(version) else None
        if self.canary is None:
            return self.base
        self.count += 1
        return self.canary if self.policy.takes(self.count - 1) else self.base

    def reason(self) -> str:
        """Why nothing of it serves: what is chosen comes before what is not."""
        if self.unloaded:
            return _UNLOADED
        if self.loading:
            return "it is being loaded"
        chosen = [version for version in (*self.failed, *self.changing) if self.policy.chooses(version)]
        return self._problem(max(chosen)) if chosen else str(self.index()[-1]["reason"])

    def absence(self, version: str | None, *, started: bool) -> ServeError:
        """What a client is told where nobody answers: 503 where somebody may yet, 404 where not.

        Args:
            version: that was asked for; None or empty left it to us.
            started: whether all that was there at the start has been looked at.
        """
        if version is None or version == "":
            return unavailable(f"{self.name} is not ready: {self.reason()}")
        rows = [row for row in self.index() if row["version"] == version]
        number = int(version) if VERSION.fullmatch(version) else 0
        waits = number in self.failed or number in self.changing or number in self.loading
        if rows and (self.unloaded or waits or not started):
            return unavailable(
                f"{self.name} version {number} is not ready: {rows[0]['reason'] or 'it is being loaded'}"
            )
        served = ", ".join(map(str, sorted(self.served))) or "none"
        return not_found(f"{self.name} version {version[:20]!r} is not served; served: {served}")

    def index(self) -> list[dict[str, Any]]:
        """Its rows of the repository index; a version that serves names a failure of what should follow it."""
        rows = []
        for version in sorted({*self.folder.versions, *self.folder.elsewhere, *self.served, *self.loading}):
            state: State = "UNAVAILABLE"
            reason = self._problem(version)
            if version in self.served:
                state = "READY"
                if not reason and self.policy.chooses(version):
                    reason = self.absent
                elif not reason:
                    reason = f"not chosen by the policy {self.policy}; it serves until what is chosen does"
            elif version in self.loading:
                state, reason = "LOADING", ""
            elif self.unloaded:
                reason = _UNLOADED
            elif not reason:
                reason = f"not chosen by the policy {self.policy}"
            rows.append({"name": self.name, "version": str(version), "state": state, "reason": reason})
        for refused, reason in sorted(self.folder.refused.items()):
            rows.append({"name": self.name, "version": refused, "state": "UNAVAILABLE", "reason": reason})
        return rows or [
            {"name": self.name, "version": "", "state": "UNAVAILABLE", "reason": "there is no version folder"}
        ]

    def _problem(self, version: int) -> str:
        """Why a version is not loaded; empty where nothing is wrong with its files."""
        if version in self.failed:
            return self.failed[version].reason
        if version in self.changing:
            return _CHANGING
        return "" if version in self.folder.versions else self.folder.elsewhere.get(version, "")

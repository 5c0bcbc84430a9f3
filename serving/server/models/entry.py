"""One name of a repository: what lies in its folder, what is loaded of it, and who answers its requests."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from headstart.serving.server.models.folder import Folder, Snapshot
from headstart.serving.server.models.memory import Taken
from headstart.serving.server.models.model import LoadedModel
from headstart.serving.server.models.policy import VERSION, Policy
from headstart.serving.server.scheduling.batching import Scheduler

_UNLOADED = "unloaded by request; load it by request"

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
    loading: set[int] = field(default_factory=set)
    failed: dict[int, Attempt] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)
    """Of those that failed, what waits for other files, as it was last told."""
    unloaded: bool = False
    """By request, until it is loaded by request."""

    def see(self, folder: Folder) -> None:
        """Note what is on the disk; where that could not be listed, what was there before is taken to be there."""
        self.folder = folder if folder.is_readable else replace(self.folder, refused=folder.refused)

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
        failed = [version for version in self.failed if self.policy.chooses(version)]
        return self.failed[max(failed)].reason if failed else str(self.index()[-1]["reason"])

    def index(self) -> list[dict[str, Any]]:
        """Its rows of the repository index; a version that serves names a failure of what should follow it."""
        rows = []
        for version in sorted({*self.folder.versions, *self.served, *self.loading}):
            state: State = "UNAVAILABLE"
            reason = self.failed[version].reason if version in self.failed else ""
            if version in self.served:
                state = "READY"
                if not reason and not self.policy.chooses(version):
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

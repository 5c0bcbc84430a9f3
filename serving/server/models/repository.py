"""The folder NAME/VERSION/ of packages: what it holds, what is loaded of it, and which version answers.

`cp -r runs/demo/package REPOSITORY/demo/1` deploys. The folder, or what a link leads to by then, is looked at every
second. A version is opened when two looks in a row saw the same files; one that is not sound is refused with a reason,
and tried again when its files have changed. A new version is loaded, verified and warmed up beside the old one, takes
over between two requests, and the old one answers what it has.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from headstart.serving.device import Device
from headstart.serving.errors import PackageError, brief
from headstart.serving.server.errors import ServeError, bad_request, not_found, unavailable
from headstart.serving.server.models.drift import check_share
from headstart.serving.server.models.entry import Entry, Served
from headstart.serving.server.models.folder import POLICY_FILE, Folder, Refused
from headstart.serving.server.models.from_package import load_package
from headstart.serving.server.models.loading import Loader, Loading, Scheduling
from headstart.serving.server.models.mirror import Mirror
from headstart.serving.server.models.policy import Policy
from headstart.serving.server.models.root import Root
from headstart.serving.server.watching.metrics import Metrics
from headstart.serving.signing import check_public_key

POLL_S = 1.0
_LOG = logging.getLogger(__name__)


class Repository:
    """Loads what a folder holds and keeps up with it; belongs to one event loop.

        repository = Repository(Path("models"))
        await repository.start()
        served = repository.route("demo", None)
        await repository.stop()

    While a version is replaced both are in memory.

    Args:
        root: the folder, or a link to it, which may come to lead to another one.
        provider: execution provider that must run every model.
        threads: threads within an operator; None is one per core.
        provider_options: of the CUDA or TensorRT provider, as `Device.options`.
        policy: the rule of models that have none of their own; None is latest.
        policies: rules by model. A file NAME/policy (`latest`, `pinned:2`, `canary:3:10%`) goes before both, and
            is read again when it changes.
        scheduling: limits of each model; None is the defaults.
        public_key: PEM of the key that must have signed every package; None asks for no signatures.
        metrics: where to count.
        poll_s: seconds between two looks at the folder, which all processes do at the same time.
        loader: how a version's folder becomes a model; tests give another.
        mirror: keeps the root up with a URL; started and closed here.
        drift: share of executions whose features are compared with the training images', 0 to 1, where a package has
            what that needs; the others cost nothing more.
        max_memory: bytes that models may take together, both versions while one is replaced; None is no limit.

    Raises:
        PackageError: the root is no folder, the key cannot be used, or the provider or threads cannot be.
    """

    def __init__(
        self,
        root: Path,
        *,
        provider: str = Device.provider,
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
        policy: Policy | None = None,
        policies: Mapping[str, Policy] | None = None,
        scheduling: Scheduling | None = None,
        public_key: Path | None = None,
        metrics: Metrics | None = None,
        poll_s: float = POLL_S,
        loader: Loader | None = None,
        mirror: Mirror | None = None,
        drift: float = 0.0,
        max_memory: int | None = None,
    ) -> None:
        if not root.is_dir():
            raise PackageError(f"{root} is no folder; make it, and copy packages to {root}/NAME/1")
        device = Device(provider=provider, threads=threads, options=provider_options or {})
        if public_key is not None:
            check_public_key(public_key)
        check_share(drift)
        self._root = Root(root.absolute())
        self.scheduling = scheduling or Scheduling()
        self.metrics = metrics or Metrics()
        self._policy, self._policies = policy or Policy(), dict(policies or {})
        self._poll_s = poll_s
        self.mirror = mirror
        """Keeps the root up with a URL; None where the folder is one's own, or a supervisor's mirror is at work."""
        self.mirrored = mirror is not None
        """Whether a mirror keeps the root, here or in the supervisor: it puts whole versions in their places."""
        self.on_refused: Refused = mirror.refuse if mirror else lambda name, versions: None
        """Is told which versions of a model do not load as they are, by its name, when these change."""
        load = loader or (
            lambda folder, name, version: load_package(
                folder,
                name=name,
                version=version,
                device=device,
                max_batch=self.scheduling.max_batch,
                public_key=public_key,
                drift=drift,
            )
        )
        self.loading = Loading(load, self.scheduling, self.metrics, max_memory)
        """How versions are opened."""
        self.unloaded: set[str] = set()
        """Names that were taken down by request."""
        self._entries: dict[str, Entry] = {}
        self._lock = asyncio.Lock()
        self._changing: set[asyncio.Task[None]] = set()
        self._retiring: dict[asyncio.Task[None], str] = {}
        """Versions that answer what they have, and whose they are."""
        self._poller: asyncio.Task[None] | None = None
        self.started = self.stopping = False

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is known, by name."""
        return self._entries

    def route(self, name: str, version: str | None) -> Served:
        """Who answers this request; the canary's share is counted here.

        Raises:
            ServeError: 404, where there is no such model or version; 503, where it is there and not ready.
        """
        entry = self._entries.get(name)
        served = entry.choose(version) if entry else None
        if served is None:
            raise self._absence(entry, name, version)
        return served

    def find(self, name: str, version: str | None) -> Served:
        """As `route`, for a question about a model: nothing is counted, and no version means the canary's base."""
        entry = self._entries.get(name)
        served = (entry.choose(version) if version else entry.base) if entry else None
        if served is None:
            raise self._absence(entry, name, version)
        return served

    async def start(self) -> None:
        """Load what the policies choose, then watch the folder. A package that is refused stops nothing.

        Raises:
            StartError: the mirror's URL cannot be listed.
        """
        if self.mirror:
            await asyncio.to_thread(self.mirror.start)
        await self.look()
        self.started = True
        for name, policy in self._policies.items():
            if name not in self._entries:
                _LOG.warning("the policy %s is of the model %s, which is not there", policy, brief(name))
        self._poller = asyncio.create_task(self._poll())

    async def stop(self, drain_s: float = 30.0) -> None:
        """Refuse new requests, answer those that wait for up to `drain_s` seconds, close all."""
        self.stopping = True
        self.loading.stop()
        if self._poller:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        for entry in self._entries.values():
            self._set(entry, None, None)
        if self._retiring:
            _, late = await asyncio.wait(self._retiring, timeout=drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self.mirror:
            await asyncio.to_thread(self.mirror.close)

    async def look(self) -> None:
        """Compare the folder with what is loaded, and follow it."""
        async with self._lock:
            try:
                folders = await self._root.scan()
            except ServeError:
                return
            for name in [*folders, *(one for one in self._entries if one not in folders)]:
                entry = self._entry(name)
                entry.see(folders.get(name, Folder()), at_once=self.mirrored or not self.started)
                await self._follow(entry)
                if name not in folders:
                    del self._entries[name]

    async def load(self, name: str) -> None:
        """Load a model, now and also where it failed before; undoes `unload`.

        A caller that is cancelled leaves it to be done, here and in `unload`.

        Raises:
            ServeError: 404, where the repository has no such model; 400 with the reason, where it cannot be loaded;
                503, where the repository cannot be read.
        """
        await self._finish(self._load(name))

    async def unload(self, name: str) -> None:
        """Take a model down until it is loaded by request; returns when its last request is answered.

        Raises:
            ServeError: 404, where there is no such model.
        """
        await self._finish(self._unload(name))

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what must not be left half done where whoever asked for it goes."""
        changing = asyncio.ensure_future(work)
        self._changing.add(changing)
        changing.add_done_callback(self._changing.discard)
        await asyncio.shield(changing)

    async def _load(self, name: str) -> None:
        async with self._lock:
            folders = await self._root.scan()
            if name not in folders:
                raise not_found(f"the repository has no model {name[:128]!r}; copy a package to NAME/1 first")
            entry = self._entry(name)
            entry.see(folders[name], at_once=True)
            entry.unloaded = False
            self.unloaded.discard(name)
            entry.failed.clear()
            self.loading.forget(name)
            await self._follow(entry)
            if entry.failed:
                version, attempt = max(entry.failed.items())
                raise bad_request(f"{name} version {version} cannot be loaded: {attempt.reason}")
            if entry.base is None:
                raise bad_request(f"{name} cannot be loaded: {entry.reason()}")

    async def _unload(self, name: str) -> None:
        async with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise not_found(f"there is no model {name[:128]!r} to unload")
            entry.unloaded = True
            self.unloaded.add(name)
            self._set(entry, None, None)
        await asyncio.gather(*(task for task, of in self._retiring.items() if of == name))

    async def _poll(self) -> None:
        while True:
            # At the multiples of a clock that all processes share, so that they see a new version at one moment.
            await asyncio.sleep(self._poll_s - monotonic() % self._poll_s)
            try:
                await self.look()
            except Exception:
                # A watcher that dies ends deployments without a word.
                _LOG.exception("the look at %s failed; it is tried again", self._root.path)

    def _entry(self, name: str) -> Entry:
        """What is known of a name: from before, or nothing yet."""
        policy, unloaded = self._policies.get(name, self._policy), name in self.unloaded
        return self._entries.setdefault(name, Entry(name=name, policy=policy, unloaded=unloaded))

    async def _follow(self, entry: Entry) -> None:
        """Load what the policy chooses, hand over to it, and retire the rest."""
        if POLICY_FILE not in entry.folder.refused:  # a damaged one leaves the rule as it was
            before, entry.policy = entry.policy, entry.folder.policy or self._policies.get(entry.name, self._policy)
            if entry.policy != before and entry.folder.versions:
                _LOG.info("%s: its policy is %s", entry.name, entry.policy)
        for what, reason in entry.folder.refused.items():
            if entry.told.get(what) != reason:
                _LOG.warning("%s: %s", f"{entry.name} {what}".strip(), reason)
        entry.told = entry.folder.refused
        versions = [*entry.folder.versions]
        known = sorted({*versions, *entry.folder.elsewhere})
        absent = entry.policy.absent(known) if known else ""
        if absent and absent != entry.absent:
            _LOG.warning("%s: %s; there are %s", entry.name, absent, ", ".join(map(str, known)))
        entry.absent = absent
        if entry.unloaded:
            self._set(entry, None, None)
            return
        base = canary = None
        for version in entry.policy.candidates(versions):
            base = await self.loading.ensure(entry, version)
            if base:
                break
        chosen = entry.policy.canary(versions)
        if chosen:
            canary = await self.loading.ensure(entry, chosen)
        refused = sorted(version for version, one in entry.failed.items() if one.again_at is None)
        if refused != entry.refused:
            entry.refused = refused
            self.on_refused(entry.name, refused)
        waits = any(map(entry.policy.chooses, entry.changing))
        stays = canary is None and entry.base is not None and int(entry.base.model.version) in versions
        if base is None and (waits or stays):
            base = entry.base  # nothing that was chosen is sound, or it is still copied: the old one stays
        if not self.stopping:
            self._set(entry, base or canary, canary)

    def _set(self, entry: Entry, base: Served | None, canary: Served | None) -> None:
        """Let these answer from the next request on; the others answer what they have and are closed."""
        before = entry.served
        entry.served = {int(one.model.version): one for one in (base, canary) if one}
        entry.base, entry.canary = base, canary
        for version, one in before.items():
            if version not in entry.served and not self.stopping:
                _LOG.info("%s version %d answers no new requests", entry.name, version)
            if entry.served.get(version) is not one:
                one.scheduler.stop_accepting()
                task = asyncio.create_task(self._retire(one))
                self._retiring[task] = entry.name
                task.add_done_callback(self._retiring.pop)

    async def _retire(self, one: Served) -> None:
        try:
            await one.scheduler.drained()
        finally:
            self.loading.release(one)

    def _absence(self, entry: Entry | None, name: str, version: str | None) -> ServeError:
        self.metrics.unknown()
        if self.stopping:
            return unavailable("the server is shutting down")
        if entry is None:
            if not self.started:
                return unavailable("the server is starting; try again")
            return not_found(f"there is no model {name[:128]!r}; POST /v2/repository/index lists those that are")
        return entry.absence(version, started=self.started)

"""What a repository's folder holds, read without opening a package: names, versions, policies, and what is odd."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from headstart.serving.errors import PackageError, brief
from headstart.serving.manifest import MANIFEST, MOST_BYTES
from headstart.serving.plain import read_plain
from headstart.serving.server.models.policy import VERSION, Policy

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
POLICY_FILE = "policy"
ELSEWHERE = ".elsewhere"
"""Beside a model's versions, where a mirror writes of others that it has not copied: `VERSION REASON` a line."""
_POLICY_BYTES, _ELSEWHERE_BYTES = 200, 1 << 20
_LEADS_OUT = "its folder is a link that leads out of the repository; copy it there"

Refused = Callable[[str, list[int]], None]
"""Is told which versions of a model do not load as they are."""

Snapshot = tuple[tuple[str, int, int, int, int], ...]
"""Path, bytes, time of change in ns, inode and device of every file of a folder: equal where nothing was written."""


class Opening(NamedTuple):
    """A version that is being opened."""

    name: str
    version: int
    mark: str
    """Of its files: another one where something else was written, and the same where it was written again."""

    @classmethod
    def of(cls, name: str, version: int, files: Snapshot, folder: Path) -> "Opening":
        """With a mark of the manifest, which has the files' digests, and of their sizes, which tell half a copy."""
        try:
            manifest = read_plain(folder / MANIFEST, MOST_BYTES)
        except (OSError, ValueError):  # nothing of it is opened
            manifest = b""
        sizes = [(path, size) for path, size, *_ in files]
        return cls(name, version, hashlib.sha256(repr((manifest, sizes)).encode()).hexdigest()[:32])


@dataclass(kw_only=True)
class Folder:
    """What is on the disk for one name."""

    path: Path = Path()
    """Where it lies, once links to the root were followed."""
    versions: dict[int, Snapshot] = field(default_factory=dict)
    """By number."""
    elsewhere: dict[int, str] = field(default_factory=dict)
    """Versions that are known and not here, with the reason, or none where none is asked for."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons by the name of what is no version."""
    policy: Policy | None = None
    """From its file, where it has one that can be read."""
    is_readable: bool = True
    """Whether what it holds could be listed."""


def snapshot(folder: Path) -> Snapshot:
    """What a folder holds, without reading it; equal snapshots mean that nothing was written between them.

    Raises:
        OSError: it cannot be listed; a FileNotFoundError, where it is gone, and not where a file in it is.
    """
    rows = []
    for parent, folders, files in os.walk(folder, onerror=_pass_over):
        for path in (Path(parent, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # what another program wrote for a moment
                told = path.lstat()
                rows.append(
                    (path.relative_to(folder).as_posix(), told.st_size, told.st_mtime_ns, told.st_ino, told.st_dev)
                )
    folder.lstat()
    return tuple(sorted(rows))


def _pass_over(error: OSError) -> None:
    """Of a folder within a version: one that is gone holds nothing; one that is another user's is told by the load."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):
        raise error


def scan(root: Path) -> dict[str, Folder]:
    """What the root holds. Hidden names are none of ours; other files and odd names are left alone.

    Where the root is a link, all is of one folder: it is read again if the link came to lead elsewhere meanwhile.

    Raises:
        OSError: the root cannot be listed.
    """
    while True:
        place = os.path.realpath(root, strict=True)
        with contextlib.suppress(FileNotFoundError):  # where the link was moved and its folder deleted
            found = _scan_place(Path(place))
            if os.path.realpath(root, strict=True) == place:
                return found


def _scan_place(root: Path) -> dict[str, Folder]:
    found = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not NAME.fullmatch(path.name):
            continue
        try:
            if path.is_dir():
                found[path.name] = _scan_model(path, root)
        except (FileNotFoundError, NotADirectoryError):
            pass  # removed while we look: it is gone at the next look
        except OSError as error:  # another user's, or a disk that fails: of this name alone
            found[path.name] = Folder(refused={"": f"it cannot be read ({error.strerror})"}, is_readable=False)
    return found


def _scan_model(folder: Path, root: Path) -> Folder:
    found = Folder(path=folder)
    if not folder.resolve().is_relative_to(root):
        found.refused[""] = _LEADS_OUT
        return found
    for path in sorted(folder.iterdir()):
        if path.name == ELSEWHERE:
            with contextlib.suppress(OSError, ValueError):  # removed while we look, or somebody else's
                lines = read_plain(path, _ELSEWHERE_BYTES).decode().splitlines()
                found.elsewhere = {int(one): reason for one, _, reason in (line.partition(" ") for line in lines)}
        if path.name.startswith("."):
            continue
        if path.name == POLICY_FILE:
            try:
                found.policy = Policy.parse(read_plain(path, _POLICY_BYTES).decode())
            except (PackageError, OSError, ValueError) as error:
                reason = "it cannot be read" if isinstance(error, (OSError, UnicodeDecodeError)) else str(error)
                found.refused[POLICY_FILE] = f"the file is not used: {reason}"
        elif path.name == MANIFEST:
            too_deep = ", or serve the folder above" if VERSION.fullmatch(folder.name) else ""
            found.refused[""] = f"the package lies in {folder.name}/; copy it to {folder.name}/1/{too_deep}"
        elif not path.is_dir():
            continue
        elif not path.resolve().is_relative_to(root):
            found.refused[brief(path.name)] = _LEADS_OUT
        elif not VERSION.fullmatch(path.name):
            found.refused[brief(path.name)] = "its name is no version; accepted: 1, 2, 3 and so on"
        else:
            # Removed while we look.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.versions[int(path.name)] = snapshot(path.resolve())  # a link may be replaced meanwhile
    return found

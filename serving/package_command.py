"""What `headstart package verify` and `show` find; the command line prints it."""

import dataclasses
from pathlib import Path
from typing import Any

from headstart.serving.manifest import load_manifest
from headstart.serving.package import SIGNATURE, verify
from headstart.serving.signing import verify_signature


def verify_package(path: Path, public_key: Path | None = None) -> dict[str, Any]:
    """Check a package: digests, files, links, parity, accuracy, with a key its signature. The answer is for `--json`.

    In it `signed` says that there is a signature, as in `show_package`; `signature_verified`, that a key was given and
    the signature is its.

    Raises:
        PackageError: it does not hold; the message says what and what mends it.
    """
    manifest = verify(path)
    if public_key is not None:
        verify_signature(path, public_key)
    return {
        "package": str(path),
        "name": manifest.name,
        "files": len(manifest.files),
        "variant": {
            "name": manifest.variant.name,
            "accuracy": manifest.variant.accuracy,
            "fp32_accuracy": manifest.variant.fp32_accuracy,
            "max_loss": manifest.variant.max_loss,
        },
        "parity": {
            "tolerance": manifest.parity.tolerance,
            "relative_difference": max(row.relative_difference for row in manifest.parity.rows),
        },
        "signed": (path / SIGNATURE).is_file(),
        "signature_verified": public_key is not None,
        "verified": True,
    }


def show_package(path: Path) -> dict[str, Any]:
    """All that a package's manifest says, and whether there is a signature; nothing of it is proven.

    Raises:
        PackageError: there is no package, or its manifest is damaged.
    """
    return {**dataclasses.asdict(load_manifest(path)), "signed": (path / SIGNATURE).is_file()}

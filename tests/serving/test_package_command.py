"""What the command line is told of a package."""

import json
import shutil
from pathlib import Path

import pytest

from headstart.serving.errors import PackageError
from headstart.serving.package import MODEL
from headstart.serving.package_command import show_package, verify_package
from tests.serving.server.graphs import LABELS, write_package


def test_packages_are_verified_and_shown(tmp_path: Path):
    package = write_package(tmp_path / "package", 1)
    assert verify_package(package)["verified"] is True
    shown = json.loads(json.dumps(show_package(package)))
    assert (shown["name"], shown["labels"]) == ("mark-1", list(LABELS))
    (package / MODEL).write_bytes(b"changed")
    with pytest.raises(PackageError, match="was changed"):
        verify_package(package)
    assert show_package(package)["name"] == "mark-1"
    shutil.rmtree(package)
    for function in (verify_package, show_package):
        with pytest.raises(PackageError, match="is no package"):
            function(package)

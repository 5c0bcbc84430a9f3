"""Signed packages: made and verified with one's own keys, and a server that takes no others."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from headstart.serving.device import Device
from headstart.serving.errors import PackageError
from headstart.serving.manifest import MANIFEST
from headstart.serving.package import MODEL, SIGNATURE, verify
from headstart.serving.runtime import Predictor
from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.from_package import load_package
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.service import Service
from headstart.serving.server.wire.protocol import InferRequest
from headstart.serving.signing import check_public_key, sign, verify_signature
from tests.serving.server.graphs import classifier, logits, rewrite_manifest, write_package

KEYS = {
    "p256": "ecparam -name prime256v1 -genkey -noout",
    "other": "ecparam -name prime256v1 -genkey -noout",
    "p521": "ecparam -name secp521r1 -genkey -noout",
    "k1": "ecparam -name secp256k1 -genkey -noout",
    "rsa": "genrsa 2048",
    "locked": "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -pass pass:word",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of key pairs, NAME.pem and NAME.pub, as the README's openssl commands make them."""
    folder = tmp_path_factory.mktemp("keys")
    for name, command in KEYS.items():
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        made = subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
        private.write_bytes(made.stdout)
        half = ["openssl", "pkey", "-in", private, "-pubout", "-out", public, "-passin", "pass:word"]
        subprocess.run(half, check=True, capture_output=True)
    (folder / "text.pem").write_text("no key")
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed package; copy it before you change it."""
    package = write_package(tmp_path_factory.mktemp("signed") / "package", mark=1)
    sign(package, keys / "p256.pem")
    return package


@pytest.fixture
def package(signed: Path, tmp_path: Path) -> Path:
    """A copy of the signed package, to damage."""
    return Path(shutil.copytree(signed, tmp_path / "package"))


@pytest.mark.parametrize("curve", ["p256", "p521"])
def test_a_signature_holds_wherever_the_package_is_copied_to(keys: Path, tmp_path: Path, curve: str):
    package = write_package(tmp_path / "here", mark=1)
    before = {path.name: path.read_bytes() for path in package.iterdir()}
    assert sign(package, keys / f"{curve}.pem") == package / SIGNATURE
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    copy = Path(shutil.copytree(package, tmp_path / "there"))
    verify(copy)
    verify_signature(copy, keys / f"{curve}.pub")
    sign(copy, keys / "other.pem")  # takes the place of the first
    verify_signature(copy, keys / "other.pub")
    assert {path.name: path.read_bytes() for path in package.iterdir() if path.name != SIGNATURE} == before


def test_other_tools_of_the_format_agree(signed: Path, keys: Path, tmp_path: Path):
    def tool(verb: str, package: Path, *options: object) -> str:
        words = [verb, "key", package, "--signature", package / SIGNATURE, *options]
        done = subprocess.run(
            [sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "succeeded" in tool("verify", signed, "--public_key", keys / "p256.pub")
    theirs = write_package(tmp_path / "theirs", mark=2)
    tool("sign", theirs, "--private_key", keys / "p256.pem")
    verify_signature(theirs, keys / "p256.pub")
    tool("sign", theirs, "--private_key", keys / "p256.pem", "--ignore-paths", theirs / MANIFEST)
    with pytest.raises(PackageError, match=f"does not cover {MANIFEST}"):
        verify_signature(theirs, keys / "p256.pub")


def rewrite_whole(package: Path) -> None:
    """Another sound package under the old signature: what a digest in the manifest cannot tell."""
    other = write_package(package.with_name("other"), mark=2)
    for name in (MODEL, MANIFEST):
        shutil.copyfile(other / name, package / name)
    verify(package)


def edit_signature(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((package / SIGNATURE).read_text())
    change(document)
    (package / SIGNATURE).write_text(json.dumps(document))


def forge(document: dict[str, Any]) -> None:
    (signature,) = document["dsseEnvelope"]["signatures"]
    signature["sig"] = ("A" if signature["sig"][20] != "A" else "B").join(
        (signature["sig"][:20], signature["sig"][21:])
    )


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unsigned": (lambda package: (package / SIGNATURE).unlink(), "is not signed: it has no package.sig"),
    "changed": (lambda package: (package / MODEL).write_bytes(b"else"), "is not what was signed.*model.onnx"),
    "manifest": (lambda package: rewrite_manifest(package, licence="MIT"), "is not what was signed.*manifest.json"),
    "replaced": (rewrite_whole, "is not what was signed"),
    "added": (lambda package: (package / "extra").write_bytes(b""), "is not what was signed.*extra"),
    "removed": (lambda package: (package / MODEL).unlink(), "is not what was signed.*model.onnx"),
    "forged": (lambda package: edit_signature(package, forge), "is forged or was changed"),
    "emptied": (lambda package: (package / SIGNATURE).write_bytes(b""), "no signature of model-signing"),
    "noise": (lambda package: (package / SIGNATURE).write_bytes(b"\xff\0"), "no signature of model-signing"),
    "endless": (lambda package: os.truncate(package / SIGNATURE, 1 << 40), "no signature of model-signing"),
    "nested": (lambda package: (package / SIGNATURE).write_text("[" * 100_000), "no signature of model-signing"),
    "no list": (lambda package: edit_signature(package, dict.clear), "no signature of model-signing"),
    "nameless": (
        lambda package: edit_signature(package, lambda d: d["verificationMaterial"]["publicKey"].clear()),
        "no signature of model-signing",
    ),
    "no signer": (
        lambda package: edit_signature(package, lambda d: d["dsseEnvelope"]["signatures"].clear()),
        "is not what was signed",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_not_signed_is_refused_and_why(package: Path, keys: Path, case: str):
    damage, words = WRONG[case]
    damage(package)
    with pytest.raises(PackageError, match=words) as caught:
        verify_signature(package, keys / "p256.pub")
    assert "headstart package sign PACKAGE --key" in str(caught.value)


def test_another_key_is_refused_by_name(signed: Path, keys: Path):
    with pytest.raises(PackageError, match=r"not signed with the private half of other\.pub"):
        verify_signature(signed, keys / "other.pub")


@pytest.mark.parametrize("name", ["none.pem", "text.pem", "rsa.pem", "k1.pem", "locked.pem", "p256.pub"])
def test_a_key_that_cannot_sign_is_named_with_the_command_that_makes_one(keys: Path, tmp_path: Path, name: str):
    package = write_package(tmp_path / "package", mark=1)
    with pytest.raises(PackageError, match=f"{name}.*openssl ecparam -name prime256v1"):
        sign(package, keys / name)
    assert not (package / SIGNATURE).exists()


@pytest.mark.parametrize("name", ["none.pub", "text.pem", "rsa.pub", "k1.pub", "p256.pem"])
def test_a_key_that_cannot_verify_is_named_with_the_command_that_makes_one(keys: Path, signed: Path, name: str):
    with pytest.raises(PackageError, match=f"{name}.*openssl ecparam -name prime256v1"):
        check_public_key(keys / name)
    with pytest.raises(PackageError, match=f"{name}.*openssl ecparam -name prime256v1"):
        verify_signature(signed, keys / name)


def test_only_a_sound_package_is_signed(package: Path, keys: Path):
    before = (package / SIGNATURE).read_bytes()
    (package / MODEL).write_bytes(b"changed")
    with pytest.raises(PackageError, match=r"model\.onnx was changed"):
        sign(package, keys / "p256.pem")
    assert (package / SIGNATURE).read_bytes() == before


def test_where_the_signature_cannot_be_put_down_nothing_is_left_of_it(package: Path, keys: Path):
    (package / SIGNATURE).unlink()
    (package / SIGNATURE).mkdir()
    with pytest.raises(PackageError, match=r"cannot be signed \(Is a directory\); free space or grant access"):
        sign(package, keys / "p256.pem")
    assert [path.name for path in package.parent.iterdir()] == ["package"]


def test_weights_that_lie_in_the_signature_are_refused(keys: Path, tmp_path: Path):
    """Spaces at the end of its JSON do not break it, and would be numbers of the model."""
    graph = onnx.load_from_string(classifier(1))
    (mark,) = (one for one in graph.graph.initializer if one.name == "mark")
    mark.ClearField("raw_data")
    mark.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", SIGNATURE), ("offset", "4096"), ("length", "12")):
        mark.external_data.add(key=key, value=value)
    package = write_package(tmp_path / "package", 1, graph=graph.SerializeToString(), name="hollow")
    for use in (
        lambda: sign(package, keys / "p256.pem"),
        lambda: Predictor(package),
        lambda: load_package(package, name="a", version="1", device=Device(threads=1)),
    ):
        with pytest.raises(PackageError, match=r"model\.onnx names package\.sig, which no digest covers"):
            use()
    assert not (package / SIGNATURE).exists()


def test_without_the_library_the_extra_is_named(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: sign(signed, keys / "p256.pem"), lambda: verify_signature(signed, keys / "p256.pub")):
        with pytest.raises(PackageError, match=r"need model_signing.*\[sign\]"):
            call()


def test_the_command_line_signs_and_verifies(headstart: Callable[..., Any], keys: Path, tmp_path: Path):
    package = write_package(tmp_path / "package", mark=1)
    said = ("signed", "signature_verified")
    assert headstart("package", "show", package).json()["signed"] is False
    found = headstart("package", "verify", package, "--json").json()
    assert [found[word] for word in said] == [False, False]
    ended = headstart("package", "verify", package, "--public-key", keys / "p256.pub")
    assert (ended.code, ended.stdout) == (2, "")
    assert "error: " in ended.stderr
    assert "is not signed" in ended.stderr
    ended = headstart("package", "sign", package, "--key", keys / "p256.pem")
    assert (ended.code, ended.stderr) == (0, "")
    assert SIGNATURE in ended.stdout
    made = headstart("package", "sign", package, "--key", keys / "p256.pem", "--json").json()
    assert made == {"package": str(package), "signature": str(package / SIGNATURE)}
    assert headstart("package", "show", package, "--json").stdout == headstart("package", "show", package).stdout
    assert headstart("package", "show", package).json()["signed"] is True
    found = headstart("package", "verify", package, "--json").json()
    assert [found[word] for word in said] == [True, False]
    assert "signed with this key" not in headstart("package", "verify", package).stdout
    found = headstart("package", "verify", package, "--public-key", keys / "p256.pub", "--json").json()
    assert [found[word] for word in said] == [True, True]
    assert "signed with this key" in headstart("package", "verify", package, "--public-key", keys / "p256.pub").stdout
    for command in (
        ("package", "verify", package, "--public-key", keys / "other.pub"),
        ("package", "sign", package, "--key", keys / "none.pem"),
        ("serve", tmp_path, "--port", 0, "--public-key", keys / "none.pub"),
    ):
        ended = headstart(*command)
        assert (ended.code, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: ")


def test_a_server_takes_signed_packages_alone_and_keeps_the_old_one(signed: Path, keys: Path, tmp_path: Path):
    root = tmp_path / "models"
    shutil.copytree(signed, root / "demo" / "1")
    write_package(root / "bare" / "1", mark=3)
    images = np.full((1, 4, 4, 3), 9, np.uint8)

    async def mark(service: Service) -> float:
        answer = service.infer(InferRequest(model="demo", inputs={"images": images}))
        response = await answer if asyncio.isfuture(answer) or asyncio.iscoroutine(answer) else answer
        found = response.outputs["logits"]
        return next(one for one in (1.0, 2.0) if np.allclose(found, logits(images, one)))

    async def play() -> None:
        repository = Repository(root, public_key=keys / "p256.pub")
        service = Service(repository)
        await service.start()
        try:
            rows = {(row["name"], row["version"]): row for row in service.repository_index(False)}
            assert rows["demo", "1"]["state"] == "READY"
            assert "is not signed: it has no package.sig" in rows["bare", "1"]["reason"]
            assert str(tmp_path) not in rows["bare", "1"]["reason"]
            write_package(root / "demo" / "2", mark=2)
            for key, words in ((None, "is not signed"), ("other.pem", "not signed with the private half")):
                if key:
                    sign(root / "demo" / "2", keys / key)
                with pytest.raises(ServeError, match=words) as caught:
                    await repository.load("demo")
                assert str(tmp_path) not in caught.value.message
                assert await mark(service) == 1
            sign(root / "demo" / "2", keys / "p256.pem")
            for _ in range(2):  # the first sees that its files have changed
                await repository.look()
            assert await mark(service) == 2
        finally:
            await service.stop()

    asyncio.run(play())


def test_a_server_that_asks_for_no_signatures_takes_signed_packages_too(signed: Path, tmp_path: Path):
    shutil.copytree(signed, tmp_path / "demo" / "1")

    async def play() -> list[str]:
        service = Service(Repository(tmp_path))
        await service.start()
        rows = service.repository_index(True)
        await service.stop()
        return [row["name"] for row in rows]

    assert asyncio.run(play()) == ["demo"]
    with pytest.raises(PackageError, match="public"):
        Repository(tmp_path, public_key=tmp_path / "public.pem")


def test_a_server_without_a_key_imports_no_library_of_signatures():
    script = "import sys, headstart.serving.server.command, headstart.serving.server.models.repository\n"
    script += "print([name for name in sys.modules if name in ('model_signing', 'cryptography', 'sigstore')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Signatures of packages in the format of OpenSSF's model-signing, made with one's own elliptic-curve keys.

    sign(Path("runs/demo/package"), Path("private.pem"))
    verify_signature(Path("runs/demo/package"), Path("public.pem"))

Digests in a manifest tell an accident: whoever can write the folder can write its manifest too. A signature tells who
made the package. It lies in the folder as `package.sig` and covers every other file; `model_signing verify key` of the
command line reads it as well.

It does not tell which model of a repository, or which version, the package was meant to be: these are names of folders.
Whoever can write there can put any package that was signed with the key, an old one too, in another's place.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headstart.serving.errors import PackageError, first_line
from headstart.serving.manifest import MANIFEST, MOST_BYTES
from headstart.serving.package import SIGNATURE, verify
from headstart.serving.plain import read_plain

_MEND = "get it from where it was signed, or sign it: headstart package sign PACKAGE --key PRIVATE.pem"
_CURVES = "PEM with an elliptic-curve key, P-256, P-384 or P-521"
_NEW_KEYS = (
    "make a pair: openssl ecparam -name prime256v1 -genkey -noout -out private.pem && "
    "openssl ec -in private.pem -pubout -out public.pem"
)


def sign(directory: Path, private_key: Path) -> Path:
    """Sign a package; an earlier signature is replaced.

    Args:
        directory: a package that verifies.
        private_key: unencrypted PEM of the curve P-256, P-384 or P-521.

    Returns:
        the file of the signature.

    Raises:
        PackageError: the key cannot be used, the package does not verify, its folder cannot be written, or
            `headstart[sign]` is not installed.
    """
    directory = Path(directory).absolute()
    with _library():
        from model_signing import hashing, signing
    with _key(private_key, f"unencrypted {_CURVES}"):
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
    verify(directory)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE]))  # type: ignore[no-untyped-call]
    unfinished = directory.with_name(f".{directory.name}.sig")
    try:
        config.sign(directory, unfinished)
        return unfinished.replace(directory / SIGNATURE)
    except OSError as error:
        reason = error.strerror or error
        raise PackageError(f"{directory} cannot be signed ({reason}); free space or grant access") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_public_key(public_key: Path) -> str:
    """Say before any package is there whether signatures can be verified.

    Returns:
        the SHA-256 of the key, by which a signature names the key that it was made with.

    Raises:
        PackageError: the key cannot be used, or `headstart[sign]` is not installed.
    """
    with _library():
        from cryptography.hazmat.primitives import serialization
        from model_signing import verifying
    with _key(public_key, f"{_CURVES}: its public half"):
        verifying.Config().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
        key = serialization.load_pem_public_key(public_key.read_bytes())
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def verify_signature(directory: Path, public_key: Path) -> None:
    """Check that a package is what the owner of a key signed.

    `package.verify` is the other half: it holds the files against the manifest, which the signature covers.

    Args:
        directory: the package.
        public_key: PEM, the public half of the key that must have signed.

    Raises:
        PackageError: the package is not signed, or with another key, or was changed since; the key cannot be used, or
            `headstart[sign]` is not installed.
    """
    fingerprint = check_public_key(public_key)
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    directory = Path(directory)
    signature = directory / SIGNATURE
    if not signature.is_file():
        raise PackageError(f"{directory} is not signed: it has no {SIGNATURE}; {_MEND}")
    hint, covered = _read(signature)
    if hint != fingerprint:
        raise PackageError(f"{directory} was not signed with the private half of {public_key.name}; {_MEND}")
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(directory, signature)  # type: ignore[no-untyped-call]
    except InvalidSignature as error:
        raise PackageError(f"{signature} is forged or was changed: {public_key.name} denies it; {_MEND}") from error
    # ValueError where a file differs; what else a strange statement may raise is no better.
    except Exception as error:
        raise PackageError(f"{directory} is not what was signed: {first_line(error)[:300]}; {_MEND}") from error
    if MANIFEST not in covered:  # signed by other means, which may leave files out
        raise PackageError(f"the signature of {directory} does not cover {MANIFEST}; {_MEND}")


def _read(signature: Path) -> tuple[str, set[str]]:
    """The key that a signature names and the files that it lists, both as it says."""
    try:
        bundle = json.loads(read_plain(signature, MOST_BYTES))
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        files = {str(one["name"]) for one in statement["predicate"]["resources"]}
        return str(bundle["verificationMaterial"]["publicKey"]["hint"]), files
    # Anything may be in the file, and then nearly anything is raised.
    except Exception as error:
        raise PackageError(f"{signature} is no signature of model-signing by a key; {_MEND}") from error


@contextmanager
def _library() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise PackageError(
            f"signatures need {error.name or error}, which is not installed: pip install model-signing pyOpenSSL, or "
            "from a checkout: pip install -c constraints.txt -e '.[sign]'"
        ) from error


@contextmanager
def _key(path: Path, accepted: str) -> Iterator[None]:
    """Say what is wrong with a key."""
    try:
        yield
    except OSError as error:
        raise PackageError(f"the key {path} cannot be read ({error.strerror}); {_NEW_KEYS}") from error
    # An encrypted key raises TypeError, one of another kind AttributeError, a damaged one ValueError.
    except Exception as error:
        raise PackageError(f"{path} is no key that can be used; accepted: {accepted}; {_NEW_KEYS}") from error

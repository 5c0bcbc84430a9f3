"""What `headstart serve` and `headstart package` do; the command line only reads their options."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headstart.serving.errors import PackageError
from headstart.serving.package import load_manifest, verify
from headstart.serving.runtime import CPU

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def serve(
    repository: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    token_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    provider: str = CPU,
    threads: int | None = None,
    max_queue: int = 256,
    max_batch: int | None = None,
    max_delay_ms: float = 0.0,
    policy: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> int:
    """Serve a repository until SIGTERM or SIGINT; returns the exit code.

        serve(Path("models"), port=8000, policy=["latest", "demo=canary:3:10%"])

    Args:
        repository: the folder NAME/VERSION/ of packages.
        host, port: where to listen; port 0 takes a free one.
        grpc_port: where to speak gRPC as well, at the same host; None is HTTP alone.
        token_file: holds what every request must bring as `Authorization: Bearer TOKEN`.
        tls_cert, tls_key: PEM files; with them the server speaks HTTPS alone, and gRPC over TLS.
        provider: ONNX Runtime's execution provider that must run every model.
        threads: threads within an operator; None is one per core.
        max_queue: requests of one model that may wait; one more is told 429.
        max_batch: rows of one execution; None, and at most, the largest batch whose parity a package proves.
        max_delay_ms: milliseconds that a batch may wait to be filled.
        policy: `latest`, `pinned:VERSION` or `canary:VERSION:SHARE` for all models, or `NAME=` and one of these.
        say: is given one line when the server is ready.

    Raises:
        PackageError: an option cannot be, or the server cannot start; its exit code is 2.
    """
    from headstart.serving.server.device import Device, check
    from headstart.serving.server.main import Ports, run
    from headstart.serving.server.repository import Repository, Scheduling
    from headstart.serving.server.service import Service
    from headstart.serving.server.settings import HttpSettings, read_token, tls_context

    everywhere, by_model = _policies(policy)
    if not 0 <= max_delay_ms <= 10_000:
        raise PackageError(f"max_delay_ms is {max_delay_ms:g}; accepted: 0 to 10000")
    scheduling = Scheduling(max_batch=max_batch, max_delay_s=max_delay_ms / 1000, max_queue=max_queue)
    token = read_token(token_file) if token_file is not None else None
    try:
        settings = HttpSettings(
            host=host, port=port, grpc_port=grpc_port, token=token, tls_cert=tls_cert, tls_key=tls_key
        )
    except ValueError as error:
        raise PackageError(str(error)) from error
    tls_context(settings)
    check(Device(provider=provider, threads=threads))
    service = Service(
        Repository(
            repository, provider=provider, threads=threads, policy=everywhere, policies=by_model, scheduling=scheduling
        )
    )
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)

    def ready(ports: Ports) -> None:
        rows = service.repository_index(False)
        serving = len([row for row in rows if row["state"] == "READY"])
        scheme = "https" if tls_cert else "http"
        shown = f"[{host}]" if ":" in host else host
        beside = "" if ports.grpc_port is None else f" (gRPC at {shown}:{ports.grpc_port})"
        url = f"{scheme}://{shown}:{ports.port}"
        say(f"ready: {url}{beside} serves {serving} of {len(rows)} versions in {repository}")

    return run(settings, service, on_ready=ready)


def verify_package(path: Path) -> dict[str, Any]:
    """Check a package: digests, files, links, parity. The answer is for `--json`.

    Raises:
        PackageError: it does not hold; the message says what and what mends it.
    """
    manifest = verify(path)
    return {
        "package": str(path),
        "name": manifest.name,
        "files": len(manifest.files),
        "parity": {
            "tolerance": manifest.parity.tolerance,
            "relative_difference": max(row.relative_difference for row in manifest.parity.rows),
        },
        "verified": True,
    }


def show_package(path: Path) -> dict[str, Any]:
    """All that a package's manifest says; its files are not read, so nothing of it is proven.

    Raises:
        PackageError: there is no package, or its manifest is damaged.
    """
    return dataclasses.asdict(load_manifest(path))


def _policies(texts: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The rule of all models (None where there is none), and those by model."""
    from headstart.serving.server.folder import NAME
    from headstart.serving.server.policy import Policy

    everywhere, by_model = None, {}
    for text in texts:
        name, equals, rule = text.partition("=")
        if not equals:
            everywhere = Policy.parse(text)
        elif NAME.fullmatch(name):
            by_model[name] = Policy.parse(rule)
        else:
            raise PackageError(f"the policy {text[:80]!r} names no model; accepted: NAME=latest and the like")
    return everywhere, by_model

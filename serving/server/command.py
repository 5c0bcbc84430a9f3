"""What `headstart serve` does; the command line only reads its options."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.serving.errors import PackageError
from headstart.serving.manifest import MANIFEST
from headstart.serving.runtime import CPU, MOST
from headstart.serving.server.errors import StartError, address

if TYPE_CHECKING:
    from headstart.serving.server.models.mirror import Mirror
    from headstart.serving.server.models.repository import Repository
    from headstart.serving.server.processes.worker import Link
    from headstart.serving.server.watching.watch import Watch

_LOG = logging.getLogger(__name__)


def serve(
    repository: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    token_file: Path | None = None,
    open_health: bool = False,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    idle_timeout: float = 75.0,
    provider: str = CPU,
    threads: int | None = None,
    max_queue: int = 256,
    max_batch: int | None = None,
    max_delay_ms: float = 0.0,
    policy: Sequence[str] = (),
    public_key: Path | None = None,
    drift: float = 0.0,
    provider_options: Sequence[str] = (),
    max_memory: str | None = None,
    workers: int = 1,
    log_format: str = "text",
    access_log: bool = False,
    otel: bool = False,
    say: Callable[[str], None] = print,
    link: "Link | None" = None,
) -> int:
    """Serve a repository until SIGTERM, SIGINT or SIGHUP; returns the exit code.

        serve(Path("models"), port=8000, policy=["latest", "demo=canary:3:10%"])

    Args:
        repository: the folder NAME/VERSION/ of packages, or a URL of one that fsspec understands.
        host, port: where to listen; port 0 takes a free one.
        grpc_port: where to speak gRPC as well, at the same host; None is HTTP alone.
        token_file: holds what every request must bring as `Authorization: Bearer TOKEN`.
        open_health: whether liveness and readiness answer without the token, for probes that cannot hold a secret.
        tls_cert, tls_key: PEM files; with them the server speaks HTTPS alone, and gRPC over TLS.
        idle_timeout: seconds that a connection may wait between requests; more than a proxy in front keeps its own.
        provider: ONNX Runtime's execution provider that must run every model.
        threads: threads within an operator; None is one per core.
        max_queue: requests of one model that may wait; one more is told 429.
        max_batch: rows of one execution; None, and at most, the largest batch whose parity a package proves.
        max_delay_ms: milliseconds that a batch may wait to be filled.
        policy: `latest`, `pinned:VERSION` or `canary:VERSION:SHARE` for all models, or `NAME=` and one of these.
        public_key: PEM of the key that must have signed every package; None asks for no signatures.
        drift: share of executions whose features are compared with those of the training images, 0 to 1.
        provider_options: `KEY=VALUE` each, of ONNX Runtime's CUDA or TensorRT provider; see `device.Device`.
        max_memory: what all models together may take, as `4G`; None is no limit. Workers have equal shares of it.
        workers: processes that share the ports, each with its own sessions and its share of the cores; for CPUs.
        log_format: `text`, or `json` for one object a line; on stderr.
        access_log: whether each request is a line in the log.
        otel: whether each inference is a span that OpenTelemetry's exporter sends; OTEL_* in the environment say where.
        say: is given one line when the server is ready.
        link: to the supervisor, in a worker.

    Raises:
        PackageError: an option cannot be, or the server cannot start; its exit code is 2.
    """
    options = {name: value for name, value in locals().items() if name not in ("workers", "say", "link")}
    from headstart.serving.server.main import Ports, hold_standard_files, run
    from headstart.serving.server.service import Service
    from headstart.serving.server.settings import HttpSettings, read_token, tls_context
    from headstart.serving.server.watching.logs import FORMATS, configure

    hold_standard_files()
    token = read_token(token_file) if token_file is not None else None
    try:
        settings = HttpSettings(
            host=host, port=port, grpc_port=grpc_port, token=token, open_health=open_health,
            tls_cert=tls_cert, tls_key=tls_key, idle_timeout=idle_timeout,
        )  # fmt: skip
    except ValueError as error:
        raise PackageError(str(error)) from error
    if not 1 <= workers <= (MOST if provider == CPU else 1):
        raise PackageError(f"workers is {workers} with {provider}; accepted: 1 to {MOST}, and 1 where it is not {CPU}")
    if log_format not in FORMATS:
        raise PackageError(f"log_format is {log_format!r}; accepted: {', '.join(FORMATS)}")
    tls_context(settings)
    kept = open_repository(
        repository,
        provider=provider,
        threads=threads,
        max_queue=max_queue,
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        policy=policy,
        public_key=public_key,
        drift=drift,
        provider_options=provider_options,
        max_memory=max_memory,
    )
    mirror = kept.mirror
    configure(log_format, None if link is None else link.number)
    if workers > 1:
        return _supervise(options, workers, _unhindered(say), mirror)
    if link is None:
        service = Service(kept)
    else:
        from headstart.serving.server.processes.worker import SharedService

        service = SharedService(kept, link)
        settings = dataclasses.replace(settings, reuse_port=True)

    def ready(ports: Ports) -> None:
        rows = service.repository_index(False)
        serving = len([row for row in rows if row["state"] == "READY"])
        scheme = "https" if tls_cert else "http"
        beside = "" if ports.grpc_port is None else f" (gRPC at {address(host, ports.grpc_port)})"
        url = f"{scheme}://{address(host, ports.port)}"
        where = mirror.url if mirror else repository
        if not serving and (link is None or link.number == 0):
            _tell_why(rows, where)
        line = f"ready: {url}{beside} serves {serving} of {len(rows)} versions in {where}"
        (_unhindered(say) if link is None else link.ready)(line)

    return run(settings, service, on_ready=ready, link=link, watch=_watch(access_log, otel))


def _unhindered(say: Callable[[str], None]) -> Callable[[str], None]:
    """As `say`; what cannot be written, on a full disk or for nobody, is logged and ends no server."""

    def tell(line: str) -> None:
        try:
            say(line)
        except OSError as error:
            _LOG.warning("%s; stdout does not take this line (%s)", line, error.strerror)

    return tell


def _tell_why(rows: list[dict[str, Any]], where: Path | str) -> None:
    """Say what to do where there are no versions; why one does not serve is told when it is looked at."""
    if not any(row["version"] for row in rows):
        if Path(where, MANIFEST).is_file():
            _LOG.warning("%s is a package itself; copy it to FOLDER/NAME/1, and serve FOLDER", where)
        else:
            _LOG.warning("there are no packages in %s; copy one to NAME/1 there", where)


def open_repository(
    repository: Path | str,
    *,
    provider: str = CPU,
    threads: int | None = None,
    max_queue: int = 256,
    max_batch: int | None = None,
    max_delay_ms: float = 0.0,
    policy: Sequence[str] = (),
    public_key: Path | None = None,
    drift: float = 0.0,
    provider_options: Sequence[str] = (),
    max_memory: str | None = None,
) -> "Repository":
    """The repository of these options, which are those of `serve`, once the provider was seen to load.

    Raises:
        PackageError: an option cannot be.
    """
    from headstart.serving.device import Device, check, read_options
    from headstart.serving.server.models.loading import Scheduling
    from headstart.serving.server.models.memory import read_size
    from headstart.serving.server.models.mirror import Mirror
    from headstart.serving.server.models.remote import is_url
    from headstart.serving.server.models.repository import Repository
    from headstart.serving.server.scratch import sweep

    everywhere, by_model = _policies(policy)
    if not 0 <= max_delay_ms <= 10_000:
        raise PackageError(f"max_delay_ms is {max_delay_ms:g}; accepted: 0 to 10000")
    scheduling = Scheduling(max_batch=max_batch, max_delay_s=max_delay_ms / 1000, max_queue=max_queue)
    device = Device(provider=provider, threads=threads, options=read_options(provider_options))
    check(device)
    url = str(repository)
    sweep()
    mirror = Mirror(url, policy_of=lambda name: by_model.get(name, everywhere)) if is_url(url) else None
    return Repository(
        mirror.folder if mirror else Path(repository),
        provider=provider,
        threads=threads,
        provider_options=device.options,
        policy=everywhere,
        policies=by_model,
        scheduling=scheduling,
        public_key=public_key,
        mirror=mirror,
        drift=drift,
        max_memory=None if max_memory is None else read_size(max_memory),
    )


def _watch(access_log: bool, otel: bool) -> "Watch | None":
    """Who is shown the requests; nobody, unless it is asked for.

    Raises:
        StartError: OpenTelemetry is asked for and not installed, or its environment asks for what is not there.
    """
    from headstart.serving.server.watching.watch import AccessLog, Watches

    watches: list[Watch] = [AccessLog()] if access_log else []
    if otel:
        try:
            from headstart.serving.server.watching.tracing import Tracing
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "opentelemetry":
                raise
            raise StartError(
                "OpenTelemetry is asked for and not installed; run `pip install -e '.[otel]'`, or in a serving "
                "environment `pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http`"
            ) from error
        watches.append(Tracing())
    return Watches(watches) if watches else None


def _supervise(options: dict[str, Any], workers: int, say: Callable[[str], None], mirror: "Mirror | None") -> int:
    """Serve with several processes; a repository behind a URL is copied once, for all of them."""
    from headstart.serving.server.models.memory import read_size
    from headstart.serving.server.processes.supervisor import supervise

    if options["max_memory"] is not None:
        options = {**options, "max_memory": str(read_size(options["max_memory"]) // workers)}
    if mirror is None:
        return supervise(options, workers, say)
    mirror.start()
    try:
        return supervise(
            {**options, "repository": mirror.folder},
            workers,
            lambda line: say(line.replace(str(mirror.folder), mirror.url)),
            mirror.refuse,
        )
    finally:
        mirror.close()


def _policies(texts: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The rule of all models, and those by model."""
    from headstart.serving.server.models.folder import NAME
    from headstart.serving.server.models.policy import Policy

    rules: dict[str, Policy] = {}
    for text in texts:
        name, equals, rule = text.rpartition("=")
        if equals and not NAME.fullmatch(name):
            raise PackageError(f"the policy {text[:80]!r} names no model; accepted: NAME=latest and the like")
        if name in rules:
            raise PackageError(f"the policy {text[:80]!r} is the second of {name or 'all models'}; give one")
        rules[name] = Policy.parse(rule)
    return rules.pop("", Policy()), rules

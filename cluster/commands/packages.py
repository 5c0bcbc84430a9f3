"""Commands on packages, which need neither torch nor ray: `predict`, `serve` and `package`."""

from pathlib import Path
from typing import Annotated

import typer

from headstart.cluster.commands.options import Json, PackageArgument, escaped, print_found, print_json

package_app = typer.Typer(help="Look at a package, and check it.", no_args_is_help=True)


def predict(
    package: PackageArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, and folders of them.")],
    provider: Annotated[str, typer.Option(help="ONNX Runtime's execution provider.")] = "CPUExecutionProvider",
    as_json: Json = False,
) -> None:
    """Say what a package sees in image files; needs neither torch nor ray."""
    from dataclasses import asdict

    from headstart.serving.images import image_files
    from headstart.serving.runtime import Predictor

    images = [image for file in files for image in image_files(file)]
    predictions = Predictor(package, provider).predict_files(images)
    if as_json:
        print_json([asdict(prediction) for prediction in predictions])
        return
    names = [escaped(prediction.file) for prediction in predictions]
    width = max(map(len, names))
    for name, prediction in zip(names, predictions, strict=True):
        typer.echo(f"{name:<{width}}  {escaped(prediction.label)}  {prediction.probability:.4f}")


def serve(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="A folder of NAME/VERSION/ packages, or its URL (s3://...).")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port for HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC as well; 0 takes a free one.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Holds the token that every request must bring.")] = None,
    open_health: Annotated[
        bool, typer.Option("--open-health", help="Liveness and readiness answer without the token.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM; makes it HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key, PEM.")] = None,
    idle_timeout: Annotated[float, typer.Option(help="Seconds that a connection may wait between requests.")] = 75.0,
    provider: Annotated[str, typer.Option(help="ONNX Runtime's execution provider.")] = "CPUExecutionProvider",
    threads: Annotated[int | None, typer.Option(help="Threads within an operator; one per core by default.")] = None,
    max_queue: Annotated[int, typer.Option(help="Requests of a model that may wait; one more is told 429.")] = 256,
    max_batch: Annotated[int | None, typer.Option(help="Rows of one execution; what parity proves by default.")] = None,
    max_delay_ms: Annotated[float, typer.Option(help="Milliseconds that a batch may wait to fill.")] = 0.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]latest, pinned:VERSION or canary:VERSION:SHARE; may be given several times."),
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="PEM of the key that must have signed each package.")] = None,
    drift: Annotated[
        float, typer.Option(help="Share of executions to compare with the training images, 0 to 1.")
    ] = 0.0,
    provider_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the CUDA or TensorRT provider; may be given several times.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="What all models may take, as 4G; none by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the ports, on a CPU.")] = 1,
    log_format: Annotated[str, typer.Option(help="text, or json for one object a line.")] = "text",
    access_log: Annotated[bool, typer.Option("--access-log", help="A line in the log for each request.")] = False,
    otel: Annotated[bool, typer.Option("--otel", help="Send OpenTelemetry spans, as OTEL_* say.")] = False,
) -> None:
    """Serve packages over HTTP and gRPC by the Open Inference Protocol; needs neither torch nor ray."""
    from headstart.serving.server import command

    code = command.serve(
        repository,
        host=host,
        port=port,
        grpc_port=grpc_port,
        token_file=token_file,
        open_health=open_health,
        tls_cert=tls_cert,
        tls_key=tls_key,
        idle_timeout=idle_timeout,
        provider=provider,
        threads=threads,
        max_queue=max_queue,
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        policy=policy or (),
        public_key=public_key,
        drift=drift,
        provider_options=provider_option or (),
        max_memory=max_memory,
        workers=workers,
        log_format=log_format,
        access_log=access_log,
        otel=otel,
        say=typer.echo,
    )
    raise typer.Exit(code)


@package_app.command("verify")
def verify_package(
    package: PackageArgument,
    public_key: Annotated[Path | None, typer.Option(help="PEM of the key that must have signed it.")] = None,
    as_json: Json = False,
) -> None:
    """Check a package's digests, files, parity record and accuracy, and with a key its signature."""
    from headstart.serving import package_command

    found = package_command.verify_package(package, public_key)
    if as_json:
        print_json(found)
    else:
        parity, variant = found["parity"], found["variant"]
        plain = variant["name"] == "fp32"
        files = "1 file has its digest" if found["files"] == 1 else f"{found['files']} files have their digests"
        typer.echo(
            f"{package} holds: {files}, and "
            f"{'PyTorch and ONNX Runtime' if plain else 'fp32 and ' + variant['name']} agree to "
            f"{parity['relative_difference']:.2g} (tolerance {parity['tolerance']:g})"
            + ("" if plain else f", with accuracies {variant['fp32_accuracy']:.4f} and {variant['accuracy']:.4f}")
            + ("; signed with this key" if found["signature_verified"] else "")
        )


@package_app.command("show")
def show_package(package: PackageArgument, as_json: Json = False) -> None:
    """Print a package's manifest and whether it is signed, as JSON with --json or without; its files are not read."""
    from headstart.serving import package_command

    print_json(package_command.show_package(package))


@package_app.command("sign")
def sign_package(
    package: PackageArgument,
    key: Annotated[Path, typer.Option(help="Elliptic-curve private key, unencrypted PEM.")],
    as_json: Json = False,
) -> None:
    """Sign a package with a key of your own; the signature lies in it as package.sig."""
    from headstart.serving.signing import sign

    made = {"package": str(package), "signature": str(sign(package, key))}
    print_found(made, as_json, lambda made: typer.echo(f"{made['package']} is signed: {made['signature']}"))

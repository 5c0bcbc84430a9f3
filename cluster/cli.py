"""The command line. Rooms are imported inside the commands, so that `headstart --help` is quick and `predict` needs
neither torch nor ray.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headstart.cluster.pipeline import Outcome, Until

app = typer.Typer(
    help="Transfer learning: find the closest source task, take over what it knows, say whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sources_app = typer.Typer(help="The source tasks that can be learned from.", no_args_is_help=True)
app.add_typer(sources_app, name="sources")
package_app = typer.Typer(help="Look at a package, and check it.", no_args_is_help=True)
app.add_typer(package_app, name="package")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or the name of a shipped recipe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]
PackageArgument = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package, such as runs/demo/package.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set train.epochs=3."),
]
Out = Annotated[Path | None, typer.Option(help="The run directory itself; default runs/NAME.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster's address; its token in RAY_AUTH_TOKEN.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do every stage again.")]
_INTERRUPTED = 130  # 128 + SIGINT

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]


@app.command()
def demo(out: Out = None, fresh: Fresh = False, as_json: Json = False) -> None:
    """Two source tasks made, eight sources ranked, one model fine-tuned, judged, packaged: on real digits."""
    from headstart.cluster.connect import Connection
    from headstart.cluster.pipeline import run as run_pipeline
    from headstart.cluster.recipe_file import load_recipe
    from headstart.cluster.stages.context import Reporter

    target = out or Path("runs/demo")
    reporter = Reporter()
    with Connection() as connection:
        for name in ("demo-digits", "demo-photographs"):
            reporter.say(f"[bold]Making the source task {name}[/bold]")
            beside = target.parent / f"{target.name}-{name.removeprefix('demo-')}"
            run_pipeline(load_recipe(name), beside, connection=connection, reporter=reporter, fresh=fresh)
        reporter.say("[bold]The target: 300 labelled digits[/bold]")
        outcome = run_pipeline(load_recipe("demo"), target, connection=connection, reporter=reporter, fresh=fresh)
    _show(outcome, as_json)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Out = None,
    address: Address = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Take a recipe through every stage, from labelled images to a package that is a source for the next."""
    _show(_run(recipe, overrides, out, address, fresh, "register"), as_json)


@app.command()
def rank(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Rank the sources for a recipe's data, and stop there."""
    outcome = _run(recipe, overrides, out, None, fresh, "rank")
    if as_json:
        _print_json(outcome.ranking)
    else:
        _show(outcome, as_json)


@app.command()
def fit(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Out = None,
    address: Address = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Rank, fine-tune the best source under Ray Train, choose the mode, and stop there."""
    _show(_run(recipe, overrides, out, address, fresh, "fit"), as_json)


@app.command()
def evaluate(run_directory: RunArgument, address: Address = None, as_json: Json = False) -> None:
    """Measure a run's model and its controls on the test images; stages it lacks are done first."""
    outcome = _again(run_directory, address, "evaluate")
    if as_json:
        _print_json(outcome.evaluation)
    else:
        _show(outcome, as_json)


@app.command()
def export(
    run_directory: RunArgument,
    variant: Annotated[str | None, typer.Option(help="fp16 or int8: that package as well, beside the other.")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Write a run's package, proven against PyTorch; stages it lacks are done first."""
    outcome = _again(run_directory, address, "export", variant)
    refused = outcome.variants[variant]["refused"] if variant else None
    if not as_json:
        _show(outcome, as_json)
    elif not refused:
        _print_json(outcome.variants[variant]["manifest"] if variant else outcome.manifest)
    if refused:
        from headstart.serving.errors import PackageError

        raise PackageError(refused)


@app.command()
def predict(
    package: PackageArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images.")],
    provider: Annotated[str, typer.Option(help="ONNX Runtime's execution provider.")] = "CPUExecutionProvider",
    as_json: Json = False,
) -> None:
    """Say what a package sees in image files; needs neither torch nor ray."""
    from dataclasses import asdict

    from headstart.serving.runtime import Predictor

    predictions = Predictor(package, provider).predict_files(files)
    if as_json:
        _print_json([asdict(prediction) for prediction in predictions])
        return
    width = max(len(prediction.file) for prediction in predictions)
    for prediction in predictions:
        typer.echo(f"{prediction.file:<{width}}  {prediction.label}  {prediction.probability:.4f}")


@app.command()
def serve(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="A folder of NAME/VERSION/ packages, or its URL (s3://...).")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port for HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC as well; 0 takes a free one.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Holds the token that every request must bring.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM; makes it HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key, PEM.")] = None,
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
        tls_cert=tls_cert,
        tls_key=tls_key,
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
    from headstart.serving.server import command

    found = command.verify_package(package, public_key)
    if as_json:
        _print_json(found)
    else:
        parity, variant = found["parity"], found["variant"]
        plain = variant["name"] == "fp32"
        typer.echo(
            f"{package} holds: {found['files']} files have their digests, and "
            f"{'PyTorch and ONNX Runtime' if plain else 'fp32 and ' + variant['name']} agree to "
            f"{parity['relative_difference']:.2g} (tolerance {parity['tolerance']:g})"
            + ("" if plain else f", with accuracies {variant['fp32_accuracy']:.4f} and {variant['accuracy']:.4f}")
            + ("; signed with this key" if found["signed"] else "")
        )


@package_app.command("show")
def show_package(package: PackageArgument) -> None:
    """Print a package's manifest and whether it is signed, as JSON; its files are not read."""
    from headstart.serving.server import command

    _print_json(command.show_package(package))


@package_app.command("sign")
def sign_package(
    package: PackageArgument,
    key: Annotated[Path, typer.Option(help="Elliptic-curve private key, unencrypted PEM.")],
) -> None:
    """Sign a package with a key of your own; the signature lies in it as package.sig."""
    from headstart.serving.signing import sign

    typer.echo(f"{package} is signed: {sign(package, key)}")


@app.command()
def tune(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Out = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Search over heads with Ray Tune: each trial is one source's bank over the recipe's `search`."""
    from headstart.cluster.connect import Connection
    from headstart.cluster.recipe_file import load_recipe
    from headstart.cluster.tune import print_trials, tune_heads

    loaded = load_recipe(recipe, overrides or ())
    with Connection(address) as connection:
        trials = tune_heads(loaded, out or Path("runs") / loaded.name, connection=connection)
    if as_json:
        _print_json(trials)
    else:
        print_trials(trials)


@app.command()
def submit(
    recipe: RecipeArgument,
    address: Annotated[str, typer.Option(help="The Ray head's dashboard, such as http://127.0.0.1:8265.")],
    overrides: Set = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Send a recipe to a Ray cluster's job API, with our code as a wheel, and wait for its end."""
    from headstart.cluster.jobs import submit as submit_job
    from headstart.cluster.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    job = submit_job(loaded, address, out or Path("runs") / loaded.name)
    if as_json:
        _print_json(job)
    else:
        typer.echo(f"job {job['job']}: {job['status']}; its run directory is {job['out']}")
    if job["status"] != "SUCCEEDED":
        raise typer.Exit(1)


@sources_app.command("list")
def list_sources(as_json: Json = False) -> None:
    """List the sources: those that come with Headstart and those that finished runs became."""
    from headstart.cluster.report.sources import describe_sources, print_sources

    found = describe_sources()
    if as_json:
        _print_json(found)
    else:
        print_sources(found)


@sources_app.command("show")
def show_source(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Show a source's card."""
    from headstart.cluster.report.sources import describe_source, print_source

    found = describe_source(name)
    if as_json:
        _print_json(found)
    else:
        print_source(found)


@sources_app.command("fetch")
def fetch_source(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Fetch a source's weights into the cache, and check their digest."""
    from headstart.cluster.report.sources import fetch

    found = fetch(name)
    if as_json:
        _print_json(found)
    else:
        typer.echo(f"{name}: {found['path']} ({found['megabytes']:.1f} MB), digest as on its card")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, processors, providers, Ray, disk; and what each finding means."""
    from headstart.cluster.report.doctor import examine, print_findings

    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        print_findings(findings)
    if any(finding["status"] == "fail" for finding in findings):
        raise typer.Exit(2)


def _run(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    address: str | None,
    fresh: bool,
    until: "Until",
) -> "Outcome":
    from headstart.cluster.connect import Connection
    from headstart.cluster.pipeline import run as run_pipeline
    from headstart.cluster.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with Connection(address) as connection:
        if address is not None:
            connection.ray()  # a cluster that does not answer is told before any work is done
        return run_pipeline(loaded, out or Path("runs") / loaded.name, connection=connection, fresh=fresh, until=until)


def _again(run_directory: Path, address: str | None, until: "Until", variant: str | None = None) -> "Outcome":
    from headstart.cluster.recipe_file import load_recipe
    from headstart.trainer.errors import RunError

    recipe = run_directory / "recipe.yaml"
    if not recipe.is_file():
        raise RunError(f"{run_directory} is no run directory: it has no recipe.yaml. Make one: headstart run RECIPE")
    overrides = None
    if variant is not None:  # the run's recipe keeps it
        known = load_recipe(str(recipe), ()).export.variants
        overrides = [f"export.variants={json.dumps(list(dict.fromkeys([*known, variant])))}"]
    return _run(str(recipe), overrides, run_directory, address, False, until)


def _show(outcome: "Outcome", as_json: bool) -> None:
    if as_json:
        _print_json(outcome.summary)
        return
    from rich.console import Console

    from headstart.cluster.report.outcome import print_outcome

    # Rich takes a pipe or a file for 80 columns, too few for the table of sources.
    print_outcome(outcome, Console(width=None if sys.stdout.isatty() else 120))


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Run the command line: 2 for what the user can mend, 130 for Ctrl-C, 1 for a crash."""
    # Before torch is imported: threads that spin while they wait cost nothing on an idle machine and a factor of five
    # to ten on one that other work shares (a batch of MobileNetV2 0.8 to 1.9 s, 0.15 to 0.20 s with this).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from headstart.cluster import interrupt

    interrupt.install()
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "headstart").startswith("headstart"):
            raise
        typer.echo(
            f"error: this command needs {error.name}, which is not installed here: a serving environment has `serve`, "
            "`predict` and `package` alone. For the rest, from a checkout: pip install -c constraints.txt -e .",
            err=True,
        )
        code = 2
    except Exception as error:
        show = getattr(error, "show", None)
        code = getattr(error, "exit_code", 1)
        if show is not None:  # a usage error of the command line itself
            show()
        elif code == 1:
            traceback.print_exc()
        else:
            typer.echo(f"error: {error}", err=True)
    if code == _INTERRUPTED:  # Typer returns it for a Ctrl-C that it has met itself
        typer.echo("interrupted: what is finished is kept; the same command goes on from there", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

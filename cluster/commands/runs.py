"""Commands that make runs: the whole way of a recipe, parts of it, a search, and a job on a cluster."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headstart.cluster.commands.options import (
    Address,
    Fresh,
    Json,
    Out,
    RecipeArgument,
    RunArgument,
    Set,
    print_found,
    print_json,
)

if TYPE_CHECKING:
    from headstart.cluster.pipeline import Outcome, Until
    from headstart.trainer.recipe import Recipe


def demo(out: Out = None, fresh: Fresh = False, as_json: Json = False) -> None:
    """Two source tasks made, eight sources ranked, one model fine-tuned, judged, packaged: on real digits."""
    from headstart.cluster.connect import Connection
    from headstart.cluster.pipeline import open_run
    from headstart.cluster.pipeline import run as run_pipeline
    from headstart.cluster.recipe_file import load_recipe
    from headstart.cluster.stages.context import Reporter

    target = out or Path("runs/demo")
    says = {
        "demo-digits": "Making the source task demo-digits",
        "demo-photographs": "Making the source task demo-photographs",
        "demo": "The target: 300 labelled digits",
    }
    folders = {name: target.parent / name.replace("demo", target.name, 1) for name in says}
    for name, folder in reversed(folders.items()):  # one that cannot be used is told before any work is done
        open_run(load_recipe(name), folder).close()
    reporter = Reporter()
    with Connection() as connection:
        for name, folder in folders.items():
            reporter.say(f"[bold]{says[name]}[/bold]")
            outcome = run_pipeline(load_recipe(name), folder, connection=connection, reporter=reporter, fresh=fresh)
    _show(outcome, as_json)


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


def rank(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Rank the sources for a recipe's data, and stop there."""
    outcome = _run(recipe, overrides, out, None, fresh, "rank")
    _show(outcome, as_json, outcome.ranking)


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


def evaluate(run_directory: RunArgument, address: Address = None, as_json: Json = False) -> None:
    """Measure a run's model and its controls on the test images; stages it lacks are done first."""
    outcome = _again(run_directory, address, "evaluate")
    _show(outcome, as_json, outcome.evaluation)


def export(
    run_directory: RunArgument,
    variant: Annotated[
        Literal["fp16", "int8"] | None, typer.Option(help="That package as well, beside the other.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Write a run's package, proven against PyTorch; stages it lacks are done first."""
    outcome = _again(run_directory, address, "export", variant)
    refused = outcome.variants[variant]["refused"] if variant else None
    if not as_json:
        _show(outcome, as_json)
    elif not refused:
        print_json(outcome.variants[variant]["manifest"] if variant else outcome.manifest)
    if refused:
        from headstart.serving.errors import PackageError

        raise PackageError(refused)


def tune(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Out = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Search over heads with Ray Tune: each trial is one source's bank over the recipe's `search`."""
    from headstart.cluster.connect import Connection
    from headstart.cluster.tune import print_trials, tune_heads

    loaded, target = _recipe_and_directory(recipe, overrides, out)
    with Connection(address) as connection:
        if address is not None:
            connection.ray()  # as of `run`
        trials = tune_heads(loaded, target, connection=connection)
    print_found(trials, as_json, print_trials)


def submit(
    recipe: RecipeArgument,
    address: Annotated[str, typer.Option(help="The Ray head's dashboard, such as http://127.0.0.1:8265.")],
    overrides: Set = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Send a recipe to a Ray cluster's job API, with our code as a wheel, and wait for its end."""
    from headstart.cluster.jobs import submit as submit_job

    loaded, target = _recipe_and_directory(recipe, overrides, out)
    job = submit_job(loaded, address, target)
    say = f"job {job['job']}: {job['status']}; its run directory is {job['out']}"
    print_found(job, as_json, lambda _: typer.echo(say))
    if job["status"] != "SUCCEEDED":
        raise typer.Exit(1)


def _run(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    address: str | None,
    fresh: bool,
    until: "Until",
    *,
    settled: bool = False,
) -> "Outcome":
    from headstart.cluster.connect import Connection
    from headstart.cluster.pipeline import run as run_pipeline

    loaded, target = _recipe_and_directory(recipe, overrides, out)
    with Connection(address) as connection:
        if address is not None:
            connection.ray()  # a cluster that does not answer is told before any work is done
        return run_pipeline(loaded, target, connection=connection, fresh=fresh, until=until, settled=settled)


def _recipe_and_directory(recipe: str, overrides: list[str] | None, out: Path | None) -> "tuple[Recipe, Path]":
    from headstart.cluster.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    return loaded, out or Path("runs") / loaded.name


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
    return _run(str(recipe), overrides, run_directory, address, False, until, settled=True)


def _show(outcome: "Outcome", as_json: bool, document: Any = None) -> None:
    """Print what a run came to; as JSON that is `document`, or its summary."""
    if as_json:
        print_json(outcome.summary if document is None else document)
        return
    from headstart.cluster.report.outcome import print_outcome
    from headstart.cluster.report.table import stdout_console

    print_outcome(outcome, stdout_console(120))

"""Commands on what there is: the sources, and this machine."""

from typing import Annotated

import typer

from headstart.cluster.commands.options import Json, print_json

sources_app = typer.Typer(help="The source tasks that can be learned from.", no_args_is_help=True)


@sources_app.command("list")
def list_sources(as_json: Json = False) -> None:
    """List the sources: those that come with Headstart and those that finished runs became."""
    from headstart.cluster.report.sources import describe_sources, print_sources

    found = describe_sources()
    if as_json:
        print_json(found)
    else:
        print_sources(found)


@sources_app.command("show")
def show_source(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Show a source's card."""
    from headstart.cluster.report.sources import describe_source, print_source

    found = describe_source(name)
    if as_json:
        print_json(found)
    else:
        print_source(found)


@sources_app.command("fetch")
def fetch_source(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Fetch a source's weights into the cache, and check their digest."""
    from headstart.cluster.report.sources import fetch

    found = fetch(name)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{name}: {found['path']} ({found['megabytes']:.1f} MB), digest as on its card")


def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, processors, providers, Ray, disk; and what each finding means."""
    from headstart.cluster.report.doctor import examine, print_findings

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        print_findings(findings)
    if any(finding["status"] == "fail" for finding in findings):
        raise typer.Exit(2)

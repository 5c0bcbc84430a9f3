"""Commands on what there is: the sources, and this machine."""

from typing import Annotated, Any

import typer

from headstart.cluster.commands.options import Json, print_found

sources_app = typer.Typer(help="The source tasks that can be learned from.", no_args_is_help=True)


@sources_app.command("list")
def list_sources(as_json: Json = False) -> None:
    """List the sources: those that come with Headstart and those that finished runs became."""
    from headstart.cluster.report.sources import describe_sources, print_sources

    print_found(describe_sources(), as_json, print_sources)


@sources_app.command("show")
def show_source(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Show a source's card."""
    from headstart.cluster.report.sources import describe_source, print_source

    print_found(describe_source(name), as_json, print_source)


@sources_app.command("fetch")
def fetch_source(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Fetch a source's weights into the cache, and check their digest."""
    from headstart.cluster.report.sources import fetch

    def say(found: dict[str, Any]) -> None:
        typer.echo(f"{name}: {found['path']} ({found['megabytes']:.1f} MB), digest as on its card")

    print_found(fetch(name), as_json, say)


def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, processors, providers, Ray, disk; and what each finding means."""
    from headstart.cluster.report.doctor import examine, print_findings

    findings = examine()
    print_found(findings, as_json, print_findings)
    if any(finding["status"] == "fail" for finding in findings):
        raise typer.Exit(2)

"""The command line. Rooms are imported inside the commands, so that `headstart --help` is quick and `predict` needs
neither torch nor ray.
"""

import importlib.metadata
import os
import sys
import traceback
from typing import Annotated

import typer

from headstart.cluster.commands import packages, recipes, runs, sources

app = typer.Typer(
    help="Transfer learning: find the closest source task, take over what it knows, say whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    runs.demo, runs.run, runs.rank, runs.fit, runs.evaluate, runs.export, packages.predict, packages.serve, runs.tune,
    runs.submit, sources.doctor,
):  # fmt: skip
    app.command()(command)
app.add_typer(recipes.recipes_app, name="recipes")
app.add_typer(sources.sources_app, name="sources")
app.add_typer(packages.package_app, name="package")

_INTERRUPTED = 130  # 128 + SIGINT


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("headstart"))
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What every command has."""


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
            from headstart.serving.errors import printable

            # It may quote what somebody else wrote, as a key of a manifest; line breaks are our own messages'.
            typer.echo("\n".join(map(printable, f"error: {error}".split("\n"))), err=True)
    if code == _INTERRUPTED:  # Typer returns it for a Ctrl-C that it has met itself
        typer.echo("interrupted: what is finished is kept; the same command goes on from there", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

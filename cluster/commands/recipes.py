"""Commands on the recipes that come with Headstart."""

from typing import Annotated

import typer

from headstart.cluster.commands.options import Json, print_found

recipes_app = typer.Typer(help="The recipes that come with Headstart.", no_args_is_help=True)


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes by name, each with its first line."""
    from headstart.cluster.recipe_file import shipped_recipes, shipped_text

    def say(found: dict[str, str]) -> None:
        for name, line in found.items():
            typer.echo(f"{name:18} {line}")

    texts = {name: shipped_text(name) for name in shipped_recipes()}
    print_found({name: text.splitlines()[0].removeprefix("# ") for name, text in texts.items()}, as_json, say)


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Print a recipe, to be copied and changed: `headstart recipes show folder > mine.yaml`."""
    from headstart.cluster.recipe_file import parse_document, shipped_text

    text = shipped_text(name)
    print_found(parse_document(text, name), as_json, lambda _: typer.echo(text, nl=False))

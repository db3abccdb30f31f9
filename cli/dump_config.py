"""`fnrecipe dump-config RECIPE`."""

from __future__ import annotations

from pathlib import Path

import click
from attrs import AttrsInstance

from fnrecipe.cli.options import ConfigCommand, config_options, sources_option
from fnrecipe.config import resolve, unstructure, yaml
from fnrecipe.shell.find_recipe import find


@click.command(cls=ConfigCommand, short_help="Print a recipe's whole config as YAML.")
@click.argument("recipe")
@config_options
@sources_option
def dump_config(recipe: str, files: tuple[Path, ...], pairs: tuple[str, ...], sources: bool) -> int:
    """Print the config of RECIPE, after files and pairs, as YAML that --config-file reads back."""
    print_config(find(recipe).config, files, pairs, sources)
    return 0


def print_config(defaults: AttrsInstance, files: tuple[Path, ...], pairs: tuple[str, ...], sources: bool) -> None:
    config, origin = resolve(defaults, files, pairs)
    click.echo(yaml.dump(unstructure(config), origin if sources else None), nl=False)

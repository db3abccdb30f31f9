"""Options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import click

from fnrecipe.config.paths import expanded
from fnrecipe.data.remote import is_address, local_path
from fnrecipe.errors import UsageError, did_you_mean
from fnrecipe.shell.find_recipe import presets

Command = TypeVar("Command", bound=Callable[..., object])

PRESET = "preset:"
_PAIR = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
_STRAY = re.compile(r"--(\w+(?:\.\w+)+)(=.*)?|(\w+(?:\.\w+)+)(=.*)", re.DOTALL)


class ConfigCommand(click.Command):
    """A command whose `--config` takes all `section.key=value` pairs that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread = _one_pair_an_option(args)
        try:
            return super().parse_args(ctx, list(spread))
        except click.UsageError as error:
            advice = _advice(spread)
            if not advice:
                raise
            raise click.UsageError(f"{error.format_message()}{advice}", ctx) from error


def _advice(args: Sequence[str]) -> str:
    """How a value of the config is written, if there is one among the arguments that does not follow `--config`."""
    others = [arg for before, arg in pairwise(["", *args]) if before != "--config"]
    stray = next(filter(None, map(_STRAY.fullmatch, others)), None)
    if stray is None:
        return ""
    key, value = stray[1] or stray[3], stray[2] or stray[4] or "=VALUE"
    return f"\nValues of the config follow --config: --config {key}{value}"


def _one_pair_an_option(args: Sequence[str]) -> list[str]:
    """`--config a=1 b=2 rest` as `--config a=1 --config b=2 rest`."""
    spread: list[str] = []
    following = False
    for number, arg in enumerate(args):
        if arg == "--":
            return [*spread, *args[number:]]
        if arg == "--config":
            if number + 1 == len(args) or not _PAIR.fullmatch(args[number + 1]):
                found = args[number + 1] if number + 1 < len(args) else "nothing"
                raise UsageError(f"--config: expected section.key=value, found {found}")
            following = True
        elif following and _PAIR.fullmatch(arg):
            spread += ["--config", arg]
        else:
            following = False
            spread.append(arg)
    return spread


class FilePath(click.Path):
    """A `Path` with `~` expanded, which shells do not expand in `--out=~/runs` and in quotes; `""` is none, and not `.`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not os.fspath(value):
            self.fail("expected a path, found nothing", param, ctx)
        return super().convert(expanded(os.fspath(value)), param, ctx)


class Place(FilePath):
    """A directory by its path, or the text of an address of a remote file system."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        text = os.fspath(value)
        return text if is_address(text) else super().convert(local_path(text), param, ctx)


class ConfigFile(FilePath):
    """A config file by its path, or by `preset:NAME` one of those that come with the recipes."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        text = os.fspath(value)
        if not text.startswith(PRESET):
            return super().convert(value, param, ctx)
        name, known = text.removeprefix(PRESET), presets()
        if name not in known:
            raise UsageError(f"--config-file {text}: expected a preset, found none; {did_you_mean(name, known)}")
        return known[name]


def config_options(command: Command) -> Command:
    files = click.option(
        "--config-file",
        "files",
        multiple=True,
        type=ConfigFile(),
        metavar="FILE",
        help="YAML over the recipe's defaults, or preset:NAME; a later file goes over an earlier one.",
    )
    pairs = click.option(
        "--config",
        "pairs",
        multiple=True,
        metavar="KEY=VALUE ...",
        help="Values over the files, left to right: --config regime.num_steps=300 optimizer.config.lr=1e-3",
    )
    return files(pairs(command))


sources_option = click.option("--sources", is_flag=True, help="Say where each value comes from, as a comment behind it.")

with_changes_option = click.option(
    "--resume-with-changes",
    "with_changes",
    is_flag=True,
    help="Go on in a directory that was trained under another config or on other data.",
)

from_step_option = click.option(
    "--from-step",
    default=None,
    type=click.IntRange(min=0),
    metavar="N",
    help="Go back to this checkpoint each time this is given; newer ones become a run of their own, DIR/aside/1.",
)

weights_option = click.option(
    "--weights",
    default="latest",
    show_default=True,
    type=click.Choice(("latest", "average")),
    help="Of a run: those of the step, or their average (trainer.average).",
)

nproc_option = click.option("--nproc", type=click.IntRange(min=1), help="Start so many processes on this machine.")

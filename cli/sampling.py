"""Options of the commands that generate: how tokens are chosen, and the model that says them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fnrecipe.cli.options import weights_option

if TYPE_CHECKING:
    from pathlib import Path

    from fnrecipe.config.sections.model import ModelConfig
    from fnrecipe.generation.generator import Generator
    from fnrecipe.shell.trained.speaker import Speaker

Command = TypeVar("Command", bound=Callable[..., object])

_OPTIONS = (
    click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0: the likeliest token."),
    click.option("--top-k", default=None, type=click.IntRange(min=1), help="Of the likeliest K tokens only.", metavar="K"),
    click.option("--top-p", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Of those that have P together."),
    click.option("--min-p", default=0.0, type=click.FloatRange(0, 1), help="Of those with P times the likeliest one's."),
    click.option(
        "--repetition-penalty", default=1.0, type=click.FloatRange(min=0, min_open=True), help="Above 1: repeat less."
    ),
    click.option(
        "--max-tokens", default=None, type=click.IntRange(min=1), metavar="N", help="At most; else up to the context."
    ),
    click.option("--seed", default=0, show_default=True, type=int, help="Decides, with the prompt's number, what is said."),
    click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    weights_option,
    click.option("--dtype", default=None, type=click.Choice(("float32", "bfloat16")), help="By default the model's own."),
    click.option("--device", default="auto", type=click.Choice(("auto", "cpu", "cuda")), help="auto: a GPU if there is one."),
    click.option("--compile", "compiled", is_flag=True, help="Compile the step first: for many tokens."),
)
_CHOICE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def open_generator(path: Path, options: Mapping[str, Any], *, many: bool = False) -> tuple[Speaker, Generator[ModelConfig]]:
    """The model in a directory, and its functions, by the values of the options above; `many`: for several batches."""
    import torch

    from fnrecipe.errors import UsageError
    from fnrecipe.generation.sampling import Sampling
    from fnrecipe.runtime.host import keep_freed_memory
    from fnrecipe.shell.trained.speaker import generator_of, open_speaker

    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: expected cpu on this machine, found cuda")
    keep_freed_memory()
    place = torch.device("cuda" if options["device"] != "cpu" and torch.cuda.is_available() else "cpu")
    speaker = open_speaker(path, dtype=options["dtype"], device=place, weights=options["weights"])
    sampling = Sampling(**{name: options[name] for name in _CHOICE})
    return speaker, generator_of(speaker, sampling, compiled=options["compiled"], many=many)

"""`fnrecipe chat RUN`: a conversation with a model on the console."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from fnrecipe.cli.options import FilePath
from fnrecipe.cli.sampling import open_generator, sampling_options
from fnrecipe.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from fnrecipe.config.sections.model import ModelConfig
    from fnrecipe.data.chat_template import ChatTemplate, Message
    from fnrecipe.generation.answer import Answer
    from fnrecipe.generation.generator import Generator
    from fnrecipe.shell.trained.speaker import Speaker

_COMMANDS = ("/reset", "/save")


@click.command(short_help="Talk with a model.")
@click.argument("path", metavar="RUN", type=FilePath())
@click.option("--system", default=None, metavar="TEXT", help="What the system says first.")
@click.option("--chat-template", "template", type=FilePath(), metavar="FILE", help="Jinja; by default that of the model.")
@sampling_options
def chat(
    path: Path,
    system: str | None,
    template: Path | None,
    max_tokens: int | None,
    seed: int,
    stops: tuple[str, ...],
    **choice: object,
) -> int:
    """Talk with the model in RUN, the output directory of a run or a directory of Hugging Face, in its chat template.

    /reset begins anew, /save FILE appends the conversation to a file, as a line of JSON with "messages". Ctrl-C ends an
    answer, Ctrl-D the conversation.

    \b
    fnrecipe chat models/smollm --system "Be brief." --temperature 0.7
    """
    from fnrecipe.data.answer_ends import with_answer_ends
    from fnrecipe.shell.trained.speaker import chat_template

    speaker, generator = open_generator(path, choice)
    found = chat_template(speaker, template)
    ends = speaker.ends | with_answer_ends(speaker.tokenizer, found).answer_ends
    speaker = attrs.evolve(speaker, ends=ends)
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = begin
    for line in _lines():
        if line.startswith("/"):
            messages = _command(line, messages, begin)
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        try:
            answer = _say(_answer(speaker, generator, found, asked, seed, max_tokens, stops), stops)
        except (UsageError, DataError) as error:
            click.echo(f"error: {error}", err=True)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _lines() -> Iterator[str]:
    """The lines that are typed, but empty ones; Ctrl-C begins a new one. What is no terminal is read without a prompt."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if typed else "").strip()
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo(nl=typed)
            return
        if line:
            yield line


def _command(line: str, messages: list[Message], begin: list[Message]) -> list[Message]:
    """The messages after a command."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        return begin
    if name == "/save" and rest:
        try:
            with Path(rest).expanduser().open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'messages': messages}, ensure_ascii=False)}\n")
            click.echo(f"{rest}: {len(messages)} messages", err=True)
        except OSError as error:
            click.echo(f"error: {rest}: cannot write: {error.strerror or error}", err=True)
        return messages
    hint = "expected a file behind it" if name == "/save" else did_you_mean(name, _COMMANDS)
    click.echo(f"error: {name}: {hint}", err=True)
    return messages


def _answer(
    speaker: Speaker,
    generator: Generator[ModelConfig],
    template: ChatTemplate,
    messages: list[Message],
    seed: int,
    max_tokens: int | None,
    stops: tuple[str, ...],
) -> Iterator[tuple[Answer, ...]]:
    from fnrecipe.data.chat_template import encode_prompt
    from fnrecipe.generation.generator import Prompt, check
    from fnrecipe.shell.trained.speaker import answers

    ids = encode_prompt(template, messages, speaker.tokenizer).tolist()
    check(speaker.context, ids, "the conversation")
    return answers(speaker, generator, [Prompt(ids, len(messages))], seed, max_tokens=max_tokens, strings=stops)


def _say(said: Iterator[tuple[Answer, ...]], stops: tuple[str, ...]) -> str:
    """Shows an answer while it grows; the whole of it, or what there is of it at Ctrl-C."""
    from fnrecipe.generation.answer import Stops, shown

    done = ""
    with closing(said):  # type: ignore[type-var]
        try:
            for (answer,) in said:
                text = shown(answer, Stops(strings=stops))
                click.echo(text[len(done) :], nl=False)
                done = text
        except KeyboardInterrupt:
            click.echo(" …", nl=False)
    click.echo()
    return done

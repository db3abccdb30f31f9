"""`fnrecipe generate RUN --prompt TEXT`: what a model says after a text, or after many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import attrs
import click

from fnrecipe.cli.options import FilePath
from fnrecipe.cli.sampling import open_generator, sampling_options
from fnrecipe.errors import UsageError

if TYPE_CHECKING:
    from fnrecipe.config.sections.model import ModelConfig
    from fnrecipe.generation.answer import Answer
    from fnrecipe.generation.generator import Generator, Prompt
    from fnrecipe.shell.trained.speaker import Speaker


@attrs.frozen
class Text:
    """A text to go on from, and where it is from, for errors."""

    text: str
    origin: str


@click.command(short_help="Say what a model says after a text.")
@click.argument("path", metavar="RUN", type=FilePath())
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A text to go on from; may be repeated.")
@click.option("--file", "file", type=FilePath(), metavar="FILE", help='JSONL with a "prompt" a line.')
@click.option("--out", type=FilePath(), metavar="FILE", help="Write JSONL there: prompt, text, and why it ended.")
@click.option("--n", "count", default=1, show_default=True, type=click.IntRange(min=1), help="Answers to each.", metavar="N")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="Texts at once.", metavar="N")
@sampling_options
def generate(
    path: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    out: Path | None,
    count: int,
    batch_size: int,
    max_tokens: int | None,
    seed: int,
    stops: tuple[str, ...],
    **choice: object,
) -> int:
    """Go on from texts with the model in RUN: the output directory of a run, or a directory of Hugging Face.

    One answer to one prompt is shown as it is said; more are lines of JSON, in the order of the prompts. The same seed gives
    the same answers, however many are generated at once.

    \b
    fnrecipe generate runs/first --prompt "def add(" --temperature 0.7 --max-tokens 100
    fnrecipe generate runs/first --file prompts.jsonl --out answers.jsonl --n 4
    """
    if bool(prompts) == (file is not None):
        raise UsageError(f"expected --prompt or --file, found {'both' if prompts else 'neither'}")
    texts = [Text(prompt, "--prompt") for prompt in prompts] if file is None else _read(file)
    if "" in stops:
        raise UsageError("--stop: expected a text, found an empty one")
    rows = [(number, sample) for number in range(len(texts)) for sample in range(count)]
    speaker, generator = open_generator(path, choice, many=len(rows) > batch_size)
    said = _answers(speaker, generator, texts, rows, batch_size, seed, max_tokens, stops)
    if len(rows) == 1 and out is None:
        return _stream(said, stops)
    try:
        with click.open_file("-" if out is None else str(out), "w", encoding="utf-8") as lines:
            _write(said, rows, texts, lines)
    except OSError as error:
        if out is None:
            raise
        raise UsageError(f"{out}: cannot write: {error.strerror or error}") from None
    return 0


def _read(file: Path) -> list[Text]:
    """The prompts of a file of JSON lines."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file: cannot read {file}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}:{number}: expected JSON, found {error}") from None
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(prompt, str):
            raise UsageError(f'{file}:{number}: expected an object with a text "prompt", found none')
        found.append(Text(prompt, f"{file}:{number}"))
    if not found:
        raise UsageError(f"{file}: expected a prompt, found an empty file")
    return found


def _answers(
    speaker: Speaker,
    generator: Generator[ModelConfig],
    texts: Sequence[Text],
    rows: Sequence[tuple[int, int]],
    batch_size: int,
    seed: int,
    max_tokens: int | None,
    stops: Sequence[str],
) -> Iterator[tuple[Answer, ...]]:
    """Of each batch of rows, (number of a text, number of a sample): what is said after each step."""
    from fnrecipe.generation.generator import Prompt, check
    from fnrecipe.shell.trained.speaker import answers

    tokens = [speaker.tokens(text.text) for text in texts]
    for text, ids in zip(texts, tokens, strict=True):
        check(speaker.context, ids, text.origin)
    for first in range(0, len(rows), batch_size):
        batch: list[Prompt] = [Prompt(tokens[number], number, k) for number, k in rows[first : first + batch_size]]
        yield from answers(speaker, generator, batch, seed, max_tokens=max_tokens, strings=stops)


def _stream(said: Iterator[tuple[Answer, ...]], stops: Sequence[str]) -> int:
    """Shows an answer while it grows."""
    from fnrecipe.generation.answer import Stops, shown

    done = ""
    for (answer,) in said:
        text = shown(answer, Stops(strings=tuple(stops)))
        click.echo(text[len(done) :], nl=False)
        done = text
    click.echo()
    return 0


def _write(said: Iterator[tuple[Answer, ...]], rows: Sequence[tuple[int, int]], texts: Sequence[Text], lines: IO[str]) -> None:
    """A line for each answer, as soon as its batch is done."""
    waiting = iter(rows)
    for answers in said:
        if not all(answer.finish for answer in answers):
            continue
        for answer in answers:
            number, sample = next(waiting)
            row = {"prompt": texts[number].text, "sample": sample, "text": answer.words}
            row |= {"tokens": len(answer.tokens), "finish": answer.finish}
            lines.write(f"{json.dumps(row, ensure_ascii=False)}\n")
        lines.flush()

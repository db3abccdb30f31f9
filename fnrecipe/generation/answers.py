"""What is said after prompts, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from fnrecipe.generation.answer import Answer, Decode, Stops, ended, said
from fnrecipe.generation.generator import Generator, Prompt, generate
from fnrecipe.tree import Tree

C = TypeVar("C")


def answers(
    generator: Generator[C],
    params: Tree,
    prompts: Sequence[Prompt],
    key: Tensor,
    decode: Decode,
    stops: Stops,
    max_tokens: int | None = None,
) -> Iterator[tuple[Answer, ...]]:
    """What is said after each prompt, after each step; ends when all have ended."""
    found = tuple(Answer() for _ in prompts)
    for column in generate(generator, params, prompts, key, max_tokens):
        found = tuple(said(answer, token, decode, stops) for answer, token in zip(found, column, strict=True))
        yield found
        if all(answer.finish for answer in found):
            return
    yield tuple(ended(answer, decode, stops) for answer in found)

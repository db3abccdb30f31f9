"""What is said after a prompt, as a fold over its tokens: text that grows by whole characters, to where it stops. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import attrs

Decode: TypeAlias = Callable[[Sequence[int]], str]
Finish: TypeAlias = Literal["stop", "length"]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8
"""Tokens that may be part of one character, at most: bytes of UTF-8 that no tokenizer joins are four."""


@attrs.frozen
class Stops:
    """Where an answer ends: before one of the tokens, or before one of the strings."""

    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()


@attrs.frozen
class Answer:
    """
    tokens    all that were said, the token of a stop left out
    words     theirs, of whole characters, up to a stop
    finish    why it ended: a stop, or the number of tokens; None while it goes on
    settled   tokens of which the text is known, and `read`, from which of these on the next are decoded
    """

    tokens: tuple[int, ...] = ()
    words: str = ""
    finish: Finish | None = None
    settled: int = 0
    read: int = 0


def said(answer: Answer, token: int | None, decode: Decode, stops: Stops = Stops()) -> Answer:
    """The answer with one token more; one that has ended stays as it is. A token that is None is the end of the context."""
    if answer.finish is not None:
        return answer
    if token is None:
        return ended(answer, decode, stops, "length")
    if token in stops.tokens:
        return ended(answer, decode, stops, "stop")
    longer = attrs.evolve(answer, tokens=(*answer.tokens, token))
    new = _new_text(longer, decode)
    # Tokens may be pieces of a character, which decode to that sign until the last one is there.
    if new.endswith(_UNKNOWN) and len(longer.tokens) - answer.settled < _LONGEST:
        return longer
    return _grown(longer, new, stops)


def ended(answer: Answer, decode: Decode, stops: Stops = Stops(), finish: Finish = "length") -> Answer:
    """The answer that ends here, with what was still held back of its text."""
    if answer.finish is not None:
        return answer
    whole = _grown(answer, _new_text(answer, decode), stops)
    return whole if whole.finish is not None else attrs.evolve(whole, finish=finish)


def shown(answer: Answer, stops: Stops = Stops()) -> str:
    """The part of the text that no later token takes back: without an end that may be the beginning of a stop string."""
    if answer.finish is not None:
        return answer.words
    held = max((_overlap(answer.words, stop) for stop in stops.strings), default=0)
    return answer.words[: len(answer.words) - held]


def _new_text(answer: Answer, decode: Decode) -> str:
    """The text of the tokens that are not settled. They are decoded behind others: the first of a text may lose its space."""
    before = decode(answer.tokens[answer.read : answer.settled])
    return decode(answer.tokens[answer.read :])[len(before) :]


def _grown(answer: Answer, new: str, stops: Stops) -> Answer:
    text = answer.words + new
    first = max(len(answer.words) - max(map(len, stops.strings), default=0), 0)
    found = [place for stop in stops.strings if (place := text.find(stop, first)) >= 0]
    settled = attrs.evolve(answer, words=text, settled=len(answer.tokens), read=answer.settled)
    return attrs.evolve(settled, words=text[: min(found)], finish="stop") if found else settled


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)

"""What is said after a prompt, as a fold over its tokens: text that grows by whole characters, to where it stops. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import attrs

Decode: TypeAlias = Callable[[Sequence[int]], str]
Finish: TypeAlias = Literal["stop", "length"]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BYTES, _LONGEST = 3, 8
"""Tokens of an unfinished character, at most, each of them a byte; and tokens that are held back at all."""


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
    held = _held(longer, decode)
    return longer if len(longer.tokens) - held <= answer.settled else _grown(longer, decode, stops, held)


def ended(answer: Answer, decode: Decode, stops: Stops = Stops(), finish: Finish = "length") -> Answer:
    """The answer that ends here, with what was still held back of its text."""
    if answer.finish is not None:
        return answer
    whole = _grown(answer, decode, stops)
    return whole if whole.finish is not None else attrs.evolve(whole, finish=finish)


def shown(answer: Answer, stops: Stops = Stops()) -> str:
    """The part of the text that no later token takes back: without an end that may be the beginning of a stop string."""
    if answer.finish is not None:
        return answer.words
    held = max((_overlap(answer.words, stop) for stop in stops.strings), default=0)
    return answer.words[: len(answer.words) - held]


def _held(answer: Answer, decode: Decode) -> int:
    """The number of last tokens that may be the beginning of a character: together they decode to the sign for what is none."""
    text = decode(answer.tokens[answer.read :])
    if not text.endswith(_UNKNOWN):
        return 0
    size, new = len(answer.tokens), len(answer.tokens) - answer.settled
    alone = [
        held
        for held in range(1, min(new, _BYTES) + 1)
        if decode(answer.tokens[size - held :]) == _UNKNOWN
        and decode(answer.tokens[answer.read : size - held]) + _UNKNOWN == text
    ]
    # None where a token ends a character and begins another; what stays wrong for long is no character.
    return max(alone, default=new if new < _LONGEST else 0)


def _grown(answer: Answer, decode: Decode, stops: Stops, held: int = 0) -> Answer:
    """With the text of all but the last `held` tokens.

    New tokens are decoded behind those before them: the first token of a text may lose its space.
    """
    upto = len(answer.tokens) - held
    before = decode(answer.tokens[answer.read : answer.settled])
    text = answer.words + decode(answer.tokens[answer.read : upto])[len(before) :]
    first = max(len(answer.words) - max(map(len, stops.strings), default=0), 0)
    found = [place for stop in stops.strings if (place := text.find(stop, first)) >= 0]
    settled = attrs.evolve(answer, words=text, settled=upto, read=answer.settled)
    return attrs.evolve(settled, words=text[: min(found)], finish="stop") if found else settled


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)

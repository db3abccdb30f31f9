"""Examples as tokens with a mask of those that are trained: by a chat template, or as prompt and response."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Literal, TypeAlias

import attrs
import numpy as np

from fnrecipe.data.answer_ends import with_answer_ends
from fnrecipe.data.blocks import Block
from fnrecipe.data.chat_template import (
    Chat,
    ChatTemplate,
    chat_template_beside,
    encode_chat,
    encode_prompt,
    read_chat_template,
)
from fnrecipe.data.document import Document, Ids, Read
from fnrecipe.data.examples import Example, Pair, parse_example
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.data.tokenizer import Tokenizer, Tokens
from fnrecipe.errors import DataError, UsageError

_log = logging.getLogger(__name__)

TooLong: TypeAlias = Literal["drop", "cut", "error"]
TODAY = datetime(2024, 7, 26)
"""What templates are told of the time: the same on every day, or a run would not go on with the text that it began with."""
NO_TEMPLATE = "expected a chat template for messages, found none beside the tokenizer; set dataset.chat_template"


@attrs.frozen
class Encoding:
    """How examples become tokens.

    template  that of their messages; None: prompts and responses as they are, and no chats
    last      whether only the last answer of a chat is trained
    add_bos, add_eos  whether prompt and response stand between BOS and EOS where there is no template
    length    predictions at most, and `too_long` what becomes of an example of more
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    last: bool
    add_bos: bool
    add_eos: bool
    length: int
    too_long: TooLong


def find_template(path: str | None, tokenizer: str | None) -> ChatTemplate | None:
    """The chat template at `path`, or without one that beside the tokenizer's file; None if there is none.

    Raises:
        UsageError: if there is nothing at `path`, or no template in it.
    """
    if path is not None and not os.path.exists(path):
        expected = "expected a file of Jinja, a tokenizer_config.json, or a directory"
        raise UsageError(f"dataset.chat_template: {expected}, found nothing at {path}")
    found = chat_template_beside(tokenizer) if path is None else read_chat_template(path)
    return None if found is None else attrs.evolve(found, now=TODAY)


def marked(tokenizer: Tokenizer, template: ChatTemplate | None, trained: str) -> Tokenizer:
    """The tokenizer, with the ends of the template's answers; it is another one where something else is trained."""
    source = "" if template is None else repr((template.source, sorted(template.tokens.items())))
    marks = hashlib.blake2b(f"{source} {trained}".encode(), digest_size=8).hexdigest()
    return attrs.evolve(with_answer_ends(tokenizer, template), fingerprint=f"{tokenizer.fingerprint} {marks}")


def encode_question(text: str, tokenizer: Tokenizer, template: ChatTemplate | None, *, add_bos: bool) -> list[int]:
    """The tokens from which a model answers a user's text: by the template, or as it is; EOS where there is none."""
    if template is None:
        ids: list[int] = [tokenizer.bos] * add_bos + tokenizer.encode([text])[0].tolist()
    else:
        ids = encode_prompt(template, [{"role": "user", "content": text}], tokenizer).tolist()
    return ids or [tokenizer.eos]


def encode_examples(
    source: Source[Read], cursor: Cursor = None, *, encoding: Encoding, number: int = 0, epoch: int = 0
) -> Stream[Tokens | DataError]:
    """The records of a source as tokens; one that is no example, or that the template refuses, as a bad record."""
    for item, cursor in source(cursor):
        yield (item if isinstance(item, DataError) else _tokens(item, encoding, number, epoch)), cursor


def read_encoded(read: Callable[[Block], Iterator[Read]], block: Block, *, encoding: Encoding) -> Iterator[Read]:
    """The documents of `read(block)` with their ids, as they are trained on, in the place of text."""
    for item in read(block):
        found = item if isinstance(item, DataError) else _tokens(item, encoding)
        yield found if isinstance(found, DataError) else Document(ids=found.ids)


def leave_out(source: Source[Tokens], cursor: Cursor = None, *, length: int, name: str) -> Stream[Tokens]:
    """The examples of at most `length` predictions of which one is trained; the first of the others is told, and their number.

    The number is told where the source ends, if it was read from its start.
    """
    whole, used = cursor is None, 0
    reasons: Counter[str] = Counter()
    for item, cursor in source(cursor):
        why = _unusable(item, length)
        if not why:
            used += 1
            yield item, cursor
            continue
        if why not in reasons:
            first = f"{name}: an example {why} is left out; how many is told at the end of the source"
            _log.warning("%s", first, extra={"once": f"{name}: {why}"})
        reasons[why] += 1
    if whole and reasons:
        listed = ", ".join(f"{count:,} {why}" for why, count in reasons.items())
        text = f"{name}: {reasons.total():,} of {used + reasons.total():,} examples are left out: {listed}"
        _log.warning("%s", text, extra={"once": text})


def _unusable(item: Tokens, length: int) -> str:
    if len(item.ids) - 1 > length:
        return f"of more than {length:,} tokens (dataset.max_seq_len; dataset.too_long)"
    return "" if item.trained is None or item.trained[1:].any() else "without a token that is trained"


def _tokens(document: Document, encoding: Encoding, number: int = 0, epoch: int = 0) -> Tokens | DataError:
    bad = document.bad or DataError
    try:
        example = parse_example(document.text or "")
        found = encode_example(example, encoding, bad)
    except DataError as error:
        return bad(str(error))
    size = len(found.ids) - 1
    if size > encoding.length and encoding.too_long == "error":
        ways = "dataset.too_long=drop leaves such out, cut keeps their beginnings"
        return bad(f"expected an example of at most {encoding.length:,} tokens (dataset.max_seq_len), found {size:,}; {ways}")
    keep = encoding.length + 1 if encoding.too_long == "cut" else None
    ids, trained = found.ids[:keep], found.trained[:keep]
    num_bytes = int(encoding.tokenizer.num_bytes[ids[1:][trained[1:]]].sum())
    return Tokens(ids, num_bytes, number, epoch, trained=trained, place=document.place)


def encode_example(example: Example, encoding: Encoding, bad: Callable[[str], DataError]) -> Chat:
    """The tokens of an example, and which of them are trained; `bad` says where the example is.

    Raises:
        DataError: if the template refuses it.
        UsageError: if there is no template for a chat.
    """
    if encoding.template is None and example.pair is None:
        raise UsageError(str(bad(NO_TEMPLATE)))
    if encoding.template is None:
        assert example.pair is not None
        return _encoded_pair(example.pair, encoding)
    return encode_chat(encoding.template, example.messages, encoding.tokenizer, tools=example.tools, last_only=encoding.last)


def _encoded_pair(pair: Pair, encoding: Encoding) -> Chat:
    """The prompt by itself, as it is when an answer to it is generated; then the response."""
    tokenizer = encoding.tokenizer
    prompt, response = tokenizer.encode([pair.prompt + pair.between, pair.response])
    bos, eos = (np.array([token], np.int32) for token in (tokenizer.bos, tokenizer.eos))
    before, after = [*[bos] * encoding.add_bos, prompt], [response, *[eos] * encoding.add_eos]
    ids: Ids = np.concatenate([*before, *after])
    return Chat(ids, np.arange(len(ids)) >= sum(map(len, before)))

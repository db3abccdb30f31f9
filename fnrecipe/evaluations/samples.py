"""What a model writes after prompts, in parts: some prompts at a time, always the same ones together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import attrs
import orjson
import torch

from fnrecipe import presets, random
from fnrecipe.config.sections.evaluation import SamplesConfig
from fnrecipe.data import Tokenizer
from fnrecipe.data.files import opened
from fnrecipe.errors import UsageError
from fnrecipe.evaluations.config import TextConfig
from fnrecipe.generation.answer import Stops
from fnrecipe.generation.answers import answers
from fnrecipe.generation.generator import Prompt, check
from fnrecipe.generation.sampling import Sampling
from fnrecipe.recipe import Findings, Measure
from fnrecipe.tree import Tree

Encode: TypeAlias = Callable[[str], Sequence[int]]
"""A prompt -> the tokens that the model goes on from."""
Written: TypeAlias = dict[str, str | int]

_TOGETHER = 8
"""Prompts that are generated from together."""


@attrs.frozen
class Asked:
    """A prompt as it was written, and where it stands."""

    text: str
    place: str


def samples(
    config: TextConfig, tokenizer: Tokenizer, section: SamplesConfig, name: str, encode: Encode, device: torch.device
) -> Measure[list[Written]]:
    """What is written after each prompt, and as numbers to record its mean length in tokens and the share that came to an end.

    Raises:
        UsageError, DataError: if there is no prompt, or one that is none, or does not fit.
    """
    context = config.dataset.max_seq_len
    asked = list(_in_file(section.file)) if section.file else [Asked(t, f"evaluations {name}") for t in section.prompts]
    if not asked:
        raise UsageError(f"{section.file}: expected a prompt on each line, found none")
    prompts = [Prompt(encode(each.text), number) for number, each in enumerate(asked)]
    for each, prompt in zip(asked, prompts, strict=True):
        check(context, prompt.tokens, f"{each.place}: prompt")
    sampling = Sampling(temperature=section.temperature)
    generator = presets.generator(config.model, config.trainer, sampling, context=context, vocab_size=tokenizer.vocab_size)
    key = random.fold_in(random.key(config.common.seed, device), f"evaluations.{name}")
    stops = Stops(tokenizer.answer_ends)

    def written(start: int, params: Tree) -> list[Written]:
        some = prompts[start : start + _TOGETHER]
        (last,) = deque(answers(generator, params, some, key, tokenizer.decode, stops, section.max_tokens), maxlen=1)
        return [
            {"prompt": each.text, "text": answer.words, "finish": answer.finish or "length", "tokens": len(answer.tokens)}
            for each, answer in zip(asked[start : start + _TOGETHER], last, strict=True)
        ]

    return Measure([partial(written, start) for start in range(0, len(prompts), _TOGETHER)], _total)


def _total(parts: Sequence[list[Written]]) -> Findings:
    texts = [text for part in parts for text in part]
    tokens = sum(int(text["tokens"]) for text in texts) / len(texts)
    ended = sum(text["finish"] == "stop" for text in texts) / len(texts)
    return Findings({"tokens": tokens, "ended": ended}, texts)


def _in_file(path: str) -> Iterator[Asked]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Asked(_prompt(line, f"{path}:{number}"), f"{path}:{number}")


def _prompt(line: bytes, place: str) -> str:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{place}: expected a JSON object, found {error.msg}") from None
    prompt = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(prompt, str):
        raise UsageError(f"{place}: expected an object with text in the field 'prompt', found {type(prompt).__name__}")
    return prompt

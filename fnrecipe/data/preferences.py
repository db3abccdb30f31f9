"""Preferences from records: two answers to a prompt of which one is better, or an answer that is desirable or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs

from fnrecipe.data.chat_template import Message
from fnrecipe.data.examples import CHATS, PAIRS, Example, Record, example_of, read_record
from fnrecipe.data.examples import KEYS as EXAMPLE_KEYS
from fnrecipe.errors import DataError, few

SIDES: Mapping[str, str] = MappingProxyType(
    {"chosen": "rejected", "chosen_messages": "rejected_messages", "tgt_chosen": "tgt_rejected"}
)
"""Keys of the better answer, and that of the worse one."""
LABELS = ("label", "kto_tag")
"""Keys of whether an answer is desirable."""
SCORES: Mapping[str, str] = MappingProxyType(
    {"reference_score_chosen": "reference_score_rejected", "ref_chosen_logps": "ref_rejected_logps"}
)
"""Keys of the log-probability of the better answer under a reference model, as fairseq2 and TRL have them; and of the worse."""
KEYS = EXAMPLE_KEYS | {*SIDES, *SIDES.values(), *LABELS, *SCORES, *SCORES.values()}
"""All keys of records that are read."""
_WEIGHTS = ("weight", "loss_weight")


@attrs.frozen
class Verdict:
    """An answer, the last message of an example; and whether it is the better one of two, or desirable.

    score  the log-probability of the answer under a reference model, if the record has it
    """

    example: Example
    is_good: bool
    score: float | None = None


def parse_preference(text: str) -> tuple[Verdict, ...]:
    """The two answers in a JSON object, the better one first; or the one that it labels.

    Raises:
        DataError: if there are none, they are the same, or they are not answers to the same prompt; it does not say where.
    """
    record = read_record(text)
    for better, worse in SIDES.items():
        if better in record or worse in record:
            if missing := [key for key in (better, worse) if key not in record]:
                raise DataError(f"expected an answer under {missing[0]!r} beside that of a pair, found none")
            return _pair(record, better, worse)
    for key in LABELS:
        if key in record:
            label = record[key]
            if not isinstance(label, bool):
                raise DataError(f"expected true or false in the field {key!r}, found {label!r:.80}")
            return (Verdict(_answered(record, key), label),)
    known = ", ".join([*(f"{better} and {worse}" for better, worse in SIDES.items()), *LABELS])
    raise DataError(f"expected a preference by its keys, {known}; found the keys {few(list(record)) or 'none'}")


def _pair(record: Record, better: str, worse: str) -> tuple[Verdict, Verdict]:
    shared = {key: value for key, value in record.items() if key not in (better, worse)}
    chosen, rejected = (_answered(_with_answer(shared, record[key], key), key) for key in (better, worse))
    before = [example.messages[:-1] for example in (chosen, rejected)]
    if before[0] != before[1]:
        number = next((n for n, (one, other) in enumerate(zip(*before, strict=False)) if one != other), min(map(len, before)))
        expected = f"expected the same messages before the last one of {better!r} and of {worse!r}"
        raise DataError(f"{expected}, found others from message {number + 1} on")
    if chosen.messages[-1] == rejected.messages[-1]:
        raise DataError(f"expected two answers that differ under {better!r} and {worse!r}, found the same one twice")
    scores = _scores(record)
    return Verdict(chosen, True, scores[0]), Verdict(rejected, False, scores[1])


def _scores(record: Record) -> tuple[float | None, float | None]:
    for chosen, rejected in SCORES.items():
        if chosen in record or rejected in record:
            return _score(record, chosen), _score(record, rejected)
    return None, None


def _score(record: Record, key: str) -> float:
    found = record.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or found > 0:
        raise DataError(f"expected a log-probability in the field {key!r}, found {found!r:.80}")
    return found


def _with_answer(shared: Record, answer: object, key: str) -> Record:
    """The record of an example that ends with `answer`: text, messages behind the prompt's, or a whole chat."""
    messages = [answer] if isinstance(answer, Mapping) else answer
    prompt = shared.get("prompt")
    chat = next((shared[name] for name in CHATS if name in shared), prompt if isinstance(prompt, list) else None)
    if isinstance(messages, str) and chat is None:
        response = next((response for name, (response, _) in PAIRS.items() if name in shared), None)
        if response is None:
            raise DataError(f"expected a prompt beside the text under {key!r}, by its key, {', '.join(PAIRS)}; found none")
        return {**shared, response: messages}
    if isinstance(messages, str):
        messages = [{"role": "assistant", "content": messages}]
    if not isinstance(messages, list) or not messages:
        found = "none" if messages == [] else type(messages).__name__
        raise DataError(f"expected text or messages under {key!r}, found {found}")
    others = {name: value for name, value in shared.items() if name not in (*CHATS, *PAIRS)}
    if len(messages) > 1 and not _is_answer(messages[0]):
        return {**others, "messages": messages}
    given = chat if chat is not None else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []
    return {**others, "messages": [*_listed(given), *messages]}


def _answered(record: Record, key: str) -> Example:
    """The example of a record, whose last message must be an answer; what its other messages weigh is not looked at."""
    weightless = {name: _without_weights(record[name]) if name in CHATS else record[name] for name in record}
    example = example_of(weightless)
    last = example.messages[-1]
    if last["role"] != "assistant":
        raise DataError(f"expected an answer of the assistant as the last message by {key!r}, found one of {last['role']!r}")
    if not last.get("content") and not last.get("tool_calls"):
        raise DataError(f"expected text in the answer by {key!r}, found none")
    return example


def _without_weights(messages: object) -> object:
    if not isinstance(messages, list):
        return messages
    return [*map(_without_weight, messages[:-1]), *messages[-1:]]


def _without_weight(message: object) -> object:
    return {k: v for k, v in message.items() if k not in _WEIGHTS} if isinstance(message, Mapping) else message


def _listed(value: object) -> Sequence[Message]:
    if not isinstance(value, list):
        raise DataError(f"expected a list of messages before an answer, found {type(value).__name__}")
    return value


def _is_answer(message: object) -> bool:
    return isinstance(message, Mapping) and (message.get("role") or message.get("from")) in ("assistant", "gpt")

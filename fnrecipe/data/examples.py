"""Examples of what a model shall answer: chats, and prompts with responses, told from records by their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import attrs
import orjson

from fnrecipe.data.chat_template import Message, Tools
from fnrecipe.errors import DataError, did_you_mean, few

CHATS = ("messages", "conversations", "chat")
"""Keys of a list of messages."""
PAIRS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "src": ("tgt", ""),
        "prompt": ("completion", ""),
        "instruction": ("output", "\n"),
        "question": ("answer", "\n"),
    }
)
"""Keys of a prompt: that of its response, and what stands between the two where no template does."""
BESIDE = ("system", "tools", "input", "history", "response")
KEYS = frozenset((*CHATS, *BESIDE, *PAIRS, *(response for response, _ in PAIRS.values())))
"""All keys of records that are read."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SHARE_GPT: Mapping[str, str] = MappingProxyType(
    {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
)
"""Roles of ShareGPT's, and what they are called elsewhere; the others are called the same."""

Record: TypeAlias = Mapping[str, object]


@attrs.frozen
class Pair:
    """A prompt and its response, and what stands between them where no chat template does."""

    prompt: str
    response: str
    between: str = ""


@attrs.frozen
class Example:
    """Messages in the form of chat templates, and tools as these take them; `pair` if they come from one, and no more does."""

    messages: Sequence[Message]
    tools: Tools | None = None
    pair: Pair | None = None


def parse_example(text: str) -> Example:
    """The example in a JSON object.

    Raises:
        DataError: if there is none; it does not say where.
    """
    return example_of(read_record(text))


def read_record(text: str) -> Record:
    """The keys of a JSON object that are not null.

    Raises:
        DataError: if it is none.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DataError(f"expected a JSON object, found {error.msg}") from None
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {type(value).__name__}")
    return {key: inner for key, inner in value.items() if inner is not None}


def example_of(record: Record) -> Example:
    """The example that a record is.

    Raises:
        DataError: if it is none.
    """
    before = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    tools = _tools(record.get("tools"))
    for key in CHATS:
        if key in record:
            return Example([*before, *_messages(record[key], key)], tools)
    pair = _pair(record)
    more = [*before, *_history(record.get("history", []))]
    turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}]
    return Example([*more, *turns], tools, None if more or tools else pair)


def _pair(record: Record) -> Pair:
    for key, (response, between) in PAIRS.items():
        if key == "prompt" and "response" in record:
            response = "response"
        if key in record and response in record:
            given = [_text(record, key), *([_text(record, "input")] if key == "instruction" and record.get("input") else [])]
            return Pair("\n".join(given), _text(record, response), between)
    known = ", ".join([*CHATS, *(f"{prompt} and {response}" for prompt, (response, _) in PAIRS.items())])
    raise DataError(f"expected an example by its keys, {known}; found the keys {few(list(record)) or 'none'}")


def _messages(value: object, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        found = "none" if value == [] else type(value).__name__
        raise DataError(f"expected a list of messages under {key!r}, found {found}")
    return [_message(message, f"{key}[{number}]") for number, message in enumerate(value)]


def _message(value: object, place: str) -> Message:
    match value:
        case {"from": role, **more} if "role" not in more:
            content: object = more.pop("value", None)
        case {"role": role, **more}:
            content = more.pop("content", None)
        case _:
            found = f"the keys {few(list(value)) or 'none'}" if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{place}: expected a message with role and content, or from and value, found {found}")
    if not isinstance(role, str) or (name := SHARE_GPT.get(role, role)) not in ROLES:
        known = [*ROLES, *SHARE_GPT]
        raise DataError(f"{place}: expected a known role, found {role!r}; {did_you_mean(str(role), known)}")
    others: dict[str, object] = {str(key): inner for key, inner in more.items()}
    for key in ("weight", "loss_weight"):
        if (weight := others.pop(key, None)) not in (None, 1):
            raise DataError(f"{place}: expected a {key} of 1, for answers weigh the same, found {weight!r}")
    if content is None and others.get("tool_calls"):
        return {"role": name, **others}
    return {"role": name, "content": _content(content, place), **others}


def _content(value: object, place: str) -> str:
    """Text, or the text of parts that are all text."""
    parts = value if isinstance(value, list) else [value]
    texts = [part if isinstance(part, str) else _text_part(part) for part in parts]
    if isinstance(value, str | list) and None not in texts:
        return "".join(text for text in texts if text is not None)
    other = next((part for part, text in zip(parts, texts, strict=True) if text is None), None)
    found = f"a part of the type {other.get('type')!r}" if isinstance(other, dict) else type(other).__name__
    raise DataError(f"{place}: expected text as the content of a message, found {found if other is not None else 'none'}")


def _text_part(part: object) -> str | None:
    match part:
        case {"type": "text", "text": str(text)} | {"type": "text", "value": str(text)}:
            return text
    return None


def _history(value: object) -> list[Message]:
    """Earlier turns, a list of a prompt and its response each."""
    found: list[Message] = []
    for turn in value if isinstance(value, list) else [value]:
        match turn:
            case [str(prompt), str(response)]:
                found += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            case _:
                raise DataError(f"expected 'history' to be a list of a prompt and a response each, found {type(turn).__name__}")
    return found


def _tools(value: object) -> Tools | None:
    """A list of tools, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value.strip() else None
        except orjson.JSONDecodeError as error:
            raise DataError(f"expected 'tools' to be a list or its JSON text, found {error.msg}") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"expected 'tools' to be a list of objects, found {type(value).__name__}")
    return value


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise DataError(f"expected text in the field {key!r}, found {type(record[key]).__name__}")
    return str(record[key])

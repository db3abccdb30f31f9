"""Examples are told from records by their keys; what is none is told with what was found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fnrecipe.data.examples import Pair, parse_example
from fnrecipe.errors import DataError

TOOL = {"name": "add"}


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


TURNS = messages(("user", "a"), ("assistant", "b"))
WITH_SYSTEM = [*messages(("system", "s")), *TURNS]
CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": TURNS, "id": 3, "prompt": "x", "completion": "y"}, TURNS),
    "fairseq2's chat": ({"chat": TURNS}, TURNS),
    "null is nothing": ({"messages": None, "chat": TURNS, "tools": None}, TURNS),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "b"},
            ]
        },
        messages(("system", "s"), ("user", "a"), ("assistant", "{}"), ("tool", "3"), ("assistant", "b")),
    ),
    "a system beside": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        WITH_SYSTEM,
    ),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}, TURNS[1]]},
        TURNS,
    ),
    "a call without text": (
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [TOOL]}]},
        [TURNS[0], {"role": "assistant", "tool_calls": [TOOL]}],
    ),
    "keys of messages stay": (
        {"messages": [TURNS[0], {**TURNS[1], "thinking": "t"}]},
        [TURNS[0], {**TURNS[1], "thinking": "t"}],
    ),
    "alpaca with a system": ({"instruction": "a", "input": "", "output": "b", "system": "s"}, WITH_SYSTEM),
    "alpaca with earlier turns": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]]},
        [*TURNS, *messages(("user", "c"), ("assistant", "d"))],
    ),
}
PAIRS: dict[str, tuple[dict[str, Any], Pair]] = {
    "fairseq2": ({"src": "a", "tgt": "b"}, Pair("a", "b")),
    "completion": ({"prompt": "a", "completion": "b"}, Pair("a", "b")),
    "response": ({"prompt": "a", "response": "b"}, Pair("a", "b")),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, Pair("a\ni", "b", "\n")),
    "alpaca without an input": ({"instruction": "a", "input": "", "output": "b"}, Pair("a", "b", "\n")),
    "a question": ({"question": "a", "answer": "b"}, Pair("a", "b", "\n")),
}


@pytest.mark.parametrize(("record", "expected"), CHATS.values(), ids=CHATS)
def test_chats_become_messages(record: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    found = parse_example(json.dumps(record))
    assert (list(found.messages), found.pair, found.tools) == (expected, None, None)


@pytest.mark.parametrize(("record", "expected"), PAIRS.values(), ids=PAIRS)
def test_pairs_are_messages_for_a_template_and_pairs_without(record: dict[str, Any], expected: Pair) -> None:
    found = parse_example(json.dumps(record))
    assert found.pair == expected
    assert found.messages == messages(("user", expected.prompt), ("assistant", expected.response))


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_may_be_a_list_or_its_text(tools: object) -> None:
    found = parse_example(json.dumps({"messages": TURNS, "tools": tools}))
    assert found.tools == [TOOL]
    assert parse_example(json.dumps({"prompt": "a", "completion": "b", "tools": tools})).pair is None


WRONG = {
    "no JSON": ('{"a"', "expected a JSON object, found "),
    "a list": ("[]", "expected a JSON object, found list"),
    "other keys": ('{"text": "a", "id": 1}', "question and answer; found the keys text, id"),
    "half a pair": ('{"prompt": "a"}', "expected an example by its keys, messages, conversations, chat, src and tgt, "),
    "no messages": ('{"messages": []}', "expected a list of messages under 'messages', found none"),
    "messages as text": ('{"messages": "[]"}', "expected a list of messages under 'messages', found str"),
    "a message as text": (
        '{"messages": ["a"]}',
        "messages[0]: expected a message with role and content, or from and value, found str",
    ),
    "a message of other keys": ('{"messages": [{"who": 1}]}', "or from and value, found the keys who"),
    "a role": ('{"messages": [{"role": "asistant", "content": ""}]}', "found 'asistant'; did you mean assistant?"),
    "a role of another type": (
        '{"messages": [{"role": 1, "content": ""}]}',
        "messages[0]: expected a known role, found 1; valid names: ",
    ),
    "no content": ('{"messages": [{"role": "user"}]}', "messages[0]: expected text as the content of a message, found none"),
    "a number": (
        '{"conversations": [{"from": "human", "value": 3}]}',
        "conversations[0]: expected text as the content of a message, found int",
    ),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
        "expected text as the content of a message, found a part of the type 'image'",
    ),
    "a weight": ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "messages[0]: expected a weight of 1, "),
    "a prompt that is no text": ('{"prompt": [1], "completion": "b"}', "expected text in the field 'prompt', found list"),
    "tools": (
        '{"messages": [{"role": "user", "content": "a"}], "tools": "x"}',
        "expected 'tools' to be a list or its JSON text, found ",
    ),
    "history": (
        '{"instruction": "a", "output": "b", "history": ["a"]}',
        "expected 'history' to be a list of a prompt and a response each, found str",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_example_is_told_in_a_line(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_example(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

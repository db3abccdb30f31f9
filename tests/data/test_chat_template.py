"""Chat templates: the text, ids and masks of `transformers`; prefixes where no tag marks; errors; hostile templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fnrecipe.data import Tokenizer, byte_tokenizer, huggingface_tokenizer
from fnrecipe.data.answer_ends import with_answer_ends
from fnrecipe.data.chat_template import ChatTemplate, Message, encode_chat, read_chat_template, render
from fnrecipe.errors import DataError, UsageError
from tests.data.kinds import byte_level, save

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x")
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
BEGIN = "{% for message in messages %}"
CHATML = (
    BEGIN + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = """{{- bos_token }}
{%- if tools %}
    {{- 'tools: ' ~ tools | tojson }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('expected the system message first, found it later: "' ~ message.content ~ '"') }}
    {%- elif message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | trim }}{% for call in message.tool_calls or [] %}
{{ call.function | tojson(indent=2) }}{% endfor %}<|im_end|>{% endgeneration %}

    {%- elif message.content is string %}
<|im_start|>{{ message['role'] }}
{{ message.content }}<|im_end|>
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}
            {%- if loop.index > 2 %}{% break %}{% endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MACRO = (
    "{%- macro turn(role) -%}<|im_start|>{{ role }}\n{{ caller() }}<|im_end|>{%- endmacro -%}"
    "{%- set state = namespace(turns=0) -%}" + BEGIN + "{%- set state.turns = state.turns + 1 -%}"
    "{%- call turn(message.role) -%}{{ message.content }} {{ state.turns }} {{ dict(a=1)['a'] }}{%- endcall -%}{% endfor %}"
)
FORGETFUL = (
    BEGIN + "{% if loop.last or message.role == 'user' %}{{ message.role }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"ChatML": CHATML, "marked": MARKED, "macro": MACRO, "forgetful": FORGETFUL}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c' \"d\" é"}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CHATS: Mapping[str, Sequence[Message]] = {
    "two turns": [user("the quick"), assistant("  brown fox "), user("größe 東京 🙂\n"), assistant("ab\n\nab")],
    "a system message": [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")],
    "an open end": [user("a"), assistant("b"), user("")],
    "a tool call": [user("a"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, assistant("3", name=None)],
    "a system message later": [user("a"), {"role": "system", "content": "b"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save(folder, byte_level(*SPECIAL))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return huggingface_tokenizer(str(folder), "</s>", "<s>")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMES)


def transformed(theirs: PreTrainedTokenizerFast, source: str, messages: Sequence[Message], **more: Any) -> Any:
    """What transformers gives; None if the template raises."""
    try:
        return theirs.apply_chat_template(list(messages), chat_template=source, **more)
    except Exception:
        return None


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_is_that_of_transformers(
    theirs: PreTrainedTokenizerFast, template: str, chat: str, tools: list[Any] | None, prompt: bool
) -> None:
    source, messages = TEMPLATES[template], CHATS[chat]
    more = {"tools": tools, "add_generation_prompt": prompt}
    expected = transformed(theirs, source, messages, tokenize=False, **more)
    if expected is None:
        with pytest.raises(DataError):
            render(ChatTemplate(source, tokens=NAMES), messages, **more)
    else:
        assert render(ChatTemplate(source, tokens=NAMES), messages, **more).text == expected


@settings(max_examples=60)
@given(contents=st.lists(st.text(st.sampled_from("ab \n东🙂e\u0301\ue000<|>")), min_size=1, max_size=5))
def test_ids_and_the_mask_are_those_of_transformers(
    ours: Tokenizer, theirs: PreTrainedTokenizerFast, contents: list[str]
) -> None:
    chat = [(user, assistant)[number % 2](content) for number, content in enumerate(contents)]
    expected = theirs.apply_chat_template(chat, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
    found = encode_chat(ChatTemplate(MARKED, tokens=NAMES), chat, ours)
    assert found.ids.tolist() == expected["input_ids"]
    assert found.trained.astype(int).tolist() == expected["assistant_masks"]
    assert (found.ids.dtype, found.trained.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("tokenizer", ["ours", "byte"])
def test_without_the_tag_the_assistant_writes_what_its_messages_add(ours: Tokenizer, tokenizer: str) -> None:
    used = {"ours": ours, "byte": byte_tokenizer()}[tokenizer]
    found = encode_chat(ChatTemplate(CHATML), CHATS["two turns"], used)
    text = render(ChatTemplate(CHATML), CHATS["two turns"]).text
    runs = np.split(found.ids, np.flatnonzero(np.diff(found.trained)) + 1)
    shown = [used.decode(run.tolist()) for run in runs]
    assert [part.replace("<|im_end|>", "") for part in shown[1::2]] == ["  brown fox \n", "ab\n\nab\n"]
    if tokenizer == "byte":
        assert "".join(shown) == text
    assert [bool(run) for run in found.trained[[0, -1]]] == [False, True]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ["</s>", "<|im_end|>"]),
        (MARKED, ["</s>", "<|im_end|>"]),
        (BEGIN + "{{ message.content + eos_token }}{% endfor %}", ["</s>"]),
        (FORGETFUL, ["</s>"]),
        ("{{ raise_exception('never') }}", ["</s>"]),
        ("{% for", ["</s>"]),
        (None, ["</s>"]),
    ],
)
def test_answers_end_with_what_a_template_writes_behind_them(ours: Tokenizer, source: str | None, expected: list[str]) -> None:
    found = with_answer_ends(ours, None if source is None else ChatTemplate(source))
    assert found.answer_ends == {ours.special[name] for name in expected}


def test_a_template_that_forgets_is_refused_with_the_message() -> None:
    template = ChatTemplate(FORGETFUL, "a/chat_template.jinja")
    once = encode_chat(template, CHATS["two turns"][:2], byte_tokenizer())
    assert bytes(once.ids[once.trained].tolist()) == b"  brown fox \n"
    with pytest.raises(DataError) as caught:
        encode_chat(template, CHATS["two turns"], byte_tokenizer())
    expected = r"a/chat_template.jinja: message 2 of 4 (assistant): not prefix-preserving: "
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            MARKED,
            CHATS["a system message later"],
            'message 2 of 2 (system): expected the system message first, found it later: "b"',
        ),
        (CHATML, [user("a"), user("b"), {"role": "user"}, user("c")], "message 3 of 4 (user): "),
        (CHATML, [user("a"), user(3)], "message 2 of 2 (user): can only concatenate str"),
        (CHATML, [user({1, 2})], "message 1 of 1 (user): expected values of JSON, found set"),
        ("{{ raise_exception('a\nb') }}", [user("a")], r"message 1 of 1 (user): a\nb"),
    ],
)
def test_an_error_of_a_template_names_the_message(template: str, messages: list[Message], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        render(ChatTemplate(template, "t.jinja"), messages)
    assert str(caught.value).startswith(f"t.jinja: {expected}")
    assert "\n" not in str(caught.value)


def test_special_tokens_that_a_message_spells_stay_text(ours: Tokenizer) -> None:
    chat = [user("a<|im_end|>x <|im_end|>\n<|im_start|>assistant\n</s>"), assistant("<s>b")]
    found = encode_chat(ChatTemplate(MARKED, tokens=NAMES), chat, ours)
    special = [number for number in found.ids.tolist() if number in ours.special.values()]
    start, end = ours.special["<|im_start|>"], ours.special["<|im_end|>"]
    assert special == [ours.bos, start, end, start, end]
    written = render(ChatTemplate(MARKED, tokens=NAMES), chat, literal=ours.special)
    assert written.text == render(ChatTemplate(MARKED, tokens=NAMES), chat).text
    assert written.generated == ((written.text.index("<s>b"), written.text.rindex("<|im_end|>") + len("<|im_end|>")),)


def test_reasoning_has_the_names_that_templates_read(theirs: PreTrainedTokenizerFast) -> None:
    source = BEGIN + "{{ message.thinking }}|{{ message.reasoning_content }};{% endfor %}"
    chat = [assistant("a", **{key: "b"}) for key in ("reasoning_content", "thinking", "reasoning")] + [assistant("c")]
    assert render(ChatTemplate(source), chat).text == transformed(theirs, source, chat, tokenize=False)


def test_the_time_is_the_templates_own() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", now=datetime(2024, 7, 26))
    assert render(template, [user("a")]).text == "26 July 2024"


# Where templates are found.


def config(folder: Path, template: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": {"content": "<s>"}}))
    return folder


def test_a_template_is_found_in_a_file_a_config_and_a_directory(tmp_path: Path) -> None:
    config(tmp_path, CHATML)
    for path in (tmp_path, tmp_path / "tokenizer_config.json"):
        found = read_chat_template(str(path))
        assert (found.source, found.tokens) == (CHATML, {"bos_token": "<s>"})
        assert found.origin == f"{tmp_path}/tokenizer_config.json"
    (tmp_path / "chat_template.jinja").write_text(MARKED, encoding="utf-8")
    assert read_chat_template(str(tmp_path)).source == MARKED
    assert read_chat_template(str(tmp_path / "chat_template.jinja")).tokens == {}


def test_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": MARKED}]
    config(tmp_path, named)
    assert read_chat_template(str(tmp_path)).source == CHATML
    assert read_chat_template(str(tmp_path), "tool_use").source == MARKED
    with pytest.raises(UsageError, match=r"expected the chat template 'tool_us', found none; did you mean tool_use\?$"):
        read_chat_template(str(tmp_path), "tool_us")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(MACRO)
    assert read_chat_template(str(tmp_path), "rag").source == MACRO


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, r"expected a chat template, found none$"),
        (3, r"expected chat_template to be a string or a list of named ones"),
        ([{"name": "a"}], r"expected a name and a template for each chat template"),
        ("\n{% for %}", r"tokenizer_config\.json:2 is not a chat template: "),
        ("{{ a | nothing }}", r"is not a chat template: No filter named 'nothing'"),
        ("{% generation %}", r"is not a chat template: "),
        ("a" * (1 << 20 | 1), r"is not a chat template: expected at most 1,048,576 characters"),
    ],
)
def test_what_is_no_template_is_named_in_one_line(tmp_path: Path, template: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        read_chat_template(str(config(tmp_path, template)))
    assert "\n" not in str(caught.value)


HOSTILE = {
    "internals of text": "{{ ''.__class__.__mro__ }}",
    "internals by a filter": "{{ (''|attr('__class__')).x }}",
    "internals of a global": "{{ cycler.__init__.__globals__.x }}",
    "internals by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "internals of a namespace": "{{ namespace(__class__=3) }}",
    "internals set in a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 3 %}",
    "a changed message": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
    "a product": "{{ 'a' * 10**9 }}",
    "a product in a list": "{{ ([1] * 10**9)|length }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "sums": "{% set ns = namespace(x=[3]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubles": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubles in a block": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubles in a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='a') %}"
    "{% for i in range(99) %}{% set ns.x = m(ns.x) %}{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide format by a method": "{{ '{:1000000000}'.format(1) }}",
    "a nested width": "{{ '{:{}}'.format(1, '1000000000') }}",
    "a wide field": "{{ 'a'.ljust(1000000000) }}",
    "a wide filter": "{{ 'a'|center(1000000000) }}",
    "a replacement": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "a replacement by a method": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "a long text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "a recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a loop for ever": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro for ever": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_an_error_in_one_line(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fnrecipe.data.chat_sandbox.MOST_SECONDS", 0.3)
    with pytest.raises(DataError) as caught:
        render(ChatTemplate(source), [user("a")])
    assert "\n" not in str(caught.value)


def test_nested_parentheses_are_refused() -> None:
    with pytest.raises(UsageError, match="is not a chat template: "):
        render(ChatTemplate("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"), [user("a")])


def test_large_numbers_and_texts_of_messages_are_no_fault() -> None:
    source = BEGIN + "{{ message.number | tojson }} {{ message.content | replace('a', 'b') | length }}{% endfor %}"
    assert render(ChatTemplate(source), [{**user("a" * 1_000_000), "number": 10**18}]).text == f"{10**18} 1000000"

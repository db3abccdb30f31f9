"""Chat templates: messages to text by a model's own Jinja template, as `transformers` renders it, and to ids with a mask."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.document import Ids
from fnrecipe.data.token_spans import Piece, Spans
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.data.tokenizer_file import read, read_bytes
from fnrecipe.data.tokenizer_folder import token_names
from fnrecipe.errors import DataError, UsageError, did_you_mean, one_line, shortened

if TYPE_CHECKING:
    from jinja2 import Template

Message: TypeAlias = Mapping[str, object]
"""A message of a chat in JSON's types, with a `role` and mostly a `content`."""

Tools: TypeAlias = Sequence[Mapping[str, object]]
"""Functions that the model may call, in JSON's types, as templates take them."""

Span: TypeAlias = tuple[int, int]

_MOST_SOURCE = 1 << 20
_PRIVATE = range(0xE000, 0x110000)


@attrs.frozen
class ChatTemplate:
    """A Jinja template that writes messages as the text that a model is trained on.

    source  the template
    origin  where it was read, for errors
    tokens  the names that it gives to special tokens, as `{"bos_token": "<s>"}`
    now     the time that its `strftime_now` gives; None: that of the clock, and a text that depends on the day
    """

    source: str
    origin: str = "the chat template"
    tokens: Mapping[str, str] = {}
    now: datetime | None = None

    @property
    def marks_generation(self) -> bool:
        """Whether it marks by `{% generation %}` what the assistant writes."""
        from fnrecipe.data.chat_sandbox import GENERATION

        return bool(GENERATION.search(self.source))


@attrs.frozen
class Rendered:
    """The text of some messages.

    generated  the parts of it within `{% generation %}`
    literal    places in the names of special tokens that messages spell: these are text
    """

    text: str
    generated: tuple[Span, ...] = ()
    literal: frozenset[int] = frozenset()


@attrs.frozen(eq=False)
class Chat:
    """Messages as tokens: `ids` int32 [n]; `trained` bool [n], those that the assistant writes."""

    ids: Ids
    trained: NDArray[np.bool_]


def read_chat_template(path: str, name: str | None = None) -> ChatTemplate:
    """The template of a file of Jinja, of a `tokenizer_config.json`, or of a directory: its `chat_template.jinja` first.

    `name` chooses one of several that a file names or that stand in `additional_chat_templates`; without it, `default`.

    Raises:
        UsageError: if there is no template, none of that name, or it is not Jinja.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    is_json = path.endswith(".json")
    found = _in_folder(path) if os.path.isdir(path) else _in_config(path) if is_json else {"default": (_text(path), path)}
    wanted = name or (next(iter(found)) if len(found) == 1 else "default")
    if wanted not in found:
        hint = did_you_mean(wanted, found)
        expected = f"expected the chat template {wanted!r}" if found else "expected a chat template"
        raise UsageError(one_line(f"{path}: {expected}, found none; {hint}".removesuffix("; ")))
    source, origin = found[wanted]
    template = ChatTemplate(source, origin, token_names(folder) if os.path.isdir(path) or is_json else {})
    _compiled(template)
    return template


def chat_template_beside(path: str | None) -> ChatTemplate | None:
    """The template of the directory that a tokenizer's `path` is, or that its file lies in; None if there is none."""
    if path is None:
        return None
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    return read_chat_template(folder) if os.path.isdir(folder) and _in_folder(folder) else None


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = False,
    literal: Collection[str] = (),
    variables: Mapping[str, object] = {},
) -> Rendered:
    """The text of `messages`; with `add_generation_prompt`, and of what stands before the assistant's next one.

    A key of a message that is null is left out; reasoning may have any of the names `reasoning_content`, `thinking` and
    `reasoning`, as `transformers` reads them. Where messages or tools spell one of the names `literal`, that is remembered.

    Raises:
        DataError: if the template raises an error; it names the message without which there is none.
    """
    from fnrecipe.data.chat_sandbox import MOST_SECONDS

    _compiled(template)
    deadline = time.monotonic() + MOST_SECONDS
    attempt = partial(_render, template, tools=tools, variables=variables, literal=literal, deadline=deadline)
    try:
        return attempt(messages, add_generation_prompt)
    except Exception as error:
        number = len(messages)
        while number > 1 and time.monotonic() < deadline and not _works(partial(attempt, messages[: number - 1], False)):
            number -= 1
        role = f" ({messages[number - 1].get('role')})" if messages else ""
        place = f"message {number} of {len(messages)}{role}"
        raise DataError(one_line(f"{template.origin}: {place}: {shortened(_said(error), 300)}")) from None


def encode_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Tools | None = None,
    variables: Mapping[str, object] = {},
    last_only: bool = False,
) -> Chat:
    """The tokens of `messages`, and which of them the assistant writes; with `last_only`, which it writes at last.

    Special tokens are those that the template writes; what a message spells stays text. The assistant's part is what stands
    in `{% generation %}`; in a template without it, what each of its messages adds to the text of those before and the
    generation prompt. A token is trained if one of its characters belongs to the assistant.

    Raises:
        DataError: if the template raises an error, or has no tag and does not keep the text of earlier messages as it was.
    """

    def text_of(size: int, prompt: bool = False) -> Rendered:
        return _rendered_for(tokenizer, template, messages[:size], tools, prompt, variables)

    whole = text_of(len(messages))
    assistant = whole.generated if template.marks_generation else _added(template, messages, whole.text, text_of)
    encoded = tokenizer.encode_pieces(_pieces(whole, tokenizer.special))
    return Chat(encoded.ids, _within(encoded.spans, assistant[-1:] if last_only else assistant))


def encode_prompt(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Tools | None = None,
    variables: Mapping[str, object] = {},
) -> Ids:
    """The tokens of `messages` and of what stands before the assistant's answer to them, int32 [n].

    Raises:
        DataError: if the template raises an error.
    """
    rendered = _rendered_for(tokenizer, template, messages, tools, True, variables)
    return tokenizer.encode_pieces(_pieces(rendered, tokenizer.special)).ids


def _rendered_for(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools | None,
    prompt: bool,
    variables: Mapping[str, object],
) -> Rendered:
    """Messages as a template writes them that knows the tokenizer's names of BOS and EOS."""
    names = {"bos_token": tokenizer.names[0], "eos_token": tokenizer.names[1]}
    return render(
        template,
        messages,
        tools=tools,
        add_generation_prompt=prompt,
        literal=tokenizer.special,
        variables={**names, **template.tokens, **variables},
    )


def _added(template: ChatTemplate, messages: Sequence[Message], whole: str, text_of: Callable[..., Rendered]) -> list[Span]:
    """What each message of the assistant adds: the text up to it must begin with the text before it and its prompt."""
    spans = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, upto = text_of(index, prompt=True).text, text_of(index + 1).text
        if not (upto.startswith(before) and whole.startswith(upto)):
            what = "not prefix-preserving: expected the text to go on from that of the messages before, found another"
            place = f"message {index + 1} of {len(messages)} (assistant)"
            raise DataError(one_line(f"{template.origin}: {place}: {what}; use a template with {{% generation %}}"))
        spans.append((len(before), len(upto)))
    return spans


def _pieces(rendered: Rendered, special: Mapping[str, int]) -> list[Piece]:
    """The text, cut at the special tokens that the template writes."""
    pieces: list[Piece] = []
    done = 0
    for match in _any_of(tuple(special)).finditer(rendered.text):
        if not any(place in rendered.literal for place in range(match.start() + 1, match.end())):
            pieces += [rendered.text[done : match.start()], special[match.group()]]
            done = match.end()
    return [piece for piece in (*pieces, rendered.text[done:]) if piece != ""]


def _within(spans: Spans, parts: Sequence[Span]) -> NDArray[np.bool_]:
    """Whether a token has a character in one of the parts, or stands in one without any."""
    first, last = spans[:, 0], spans[:, 1]
    found = np.zeros(len(spans), bool)
    for begin, end in parts:
        found |= (first < end) & ((last > begin) | ((first == last) & (first >= begin)))
    return found


def _render(
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    *,
    tools: Tools | None,
    variables: Mapping[str, object],
    literal: Collection[str],
    deadline: float,
) -> Rendered:
    from fnrecipe.data.chat_sandbox import Rendering, generate

    # Three characters that are nowhere in the text mark what the template generates, and the inside of literal names.
    texts = _texts([messages, tools, variables])
    used = set(template.source).union(*texts)
    begin, end, inside = islice((char for char in map(chr, _PRIVATE) if char not in used), 3)
    pattern = _any_of(tuple(literal))

    def shown(value: object) -> object:
        if isinstance(value, str):
            return pattern.sub(lambda match: match.group()[:1] + inside + match.group()[1:], value)
        if isinstance(value, Mapping):
            return {key: shown(inner) for key, inner in value.items()}
        return [shown(inner) for inner in value] if isinstance(value, list | tuple) else value

    known = [shown(_with_reasoning(message)) for message in messages]
    given = {**template.tokens, **variables, "messages": known, "tools": shown(tools), "documents": None}
    rendering = Rendering(begin, end, template.now, deadline)
    marked = "".join(generate(_compiled(template), rendering, {**given, "add_generation_prompt": add_generation_prompt}))
    return _unmarked(marked, begin, end, inside)


def _with_reasoning(message: Message) -> Message:
    """A message without keys that are null, whose reasoning stands under the names that templates read, whatever its own."""
    given = {key: value for key, value in message.items() if value is not None}
    found = next((given[key] for key in ("reasoning_content", "thinking", "reasoning") if key in given), None)
    return given if found is None else {"thinking": found, **given, "reasoning_content": found}


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception:
        return False
    return True


def _unmarked(marked: str, begin: str, end: str, inside: str) -> Rendered:
    texts: list[str] = []
    place, opened = 0, None
    generated: list[Span] = []
    literal: set[int] = set()
    for text in re.split(f"([{begin}{end}{inside}])", marked):
        if text == begin:
            opened = place
        elif text == end:
            generated += [] if opened is None else [(opened, place)]
            opened = None
        elif text == inside:
            literal.add(place)
        else:
            texts.append(text)
            place += len(text)
    return Rendered("".join(texts), tuple(generated), frozenset(literal))


def _texts(value: object) -> set[str]:
    """All strings in a value of JSON's types.

    Raises:
        TypeError: if it holds anything else.
    """
    match value:
        case str():
            return {value}
        case Mapping():
            return set().union(*map(_texts, value.keys()), *map(_texts, value.values()))
        case list() | tuple():
            return set().union(*map(_texts, value))
        case None | bool() | int() | float():
            return set()
    raise TypeError(f"expected values of JSON, found {type(value).__name__}")


@cache
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """The longest of the names at a place; nothing if there are none."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


@cache
def _compile(source: str) -> Template:
    from fnrecipe.data.chat_sandbox import compile_template

    return compile_template(source)


def _compiled(template: ChatTemplate) -> Template:
    try:
        if len(template.source) > _MOST_SOURCE:
            raise ValueError(f"expected at most {_MOST_SOURCE:,} characters, found {len(template.source):,}")
        return _compile(template.source)
    except Exception as error:
        line = getattr(error, "lineno", None)
        place = f"{template.origin}:{line}" if line else template.origin
        raise UsageError(one_line(f"{place} is not a chat template: {_said(error)}")) from None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _in_folder(folder: str) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    config = os.path.join(folder, "tokenizer_config.json")
    if os.path.exists(config):
        found |= _in_config(config)
    if os.path.exists(path := os.path.join(folder, "chat_template.jinja")):
        found = {"default": (_text(path), path)}
    more = os.path.join(folder, "additional_chat_templates")
    for file in sorted(os.listdir(more)) if os.path.isdir(more) else ():
        if file.endswith(".jinja"):
            found[file.removesuffix(".jinja")] = (_text(os.path.join(more, file)), os.path.join(more, file))
    return found


def _in_config(path: str) -> dict[str, tuple[str, str]]:
    match read(path, os.path.basename(path)).get("chat_template"):
        case None:
            return {}
        case str(source):
            return {"default": (source, path)}
        case [*listed]:
            return {name: (source, f"{path} ({name})") for name, source in map(_named, listed, [path] * len(listed))}
    raise UsageError(f"{path}: expected chat_template to be a string or a list of named ones, found another type")


def _named(item: object, path: str) -> tuple[str, str]:
    match item:
        case {"name": str(name), "template": str(source)}:
            return name, source
    raise UsageError(f"{path}: expected a name and a template for each chat template, found {shortened(repr(item), 80)}")


def _text(path: str) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a chat template: {error}") from None

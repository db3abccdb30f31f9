"""YAML 1.2 to plain values with their lines, and back. Safe: no tags, anchors or repeated keys; bounded size and depth.

Built on the events of ruamel.yaml's parser; nothing is constructed but None, bool, int, float, str, list and dict.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import Event, MappingEndEvent, MappingStartEvent, ScalarEvent, SequenceEndEvent, SequenceStartEvent
from ruamel.yaml.representer import RoundTripRepresenter

from fnrecipe.config import scalars
from fnrecipe.errors import UsageError, one_line, shortened

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000
"""Keys and values, lists and sections among them, in a text. The parser takes some 30 microseconds for each."""
MAX_DEPTH = 32


@attrs.frozen
class Located:
    """A value and where it was written."""

    value: object
    source: str


@attrs.frozen
class _Node:
    """A scalar, a list of nodes or a dict of nodes, and the line it starts on."""

    value: Any
    line: int


def load(text: str, name: str, *, bounded: bool = True) -> dict[str, Located]:
    """The mapping in `text` as dotted paths; values are scalars and lists, each with its source `name:line`.

    What fnrecipe wrote itself need not be `bounded` in size.

    Raises:
        UsageError: naming file and line, if `text` is not one plain YAML mapping of text keys.
    """
    node = _compose(text, name, bounded=bounded)
    if node is None:
        return {}
    if not isinstance(node.value, dict):
        raise _refusal(name, node.line, "a mapping of keys to values at the top")
    return dict(_flatten(node, name, ""))


def load_value(text: str, name: str) -> object:
    """The single YAML value in `text`: `1e-4`, `null`, `[0.9, 0.95]`, `{path: a.jsonl}`."""
    node = _compose(text, name)
    return None if node is None else _plain(node)


def dump(data: Mapping[str, object], comments: dict[str, str] | None = None) -> str:
    """`data` as block YAML that `load` reads back; `comments` puts a text behind the value at a dotted path."""
    writer = YAML()
    writer.width = 1 << 16
    writer.Representer = _Representer
    text = io.StringIO()
    writer.dump(_commented(data, comments or {}, ""), text)
    return text.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, and between double quotes all text that is not printable or would be read as something else."""


_Representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
_Representer.add_representer(str, lambda writer, text: writer.represent_scalar("tag:yaml.org,2002:str", text, _style(text)))


def _style(text: str) -> str | None:
    return None if text.isprintable() and scalars.is_text(text) else '"'


def _commented(data: Mapping[str, object], comments: dict[str, str], path: str) -> CommentedMap:
    mapping = CommentedMap()
    for key, value in data.items():
        where = f"{path}{key}"
        mapping[key] = _commented(value, comments, f"{where}.") if isinstance(value, dict) and value else value
        if where in comments:
            mapping.yaml_add_eol_comment(f"# {one_line(comments[where])}", key, column=48)
    return mapping


def _compose(text: str, name: str, *, bounded: bool = True) -> _Node | None:
    size = len(text.encode(errors="replace"))
    if bounded and size > MAX_BYTES:
        raise UsageError(f"{name}: expected at most {MAX_BYTES} bytes of YAML, found {size}")
    try:
        nodes = _nodes(_events(text, name, MAX_VALUES if bounded else None), name)
        return nodes[0] if nodes else None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}: not valid YAML: {reason}") from None


def _events(text: str, name: str, limit: int | None) -> Iterator[Event]:
    """The parser's events, of which those that are not plain are refused before anything is made of them."""
    depth = documents = values = 0
    for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
        line = event.start_mark.line + 1
        depth += isinstance(event, (MappingStartEvent, SequenceStartEvent))
        depth -= isinstance(event, (MappingEndEvent, SequenceEndEvent))
        values += isinstance(event, (ScalarEvent, MappingStartEvent, SequenceStartEvent))
        documents += type(event).__name__ == "DocumentStartEvent"
        if depth > MAX_DEPTH:
            raise UsageError(f"{name}:{line}: expected at most {MAX_DEPTH} levels of nesting")
        if limit is not None and values > limit:
            raise UsageError(f"{name}:{line}: expected at most {limit:,} keys and values, found more")
        if getattr(event, "anchor", None) is not None:
            raise UsageError(f"{name}:{line}: anchors and aliases (&, *) are not supported")
        if getattr(event, "tag", None) is not None:
            raise UsageError(f"{name}:{line}: tags (!) are not supported, found {event.tag}")
        if getattr(event, "version", None) is not None:
            raise UsageError(f"{name}:{line}: YAML is read as version 1.2; expected no %YAML line")
        if documents > 1:
            raise UsageError(f"{name}:{line}: expected one YAML document, found another")
        yield event


def _nodes(events: Iterator[Event], name: str) -> list[_Node]:
    """The nodes up to the end of the sequence or mapping that `events` are in, or of the text."""
    nodes: list[_Node] = []
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            break
        if isinstance(event, ScalarEvent):
            nodes.append(_Node(_scalar(event, name, line), line))
        elif isinstance(event, SequenceStartEvent):
            nodes.append(_Node(_nodes(events, name), line))
        elif isinstance(event, MappingStartEvent):
            nodes.append(_Node(_mapping(_nodes(events, name), name), line))
    return nodes


def _scalar(event: ScalarEvent, name: str, line: int) -> object:
    plain, _ = event.implicit
    try:
        return scalars.read(event.value) if plain else event.value
    except ValueError:
        number = "a number (12, 1_000, 0x1F, 1.5e-3) or text between quotes"
        raise _refusal(name, line, f"{number}, found {shortened(event.value, 60)}") from None


def _mapping(nodes: list[_Node], name: str) -> dict[str, _Node]:
    """Keys and values stand in turn."""
    mapping: dict[str, _Node] = {}
    for key, value in zip(nodes[::2], nodes[1::2], strict=True):
        if not isinstance(key.value, str):
            raise _refusal(name, key.line, f"a key that is text, found {_plain(key)!r}")
        if key.value in mapping:
            raise _refusal(name, key.line, f"each key once, found {key.value!r} again")
        mapping[key.value] = value
    return mapping


def _flatten(node: _Node, name: str, path: str) -> Iterator[tuple[str, Located]]:
    for key, value in node.value.items():
        where = f"{path}{key}"
        if "." in key:
            raise _refusal(name, value.line, f"a section for each part of {key!r}; dotted keys are for --config")
        if isinstance(value.value, dict) and value.value:
            yield from _flatten(value, name, f"{where}.")
        else:
            yield where, Located(_plain(value), f"{name}:{value.line}")


def _plain(node: _Node) -> object:
    if isinstance(node.value, dict):
        return {key: _plain(value) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(item) for item in node.value]
    return node.value


def _refusal(name: str, line: int, expected: str) -> UsageError:
    return UsageError(f"{name}:{line}: expected {expected}")

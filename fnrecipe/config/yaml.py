"""YAML 1.2 to plain values with their lines, and back. Safe: no tags, anchors or repeated keys; bounded size and depth.

Built on ruamel.yaml's parser and composer; nothing is constructed but None, bool, int, float, str, list and dict.
"""

from __future__ import annotations

import io
from typing import Any

import attrs
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter

from fnrecipe.errors import UsageError, one_line

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_TEXT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value")}  # of YAML 1.1: `2020-01-01` and `=`
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


@attrs.frozen
class Located:
    """A value and where it was written."""

    value: Any
    source: str


def load(text: str, name: str) -> dict[str, Located]:
    """The mapping in `text` as dotted paths; values are scalars and lists, each with its source `name:line`.

    Raises:
        UsageError: naming file and line, if `text` is not one plain YAML mapping of text keys.
    """
    node = _compose(text, name)
    if node is None:
        return {}
    if not isinstance(node, MappingNode):
        raise _refusal(name, node, "a mapping of keys to values at the top")
    return dict(_flatten(node, name, ""))


def load_value(text: str, name: str) -> Any:
    """The single YAML value in `text`: `1e-4`, `null`, `[0.9, 0.95]`, `{path: a.jsonl}`."""
    node = _compose(text, name)
    return None if node is None else _plain(node, name)


def dump(data: dict[str, Any], comments: dict[str, str] | None = None) -> str:
    """`data` as block YAML that `load` reads back; `comments` puts a text behind the value at a dotted path."""
    writer = YAML()
    writer.width = 1 << 16
    writer.Representer = _Representer
    text = io.StringIO()
    writer.dump(_commented(data, comments or {}, ""), text)
    return text.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, and text that has more than printable characters between double quotes."""


_Representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
_Representer.add_representer(
    str,
    lambda writer, text: writer.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'),
)


def _commented(data: dict[str, Any], comments: dict[str, str], path: str) -> CommentedMap:
    mapping = CommentedMap()
    for key, value in data.items():
        where = f"{path}{key}"
        mapping[key] = _commented(value, comments, f"{where}.") if isinstance(value, dict) and value else value
        if where in comments:
            mapping.yaml_add_eol_comment(f"# {one_line(comments[where])}", key, column=48)
    return mapping


def _compose(text: str, name: str) -> Node | None:
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise UsageError(f"{name}: expected at most {MAX_BYTES} bytes of YAML, found {size}")
    parser = YAML(typ="safe", pure=True)
    depth = documents = 0
    try:
        for event in parser.parse(io.StringIO(text)):
            kind, line = type(event).__name__, event.start_mark.line + 1
            depth += kind in ("MappingStartEvent", "SequenceStartEvent")
            depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
            if depth > MAX_DEPTH:
                raise UsageError(f"{name}:{line}: expected at most {MAX_DEPTH} levels of nesting")
            if getattr(event, "anchor", None) is not None:
                raise UsageError(f"{name}:{line}: anchors and aliases (&, *) are not supported")
            if getattr(event, "tag", None) is not None:
                raise UsageError(f"{name}:{line}: tags (!) are not supported, found {event.tag}")
            if getattr(event, "version", None) is not None:
                raise UsageError(f"{name}:{line}: YAML is read as version 1.2; expected no %YAML line")
            documents += kind == "DocumentStartEvent"
            if documents > 1:
                raise UsageError(f"{name}:{line}: expected one YAML document, found another")
        node: Node | None = YAML(typ="safe", pure=True).compose(io.StringIO(text))
        return node
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}: not valid YAML: {reason}") from None


def _flatten(node: MappingNode, name: str, path: str) -> list[tuple[str, Located]]:
    entries: list[tuple[str, Located]] = []
    for key, value in _items(node, name):
        where = f"{path}{key}"
        if "." in key:
            raise _refusal(name, value, f"a section for each part of {key!r}; dotted keys are for --config")
        if isinstance(value, MappingNode) and value.value:
            entries += _flatten(value, name, f"{where}.")
        else:
            entries.append((where, Located(_plain(value, name), f"{name}:{value.start_mark.line + 1}")))
    return entries


def _items(node: MappingNode, name: str) -> list[tuple[str, Node]]:
    seen: dict[str, Node] = {}
    for key_node, value in node.value:
        key = _plain(key_node, name)
        if not isinstance(key, str):
            raise _refusal(name, key_node, f"a key that is text, found {key!r}")
        if key in seen:
            raise _refusal(name, key_node, f"each key once, found {key!r} again")
        seen[key] = value
    return list(seen.items())


def _plain(node: Node, name: str) -> Any:
    if str(node.tag) in _TEXT_TAGS:
        return node.value
    if str(node.tag) not in _PLAIN_TAGS:
        raise _refusal(name, node, f"a plain value, found the tag {node.tag}")
    if isinstance(node, MappingNode):
        return {key: _plain(value, name) for key, value in _items(node, name)}
    if isinstance(node, SequenceNode):
        return [_plain(item, name) for item in node.value]
    try:
        return SafeConstructor(loader=YAML(typ="safe", pure=True)).construct_object(node)
    except ValueError:  # what looks like a number and is none, such as `-_`, or has thousands of digits
        raise _refusal(name, node, f"a plain value, found {node.value[:60]!r}") from None


def _refusal(name: str, node: Node, expected: str) -> UsageError:
    return UsageError(f"{name}:{node.start_mark.line + 1}: expected {expected}")

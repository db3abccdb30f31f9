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

from fnrecipe.errors import UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


@attrs.frozen
class Located:
    """A value and where it was written."""

    value: Any
    source: str


def load(text: str, name: str, *, lines: bool = True) -> dict[str, Located]:
    """The mapping in `text` as dotted paths; values are scalars and lists, each with its source `name:line` (or `name`).

    Raises:
        UsageError: naming file and line, if `text` is not one plain YAML mapping of text keys.
    """
    node = _compose(text, name)
    if node is None:
        return {}
    if not isinstance(node, MappingNode):
        raise _refusal(name, node, "a mapping of keys to values at the top")
    return dict(_flatten(node, name, "", lines))


def load_value(text: str, name: str) -> Any:
    """The single YAML value in `text`: `1e-4`, `null`, `[0.9, 0.95]`, `{path: a.jsonl}`."""
    node = _compose(text, name)
    return None if node is None else _plain(node, name)


def dump(data: dict[str, Any], comments: dict[str, str] | None = None) -> str:
    """`data` as block YAML that `load` reads back; `comments` puts a text behind the value at a dotted path."""
    writer = YAML()
    writer.width = 1 << 16
    writer.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    text = io.StringIO()
    writer.dump(_commented(data, comments or {}, ""), text)
    return text.getvalue()


def _commented(data: dict[str, Any], comments: dict[str, str], path: str) -> CommentedMap:
    mapping = CommentedMap()
    for key, value in data.items():
        where = f"{path}{key}"
        mapping[key] = _commented(value, comments, f"{where}.") if isinstance(value, dict) and value else value
        if where in comments:
            mapping.yaml_add_eol_comment(comments[where], key, column=48)
    return mapping


def _compose(text: str, name: str) -> Node | None:
    if len(text.encode()) > MAX_BYTES:
        raise UsageError(f"{name}: expected at most {MAX_BYTES} bytes of YAML, found {len(text.encode())}")
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


def _flatten(node: MappingNode, name: str, path: str, lines: bool) -> list[tuple[str, Located]]:
    entries: list[tuple[str, Located]] = []
    for key, value in _items(node, name):
        where = f"{path}{key}"
        if isinstance(value, MappingNode) and str(value.tag) in _PLAIN_TAGS:
            entries += _flatten(value, name, f"{where}.", lines)
        else:
            source = f"{name}:{value.start_mark.line + 1}" if lines else name
            entries.append((where, Located(_plain(value, name), source)))
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
    if str(node.tag) not in _PLAIN_TAGS:
        raise _refusal(name, node, f"a plain value, found the tag {node.tag}")
    if isinstance(node, MappingNode):
        return {key: _plain(value, name) for key, value in _items(node, name)}
    if isinstance(node, SequenceNode):
        return [_plain(item, name) for item in node.value]
    return SafeConstructor(loader=YAML(typ="safe", pure=True)).construct_object(node)


def _refusal(name: str, node: Node, expected: str) -> UsageError:
    return UsageError(f"{name}:{node.start_mark.line + 1}: expected {expected}")

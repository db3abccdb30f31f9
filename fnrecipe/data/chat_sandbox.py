"""Jinja templates from strangers, compiled within bounds: the sandbox of `transformers`, and limits on time and size.

Jinja's sandbox keeps a template from Python's internals, not from running for ever or filling the memory. So each loop and
macro looks at the clock, and operations that multiply text are checked before they run, others by their result. One operation
on large values is not interrupted: the bound on time holds between operations.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeGuard

import attrs
from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from jinja2.parser import Parser

MOST_CHARACTERS, MOST_SECONDS = 1 << 23, 10.0
_MOST_NUMBER, _MOST_BITS = 100_000, 1 << 12
_WIDE = re.compile(r"\d{6}|\*|\{[^{}]*\{")
_WIDENING = {"center", "indent", "wordwrap", "batch", "slice", "ljust", "rjust", "zfill", "expandtabs"}
_RENDERING, _LIMITED = "this rendering", "within limits"  # names that no template can write
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@attrs.frozen
class Rendering:
    """What one rendering needs: characters around what is generated, the time that it shows, and that of the end."""

    begin: str
    end: str
    now: datetime | None
    deadline: float


def compile_template(source: str) -> Template:
    """A template that `generate` renders.

    Raises:
        TemplateError: if it is none.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Bounds, loopcontrols])
    environment.filters = {name: _limited(name, function) for name, function in environment.filters.items()}
    environment.filters |= {"tojson": _limited("tojson", _to_json), _LIMITED: _check}
    harmless = {name: environment.globals[name] for name in ("range", "cycler", "joiner")}
    ours = {"raise_exception": _raise, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _Namespace}
    environment.globals = {**harmless, **ours}
    return environment.from_string(_Bound(environment).visit(environment.parse(source)))


def generate(template: Template, rendering: Rendering, variables: Mapping[str, object]) -> Iterator[str]:
    """The pieces of the text.

    Raises:
        TemplateError: if the template raises it, or exceeds a limit; anything else that an expression of it may raise.
    """
    size = 0
    for piece in template.generate({**variables, _RENDERING: rendering}):
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise SecurityError(f"expected at most {MOST_CHARACTERS:,} characters, found more")
        yield piece


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and not (_is_number(left) and _is_number(right) and abs(left) <= _MOST_NUMBER and abs(right) <= 64):
            raise SecurityError("expected a small power, found a larger one")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("expected a format without widths, found one")
        return _check(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: object, **kwargs: object) -> object:  # noqa: N805 any name may be a keyword
        of = getattr(__obj, "__self__", None)
        if isinstance(of, str):
            _check_arguments(__obj.__name__, (of, *args), kwargs)
        return _check(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        of = getattr(value, "__self__", None)
        if isinstance(of, str) and getattr(value, "__name__", "") in ("format", "format_map") and _WIDE.search(of):
            raise SecurityError("expected a format without widths, found one")
        return super().wrap_str_format(value)


class _Bounds(Extension):
    """The tag `generation`, and what is called between operations."""

    tags = {"generation"}  # noqa: RUF012 as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([self.call_method(name)], lineno=line) for name in ("begin", "end"))
        return [begin, nodes.Scope(body, lineno=line), end]

    @pass_context
    def begin(self, context: Context) -> str:
        return _rendering(context).begin

    @pass_context
    def end(self, context: Context) -> str:
        return _rendering(context).end

    @pass_context
    def tick(self, context: Context) -> str:
        if time.monotonic() > _rendering(context).deadline:
            raise SecurityError(f"expected a text within {MOST_SECONDS:.0f} seconds, found none")
        return ""

    def concat(self, *parts: object) -> object:
        return _check("".join(map(str, parts)))


class _Bound(NodeTransformer):
    """Puts checks into loops, macros, concatenations and blocks whose text is kept."""

    def __init__(self, environment: _Environment) -> None:
        self.bounds = environment.extensions[_Bounds.identifier]

    def _with_tick(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.bounds.call_method("tick"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_tick  # noqa: N815 Jinja's names

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self.bounds.call_method("concat", list(node.nodes), lineno=node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, _LIMITED, [], [], None, None, lineno=node.lineno)
        return node


class _Dict:
    """`dict(…)` without the attributes of the class."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace that no name with an underscore before it is set in."""

    def __init__(*args: object, **kwargs: object) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _rendering(context: Context) -> Rendering:
    found = context.parent[_RENDERING]
    assert isinstance(found, Rendering)
    return found


def _raise(message: object) -> None:
    raise TemplateError(str(message))


@pass_context
def _strftime_now(context: Context, format: str) -> str:
    return (_rendering(context).now or datetime.now()).strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limited(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """A filter whose arguments and result are checked."""

    @wraps(function)  # keeps the mark of a filter that gets the environment or the context
    def call(*args: object, **kwargs: object) -> object:
        _check_arguments(name, args, kwargs)
        return _check(function(*args, **kwargs))

    return call


def _check(value: object) -> object:
    if isinstance(value, str | list | tuple | dict) and len(value) > MOST_CHARACTERS:
        raise SecurityError(f"expected values of at most {MOST_CHARACTERS:,} characters, found more")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise SecurityError("expected a smaller number, found a larger one")
    return value


def _check_product(left: object, right: object) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and _is_number(count) and len(value) * count > MOST_CHARACTERS:
            raise SecurityError(f"expected values of at most {MOST_CHARACTERS:,} characters, found more")


def _check_arguments(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Checks what a filter or a method of text called `name` is called with."""
    given = (*args, *kwargs.values())
    if name in _WIDENING and any(_is_number(value) and abs(value) > _MOST_NUMBER for value in given):
        raise SecurityError("expected a smaller width, found a larger one")
    texts = [value for value in given if isinstance(value, str)]
    if name == "replace" and len(texts) > 2 and texts[0].count(texts[1]) * len(texts[2]) > MOST_CHARACTERS:
        raise SecurityError(f"expected values of at most {MOST_CHARACTERS:,} characters, found more")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"expected names without an underscore before them in a namespace, found {name!r}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

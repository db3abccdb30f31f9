"""Plain data to config and back, by cattrs, strictly: no unknown key, no silent conversion, every problem at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs
from attrs import AttrsInstance
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, override

from fnrecipe.config.bounds import Bound
from fnrecipe.config.tagged import TagError, Tagged
from fnrecipe.errors import SHOWN, ConfigError, Problem, did_you_mean, shortened

C = TypeVar("C", bound=AttrsInstance)

_SCALARS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


class _MismatchError(Exception):
    """A value is not what its field expects."""

    def __init__(self, expected: str, found: object, choices: Sequence[str] = ()) -> None:
        super().__init__(expected)
        self.expected, self.found, self.choices = expected, found, choices


class _UnknownKeyError(Exception):
    """A section has a key that it does not know."""

    def __init__(self, key: object, valid: Sequence[str]) -> None:
        super().__init__(key)
        self.key, self.valid = key, valid


def structure(data: object, defaults: C, fallback: dict[str, object] | None = None) -> C:
    """A config of the class of `defaults` from nested dicts, lists and scalars.

    Raises:
        ConfigError: naming every unknown key, wrong type, value out of its bound and contradiction between values;
            conflicts are sought with the values of `fallback` in the place of wrong ones, or else those of `defaults`.
    """
    cls = type(defaults)
    try:
        config, problems, wrong = _CONVERTER.structure(data, cls), [], set[str]()
    except (ClassValidationError, _MismatchError) as error:
        faults = list(_faults(error, cls, ""))
        problems = [_problem(*fault, hinted=number < SHOWN) for number, fault in enumerate(faults)]
        wrong = {(path.rpartition(".")[0] if isinstance(fault, TagError) else path).split("[")[0] for path, fault in faults}
        config = _CONVERTER.structure(_mended(data, fallback or unstructure(defaults), wrong), cls)
    problems += [found for found in conflicts(config) if wrong.isdisjoint(upwards(found.path))]
    if problems:
        raise ConfigError(problems)
    return config


def upwards(path: str) -> list[str]:
    """A dotted path and the paths of all sections that it is in: `a.b.c`, `a.b` and `a`."""
    parts = path.split(".")
    return [".".join(parts[:size]) for size in range(len(parts), 0, -1)]


def unstructure(config: object) -> dict[str, object]:
    """Nested dicts, lists and scalars, in the order of the fields; `structure` is its inverse."""
    data: dict[str, object] = _CONVERTER.unstructure(config)
    return data


def conflicts(config: AttrsInstance, path: str = "") -> list[Problem]:
    """What the `conflicts` methods of `config` and of the sections in it report, with full paths."""
    found = [attrs.evolve(p, path=path + p.path) for p in config.conflicts()] if hasattr(config, "conflicts") else []
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        parts = {f"[{i}]": item for i, item in enumerate(value)} if isinstance(value, tuple) else {"": value}
        for index, part in parts.items():
            if attrs.has(type(part)):
                found += conflicts(part, f"{path}{field.name}{index}.")
    return found


def _mended(data: object, defaults: dict[str, object], wrong: Collection[str]) -> dict[str, object]:
    """`data` with the values of `defaults` at the paths that are `wrong`, and without the keys that `defaults` lacks."""
    if not isinstance(data, dict):
        return defaults

    def mend(value: Any, default: object, path: str) -> Any:
        if path in wrong:
            return default
        if not isinstance(default, dict) or not isinstance(value, dict):  # a section may be null, by default or as it is given
            return default if any(other.startswith(f"{path}.") for other in wrong) else value
        return {k: mend(value.get(k, d), d, f"{path}.{k}" if path else k) for k, d in default.items()}

    mended: dict[str, object] = mend(data, defaults, "")
    return mended


_Wrong = _MismatchError | _UnknownKeyError | TagError | KeyError


def _faults(error: BaseException, cls: type, path: str) -> Iterator[tuple[str, _Wrong]]:
    """Paths, each with what is wrong there."""
    if isinstance(error, ClassValidationError):
        noted, plain = error.group_exceptions()
        for inner, note in noted:
            yield from _faults(inner, cls, f"{path}.{note.name}" if path else note.name)
        for inner_plain in plain:
            yield from _faults(inner_plain, cls, path)
    elif isinstance(error, IterableValidationError):
        for inner, index_note in error.group_exceptions()[0]:
            yield from _faults(inner, cls, f"{path}[{index_note.index}]")
    elif isinstance(error, ForbiddenExtraKeysError):
        valid = [field.name for field in attrs.fields(error.cl)]
        for key in sorted(error.extra_fields, key=str):
            yield f"{path}.{key}" if path else str(key), _UnknownKeyError(key, valid)
    elif isinstance(error, TagError):
        yield f"{path}.{error.field}", error
    elif isinstance(error, _Wrong):
        yield path, error
    else:
        raise error


def _problem(path: str, wrong: _Wrong, *, hinted: bool) -> Problem:
    """`wrong` in words; to look for the nearest name takes long, and is done only where it is shown."""
    match wrong:
        case _UnknownKeyError():
            hint = did_you_mean(str(wrong.key), wrong.valid) if hinted else ""
            return Problem(path, "a known key", f"{wrong.key!r}", hint=hint)
        case _MismatchError():
            near = did_you_mean(str(wrong.found), wrong.choices) if hinted else ""
            hint = near if near.startswith("did") else ""
            return Problem(path or "config", wrong.expected, _show(wrong.found), hint=hint)
        case TagError():
            return Problem(path, wrong.expected, _show(wrong.found), hint=wrong.hint)
        case KeyError():
            return Problem(path, "a value", "nothing")


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return shortened(repr(value), 60)


def _scalar(value: object, cls: type) -> object:
    if type(value) is int and cls is not bool and abs(value) >= 2**63:
        raise _MismatchError(f"{_SCALARS[cls]} of at most 64 bits", value)
    if type(value) is str and cls is str and not _is_unicode(value):
        raise _MismatchError("text without halves of surrogate pairs", value)
    if cls is float and type(value) is int:
        return float(value)
    if type(value) is not cls or value in (math.inf, -math.inf) or value != value:
        raise _MismatchError(_SCALARS[cls], value)
    return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _literal(value: object, cls: object) -> object:
    choices = get_args(cls)
    if value not in choices or isinstance(value, bool):
        names = [str(choice) for choice in choices]
        raise _MismatchError(" or ".join(names), value, names)
    return value


def _bounded(value: object, cls: object) -> object:
    kind, *bounds = get_args(cls)
    number = _CONVERTER.structure(value, kind)
    for bound in bounds:
        if isinstance(bound, Bound) and not bound.holds(number):
            raise _MismatchError(bound.expected, value)
    return number


def _union(value: object, cls: object) -> object:
    """The value of the first of the kinds that takes it."""
    kinds = [kind for kind in get_args(cls) if kind is not NoneType]
    null = " or null" if len(kinds) < len(get_args(cls)) else ""
    if null and value is None:
        return None
    errors = []
    for kind in kinds:
        try:
            return _CONVERTER.structure(value, kind)
        except _MismatchError as error:
            errors.append(error)
    expected = errors[0].expected if len(kinds) == 1 else " or ".join(map(_described, kinds))
    raise _MismatchError(f"{expected}{null}", errors[0].found, errors[0].choices)


def _described(kind: Any) -> str:
    """What a value of a scalar kind is expected to be, with its bound, or which words it may be."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    bounds = [bound.expected for bound in get_args(kind) if isinstance(bound, Bound)]
    return bounds[0] if bounds else _SCALARS[kind]


_FromMapping = Callable[[dict[str, object], type], object]
_Hook = Callable[[object, object], object]


def _section(cls: type) -> _Hook:
    """A section from its mapping; or from text, where the class has a field `PLAIN_TEXT` that it is the value of."""
    short = getattr(cls, "PLAIN_TEXT", None)
    from_mapping = _tagged(cls) if issubclass(cls, Tagged) else _from_mapping(cls)

    def hook(value: object, _: object) -> object:
        if short is not None and isinstance(value, str):
            value = {short: value}
        if not isinstance(value, dict):
            keys = ", ".join(field.name for field in attrs.fields(cls))
            raise _MismatchError(f"{'text or ' if short else ''}a section with the keys {keys}", value)
        return from_mapping(value, cls)

    return hook


def _from_mapping(cls: type, **overrides: object) -> _FromMapping:
    make: Callable[..., _FromMapping] = make_dict_structure_fn
    return make(cls, _CONVERTER, _cattrs_forbid_extra_keys=True, **overrides)


def _tagged(cls: type[Tagged]) -> _FromMapping:
    """A section whose tags choose the class of its `config`; nothing is said of the config where they choose none."""

    @cache
    def of_kind(kind: type) -> _FromMapping:
        return _from_mapping(cls, config=override(struct_hook=lambda value, _: _CONVERTER.structure(value, kind)))

    def hook(value: dict[str, object], _: type) -> object:
        defaults = cls.default_tags()
        try:
            kind = type(cls.bases({tag: value.get(tag, default) for tag, default in defaults.items()})[-1][1])
        except TagError as error:
            rest = {key: part for key, part in value.items() if key not in (*defaults, "config")}
            raise ClassValidationError("tags", [error, *_errors(partial(hook, rest, _))], cls) from None
        return of_kind(kind)(value, cls)

    return hook


def _errors(function: Callable[[], object]) -> list[Exception]:
    try:
        function()
    except ClassValidationError as error:
        return [error]
    return []


def _tuple(cls: object) -> _Hook:
    kinds = get_args(cls)

    def hook(value: object, _: object) -> object:
        if isinstance(value, str) and hasattr(kinds[0], "PLAIN_TEXT"):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise _MismatchError(f"{'text or ' if hasattr(kinds[0], 'PLAIN_TEXT') else ''}a list", value)
        if kinds[-1] is Ellipsis:
            return tuple(_CONVERTER.structure(list(value), list[kinds[0]]))  # type: ignore[valid-type]
        if len(value) != len(kinds):
            raise _MismatchError(f"a list of {len(kinds)} values", value)
        return tuple(_CONVERTER.structure(item, kind) for item, kind in zip(value, kinds, strict=True))

    return hook


def _has_origin(*origins: object) -> Callable[[object], bool]:
    return lambda kind: get_origin(kind) in origins


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True)
    for scalar in _SCALARS:
        converter.register_structure_hook(scalar, _scalar)
    converter.register_structure_hook_func(_has_origin(Literal), _literal)
    converter.register_structure_hook_func(_has_origin(Annotated), _bounded)
    converter.register_structure_hook_func(_has_origin(Union, UnionType), _union)
    converter.register_structure_hook_factory(lambda kind: isinstance(kind, type) and attrs.has(kind), _section)
    converter.register_structure_hook_factory(_has_origin(tuple), _tuple)
    converter.register_unstructure_hook_func(_has_origin(tuple), lambda values: [converter.unstructure(v) for v in values])
    return converter


_CONVERTER = _converter()

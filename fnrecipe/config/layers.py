"""Config from layers, later over earlier: class defaults, recipe defaults, files, `--config` pairs, each with its source.

A layer maps dotted paths to located values. Sections merge; scalars and lists replace. The class defaults of the config of a
tagged section are those of the class that its tags choose, with a layer of its own for an `arch` (`fnrecipe.config.tagged`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import attrs
from attrs import AttrsInstance

from fnrecipe.config import yaml
from fnrecipe.config.nested import nested
from fnrecipe.config.structure import structure, unstructure, upwards
from fnrecipe.config.tagged import Choice, Layer, choose, tagged_sections
from fnrecipe.config.yaml import Located
from fnrecipe.errors import ConfigError, Problem, UsageError, one_line

C = TypeVar("C", bound=AttrsInstance)
_Branch: TypeAlias = "dict[str, _Branch | Located]"


def resolve(defaults: C, files: Sequence[Path | str] = (), pairs: Sequence[str] = ()) -> tuple[C, dict[str, str]]:
    """The config that `defaults` become under the YAML `files` and the `a.b=c` `pairs`; and each value's source.

    Raises:
        ConfigError: everything that is wrong, each problem with the source of its value.
        UsageError: a file that cannot be read or is not YAML, a pair that is not one.
    """
    of_files, of_pairs = [*map(read_file, map(Path, files))], [*map(read_pair, pairs)]
    choices = [choose(*section, [*of_files, merge(of_pairs)]) for section in tagged_sections(defaults)]
    base, recipe = _default_layers(defaults, choices)
    numbered = [*enumerate([recipe, *of_files]), *((len(of_files) + 1, layer) for layer in of_pairs)]
    layers = [_kept(layer, number, choices) for number, layer in numbered]
    layers[1:1] = [_beside(choice, [*of_files, *of_pairs], base) for choice in choices]
    merged = _with_tags(merge([base, *layers]), choices)
    fallback = _with_tags(merge([base, layers[0]]), [choice for choice in choices if choice.valid])
    try:
        config = structure(nest(merged), defaults, nest(fallback))
    except ConfigError as error:
        raise ConfigError(_located(error.problems, merged, base)) from None
    return config, {path: entry.source for path, entry in merged.items()}


def read_file(path: Path, *, bounded: bool = True) -> Layer:
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), str(path), bounded=bounded)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise UsageError(f"{path}: expected UTF-8 text, found {found}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read the config file: {error.strerror}") from None


def read_pair(pair: str) -> Layer:
    key, equals, text = pair.partition("=")
    parts, name = key.split("."), f"--config {one_line(pair)}"
    if not equals or len(parts) > yaml.MAX_DEPTH or not all(part.isidentifier() for part in parts):
        raise UsageError(f"{name}: expected section.key=value")
    return flatten({key: yaml.load_value(text, name)}, "command line")


def merge(layers: Iterable[Layer]) -> dict[str, Located]:
    """The last layer's value for every path; a value takes the place of a section of its name, and the other way round.

    An empty section adds nothing to one that is there.
    """
    root: _Branch = {}
    for layer in layers:
        for path, entry in layer.items():
            *parents, key = path.split(".")
            section = root
            for parent in parents:
                below = section.get(parent)
                section[parent] = section = below if isinstance(below, dict) else {}
            if entry.value != {} or not isinstance(section.get(key), dict):
                section[key] = entry
    return dict(_leaves(root, ""))


def _leaves(section: _Branch, path: str) -> Iterator[tuple[str, Located]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def flatten(data: Mapping[str, object], source: str, path: str = "") -> dict[str, Located]:
    flat: dict[str, Located] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, source, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = Located(value, source)
    return flat


def values(layer: Layer) -> dict[str, object]:
    return {path: entry.value for path, entry in layer.items()}


def nest(flat: Layer) -> dict[str, object]:
    return nested(values(flat))


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Paths at which two flat configs differ, with both values (None where there is none)."""
    paths = dict.fromkeys([*old, *new])
    absent = object()
    return {p: (old.get(p), new.get(p)) for p in paths if old.get(p, absent) != new.get(p, absent)}


def _default_layers(defaults: AttrsInstance, choices: Sequence[Choice]) -> list[Layer]:
    """The class defaults, those of the chosen configs among them, and what the recipe's differ in."""
    base = flatten(unstructure(type(defaults)()), "default")
    for choice in choices:
        base = {path: entry for path, entry in base.items() if not path.startswith(f"{choice.path}.config.")}
        for source, config in choice.bases:
            base |= _difference(flatten(unstructure(config), source, f"{choice.path}.config."), base)
    return [base, _difference(flatten(unstructure(defaults), "recipe"), base)]


def _difference(layer: Layer, base: Layer) -> dict[str, Located]:
    """The values of `layer` that are not those of `base`."""
    return {path: entry for path, entry in layer.items() if path not in base or base[path].value != entry.value}


def _kept(layer: Layer, number: int, choices: Sequence[Choice]) -> Layer:
    """The source `number`, without what it says of configs that later ones have switched from."""
    return {path: entry for path, entry in layer.items() if all(choice.keeps(path, number) for choice in choices)}


def _beside(choice: Choice, written: Sequence[Layer], base: Layer) -> Layer:
    """What a choice brings for sections of this config, unless the user says there of which family something is, or where."""
    identity = {f"{path.rpartition('.')[0]}.{key}" for path in choice.beside for key in ("family", "path")}
    if any(path in layer for layer in written for path in identity):
        return {}
    return {path: entry for path, entry in choice.beside.items() if path in base}


def _with_tags(merged: dict[str, Located], choices: Sequence[Choice]) -> dict[str, Located]:
    """The tags of `choices` in the place of those that they do not follow."""
    tags = {f"{choice.path}.{tag}": Located(value, choice.derived) for choice in choices for tag, value in choice.tags.items()}
    changed = {path: tag for path, tag in tags.items() if path in merged and merged[path].value != tag.value}
    return {**merged, **changed}


def _located(problems: Sequence[Problem], merged: Layer, valid: Layer) -> list[Problem]:
    """`problems` with the sources of their values; a key in the wrong section gets a hint at the right one."""
    sources = {part: entry.source for path, entry in merged.items() for part in upwards(path)}
    homes: dict[str, list[str]] = {}
    for path in valid:
        homes.setdefault(path.rpartition(".")[2], []).append(path)

    def located(problem: Problem) -> Problem:
        path = problem.path.split("[")[0]
        elsewhere = homes.get(path.rpartition(".")[2], [])
        unknown = problem.expected == "a known key" and "did you mean" not in problem.hint
        misplaced = unknown and path not in valid and len(elsewhere) == 1
        hint = f"did you mean {elsewhere[0]}?" if misplaced else problem.hint
        return attrs.evolve(problem, source=sources.get(path, ""), hint=hint)

    return [located(problem) for problem in problems]

"""Sections with tags: fields that choose of which class their `config` is, and its values below those that a user writes.

`optimizer.name: adamw` is a tag, and `model.family: llama` and `model.arch: llama3_2_1b` are two. Only the chosen config is
there: it alone is checked and dumped.

Values come from sources, one after the other: the recipe, files, the pairs of a command line. What a source says of `config`
is said under the tags that hold at its end, wherever in the source they stand; it counts if these are the tags that hold at
the end of all. So a source that switches a tag drops what those before it said under the old one, and keeps its own values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import attrs
from attrs import AttrsInstance

from fnrecipe.config.find import Kind, NotFoundError, find_component
from fnrecipe.config.yaml import Located

Tags = Mapping[str, object]
Layer = Mapping[str, Located]
T = TypeVar("T")


class TagError(Exception):
    """The tag `field` has a value that chooses nothing."""

    def __init__(self, field: str, expected: str, found: object, hint: str = "") -> None:
        super().__init__(expected)
        self.field, self.expected, self.found, self.hint = field, expected, found, hint


class Tagged:
    """A section with a field `config`, of the class that its fields `TAGS` choose; `SHORT` is one that stands for others."""

    __slots__ = ()
    TAGS: ClassVar[tuple[str, ...]] = ("name",)
    SHORT: ClassVar[str] = ""

    @classmethod
    def follow(cls, before: Tags, written: Tags) -> dict[str, object]:
        """All tags, where one source of values writes some of them over those from `before`."""
        return {**before, **written}

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        """What lies below all that is written of `config`: configs of the chosen class, later over earlier, by their sources.

        Raises:
            TagError: if the tags choose nothing.
        """
        raise NotImplementedError

    @classmethod
    def derived(cls, tags: Tags) -> str:
        """The source of those of `tags` that are not written."""
        return f"{cls.SHORT} {tags[cls.SHORT]}" if tags.get(cls.SHORT) else "default"

    @classmethod
    def beside(cls, tags: Tags) -> tuple[str, Mapping[str, object]]:
        """Values that the tags bring for other sections, by their paths in the whole config, and where they come from."""
        return "", {}

    @classmethod
    def default_tags(cls) -> dict[str, object]:
        return tags_of(cls())

    def default_config(self) -> AttrsInstance:
        """What `config` is if nothing is written of it: for the default of that field."""
        return self.bases(tags_of(self))[-1][1]


def tags_of(section: Tagged) -> dict[str, object]:
    return {tag: getattr(section, tag) for tag in section.TAGS}


def find_tagged(field: str, name: object, kind: Kind[T]) -> T:
    """The component that the tag `field` of a section names.

    Raises:
        TagError: if there is none.
    """
    try:
        return find_component(name, kind)
    except NotFoundError as error:
        raise TagError(field, error.expected, name, error.hint) from None


def tagged_sections(config: AttrsInstance, path: str = "") -> Iterator[tuple[str, Tagged]]:
    """The tagged sections of a config, by their paths."""
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if isinstance(value, Tagged):
            yield f"{path}{field.name}", value
        elif attrs.has(type(value)):
            yield from tagged_sections(value, f"{path}{field.name}.")


@attrs.frozen
class Choice:
    """What sources of values choose for the tagged section at `path`.

    tags     all of them, as they follow from those that are written
    derived  the source of those that are not written
    bases    as `Tagged.bases` gives them; those of the recipe if the tags choose nothing
    beside   what the tags bring for other sections; nothing if they are the recipe's
    sources  the numbers of those that speak of this choice
    valid    whether the tags choose something
    """

    path: str
    tags: Tags
    derived: str
    bases: Sequence[tuple[str, AttrsInstance]]
    sources: frozenset[int]
    beside: Layer = attrs.field(factory=dict)
    valid: bool = True

    def keeps(self, path: str, number: int) -> bool:
        """Whether what source `number` says at `path` counts."""
        return number in self.sources or not f"{path}.".startswith(f"{self.path}.config.")


def choose(path: str, section: Tagged, sources: Sequence[Layer]) -> Choice:
    """The choice of `sources`, numbered from 1, for a section of the recipe, which is number 0."""
    history = [tags_of(section)]
    for source in sources:
        written = {tag: source[key].value for tag in section.TAGS if (key := f"{path}.{tag}") in source}
        history.append(section.follow(history[-1], written))
    tags = history[-1]
    derived = section.derived(tags)
    same = [all(old[tag] == tags[tag] for tag in tags if tag != section.SHORT) for old in history]
    numbers = frozenset(number for number, alike in enumerate(same) if alike)
    try:
        name, values = section.beside(tags) if tags != history[0] else ("", {})
        beside = {key: Located(value, name) for key, value in values.items()}
        return Choice(path, tags, derived, section.bases(tags), numbers, beside)
    except TagError:  # which is told when the values are structured
        return Choice(path, tags, derived, section.bases(history[0]), frozenset([0]), valid=False)

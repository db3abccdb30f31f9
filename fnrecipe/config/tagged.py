"""Sections with tags: fields that choose of which class their `config` is, and its values below those that a user writes.

`optimizer.name: adamw` is a tag, and `model.family: llama` and `model.arch: llama3_2_1b` are two. Only the chosen config is
there: it alone is checked and dumped. A tag that one source of values switches (a file, the pairs of a command line) drops
what earlier sources, and the recipe, said about the config of the old one; what the same source says of the config, before
the tag or behind it, holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
from attrs import AttrsInstance

from fnrecipe.config.find import Kind, NotFoundError, find_component
from fnrecipe.config.yaml import Located

Tags = Mapping[str, Any]
Layer = Mapping[str, Located]


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
    def follow(cls, before: Tags, written: Tags) -> dict[str, Any]:
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
    def default_tags(cls) -> dict[str, Any]:
        return tags_of(cls())

    def default_config(self) -> Any:
        """What `config` is if nothing is written of it: for the default of that field."""
        return self.bases(tags_of(self))[-1][1]


def tags_of(section: Tagged) -> dict[str, Any]:
    return {tag: getattr(section, tag) for tag in section.TAGS}


def find_tagged(field: str, name: object, kind: Kind) -> Any:
    """The component that the tag `field` of a section names.

    Raises:
        TagError: if there is none.
    """
    try:
        return find_component(name, kind)
    except NotFoundError as error:
        raise TagError(field, error.expected, name, error.hint) from None


def tagged_sections(config: Any, path: str = "") -> Iterator[tuple[str, Tagged]]:
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
    bases    as `Tagged.bases` gives them
    since    the number of the source that chose it: what sources before it say of `config` is of another one
    """

    path: str
    tags: Tags
    derived: str
    bases: Sequence[tuple[str, AttrsInstance]]
    since: int

    def keeps(self, path: str, number: int) -> bool:
        """Whether the value that source `number` has for `path` is one of what is chosen."""
        return number >= self.since or not f"{path}.".startswith(f"{self.path}.config.")


def choose(path: str, section: Tagged, sources: Sequence[Layer]) -> Choice:
    """The choice of `sources`, from number 1, for a `section` of the recipe, which is number 0; the recipe's if theirs fails."""
    tags, since = tags_of(section), 0
    for number, source in enumerate(sources, 1):
        written = {tag: source[key].value for tag in section.TAGS if (key := f"{path}.{tag}") in source}
        before, tags = tags, section.follow(tags, written)
        if any(before[tag] != tags[tag] for tag in section.TAGS if tag != section.SHORT):
            since = number
    short = tags.get(section.SHORT)
    try:
        return Choice(path, tags, f"{section.SHORT} {short}" if short else "default", section.bases(tags), since)
    except TagError:  # which is told when the values are structured
        return Choice(path, {}, "", section.bases(tags_of(section)), 0)

"""What is measured beside training, by name: the loss on text of its own, multiple choice, texts that the model writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from attrs import AttrsInstance, Factory, field, frozen
from attrs.converters import optional

from fnrecipe.config.bounds import NonNegative, PositiveInt
from fnrecipe.config.paths import expanded
from fnrecipe.config.sections.data import DataSource
from fnrecipe.config.tagged import TagError, Tagged, Tags
from fnrecipe.errors import Problem, did_you_mean

_TAKEN = ("train", "perf", "valid")
"""Names of other records."""


@frozen
class HeldOutConfig:
    """The loss of the recipe on sources of its own, none of which may be trained on."""

    sources: tuple[DataSource, ...] = ()

    def conflicts(self) -> Iterator[Problem]:
        if not self.sources:
            yield Problem("sources", "at least one source", "none")


@frozen
class ChoicesConfig:
    """Accuracy on the questions of a file, with `delimiter` before each choice, as `fnrecipe evaluate --choices` has it."""

    file: str = field(default="", converter=expanded)
    delimiter: str = ""

    def conflicts(self) -> Iterator[Problem]:
        if not self.file:
            yield Problem("file", "a file of questions", "''")


@frozen
class SamplesConfig:
    """What the model writes after `prompts`, or those of `file`, in JSON lines with the field "prompt"."""

    prompts: tuple[str, ...] = ()
    file: str | None = field(default=None, converter=optional(expanded))
    max_tokens: PositiveInt = 64
    temperature: NonNegative = 0.7

    def conflicts(self) -> Iterator[Problem]:
        if bool(self.prompts) == (self.file is not None):
            yield Problem("prompts", "texts, or a file of them", "both" if self.prompts else "neither")


KINDS: Mapping[str, type[AttrsInstance]] = {"loss": HeldOutConfig, "choices": ChoicesConfig, "samples": SamplesConfig}


@frozen
class EvaluationSection(Tagged):
    """
    name           what its records are called
    every_n_steps  null: that of validations
    """

    TAGS: ClassVar[tuple[str, ...]] = ("kind",)

    name: str = ""
    kind: Literal["loss", "choices", "samples"] = "loss"
    config: AttrsInstance = field(default=Factory(Tagged.default_config, takes_self=True))
    every_n_steps: PositiveInt | None = None

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        kind = str(tags["kind"])
        if kind not in KINDS:
            near = did_you_mean(kind, KINDS)
            raise TagError("kind", " or ".join(KINDS), tags["kind"], near if near.startswith("did") else "")
        return [("default", KINDS[kind]())]

    def conflicts(self) -> Iterator[Problem]:
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in _TAKEN:
            expected = f"letters, digits, '_', '-' and '.', and none of {', '.join(_TAKEN)}"
            yield Problem("name", expected, repr(self.name))


def evaluation_conflicts(sections: Sequence[EvaluationSection], formats: Mapping[str, object]) -> Iterator[Problem]:
    """What cannot stand in the key `evaluations` of a recipe that knows these formats of sources."""
    names, known = [section.name for section in sections], ("auto", *formats)
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Problem(f"evaluations[{number}].name", "a name of its own for each evaluation", repr(name))
    for number, section in enumerate(sections):
        for place, source in enumerate(section.config.sources) if isinstance(section.config, HeldOutConfig) else ():
            if source.format not in known:
                path, near = f"evaluations[{number}].config.sources[{place}].format", did_you_mean(source.format, known)
                yield Problem(path, " or ".join(known), repr(source.format), hint=near if near.startswith("did") else "")

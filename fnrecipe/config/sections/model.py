"""The model: its family, the shape in it, and the dtype in which it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, cast

import attrs
from attrs import AttrsInstance, Factory, field, frozen
from attrs.converters import optional

from fnrecipe.config.bounds import ProperFraction
from fnrecipe.config.find import Kind, NotFoundError, find_component, known
from fnrecipe.config.model_dir import Described, describe, is_directory
from fnrecipe.config.paths import expanded
from fnrecipe.config.sections.adapter import AdapterSection
from fnrecipe.config.sections.transfer import TransferSection
from fnrecipe.config.tagged import TagError, Tagged, Tags, find_tagged
from fnrecipe.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from fnrecipe.models.model import Family

FAMILIES: Kind[Family[ModelConfig]] = Kind(
    cls="fnrecipe.models.model:Model", package="fnrecipe.models", light="config:family", attribute="model"
)


class ModelConfig(AttrsInstance, Protocol):
    """What recipes read of the config of a family: a frozen attrs class whose fields all have defaults."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...


def named() -> dict[str, str]:
    """The names of all architectures of the families that come with fnrecipe, each with its family."""
    return {arch: family for family in known(FAMILIES) for arch in find_component(family, FAMILIES).archs}


def _family(section: ModelSection) -> str:
    if section.path is not None:
        return _described(section.path).family
    return named().get(section.name or "", "llama")


def _config(section: ModelSection) -> ModelConfig:
    return cast("ModelConfig", section.default_config())


@frozen
class ModelSection(Tagged):
    """`family`: whose functions; `arch`: a shape in it, null for the family's defaults; `name`: a word for both at once.

    `path`: a directory that gives family and shape, and the weights to begin with.
    `dtype`: of the parameters and of what the optimizer keeps for them. `adapter`: what is trained in their place; in float32.
    `transfer`: the model for which rates were found, if that is another one.
    `dropout_p`: of the embeddings and of what sublayers add to the residual stream, in training.
    """

    TAGS: ClassVar[tuple[str, ...]] = ("name", "path", "family", "arch")
    SHORT: ClassVar[str] = "name"

    name: str | None = None
    path: str | None = field(default=None, converter=optional(expanded))
    family: str = field(default=Factory(_family, takes_self=True))
    arch: str | None = field(default=Factory(lambda section: section.name, takes_self=True))
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: AdapterSection = field(factory=AdapterSection)
    transfer: TransferSection = field(factory=TransferSection)
    dropout_p: ProperFraction = 0.0
    config: ModelConfig = field(default=Factory(_config, takes_self=True))

    def conflicts(self) -> Iterator[Problem]:
        if self.adapter.path is not None and self.path is None:
            expected = "null without model.path, the model that the adapter was trained beside"
            yield Problem("adapter.path", expected, self.adapter.path)
        if self.transfer.name is not None:
            roles = find_component(self.family, FAMILIES).roles
            if roles is None:
                of = [name for name in known(FAMILIES) if find_component(name, FAMILIES).roles]
                yield Problem("transfer.name", f"null for a family that is none of {', '.join(of)}", repr(self.transfer.name))
            elif roles.scores is None and self.transfer.base_head_dim is not None:
                expected = f"null for the family {self.family}, whose scores depend on query_pre_attn_scalar"
                yield Problem("transfer.base_head_dim", expected, str(self.transfer.base_head_dim))
            if self.adapter.name is not None:
                yield Problem("transfer.name", f"null beside model.adapter.name={self.adapter.name}", repr(self.transfer.name))

    @classmethod
    def follow(cls, before: Tags, written: Tags) -> dict[str, object]:
        """A name or a path brings family and arch; a family ends another one's name and arch, an arch another one's name."""
        name, family, arch, path = (written.get(tag) for tag in ("name", "family", "arch", "path"))
        after = {**before, **written}
        if isinstance(path, str) and path != before["path"]:
            return {"name": None, "path": path, "family": family or _family_at(path), "arch": None, **written}
        if isinstance(name, str) and name in named():
            return {**after, "name": name, "family": named()[name], "arch": name, **written}
        if "family" in written and family != before["family"]:
            return {**after, "name": name, "arch": arch}
        return {**after, "name": name} if "arch" in written and arch != before["arch"] else after

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        name, family, arch = tags["name"], tags["family"], tags["arch"]
        described = _checked_path(tags)
        if name is not None:
            names = named()
            if name not in [*names]:
                raise TagError("name", "null or the name of an architecture", name, did_you_mean(str(name), names))
            if (family, arch) != (names[name], name):
                raise TagError("name", f"null beside model.family={family}, model.arch={arch}", name)
        found = find_tagged("family", family, FAMILIES)
        if missing := {"vocab_size", "max_seq_len"} - {f.name for f in attrs.fields(found.config)}:
            raise TagError("family", f"a family whose config has {' and '.join(sorted(missing))}", family)
        if arch is not None and arch not in [*found.archs]:
            expected = f"null or an architecture of the family {family}"
            raise TagError("arch", expected, arch, did_you_mean(str(arch), found.archs))
        chosen = [] if arch is None else [(f"arch {arch}", found.archs[arch])]
        chosen += [] if described is None else [(described.source, described.config)]
        return [("default", found.config()), *chosen]

    @classmethod
    def derived(cls, tags: Tags) -> str:
        return f"path {tags['path']}" if tags["path"] else super().derived(tags)

    @classmethod
    def beside(cls, tags: Tags) -> tuple[str, Mapping[str, object]]:
        """The tokenizer of the directory `path`, if it has one."""
        described = _checked_path(tags)
        return (
            ("", {}) if described is None else (described.source, {f"tokenizer.{k}": v for k, v in described.tokenizer.items()})
        )


def _family_at(path: str) -> str | None:
    """The family of the model in a directory; None if that does not say."""
    try:
        return describe(path, FAMILIES).family
    except NotFoundError:
        return None


def _described(path: str) -> Described:
    try:
        return describe(path, FAMILIES)
    except NotFoundError as error:
        raise TagError("path", error.expected, path, error.hint) from None


def _checked_path(tags: Tags) -> Described | None:
    """What the directory `path` says of its model; None without one.

    A directory that is gone is none if the family is known otherwise: a saved config says all that it said.

    Raises:
        TagError: if it is not such a directory, or another tag speaks of another model.
    """
    path = tags["path"]
    if path is None:
        return None
    if not isinstance(path, str):
        raise TagError("path", "text or null", path)
    for other in ("name", "arch"):
        if tags[other] is not None:
            raise TagError(other, f"null beside model.path={path}", tags[other])
    if tags["family"] is not None and not is_directory(path):
        return None
    described = _described(path)
    if tags["family"] != described.family:
        raise TagError("family", f"{described.family}, which {described.source} says", tags["family"])
    return described

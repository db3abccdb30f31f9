"""The model: its family, the shape in it, and the dtype in which it is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, cast

import attrs
from attrs import AttrsInstance, Factory, field, frozen

from fnrecipe.config.find import Kind, find_component, known
from fnrecipe.config.tagged import TagError, Tagged, Tags, find_tagged
from fnrecipe.errors import did_you_mean

if TYPE_CHECKING:
    from fnrecipe.models.model import Family

FAMILIES: Kind[Family[AttrsInstance]] = Kind(
    cls="fnrecipe.models.model:Model", package="fnrecipe.models", light="config:family", attribute="model"
)


class ModelConfig(Protocol):
    """What recipes read of the config of a family: a frozen attrs class whose fields all have defaults."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...


def named() -> dict[str, str]:
    """The names of all architectures of the families that come with fnrecipe, each with its family."""
    return {arch: family for family in known(FAMILIES) for arch in find_component(family, FAMILIES).archs}


def _family(section: ModelSection) -> str:
    return named().get(section.name or "", "llama")


def _config(section: ModelSection) -> ModelConfig:
    return cast("ModelConfig", section.default_config())


@frozen
class ModelSection(Tagged):
    """`family`: whose functions; `arch`: a shape in it, null for the family's defaults; `name`: a word for both at once.

    `dtype`: of the parameters and of what the optimizer keeps for them.
    """

    TAGS: ClassVar[tuple[str, ...]] = ("name", "family", "arch")
    SHORT: ClassVar[str] = "name"

    name: str | None = None
    family: str = field(default=Factory(_family, takes_self=True))
    arch: str | None = field(default=Factory(lambda section: section.name, takes_self=True))
    dtype: Literal["float32", "bfloat16"] = "float32"
    config: ModelConfig = field(default=Factory(_config, takes_self=True))

    @classmethod
    def follow(cls, before: Tags, written: Tags) -> dict[str, object]:
        """A name brings family and arch; a family ends the name and arch of another one, an arch the name of another one."""
        name, family, arch = written.get("name"), written.get("family"), written.get("arch")
        if isinstance(name, str) and name in named():
            return {"name": name, "family": named()[name], "arch": name, **written}
        after = {**before, **written}
        if "family" in written and family != before["family"]:
            return {**after, "name": name, "arch": arch}
        return {**after, "name": name} if "arch" in written and arch != before["arch"] else after

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        name, family, arch = tags["name"], tags["family"], tags["arch"]
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
        return [("default", found.config()), *([] if arch is None else [(f"arch {arch}", found.archs[arch])])]

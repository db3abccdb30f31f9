"""The parameters of a model as a table: how large each is, how it begins, how tensor parallelism cuts it. No torch here.

A key is a pattern of paths, in which `*` is the number of a layer: "layers.*.query". Linear weights are [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TypeAlias, TypeVar

import attrs


@attrs.frozen
class Parameter:
    """One parameter, or one in each layer.

    cut        the dimension along which tensor parallelism cuts it; None: each rank has all of it
    start      normal with the config's `init_std`; of a `writer` to the residual stream, with init_std / sqrt(2 * layers)
    looked_up  whether it is only looked up in, and multiplied by nothing
    """

    shape: tuple[int, ...]
    cut: int | None = None
    start: Literal["normal", "writer", "ones", "zeros"] = "normal"
    looked_up: bool = False


Table: TypeAlias = Mapping[str, Parameter]


class Layered(Protocol):
    """What is read of a config beside its table."""

    @property
    def num_layers(self) -> int: ...


L = TypeVar("L", bound=Layered)

LAYER = "layers.*."


def in_layers(layer: Table) -> dict[str, Parameter]:
    """The table of the parameters that each layer has, from their names within it."""
    return {f"{LAYER}{name}": parameter for name, parameter in layer.items()}


def shapes(table: Table, num_layers: int) -> dict[str, object]:
    """The parameters' shapes as nested dicts, in the structure of the parameters."""
    tree: dict[str, object] = {}
    for path, parameter in table.items():
        if path.startswith(LAYER):
            layers = tree.setdefault("layers", {str(number): {} for number in range(num_layers)})
            assert isinstance(layers, dict)
            for layer in layers.values():
                layer[path.removeprefix(LAYER)] = parameter.shape
        else:
            tree[path] = parameter.shape
    return tree


def pattern(path: str) -> str:
    """The key in the table of the parameter at `path`."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def counted(table: Callable[[L], Table]) -> Callable[[L], tuple[int, int]]:
    """config -> how many parameters it has: of the vocabulary, embedding and head; and of the layers and the last norm."""
    return lambda config: _count(table(config), config.num_layers)


def _count(table: Table, num_layers: int) -> tuple[int, int]:
    sizes = {path: math.prod(parameter.shape) * (num_layers if "*" in path else 1) for path, parameter in table.items()}
    vocabulary = sum(sizes[path] for path in ("embedding", "head") if path in sizes)
    return vocabulary, sum(sizes.values()) - vocabulary


def cuts(table: Table) -> dict[str, int]:
    """The dimension along which tensor parallelism cuts each parameter that it cuts, by its pattern."""
    return {path: parameter.cut for path, parameter in table.items() if parameter.cut is not None}

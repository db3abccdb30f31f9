"""Patterns of the paths of parameters, and tags: a name for all parameters of a kind, whatever a family calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from fnrecipe.errors import Problem, did_you_mean

TAGS = ("@embedding", "@head", "@norms", "@biases", "@matrices")


def fits(path: str, dims: int, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is that of a parameter of so many dimensions: its tag, or an fnmatch of its dotted path."""
    own = tag(path, dims)
    return any(pattern == own if pattern.startswith("@") else fnmatchcase(path, pattern) for pattern in patterns)


def tag(path: str, dims: int) -> str:
    """The tag of a parameter: each has one.

    Embedding, head and norms have the same names in the tables of all families (`fnrecipe.models.parameters`). What else has
    two dimensions is a matrix; what else has one, the bias of a norm too, is a bias.
    """
    name = path.rpartition(".")[2]
    if name in ("embedding", "positions"):
        return "@embedding"
    if name == "head":
        return "@head"
    if dims > 1:
        return "@matrices"
    return "@norms" if name.endswith("norm") else "@biases"


def tag_conflicts(key: str, patterns: Sequence[str]) -> Iterator[Problem]:
    """The first of the patterns under `key` that begins with @ and is no tag."""
    wrong = next((pattern for pattern in patterns if pattern.startswith("@") and pattern not in TAGS), None)
    if wrong is not None:
        yield Problem(key, "a known tag", repr(wrong), hint=did_you_mean(wrong, TAGS))

"""Keys that are read: recorded by a copy of the config, mentioned by code, or by neither."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from functools import partial

import attrs
import pytest
from attrs import field, frozen

from fnrecipe.config.reads import Watched, mentioned, recorded, unread
from fnrecipe.config.structure import unstructure


@frozen
class Inner:
    rate: float = 0.1
    steps: int = 3

    def total(self) -> float:
        return self.rate * self.steps


@frozen
class Outer:
    inner: Inner = field(factory=Inner)
    name: str = "x"
    extra: Mapping[str, int] = field(factory=lambda: {"a": 1})


def test_what_is_read_is_recorded_by_its_path() -> None:
    paths: set[str] = set()
    found = recorded(Outer(), paths)
    assert paths == set()
    assert found.inner.rate == 0.1
    assert paths == {"inner.rate"}
    assert found.name == "x"
    assert paths == {"inner.rate", "name"}


def test_methods_read_too() -> None:
    paths: set[str] = set()
    assert recorded(Outer(), paths).inner.total() == pytest.approx(0.3)
    assert paths == {"inner.rate", "inner.steps"}


def test_the_copy_is_as_the_config() -> None:
    config = Outer(Inner(0.5))
    found = recorded(config, set())
    assert isinstance(found, Outer)
    assert isinstance(found.inner, Inner)
    assert found == config
    assert config == found
    assert found == recorded(config, set())
    assert hash(found.inner) == hash(config.inner)
    assert repr(found) == repr(config)
    assert unstructure(found) == unstructure(config)
    assert attrs.fields(type(found)) == attrs.fields(Outer)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        found.name = "y"  # type: ignore[misc]


def test_what_is_made_of_the_copy_is_plain() -> None:
    found = recorded(Outer(), set())
    for plain in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), attrs.evolve(found, name="x")):  # noqa: S301
        assert type(plain) is Outer
        assert plain == Outer()


def total(config: Outer) -> float:
    return config.inner.total()


def test_a_watched_function_records_and_pickles_as_itself() -> None:
    paths: set[str] = set()
    assert Watched(total, paths)(Outer()) == pytest.approx(0.3)
    assert paths == {"inner.rate", "inner.steps"}
    assert pickle.loads(pickle.dumps(Watched(total, paths))) is total  # noqa: S301


def lazily(config: Outer, names: tuple[str, ...]) -> object:
    return lambda: [sub(config) for _ in names]


def sub(config: Outer) -> object:
    return getattr(config.inner, "steps") if config.name else None  # noqa: B009


def test_code_mentions_what_it_and_all_that_it_reaches_may_read() -> None:
    assert {"inner", "steps", "name"} <= mentioned([lazily])
    assert {"inner", "steps", "name"} <= mentioned([partial(lazily, names=()), {"b": 3}])
    assert "rate" not in mentioned([lazily])
    assert "steps" in mentioned([{"one": Watched(sub, set())}])
    assert "steps" in mentioned([lazily(Outer(), ())]), "a closure"


def test_it_follows_modules_but_not_those_of_others() -> None:
    found = mentioned([unread, lambda: attrs.evolve(pickle.dumps)])
    assert "rpartition" in found
    assert "HIGHEST_PROTOCOL" not in found


@pytest.mark.parametrize(
    ("paths", "names", "expected"),
    [
        (set(), set(), ["a.b", "a.c.d", "e"]),
        ({"a.b"}, set(), ["a.c.d", "e"]),
        ({"a.c"}, set(), ["a.b", "e"]),
        (set(), {"d", "e"}, ["a.b"]),
        ({"a.b", "a.c.d"}, {"e"}, []),
        ({"a.bb"}, {"a"}, ["a.b", "a.c.d", "e"]),
    ],
)
def test_a_key_is_unread_if_it_is_neither_recorded_nor_mentioned(paths: set[str], names: set[str], expected: list[str]) -> None:
    assert unread(["a.b", "a.c.d", "e"], paths, names) == expected

"""What differs between two checkpoints, against the tensors themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import checkpoint
from fnrecipe.checkpoint import compare
from fnrecipe.checkpoint.compare import Difference, differences, whole
from tests.checkpoints import save_cut

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def differ(root: Path, ours: dict[str, Tensor], theirs: dict[str, Tensor], parts: tuple[int, int] = (1, 1)) -> list[Difference]:
    for name, tensors, count in (("a", ours, parts[0]), ("b", theirs, parts[1])):
        save_cut(root / name, 1, tensors, count)
    found = [checkpoint.of_step(root / name, 1) for name in ("a", "b")]
    return list(differences(*found))


@pytest.mark.parametrize("parts", [(1, 1), (1, 3), (2, 3), (4, 1)])
def test_elements_are_compared_wherever_the_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[int, int]
) -> None:
    monkeypatch.setattr(compare, "_CHUNK", 5)
    x = torch.arange(1.0, 29.0).view(7, 4)
    y = x.clone()
    y[2, 1] += 0.5
    y[6, 3] = -28.0
    (found,) = differ(tmp_path, {"x": x, "same": x}, {"x": y, "same": x}, parts)
    assert (found.path, found.count, found.largest) == ("x", 2, 56.0)
    assert found.relative == 2.0


def test_a_whole_tensor_comes_back(tmp_path: Path) -> None:
    x = torch.arange(28.0).view(7, 4)
    save_cut(tmp_path, 1, {"a.x": x, "n": torch.tensor(3)}, 3)
    found = checkpoint.of_step(tmp_path, 1)
    assert torch.equal(whole(found, "a.x"), x)
    assert torch.equal(whole(found, "n"), torch.tensor(3))


def test_bits_count_where_dtypes_are_the_same(tmp_path: Path) -> None:
    x = torch.tensor([0.0, math.nan, math.inf, 1.0, math.nan])
    y = torch.tensor([-0.0, math.nan, -math.inf, 1.0, 2.0])
    (found,) = differ(tmp_path, {"x": x}, {"x": y})
    assert (found.count, found.largest, found.relative) == (3, math.inf, math.inf)
    (tmp_path / "zero").mkdir()
    (found,) = differ(tmp_path / "zero", {"x": x[:1]}, {"x": y[:1]})
    assert (found.count, found.largest, found.relative) == (1, 0.0, 0.0)


def test_values_count_where_dtypes_differ(tmp_path: Path) -> None:
    x = torch.tensor([1.0, 1.0 + 2**-12, math.nan])
    half, count = torch.arange(3), torch.arange(3, dtype=torch.int8)
    found = differ(tmp_path, {"x": x, "n": half}, {"x": x.bfloat16(), "n": count})
    assert [(each.path, each.count, each.largest) for each in found] == [("n", 0, 0.0), ("x", 1, 2.0**-12)]
    assert [str(each.theirs) for each in found] == ["int8 [3]", "bfloat16 [3]"]


def test_what_only_one_has_and_other_shapes_are_named(tmp_path: Path) -> None:
    found = differ(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, {"b": torch.ones(1, 2), "c": torch.ones(0)})
    assert [(each.path, str(each.ours), str(each.theirs)) for each in found] == [
        ("a", "float32 [2]", "None"),
        ("b", "float32 [2]", "float32 [1, 2]"),
        ("c", "None", "float32 [0]"),
    ]


NUMBERS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4))
def test_integers_are_compared_without_overflow(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    found = compare._compared(Difference("x", None, None), a, b)
    distances = [abs(x - y) for x, y in pairs if x != y]
    assert found.count == len(distances)
    assert found.largest == pytest.approx(max(distances, default=0), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, *INTEGERS, torch.bool])
def test_every_dtype_is_compared(tmp_path: Path, dtype: torch.dtype) -> None:
    x, y = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
    (found,) = differ(tmp_path, {"x": x}, {"x": y})
    assert (found.count, found.largest, found.relative) == (1, 1.0, 1.0)

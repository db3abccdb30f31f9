"""Files of tensors: the bytes that the library of safetensors would write."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe.checkpoint import tensors as shards
from fnrecipe.checkpoint.shard_file import write_files
from fnrecipe.checkpoint.tensors import Snapshot, snapshot

DTYPES = [
    *(torch.uint64, torch.int64, torch.float64, torch.complex64, torch.float32, torch.uint32, torch.int32, torch.bfloat16),
    *(torch.float16, torch.uint16, torch.int16, torch.float8_e5m2fnuz, torch.float8_e4m3fnuz, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.int8, torch.uint8, torch.bool),
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=5)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def patterned(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    drawn = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (drawn % 2).bool().view(shape) if dtype == torch.bool else drawn.view(dtype).view(shape)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.dictionaries(TEXTS, st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=12))
def test_a_file_has_the_bytes_that_the_library_writes(tmp_path: Path, drawn: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: patterned(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(drawn.items())}
    (tmp_path / "ours").unlink(missing_ok=True)
    digest = write_files({tmp_path / "ours": tensors})[tmp_path / "ours"]
    found = (tmp_path / "ours").read_bytes()
    assert found == safetensors.torch.save(tensors)
    assert digest == hashlib.sha256(found).hexdigest()


def test_what_is_not_contiguous_is_written_in_the_order_of_its_shape(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    write_files({tmp_path / "file": {"x": tensor}})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "file")["x"], tensor)


sizes = st.lists(st.integers(0, 300), max_size=30)


@settings(deadline=None)
@given(sizes=sizes)
def test_what_is_much_is_dealt_over_files_of_about_the_same_size(sizes: list[int]) -> None:
    tensors = {f"{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_FILE_BYTES", 100)
        files = snapshot(tensors).dealt()
        assert files == snapshot(dict(reversed(tensors.items()))).dealt()  # whatever their order in the state
    assert sorted(path for paths in files for path in paths) == sorted(tensors)
    assert len(files) <= min(8, max(1, sum(sizes) // 100))
    filled = [sum(tensors[path].nbytes for path in paths) for paths in files]
    assert max(filled, default=0) - min(filled, default=0) <= max(sizes, default=0)


def test_what_is_little_is_one_file_and_nothing_is_none(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(1 << 20) for name in "abcdefg"}  # 28 MiB
    assert [sorted(paths) for paths in snapshot(tensors).dealt()] == [sorted(tensors)]
    assert shards.write(tmp_path, Snapshot({}, {})) == ({}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_no_state_has_is_none_in_a_header(tmp_path: Path) -> None:
    text = b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    assert shards.header(tmp_path / "file") == {"x": ("", [1])}


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write_files({tmp_path / "file": {"x": torch.zeros(1)}})
    with pytest.raises(FileExistsError):
        write_files({tmp_path / "file": {"x": torch.ones(1)}})


def test_a_dtype_that_the_format_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^expected dtypes of safetensors, found x: torch\.complex128$"):
        write_files({tmp_path / "file": {"x": torch.zeros(1, dtype=torch.complex128)}})
    assert not (tmp_path / "file").exists()

"""Checkpoints as torch's distributed ones and back, against torch's own reader and writer."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint.compare import differences
from fnrecipe.errors import UsageError
from fnrecipe.interop import dcp
from fnrecipe.interop.dcp_pickles import unpickled
from tests.checkpoint.test_golden import CURSOR, FACTS, GOLDEN, golden
from tests.checkpoints import silent
from tests.cli.helpers import assert_usage_error, fnrecipe_here
from tests.helpers import assert_same_bits
from tests.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EXTRA = {"float8": torch.arange(8.0).to(torch.float8_e4m3fn), "int8": torch.arange(3, dtype=torch.int8)}


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    dcp.write(checkpoint.of_step(GOLDEN, 3), tmp_path / "dcp")
    return tmp_path / "dcp"


def test_torch_reads_what_is_written(converted: Path) -> None:
    expected = tree.paths(golden())
    found = {path: torch.zeros_like(tensor) for path, tensor in expected.items()}
    torch_dcp.load(found, checkpoint_id=converted, no_dist=True)
    assert_same_bits(found, expected)
    assert not list(converted.parent.glob("*.tmp"))


def test_it_comes_back(converted: Path, tmp_path: Path) -> None:
    dcp.convert_back(converted, tmp_path)
    ours, theirs = checkpoint.of_step(GOLDEN, 3), checkpoint.newest(tmp_path, silent)
    assert theirs is not None
    assert (theirs.step, theirs.cursor, theirs.files) == (3, CURSOR, FACTS)
    assert list(differences(ours, theirs)) == []
    with pytest.raises(UsageError, match="expected no checkpoint of step 3, found one"):
        dcp.convert_back(converted, tmp_path)


def test_every_dtype_and_stride_comes_back(tmp_path: Path) -> None:
    state = {**EXTRA, "turned": torch.arange(6.0).view(2, 3).t(), "view": torch.arange(9.0)[3:5]}
    checkpoint.save(tmp_path / "a", 1, state, None, {})
    dcp.write(checkpoint.of_step(tmp_path / "a", 1), tmp_path / "dcp")
    facts = torch.frombuffer(bytearray(b'{"step": 1, "cursor": null, "files": {}}'), dtype=torch.uint8)
    torch_dcp.save({**state, dcp.OURS: facts}, checkpoint_id=tmp_path / "torch", no_dist=True)
    for name in ("dcp", "torch"):
        dcp.convert_back(tmp_path / name, tmp_path / f"{name}_back")
        found = checkpoint.of_step(tmp_path / f"{name}_back", 1)
        assert_same_bits(checkpoint.restore(found, tree.map(torch.zeros_like, state)), state)


def resave(rank: int, size: int, path: Path, out: Path) -> None:
    """Loads a distributed checkpoint as tensors cut over the ranks, and saves it so."""
    mesh = init_device_mesh("cpu", (size,))
    state = tree.paths(golden())
    state[dcp.OURS] = torch.zeros(dcp_size(path), dtype=torch.uint8)
    cut = {
        name: distribute_tensor(torch.zeros_like(leaf), mesh, [Shard(0)]) if leaf.ndim else leaf for name, leaf in state.items()
    }
    torch_dcp.load(cut, checkpoint_id=path)
    torch_dcp.save(cut, checkpoint_id=out)
    dist.barrier()


def dcp_size(path: Path) -> int:
    return int(torch_dcp.FileSystemReader(path).read_metadata().state_dict_metadata[dcp.OURS].size[0])  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_torch_has_cut_over_ranks_comes_back(converted: Path, tmp_path: Path) -> None:
    on_ranks(2, resave, converted, tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.distcp"))) == 2
    dcp.convert_back(tmp_path / "cut", tmp_path / "back")
    found = checkpoint.of_step(tmp_path / "back", 3)
    assert list(differences(checkpoint.of_step(GOLDEN, 3), found)) == []


class Harm:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("make", [Harm, lambda: {"a": [Harm()]}])
def test_nothing_that_a_pickle_names_is_run(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (converted / ".metadata").write_bytes(pickle.dumps(make()))
    with pytest.raises(UsageError, match=r"a pickle that is not read: it names pathlib.Path.touch|it names builtins.getattr"):
        dcp.convert_back(converted, tmp_path / "back")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x04.",
        b"cos\nsystem\n.",
        b"(" * 10,
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        pickle.dumps(len),
        b"\x80\x02N\x86.",
    ],
)
def test_what_is_no_pickle_of_tensors_is_told(data: bytes) -> None:
    with pytest.raises(ValueError, match="a pickle that is not read"):
        unpickled(data)


def spoil(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "No such file"),
        (lambda path: spoil(path / ".metadata", b"__0_0.distcp", b"../0.distcpx"), "a file '../0.distcpx'"),
        (lambda path: spoil(path / ".metadata", b"float32", b"float64"), "slice|numbers|buffer|storage"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"x" * 10_000), "not a zip file"),
        (lambda path: spoil(path / "__0_0.distcp", golden()["params"]["weight"].numpy().tobytes()[4:12], b"\0" * 8), "CRC"),
    ],
)
def test_damage_is_one_line(converted: Path, tmp_path: Path, act: Callable[[Path], Any], found: str) -> None:
    act(converted)
    with pytest.raises(UsageError, match=f"expected a distributed checkpoint of tensors, found .*({found})") as caught:
        dcp.convert_back(converted, tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    torch_dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(UsageError, match="expected a distributed checkpoint of fnrecipe, found no 'fnrecipe'"):
        dcp.convert_back(tmp_path / "other", tmp_path / "back")
    torch_dcp.save({"x": torch.ones(2), "epoch": 3}, checkpoint_id=tmp_path / "number", no_dist=True)
    with pytest.raises(UsageError, match="found epoch, which is no tensor"):
        dcp.convert_back(tmp_path / "number", tmp_path / "back")


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(*args: str | Path) -> Any:
        return fnrecipe_here(monkeypatch, capsys, "checkpoint", "convert", *args)

    shutil.copytree(GOLDEN, tmp_path / "run/checkpoints")
    ended = verb(tmp_path / "run", tmp_path / "dcp")
    assert (ended.status, ended.err) == (0, "")
    assert "8 tensors of step 3" in ended.out
    assert verb(tmp_path / "dcp", tmp_path / "again").status == 0
    found = checkpoint.of_step(tmp_path / "again/checkpoints", 3)
    assert list(differences(checkpoint.of_step(GOLDEN, 3), found)) == []
    assert_usage_error(verb(tmp_path / "run", tmp_path / "dcp"), "expected a new directory, found one that is there")

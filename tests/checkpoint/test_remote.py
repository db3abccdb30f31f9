"""Copies of checkpoints on remote file systems: in memory, and on a server that speaks S3."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from fnrecipe import checkpoint
from fnrecipe.checkpoint import remote
from fnrecipe.checkpoint.damage import problem
from fnrecipe.checkpoint.keep import Policy
from fnrecipe.errors import CheckpointError, FnrecipeError, UsageError
from fnrecipe.runtime import remote as files
from fnrecipe.runtime.remote import RemoteDirectory, remote_directory
from tests.checkpoints import FILES, save_two, small_state

BASE = "checkpoints/step_00000020"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of a bucket on a server of this process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        known = fsspec.get_filesystem_class("s3")
        known.clear_instance_cache()  # other tests have made some without credentials
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        known.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3", "path"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteDirectory:
    """A directory in which nothing is."""
    if request.param == "path":
        return remote_directory((tmp_path / "there").as_uri())
    root = "memory://" if request.param == "memory" else request.getfixturevalue("bucket")
    return remote_directory(f"{root}/{tmp_path.name}/run")


@pytest.fixture
def memory(tmp_path: Path) -> RemoteDirectory:
    return remote_directory(f"memory://{tmp_path.name}/run")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return save_two(tmp_path / "checkpoints")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_copy_comes_back_as_it_went(there: RemoteDirectory, root: Path, tmp_path: Path) -> None:
    source = root / "step_00000020"
    assert remote.complete(there) == {}
    assert remote.upload(source, there) == f"{there.address}/{BASE}" == remote.upload(source, there)
    assert there.names() == {f"{BASE}/{name}" for name in FILES}
    assert remote.complete(there) == {"step_00000020": 20}
    back = remote.download(there, "step_00000020", tmp_path / "back")
    assert contents(back) == contents(source)
    assert remote.download(there, "step_00000020", tmp_path / "back") == back


@pytest.mark.parametrize("written", [0, 1, 2])
def test_what_a_killed_upload_left_is_no_checkpoint_and_the_next_one_is(
    there: RemoteDirectory, root: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    real, count = RemoteDirectory.write, iter(range(10))

    def write(self: RemoteDirectory, name: str, source: Any) -> str:
        if next(count) == written:
            raise KeyboardInterrupt
        return real(self, name, source)

    remote.upload(root / "step_00000010", there)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteDirectory, "write", write)
        with pytest.raises(KeyboardInterrupt):
            remote.upload(root / "step_00000020", there)
    assert remote.complete(there) == {"step_00000010": 10}
    remote.upload(root / "step_00000020", there)
    assert remote.complete(there) == {"step_00000010": 10, "step_00000020": 20}


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_is_flipped_there_is_found_on_the_way_back(
    there: RemoteDirectory, root: Path, tmp_path: Path, name: str
) -> None:
    remote.upload(root / "step_00000020", there)
    data = bytearray(there.read(f"{BASE}/{name}", 1 << 20))
    data[len(data) // 2] ^= 1
    there.write(f"{BASE}/{name}", io.BytesIO(data))
    with pytest.raises(CheckpointError, match="expected a whole checkpoint, found a damaged copy"):
        remote.download(there, "step_00000020", tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


class Failing:
    """A file system whose `open` fails some times, or on whose way a bit is flipped."""

    def __init__(self, system: Any, failures: int, error: Exception) -> None:
        self.system, self.failures, self.error = system, failures, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    def open(self, path: str, mode: str) -> Any:
        self.failures -= 1
        if self.failures >= 0:
            raise self.error
        return self.system.open(path, mode)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(files.time, "sleep", found.append)
    return found


@pytest.mark.parametrize(
    ("failures", "error", "expected"),
    [
        (2, OSError("slow down"), [1, 2]),
        (2, RuntimeError("of its own"), [1, 2]),
        (9, OSError("slow down"), [1, 2, 4, 8]),
        (9, PermissionError("no"), []),
    ],
)
def test_what_may_pass_is_tried_again(
    there: RemoteDirectory, root: Path, pauses: list[float], failures: int, error: Exception, expected: list[float]
) -> None:
    failing = attrs.evolve(there, system=Failing(there._system, failures, error))
    if failures == 2:
        remote.upload(root / "step_00000020", failing)
    else:
        with pytest.raises(FnrecipeError, match=rf"{BASE}/state_0000\.safetensors: cannot write: {error}$"):
            remote.upload(root / "step_00000020", failing)
    assert pauses == expected
    assert len(remote.complete(there)) == (failures == 2)


def test_what_is_not_read_back_as_it_was_written_is_no_copy(memory: RemoteDirectory, root: Path, pauses: list[float]) -> None:
    class Flipping(Failing):
        def open(self, path: str, mode: str) -> Any:
            return io.BytesIO(b"other") if mode == "rb" else self.system.open(path, mode)

    with pytest.raises(FnrecipeError, match=r"what was read back is not what was written$"):
        remote.upload(root / "step_00000020", attrs.evolve(memory, system=Flipping(memory._system, 0, OSError())))
    assert remote.complete(memory) == {}
    assert len(pauses) == 4


def test_a_damaged_checkpoint_is_not_copied(memory: RemoteDirectory, root: Path) -> None:
    shard = root / "step_00000020/state_0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"found a damaged one: state_0000\.safetensors is not what SHA256SUMS says"):
        remote.upload(shard.parent, memory)
    assert remote.complete(memory) == {}


def test_a_checkpoint_that_is_removed_while_it_is_copied_is_copied(
    memory: RemoteDirectory, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RemoteDirectory.write
    before = contents(root / "step_00000020")

    def write(self: RemoteDirectory, name: str, source: Any) -> str:
        shutil.rmtree(root / "step_00000020", ignore_errors=True)
        return real(self, name, source)

    monkeypatch.setattr(RemoteDirectory, "write", write)
    remote.upload(root / "step_00000020", memory)
    assert contents(remote.download(memory, "step_00000020", tmp_path / "back")) == before


def test_another_checkpoint_of_the_step_stays(memory: RemoteDirectory, root: Path, tmp_path: Path) -> None:
    other = checkpoint.save(tmp_path / "other", 20, small_state(7.0), None, {})
    remote.upload(root / "step_00000020", memory)
    with pytest.raises(CheckpointError, match="expected the same checkpoint, found another one of its step"):
        remote.upload(other, memory)
    with pytest.raises(CheckpointError, match="expected the same checkpoint, found another one of its step"):
        remote.download(memory, "step_00000020", other.parent)
    assert problem(other, 20, every_byte=True) == ""


def test_names_that_lead_elsewhere_are_not_fetched(memory: RemoteDirectory, root: Path, tmp_path: Path) -> None:
    remote.upload(root / "step_00000020", memory)
    memory.write("checkpoints/step_00000020/SHA256SUMS", io.BytesIO(f"{'0' * 64}  ..\n".encode()))
    with pytest.raises(CheckpointError, match="found a damaged copy"):
        remote.download(memory, "step_00000020", tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


def test_old_ones_and_halves_go_and_what_comes_after_a_step(there: RemoteDirectory, tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        remote.upload(checkpoint.save(tmp_path / "checkpoints", step, small_state(float(step)), None, {}), there)
    for step in (20, 60):
        there.remove(f"checkpoints/step_{step:08d}/SHA256SUMS")
    remote.prune(there, Policy(last=1, every_n_steps=30, best=1), {10: 0.5, 40: 0.7})
    assert list(remote.complete(there).values()) == [10, 30, 50]
    assert {name.split("/")[1][-2:] for name in there.names()} == {"10", "30", "50", "60"}
    remote.forget_after(there, 10)
    assert list(remote.complete(there).values()) == [10]


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("s3://bucket-that-is-not/run", FnrecipeError, r"cannot list: .*bucket does not exist"),
        ("zip://a/run", UsageError, "expected an address of files that are read as they are"),
        ("s3://***@bucket/run", UsageError, "expected a whole address, found one without its secret"),
    ],
)
def test_places_that_are_none_are_told(bucket: str, root: Path, address: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        remote.upload(root / "step_00000020", remote_directory(address))

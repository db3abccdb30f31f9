"""The output directory: one config and one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fnrecipe import checkpoint
from fnrecipe.config import yaml
from fnrecipe.config.affects import runtime_paths
from fnrecipe.errors import FnrecipeError, UsageError
from fnrecipe.recipes.lm.config import config
from fnrecipe.shell.directory import run_dir
from tests.nobody import error_of_nobody, public

BASE: dict[str, Any] = {
    "optimizer": {"config": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "regime": {"num_steps": 30, "validate_every_n_steps": None},
}


def changed(**regime: Any) -> dict[str, Any]:
    return {**BASE, "regime": {**BASE["regime"], **regime}}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A directory with the config BASE and a checkpoint."""
    write_config(tmp_path)
    checkpoint.save(tmp_path / run_dir.CHECKPOINTS, 1, {"x": torch.ones(1)}, None, {})
    return tmp_path


def write_config(out: Path) -> None:
    (out / run_dir.CONFIG).write_text(yaml.dump(BASE))


def test_the_same_config_is_allowed(trained: Path) -> None:
    run_dir.check_config(trained, BASE)


def test_a_tuple_in_a_config_is_the_list_in_its_file(trained: Path) -> None:
    run_dir.check_config(trained, BASE)
    with pytest.raises(UsageError, match="betas"):
        run_dir.check_config(trained, {**BASE, "optimizer": {"config": {"lr": 0.1, "betas": [0.9, 0.99]}}})


def test_another_config_is_refused_with_the_difference_alone(trained: Path) -> None:
    other = changed(validate_every_n_steps=5)
    other["optimizer"] = {"config": {"lr": 0.2, "betas": [0.9, 0.95]}}
    with pytest.raises(UsageError) as caught:
        run_dir.check_config(trained, other)
    first, *lines = str(caught.value).splitlines()
    assert str(trained) in first
    assert "--resume-with-changes" in first
    assert lines == ["  optimizer.config.lr: 0.1 there, 0.2 now", "  regime.validate_every_n_steps: null there, 5 now"]


def test_a_key_that_is_new_or_gone_is_a_difference(trained: Path) -> None:
    for other in (changed(extra=1), {"regime": BASE["regime"]}):
        with pytest.raises(UsageError):
            run_dir.check_config(trained, other)


def test_more_steps_are_allowed(trained: Path) -> None:
    run_dir.check_config(trained, changed(num_steps=40))


@pytest.mark.parametrize("num_steps", [29, 1, None, 40.5])
def test_fewer_steps_and_no_number_of_steps_are_refused(trained: Path, num_steps: Any) -> None:
    with pytest.raises(UsageError, match=r"regime.num_steps: 30 there"):
        run_dir.check_config(trained, changed(num_steps=num_steps))


def test_more_steps_do_not_excuse_another_change(trained: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_dir.check_config(trained, changed(num_steps=40, validate_every_n_steps=5))
    assert "num_steps:" not in str(caught.value)


@pytest.mark.parametrize("key", ["num_workers", "prefetch", "cache"])
def test_how_data_is_read_may_change_and_what_is_read_may_not(tmp_path: Path, key: str) -> None:
    old = {"dataset": {"num_workers": 0, "prefetch": 2, "cache": None, "order": "blocks"}, **BASE}
    (tmp_path / run_dir.CONFIG).write_text(yaml.dump(old))
    checkpoint.save(tmp_path / run_dir.CHECKPOINTS, 1, {"x": torch.ones(1)}, None, {})
    new = {**old, "dataset": {**old["dataset"], key: 4}}
    runtime = set(runtime_paths(config))
    run_dir.check_config(tmp_path, new, runtime)
    with pytest.raises(UsageError) as caught:
        run_dir.check_config(tmp_path, {**new, "dataset": {**new["dataset"], "order": "documents"}}, runtime)
    assert str(caught.value).splitlines()[1:] == ["  dataset.order: 'blocks' there, 'documents' now"]


FILES = {"a: 1": "x", "a: 2": "y", "b: 1": "z"}


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        ({**FILES, "a: 2": "x"}, ["  changed: a: 2"]),
        ({"a: 2": "y"}, ["  missing: a: 1, b: 1"]),
        ({**FILES, "b: 2": "z", "c: 1": "z"}, ["  added: b: 2, c: 1"]),
        ({"b: 1": "y", "a: 1": "z", "a: 3": "y"}, ["  changed: a: 1, b: 1", "  missing: a: 2", "  added: a: 3"]),
        ({}, ["  missing: a: 1, a: 2, b: 1"]),
    ],
)
def test_other_data_is_refused_by_the_names_of_its_files(tmp_path: Path, new: dict[str, str], lines: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        run_dir.check_identity(tmp_path, FILES, new)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: holds a run on other data; ")
    assert "--resume-with-changes" in first
    assert rest == lines


@pytest.mark.parametrize("files", [FILES, dict(reversed(FILES.items())), {}])
def test_the_same_data_in_any_order_is_allowed(tmp_path: Path, files: dict[str, str]) -> None:
    run_dir.check_identity(tmp_path, files, FILES if files else {})


@pytest.mark.parametrize(("number", "end"), [(10, "a: 9"), (11, "a: 9, … (11 in all)"), (12_345, "a: 9, … (12,345 in all)")])
def test_many_files_are_named_in_part(tmp_path: Path, number: int, end: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_dir.check_identity(tmp_path, {}, {f"a: {i}": "x" for i in range(number)})
    assert str(caught.value).splitlines()[1] == f"  added: {', '.join(f'a: {i}' for i in range(9))}, {end}"


def test_without_a_checkpoint_anything_is_allowed(tmp_path: Path) -> None:
    write_config(tmp_path)
    run_dir.check_config(tmp_path, changed(num_steps=2))


HOLD = """
import sys, time
from pathlib import Path
from fnrecipe.shell.directory import run_dir
with run_dir.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_directory_is_held_by_one_process_until_its_death(tmp_path: Path) -> None:
    out = tmp_path / "deep/run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"another run \(process {holder.pid}\)"), run_dir.claimed(out):
            pass
        holder.kill()
        holder.wait()
    with run_dir.claimed(out):
        assert (out / ".lock").read_text().splitlines()[0] == str(os.getpid())
    with run_dir.claimed(out):
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_the_directory_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a directory"), run_dir.claimed(tmp_path / name):
        pass


# The lock is a file of this directory, and nothing else.

LOCKS: dict[str, Callable[[Path], Any]] = {
    "a link": lambda path: path.symlink_to(path.parent / "victim"),
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_is_no_file_is_refused_and_let_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("mine")
    LOCKS[kind](tmp_path / ".lock")
    message = f"{tmp_path}/.lock: cannot open the lock of the output directory: expected a file, found {kind}"
    with pytest.raises(UsageError) as caught, run_dir.claimed(tmp_path):
        pass
    assert str(caught.value) == message
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_link_to_nothing_makes_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="found a link"), run_dir.claimed(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"not a number", b"9" * 5000])
def test_a_lock_may_hold_anything(tmp_path: Path, content: bytes) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(UsageError, match=r"another run \(process (unknown|9{20})\) is writing here"),
            run_dir.claimed(tmp_path),
        ):
            pass
    with run_dir.claimed(tmp_path):
        assert lock.read_text().splitlines()[0] == str(os.getpid())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError) as caught, run_dir.claimed(tmp_path):
        pass
    advice = "choose an output directory on a file system that locks files"
    assert str(caught.value) == f"{tmp_path}: cannot lock the output directory: {os.strerror(number)}; {advice}"


def claim(out: Path) -> None:
    with run_dir.claimed(out):
        pass


def test_a_lock_of_another_user_is_told() -> None:
    told = "cannot open the lock of the output directory: Permission denied"
    with public() as out:
        for name in ("logs", "metrics"):
            (out / name).mkdir()
        (out / ".lock").touch(mode=0o400)
        assert error_of_nobody(partial(claim, out)) == f"UsageError: {out}/.lock: {told}"


def test_a_directory_of_another_user_is_told() -> None:
    told = "cannot write to the output directory: Permission denied"
    with public() as root:
        out = root / "out"
        out.mkdir(mode=0o555)
        assert error_of_nobody(partial(claim, out)) == f"UsageError: {out}: {told}"
        out.chmod(0o000)
        assert error_of_nobody(partial(claim, out / "below")) == f"UsageError: {out}/below: {told}"


def test_checkpoints_of_another_user_are_told() -> None:
    with public() as out:
        write_config(out)
        (out / run_dir.CHECKPOINTS).mkdir(mode=0o000)
        told = error_of_nobody(lambda: run_dir.check_config(out, BASE))
    assert told == f"UsageError: {out}/checkpoints: cannot read the output directory: Permission denied"


# A claim holds for one directory, not for its name.


def replaced(out: Path) -> None:
    out.rename(out.with_name("moved"))
    shutil.copytree(out.with_name("moved"), out)


def linked(out: Path) -> None:
    out.rename(out.with_name("moved"))
    (out.parent / "other").mkdir()
    out.symlink_to("other")


GONE: dict[str, Callable[[Path], Any]] = {
    "removed": shutil.rmtree,
    "removed and made again": lambda out: (shutil.rmtree(out), out.mkdir()),
    "renamed": lambda out: out.rename(out.with_name("moved")),
    "replaced by a copy": replaced,
    "replaced by a link": linked,
    "replaced by a file": lambda out: (shutil.rmtree(out), out.touch()),
}


@pytest.mark.parametrize("act", GONE.values(), ids=GONE.keys())
def test_a_claim_ends_with_its_directory(tmp_path: Path, act: Callable[[Path], Any]) -> None:
    out = tmp_path / "out"
    with run_dir.claimed(out) as claim:
        run_dir.check_claim(out, claim)
        act(out)
        with pytest.raises(FnrecipeError, match="out: the output directory was removed, renamed or replaced while the run"):
            run_dir.check_claim(out, claim)


def test_a_link_to_the_directory_is_as_good_as_its_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with run_dir.claimed(tmp_path / "out") as claim:
        run_dir.check_claim(tmp_path / "out", claim)
        run_dir.check_claim(tmp_path / "real", claim)


@pytest.mark.parametrize("content", [b"\xff", b"a: [", b"- 1", b"a: 1\na: 2"])
def test_a_config_in_the_directory_that_is_none_is_a_usage_error(trained: Path, content: bytes) -> None:
    (trained / run_dir.CONFIG).write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        run_dir.check_config(trained, BASE)

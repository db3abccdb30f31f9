"""Runs of several processes over gloo: the same bytes as those of one, whatever happens to them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fnrecipe.errors import UsageError
from fnrecipe.gang import Gang, check_same, first_host, gather
from fnrecipe.mesh import check_size
from tests.helpers import Ended, end, last_step, pairs, remains, start

LANES = {"dataset__num_lanes": 8, "gang__num_leaves": 8}


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one process with 8 lanes and leaves."""
    out = tmp_path_factory.mktemp("gang") / "alone"
    assert end(start("train", "lm", "--out", str(out), "--config", *pairs(texts, **LANES))).status == 0
    return out


def torchrun(size: int, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "fnrecipe.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def train(size: int, texts: Path, out: Path, **changes: object) -> subprocess.Popen[str]:
    return torchrun(size, "train", "lm", "--out", str(out), "--config", *pairs(texts, **LANES | changes))


def by_hand(number: int, texts: Path, out: Path, environment: dict[str, str], **changes: object) -> subprocess.Popen[str]:
    """One of the processes of a gang of two, with the variables of its launcher."""
    arguments = ["train", "lm", "--out", str(out), "--config", *pairs(texts, **LANES | changes)]
    names = {name: value.format(number=number) for name, value in environment.items()}
    command = [sys.executable, "-m", "fnrecipe.cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **names})


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The process ids of the ranks, in no order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if "fnrecipe.cli" in Path(f"/proc/{child}/cmdline").read_text()]


def wait_for(launcher: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while last_step(out) < step:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_leave_the_bytes_of_one(alone: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    assert end(start("train", "lm", "--nproc", "2", "--out", str(out), "--config", *pairs(texts, **LANES))).status == 0
    assert remains(out) == remains(alone)
    assert {path.name for path in (out / "logs").iterdir()} == {"rank_0.log", "rank_1.log", "speed.jsonl"}


@pytest.mark.slow
def test_eight_processes_leave_the_bytes_of_one(alone: Path, texts: Path, tmp_path: Path) -> None:
    assert end(train(8, texts, tmp_path / "out")).status == 0
    assert remains(tmp_path / "out") == remains(alone)


@pytest.mark.slow
def test_data_that_ends_ends_every_size_at_the_same_step(texts: Path, tmp_path: Path) -> None:
    changes = {"regime__num_steps": "null", "regime__num_data_epochs": 1, "lr_scheduler__config__cycle_len": 40}
    for size in (1, 4):
        assert end(train(size, texts, tmp_path / str(size), **changes)).status == 0
    assert remains(tmp_path / "4") == remains(tmp_path / "1")


@pytest.mark.slow
def test_killed_and_gone_on_with_at_other_sizes_it_leaves_the_same_bytes(alone: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for size, step in ((4, 6), (1, 18)):
        launcher = train(size, texts, out)
        wait_for(launcher, out, step)
        os.kill(ranks_of(launcher)[-1] if size > 1 else launcher.pid, signal.SIGKILL)
        assert end(launcher).status != 0
    assert end(train(2, texts, out)).status == 0
    found, expected = remains(out), remains(alone)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(texts: Path, tmp_path: Path, size: int) -> None:
    launcher = train(size, texts, tmp_path, regime__num_steps=100_000, lr_scheduler__config__cycle_len=40)
    wait_for(launcher, tmp_path, 6)
    os.kill(ranks_of(launcher)[-1], signal.SIGUSR1)
    ended = end(launcher)
    assert ended.status == 0, ended.errors
    stopped = last_step(tmp_path)
    assert f"SIGUSR1: saved step {stopped}; the same command goes on from there" in ended.output
    assert (tmp_path / f"checkpoints/step_{stopped:08d}").is_dir()


def test_a_killed_rank_ends_the_run_with_its_name(texts: Path, tmp_path: Path) -> None:
    config = pairs(texts, **LANES, regime__num_steps=100_000, lr_scheduler__config__cycle_len=40)
    launcher = start("train", "lm", "--nproc", "2", "--out", str(tmp_path), "--config", *config)
    wait_for(launcher, tmp_path, 3)
    os.kill(max(ranks_of(launcher)), signal.SIGKILL)
    ended = end(launcher)
    assert ended.status == 1
    assert "was ended by SIGKILL; the same command goes on from the last checkpoint" in ended.errors.splitlines()[-1]
    assert "Traceback" not in ended.errors


def test_a_rank_with_another_config_is_refused(texts: Path, tmp_path: Path) -> None:
    environment = {"RANK": "{number}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    ranks = [by_hand(n, texts, tmp_path, environment, optimizer__config__lr=[1e-3, 2e-3][n]) for n in range(2)]
    for rank, ended in enumerate(map(end, ranks)):
        assert ended.status == 2
        assert f"rank {rank}: error: rank 1: expected what rank 0 has, found a difference" in ended.errors
        assert "  optimizer.config.lr: 0.001 on rank 0, 0.002 on rank 1" in ended.errors


@pytest.mark.slow
def test_processes_that_slurm_started_are_a_gang(alone: Path, texts: Path, tmp_path: Path) -> None:
    environment = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "{number}",
        "SLURM_LOCALID": "{number}",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": free_port(),
    }
    ended: list[Ended] = [end(rank) for rank in [by_hand(n, texts, tmp_path / "out", environment) for n in range(2)]]
    assert [e.status for e in ended] == [0, 0]
    assert remains(tmp_path / "out") == remains(alone)


@pytest.mark.parametrize(("size", "wrong"), [(3, ["a", "b"]), (8, ["b"]), (5, ["a", "b"])])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(size: int, wrong: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_size({"a": 8, "b": 4}, size)
    assert str(caught.value).endswith(f"(1, 2, 4), found {size}")
    assert all(f"{name} = " in str(caught.value) for name in wrong)


def test_sizes_that_divide_are_taken() -> None:
    for size in (1, 2, 4):
        check_size({"a": 8, "b": 4}, size)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("gpu[003-010,012],cpu7", "gpu003"), ("node1", "node1"), ("a,b", "a"), ("n[7]", "n7"), ("x-1-[02,05]", "x-1-02")],
)
def test_the_first_host_of_a_slurm_list(hosts: str, expected: str) -> None:
    assert first_host(hosts) == expected


def test_a_gang_of_one_asks_nobody() -> None:
    assert gather(Gang(), {"a": [1, None]}) == [{"a": [1, None]}]
    check_same(Gang(), {"a": 1})

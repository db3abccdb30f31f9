"""Runs of several processes over gloo: the same bytes as those of one, whatever happens to them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fnrecipe import checkpoint
from fnrecipe.errors import EXIT_AGAIN, LostError, UsageError
from fnrecipe.runtime.gang import Gang, all_gather_objects, check_same
from fnrecipe.runtime.last_words import last_words
from fnrecipe.runtime.process_groups import check_world_size
from tests.helpers import Ended, assert_same_bits, end, last_step, pairs, remains, rows, start
from tests.zygote import ENVIRONMENT, children

LANES = {"dataset__num_lanes": 4, "gang__num_microbatches": 4}
EIGHT = {"dataset__num_lanes": 8, "gang__num_microbatches": 8, "regime__num_steps": 9, "trainer__jit": "off"}
"""What eight processes train: with a checkpoint and a validation on the way; fewer are traced."""


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one process with 4 lanes and microbatches."""
    out = tmp_path_factory.mktemp("gang") / "alone"
    assert end(start("train", "lm", "--out", str(out), "--config", *pairs(texts, **LANES))).status == 0
    return out


def torchrun(size: int, *args: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(
        [*command, "-m", "fnrecipe.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def train(size: int, texts: Path, out: Path, **changes: object) -> subprocess.Popen[str]:
    return start(*arguments(texts, out, **changes), "--nproc", str(size))


def arguments(texts: Path, out: Path, **changes: object) -> list[str]:
    return ["train", "lm", "--out", str(out), "--config", *pairs(texts, **LANES | changes)]


def by_hand(number: int, texts: Path, out: Path, environment: dict[str, str], **changes: object) -> subprocess.Popen[str]:
    """One of the processes of a gang, with the variables of its launcher."""
    names = {name: value.format(number=number) for name, value in environment.items()}
    return start(*arguments(texts, out, **changes), env=names)


def by_hand_environment(size: int = 2) -> dict[str, str]:
    """As torchrun's agents set it where one of them has come back, which counts its restarts anew, and rank 0 has the store."""
    return {
        "TORCHELASTIC_RESTART_COUNT": "{number}",
        "RANK": "{number}",
        "LOCAL_RANK": "{number}",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
    }


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The process ids of the ranks, in no order."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children(launcher.pid)}
    return [child for child, command in commands.items() if "fnrecipe.cli" in command or "tests.zygote" in command]


def assert_trained_alike(out: Path, alone: Path) -> None:
    """Records and samples have the same bytes, and the last checkpoints the same tensors, however these lie in files."""
    names = ("metrics/train.jsonl", "metrics/valid.jsonl", "sample.txt")
    assert {name: (out / name).read_bytes() for name in names} == {name: (alone / name).read_bytes() for name in names}
    found, expected = (checkpoint.newest(each / "checkpoints", warnings.warn) for each in (out, alone))
    assert found is not None
    assert expected is not None
    assert (found.step, found.cursor, found.files) == (expected.step, expected.cursor, expected.files)
    blank = {path: torch.zeros(saved.shape, dtype=getattr(torch, saved.dtype)) for path, saved in expected.tensors.items()}
    assert_same_bits(checkpoint.restore(found, blank), checkpoint.restore(expected, blank))


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
    assert {path.name for path in (out / "logs").iterdir()} == {"rank_0.log", "rank_1.log", "perf.jsonl"}


HANGS = """
import time

import attrs
import torch.distributed as dist

from fnrecipe.recipes.lm.train import recipe as lm

calls = []


def loss(config):
    of_lm = lm.loss(config)

    def waits_for_ever(params, batch, key=None):
        calls.append(batch)
        if dist.get_rank() == 1 and len(calls) > 20:
            time.sleep(600)
        return of_lm(params, batch, key)

    return waits_for_ever


recipe = attrs.evolve(lm, loss=loss)
"""


def test_a_rank_that_hangs_in_a_step_is_named_and_says_where_it_is(texts: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "hangs.py", tmp_path / "out"
    file.write_text(HANGS)
    config = pairs(texts, **LANES, trainer__jit="off", gang__step_timeout=0.05)
    began = time.monotonic()
    ended = end(start("train", str(file), "--nproc", "2", "--out", str(out), "--config", *config))
    assert time.monotonic() - began < 120
    assert ended.status not in (0, EXIT_AGAIN)
    assert "rank 1 does not answer: it hangs or was killed" in ended.errors
    stacks = (out / "logs/rank_1.log").read_text()
    assert "a rank does not answer; this one is here:" in stacks
    assert "in waits_for_ever" in stacks
    assert "a rank does not answer; this one is here:" in (out / "logs/rank_0.log").read_text()


@pytest.mark.slow
def test_eight_processes_leave_the_bytes_of_one(texts: Path, tmp_path: Path) -> None:
    for size in (1, 8):
        assert end(train(size, texts, tmp_path / str(size), **EIGHT)).status == 0
    assert remains(tmp_path / "8") == remains(tmp_path / "1")


@pytest.mark.slow
def test_data_that_ends_ends_every_size_at_the_same_step(texts: Path, tmp_path: Path) -> None:
    changes = {"regime__num_steps": "null", "regime__num_data_epochs": 1, "lr_scheduler__config__cycle_len": 40}
    assert end(by_hand(0, texts, tmp_path / "1", by_hand_environment(1), **changes)).status == 0
    assert end(train(2, texts, tmp_path / "2", **changes)).status == 0
    assert remains(tmp_path / "2") == remains(tmp_path / "1")


def test_ranks_that_cut_the_state_leave_the_tensors_and_records_of_one_process(
    alone: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = pairs(texts, **LANES, gang__sharding="fsdp")
    ended = end(start("train", "lm", "--nproc", "2", "--out", str(out), "--config", *config))
    assert ended.status == 0, ended.errors
    assert_trained_alike(out, alone)
    newest = max((out / "checkpoints").iterdir())
    assert {path.name for path in newest.glob("*.safetensors")} == {"state_0000.safetensors", "state_0001.safetensors"}
    sizes = [path.stat().st_size for path in newest.glob("*.safetensors")]
    assert max(sizes) < 0.55 * sum(sizes)


@pytest.mark.slow
def test_four_ranks_two_and_four_again_at_other_shardings_leave_the_bytes_of_one(
    alone: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for size, step, options in (
        (4, 6, {"gang__sharding": "fsdp", "gang__shard_size": 2}),
        (2, 18, {"gang__sharding": "zero1"}),
    ):
        launcher = train(size, texts, out, **options)
        wait_for(launcher, out, step)
        os.kill(ranks_of(launcher)[-1], signal.SIGKILL)
        assert end(launcher).status != 0
    assert end(train(4, texts, out)).status == 0
    found, expected = remains(out), remains(alone)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.slow
def test_tensor_parallel_ranks_train_within_rounding_of_one_process(alone: Path, texts: Path, tmp_path: Path) -> None:
    changes = {"gang__tensor_parallel_size": 2, "gang__num_microbatches": 2}
    assert end(train(2, texts, tmp_path / "out", **changes)).status == 0
    found, expected = (rows(out / "metrics/train.jsonl") for out in (tmp_path / "out", alone))
    assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in expected], rel=1e-4)
    assert rows(tmp_path / "out/metrics/valid.jsonl")[-1]["valid/loss"] == pytest.approx(
        rows(alone / "metrics/valid.jsonl")[-1]["valid/loss"], rel=1e-4
    )


BIGRAMS = """
import attrs, torch
import torch.nn.functional as F
from fnrecipe import random
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.recipes.lm.train import recipe as lm

def apply(params, tokens, segments, positions, key=None):
    return F.embedding(tokens, params["table"])

recipe = attrs.evolve(
    lm,
    name="bigrams",
    init=lambda config, key, keep: {"table": keep("table", random.normal(key, 264, 264))},
    loss=lambda config: next_token_loss(apply),
    sample=lambda config, params, key: str(apply(params, torch.tensor([0]), None, None).argmax().item()),
    rules=lambda config: {},
)
"""


@pytest.mark.slow
def test_a_model_that_knows_nothing_of_ranks_trains_on_parts_of_the_state(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "bigrams.py").write_text(BIGRAMS)
    outs = tmp_path / "alone", tmp_path / "cut"
    for out, options, more in ((outs[0], [], {}), (outs[1], ["--nproc", "2"], {"gang__sharding": "zero2"})):
        config = pairs(texts, **LANES, **more)
        ended = end(start("train", str(tmp_path / "bigrams.py"), *options, "--out", str(out), "--config", *config))
        assert ended.status == 0, ended.errors
    assert_trained_alike(outs[1], outs[0])


@pytest.mark.slow
def test_restarts_by_torchrun_go_on_by_themselves(alone: Path, texts: Path, tmp_path: Path) -> None:
    options = {"gang__sharding": "fsdp"}
    launcher = torchrun(2, *arguments(texts, tmp_path / "out", **options), restarts=1)
    wait_for(launcher, tmp_path / "out", 6)
    os.kill(ranks_of(launcher)[0], signal.SIGKILL)
    ended = end(launcher)
    assert ended.status == 0, ended.errors
    assert_trained_alike(tmp_path / "out", alone)


def test_a_rank_that_hangs_ends_the_others_and_is_named(texts: Path, tmp_path: Path) -> None:
    environment = by_hand_environment()
    changes = {"regime__num_steps": 100_000, "lr_scheduler__config__cycle_len": 40, "gang__timeout": 0.1}
    ranks = [by_hand(number, texts, tmp_path, environment, **changes) for number in range(2)]
    wait_for(ranks[0], tmp_path, 3)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ended = end(ranks[0])
    ranks[1].kill()
    end(ranks[1])
    assert ended.status == 1
    assert "rank 0: error: rank 1 does not answer: it hangs or was killed" in ended.errors
    assert "Traceback" not in ended.errors


@pytest.mark.slow
@pytest.mark.parametrize("size", [4])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(texts: Path, tmp_path: Path, size: int) -> None:
    launcher = train(size, texts, tmp_path, regime__num_steps=100_000, lr_scheduler__config__cycle_len=40)
    wait_for(launcher, tmp_path, 6)
    os.kill(ranks_of(launcher)[-1], signal.SIGUSR1)
    ended = end(launcher)
    assert ended.status == EXIT_AGAIN, ended.errors
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
    environment = by_hand_environment()
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
        check_world_size({"a": 8, "b": 4}, size)
    assert str(caught.value).endswith(f"(1, 2, 4), found {size}")
    assert all(f"{name} = " in str(caught.value) for name in wrong)


def test_sizes_that_divide_are_taken() -> None:
    for size in (1, 2, 4):
        check_world_size({"a": 8, "b": 4}, size)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("", "the ranks lost contact: NCCL error: Last error: Duplicate GPU detected"),
        ("a.jsonl:3: not JSON", "rank 1 failed: a.jsonl:3: not JSON"),
    ],
)
def test_what_ends_a_rank_is_told_by_the_rank_that_knows(word: str, expected: str) -> None:
    gang = Gang(0, 2, store=dist.HashStore())  # type: ignore[attr-defined]
    gang.store.set("last word of rank 1", word)
    with pytest.raises(LostError) as caught, last_words(gang):
        raise RuntimeError("NCCL error:\nLast error:\nDuplicate GPU detected")
    assert str(caught.value) == expected


def test_a_gang_of_one_asks_nobody() -> None:
    assert all_gather_objects(Gang(), {"a": [1, None]}) == [{"a": [1, None]}]
    check_same(Gang(), {"a": 1})


STANDS_STILL = """
import time
import attrs
from fnrecipe.data import pipe
from fnrecipe.recipes.lm.train import recipe as lm

def three(source, cursor=None):
    stream = source(cursor)
    for _ in range(3):
        yield next(stream)
    open("waiting", "a").close()
    time.sleep(1000)

recipe = attrs.evolve(lm, stream=lambda config, place: pipe(lm.stream(config, place), three))
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_signal_ends_the_wait_of_several_ranks_for_data_behind_the_same_step(
    texts: Path, tmp_path: Path, prefetch: int
) -> None:
    (tmp_path / "still.py").write_text(STANDS_STILL.replace('"waiting"', f'"{tmp_path}/waiting"'))
    changes = {**LANES, "dataset__batch_size": 8, "dataset__prefetch": prefetch, "regime__validate_every_n_steps": "null"}
    process = start(
        *("train", str(tmp_path / "still.py"), "--nproc", "2", "--out", str(tmp_path / "out")),
        *("--config", *pairs(texts, **changes, regime__publish_metrics_every_n_steps=1)),
    )
    deadline = time.monotonic() + 120
    while last_step(tmp_path / "out") < 2:  # the third is made when its successor has come, or the signal
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    assert (ended.status, ended.errors) == (EXIT_AGAIN, "")
    assert "SIGTERM: saved step 3" in ended.output
    assert [place.name for place in checkpoint.committed(tmp_path / "out/checkpoints")] == ["step_00000003"]

"""What cannot fit on the machine is refused at once, with its size and keys; what a command does not make is not counted."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from fnrecipe.cli.fit import check_fit, of_training
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.recipes.lm.config import config, needs
from fnrecipe.runtime import capacity
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here, python

Run = Callable[..., Ended]
HUGE = {
    "layers": ["model.config.num_layers=1_000_000_000"],
    "vocabulary": ["model.config.vocab_size=137_438_953_472"],
    "width": ["model.config.model_dim=1_000_000_000"],
    "feed-forward": ["model.config.ffn_inner_dim=1_000_000_000_000"],
    "batch": ["dataset.batch_size=1_000_000_000_000"],
    "row": ["dataset.max_seq_len=1_000_000_000_000", "model.config.max_seq_len=1_000_000_000_000"],
    "lanes": ["dataset.batch_size=1_000_000_000_000", "dataset.num_lanes=1_000_000_000_000", "dataset.max_seq_len=1"],
    "leaves": ["dataset.batch_size=1_099_511_627_776", "gang.num_microbatches=1_099_511_627_776"],
    "workers": ["dataset.num_workers=10_000_000", "dataset={num_lanes: 10_000_000, batch_size: 10_000_000, max_seq_len: 1}"],
    "threads": ["common.torch.num_threads=1_000_000_000"],
}
MODEL = ["layers", "vocabulary", "width", "feed-forward", "threads"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *args: fnrecipe_here(monkeypatch, capsys, *args)


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("command", ["train lm --out out", "train lm --nproc 2 --out out", "profile lm --out out"])
def test_a_training_that_cannot_fit_is_refused_before_anything_is_written(run: Run, command: str, name: str) -> None:
    ended = run(*command.split(), "--config", *HUGE[name])
    assert_usage_error(ended, f"{HUGE[name][0].partition('=')[0]} = {HUGE[name][0].partition('=')[2].replace('_', '')}")
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith(("error: memory: expected at most the ", "error: processes: expected at most "))
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("graph lm", ["layers", "batch", "row", "leaves"]),
        ("data show lm", ["batch", "row", "lanes", "leaves"]),
        ("data stats lm", ["batch", "row", "lanes", "leaves"]),
    ],
)
def test_other_commands_refuse_what_they_would_make(run: Run, command: str, names: list[str]) -> None:
    for name in names:
        assert_usage_error(run(*command.split(), "--config", *HUGE[name]), "error: memory: expected at most the ")


def test_what_a_command_does_not_make_may_be_of_any_size(run: Run) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": "some words " * 9}) + "\n" for _ in range(40)))
    pairs = ["dataset={sources: [{path: a.jsonl}], valid_fraction: 0}"]
    sizes = [pair for name in MODEL for pair in HUGE[name]]
    assert run("data", "show", "lm", "--config", *pairs, *sizes).status == 0
    assert run("data", "cache", "lm", "--config", *pairs, *sizes, *HUGE["batch"], "dataset.cache=cache").status == 0


WATCHED = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from fnrecipe.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["train lm --out out", "graph lm", "profile lm --out out"])
def test_it_is_refused_without_torch(tmp_path: Path, command: str) -> None:
    pairs = [*HUGE["layers"], "gang.device=cpu"]  # only torch knows the memory of a GPU
    ended = python("-c", WATCHED, *command.split(), "--config", *pairs, cwd=tmp_path)
    assert_usage_error(ended, "model.config.num_layers = 1000000000")
    assert ended.err.splitlines()[-1] == "False"


LIMITED = """
import os, resource, sys
from fnrecipe.runtime import capacity
from fnrecipe.cli.fit import check_fit, of_training
from fnrecipe.config import resolve
from fnrecipe.recipes.lm.config import config, needs
check_fit(config, needs, parts=of_training(config))  # all modules are loaded while they can be read
if os.geteuid() == 0:
    os.setuid(65534)
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2)
changed, _ = resolve(config, pairs=["gang.device=cpu", *sys.argv[3:]])
check_fit(changed, needs, parts=of_training(changed))
print("fits")
"""


@pytest.mark.parametrize(
    ("limit", "pairs", "message"),
    [
        (("RLIMIT_AS", 2 * 10**9), ["model.config.vocab_size=400_000"], None),
        (
            ("RLIMIT_AS", 2 * 10**9),
            ["model.config.vocab_size=500_000"],
            "at most the 2.0 GB of this machine, found at least 2.1 GB",
        ),
        (("RLIMIT_NPROC", 20), ["common.torch.num_threads=20"], None),
        (("RLIMIT_NPROC", 20), ["common.torch.num_threads=21"], "expected at most 20 processes and threads at once"),
        (("RLIMIT_NPROC", 20), ["common.torch.num_threads=13", "dataset.num_workers=8"], "found 21 (dataset.num_workers = 8, "),
    ],
)
def test_the_limits_of_the_process_count(tmp_path: Path, limit: tuple[str, int], pairs: list[str], message: str | None) -> None:
    ended = python("-c", LIMITED, *map(str, limit), *pairs, cwd=tmp_path)
    assert (ended.out == "fits\n") == (message is None), ended.err
    assert message is None or message in ended.err


def test_the_machine_has_at_most_its_memory() -> None:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1]) * 1024
    swap = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "SwapTotal" in line).split()[1]) * 1024
    assert resource.getpagesize() < (capacity.memory() or 0) <= total + swap
    assert 1 < (capacity.processes() or 0) <= int(Path("/proc/sys/kernel/pid_max").read_text())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n"}, 1_024_000),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "5000\n"}, 5000),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/memory.max": "6000\n",
                "/sys/fs/cgroup/a/b/memory.max": "7000",
            },
            6000,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "5000\n"}, 5000),
        ({"/proc/self/cgroup": "4:memory:/a\n3:pids:/\n", "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000"}, 5000),
        ({"/proc/self/cgroup": "4:cpu,memory:/a\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "5000"}, 5000),
        ({"/proc/self/cgroup": "4:cpu:/a\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "5000"}, 1_024_000),
        ({"/proc/meminfo": "MemTotal: 1000 kB\nSwapTotal: 9 kB\n"}, 1009 * 1024),
        ({"/proc/meminfo": ""}, None),
    ],
)
def test_the_memory_is_that_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int | None
) -> None:
    there = {"/proc/meminfo": "MemTotal: 1000 kB\nSwapTotal: 0 kB\n", **files}
    monkeypatch.setattr("fnrecipe.runtime.capacity._read", lambda path: there.get(str(path), ""))
    assert capacity.memory() == expected


@pytest.mark.parametrize(
    ("vocabulary", "where"), [(10**6, None), (10**8, "the 80.0 GB of a GPU"), (10**10, "the 80.0 GB of a GPU")]
)
def test_the_state_is_held_to_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch, vocabulary: int, where: str | None) -> None:
    monkeypatch.setattr("fnrecipe.runtime.capacity.device_memory", lambda: 80 * 10**9)
    monkeypatch.setattr("fnrecipe.runtime.capacity.memory", lambda: 10**9)
    changed, _ = resolve(config, pairs=[f"model.config.vocab_size={vocabulary}"])
    if where is None:
        check_fit(changed, needs, parts=of_training(changed))
        return
    with pytest.raises(UsageError, match=where):
        check_fit(changed, needs, parts=of_training(changed))


def test_a_recipe_that_knows_no_needs_is_not_held_to_any() -> None:
    changed, _ = resolve(config, pairs=HUGE["layers"])
    check_fit(changed, None, parts=of_training(changed))


def test_eager_steps_need_no_graph() -> None:
    traced, eager = (resolve(config, pairs=[f"trainer.jit={jit}"])[0] for jit in ("auto", "off"))
    assert set(of_training(traced)) - set(of_training(eager)) == {"graph"}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (2999, ""),
        (5000, "the first step is a long way off, at least 0.3 hours: the graph of the step (model.config.num_layers = 5000)"),
    ],
)
def test_what_takes_long_before_the_first_step_is_told(capsys: pytest.CaptureFixture[str], layers: int, found: str) -> None:
    slow, _ = resolve(config, pairs=[f"model.config.num_layers={layers}", "model.config.model_dim=8"])
    check_fit(slow, needs, parts=["graph"])
    assert capsys.readouterr().err.strip() == found


def test_what_takes_more_than_a_day_before_the_first_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, _ = resolve(config, pairs=["model.config.num_layers=1000000"])
    monkeypatch.setattr(capacity, "memory", lambda: 1 << 60)
    with pytest.raises(UsageError, match=r"^time: expected at most a day before the first step, found at least 55\.6 hours: "):
        check_fit(slow, needs, parts=["graph"])

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fnrecipe.config import DataSource
from fnrecipe.data import Cursor, LaneAssignment, Source, Stream, in_worker_processes, pipe, prefetch
from fnrecipe.data.processes import in_process
from fnrecipe.errors import DataError, FnrecipeError, UsageError
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.streams import example
from tests.data.laws import take
from tests.recipes.streams import recipe, texts, write, write_folder

ROOT = Path(__file__).parents[2]


def counting(assignment: LaneAssignment, *, path: Path) -> Source[int]:
    """Endless numbers; the size of the file is how many have been made."""

    def source(cursor: Cursor = None) -> Stream[int]:
        number = cursor or 0
        while True:
            with path.open("ab") as file:
                file.write(b".")
            yield number, number + 1
            number += 1

    return source


def failing(assignment: LaneAssignment, *, error: Exception) -> Source[int]:
    def source(cursor: Cursor = None) -> Stream[int]:
        yield 1, 1
        yield 2, 2
        raise error

    return source


def absent(assignment: LaneAssignment) -> Source[int]:
    raise UsageError("nothing there")


def stuck(assignment: LaneAssignment) -> Source[int]:
    def source(cursor: Cursor = None) -> Stream[int]:
        yield 1, 1
        time.sleep(600)

    return source


def heavy(assignment: LaneAssignment) -> Source[bytes]:
    """Items that no pipe holds."""
    return lambda cursor: ((bytes(1 << 24), number) for number in range(4))


def leaving(assignment: LaneAssignment) -> Source[int]:
    return lambda cursor: os._exit(7)


def meeting(assignment: LaneAssignment, *, folder: Path) -> Source[Any]:
    """Gives nothing before all workers have begun."""
    (folder / str(assignment.rank)).touch()
    if not wait_until(lambda: len(list(folder.iterdir())) == assignment.world_size):
        raise UsageError("one worker waited for another's first item")
    return lambda cursor: iter(())


def children() -> set[int]:
    """The processes below this one, dead or alive, but for multiprocessing's own, of what is shared and of forks, and ours."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and not any(name in command for name in (b"resource_tracker", b"forkserver", b"tests.zygote")):
            found.add(int(path.name))
    return found


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    threads = threading.enumerate()
    yield
    assert multiprocessing.active_children() == []
    assert children() == set()
    assert threading.enumerate() == threads


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def uneven(folder: Path, **options: Any) -> LMConfig:
    """Four lanes of readers of their own, some of which end long before the others."""
    documents = ["a" * 900, *texts(0, 30)]
    return recipe(write(folder / "a.jsonl", documents), num_lanes=4, num_readers=4, batch_size=4, **options)


def spread_over(config: LMConfig, number: int, assignment: LaneAssignment = LaneAssignment()) -> Source[Any]:  # noqa: B008
    padding = example(config, config.dataset.batch_size // number // assignment.world_size)
    make = partial(train_stream, config)
    return partial(in_worker_processes, make, assignment=assignment, workers=number, size=2, padding=padding)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_any_number_of_workers_gives_the_batches_and_cursors_of_one_process(tmp_path: Path, number: int) -> None:
    config = uneven(tmp_path)
    whole = take(train_stream(config, LaneAssignment()), None, 99)
    assert any(not any(row) for row in whole[-1][0]["mask"][1])
    assert take(spread_over(config, number), None, 99) == whole


def test_a_stream_goes_on_with_other_numbers_of_workers(tmp_path: Path) -> None:
    config = uneven(tmp_path, epochs=2)
    whole = take(train_stream(config, LaneAssignment()), None, 99)
    (_, cursor), rest = whole[7], whole[8:]
    assert take(spread_over(config, 4), cursor, 99) == rest
    (_, cursor) = list(islice(spread_over(config, 2)(None), 10))[-1]
    assert take(train_stream(config, LaneAssignment()), json.loads(json.dumps(cursor)), 99) == whole[10:]


def test_the_workers_of_a_rank_give_its_rows(tmp_path: Path) -> None:
    config, place = uneven(tmp_path), LaneAssignment(1, 2)
    assert take(spread_over(config, 2, place), None, 40) == take(train_stream(config, place), None, 40)


def test_workers_start_side_by_side(tmp_path: Path) -> None:
    make = partial(meeting, folder=tmp_path)
    assert list(in_worker_processes(make, assignment=LaneAssignment(), workers=3, size=1, padding=None)) == []


def test_a_stream_ends_with_its_process() -> None:
    assert list(in_process(none, LaneAssignment(), size=2)) == []
    assert list(in_process(ten, LaneAssignment(), 7, size=2)) == [(7, 8), (8, 9), (9, 10)]
    assert list(in_process(ten, LaneAssignment(), 8, size=0)) == [(8, 9), (9, 10)]


def none(assignment: LaneAssignment) -> Source[int]:
    return lambda cursor: iter(())


def ten(assignment: LaneAssignment) -> Source[int]:
    return lambda cursor: ((number, number + 1) for number in range(cursor or 0, 10))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ZeroDivisionError("by nought"), (RuntimeError, "ZeroDivisionError: by nought")),
        (DataError("a.jsonl:17 (byte 4): expected text"), (DataError, "a.jsonl:17 (byte 4): expected text")),
        (UsageError("no such column"), (UsageError, "no such column")),
    ],
)
def test_an_error_of_a_worker_is_raised_at_its_place(error: Exception, expected: tuple[type[Exception], str]) -> None:
    stream = in_process(partial(failing, error=error), LaneAssignment(3, 4), size=4)
    assert [next(stream), next(stream)] == [(1, 1), (2, 2)]
    with pytest.raises(expected[0]) as caught:
        next(stream)
    assert (type(caught.value), str(caught.value)) == expected
    (note,) = caught.value.__notes__
    assert note.startswith("in data 3:\n")
    assert "raise error" in note
    assert "in source" in note


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(UsageError, match="nothing there"):
        next(in_process(absent, LaneAssignment(), size=1))


def test_a_bad_record_in_a_worker_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2 \(byte 16\): expected text") as caught:
        list(spread_over(recipe(DataSource(str(path))), 2)(None))
    assert "in tolerate" in caught.value.__notes__[0]


def test_warnings_of_workers_reach_the_logger_of_the_consumer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n{"text": 1}\n{"text": "two"}\n[]\n')
    with caplog.at_level(logging.WARNING):
        list(spread_over(recipe(DataSource(str(path)), num_readers=2, max_bad_records=2), 2)(None))
    found = sorted(
        (record.levelname, record.name.split(".")[0], record.getMessage().split(" (byte")[0])
        for record in caplog.records
        if "bad record" in record.getMessage()
    )
    assert [(level, logger) for level, logger, _ in found] == [("WARNING", "fnrecipe")] * 2
    assert sorted(message.rpartition(":")[2] for *_, message in found) == ["2", "4"]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def wait_until(holds: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ended(pid: int) -> bool:
    return wait_until(lambda: not alive(pid))


def test_what_a_process_sent_before_it_ended_is_not_lost() -> None:
    stream = in_process(ten, LaneAssignment(), 7, size=4)
    assert next(stream) == (7, 8)
    assert ended(workers()[0])
    assert list(stream) == [(8, 9), (9, 10)]


def test_the_error_of_a_process_that_has_ended_is_not_lost() -> None:
    stream = in_process(partial(failing, error=DataError("bad")), LaneAssignment(), size=4)
    assert next(stream) == (1, 1)
    assert ended(workers()[0])
    assert next(stream) == (2, 2)
    with pytest.raises(DataError, match="bad"):
        next(stream)


def test_a_worker_that_is_killed_while_it_makes_an_item_is_noticed_at_once() -> None:
    stream = in_process(stuck, LaneAssignment(), size=3)
    next(stream)
    before = time.monotonic()
    threading.Timer(0.3, kill, workers()).start()
    with pytest.raises(FnrecipeError, match=r"worker of the data \(data 0\) ended by SIGKILL"):
        next(stream)
    assert 0.3 < time.monotonic() - before < 2


def test_a_worker_that_is_killed_while_it_sends_an_item_is_noticed_at_once() -> None:
    stream = in_process(heavy, LaneAssignment(), size=3)
    next(stream)
    time.sleep(0.3)
    (pid,) = workers()
    kill(pid)
    assert ended(pid)
    before = time.monotonic()
    with pytest.raises(FnrecipeError, match=r"worker of the data \(data 0\) ended by SIGKILL"):
        list(stream)
    assert time.monotonic() - before < 2


def test_far_ahead_is_no_deadlock() -> None:
    """More words of one item than a pipe holds, and items that no pipe holds."""
    stream = in_process(heavy, LaneAssignment(), size=5000)
    rescue = threading.Timer(10, lambda: [kill(pid) for pid in workers()])
    rescue.start()
    try:
        assert len(list(stream)) == 4
    finally:
        rescue.cancel()
        rescue.join()


def test_a_killed_worker_ends_the_others(tmp_path: Path) -> None:
    stream = spread_over(uneven(tmp_path, epochs=None), 2)(None)
    next(stream)
    kill(workers()[1])
    before = time.monotonic()
    with pytest.raises(FnrecipeError, match="SIGKILL"):
        list(islice(stream, 99))
    assert time.monotonic() - before < 2


def test_a_worker_that_leaves_is_noticed() -> None:
    with pytest.raises(FnrecipeError, match="ended with status 7"):
        next(in_process(leaving, LaneAssignment(), size=1))


@pytest.mark.parametrize("size", [0, 1, 4])
def test_a_worker_is_so_many_items_ahead(tmp_path: Path, size: int) -> None:
    path = tmp_path / "made"
    stream = in_process(partial(counting, path=path), LaneAssignment(), size=size)
    for used in (1, 5):
        while next(stream)[1] < used:
            pass
        least = used + max(size, 1) - 1
        assert wait_until(lambda: path.stat().st_size >= least)  # noqa: B023
        time.sleep(0.1)
        assert least <= path.stat().st_size <= used + size + 2
    stream.close()


@pytest.mark.parametrize("make", [stuck, heavy, ten])
def test_closing_the_stream_ends_its_process_at_once(make: Callable[[LaneAssignment], Source[Any]]) -> None:
    stream = in_process(make, LaneAssignment(), size=3)
    next(stream)
    assert children() == set(workers()) != set()
    before = time.monotonic()
    stream.close()
    assert children() == set()
    assert time.monotonic() - before < 1


def test_closing_a_stream_read_ahead_ends_its_processes_and_its_thread(tmp_path: Path) -> None:
    source = pipe(spread_over(uneven(tmp_path, epochs=None), 2), partial(prefetch, size=2))
    stream = source(None)
    next(stream)
    assert len(children()) == 2
    stream.close()  # type: ignore[attr-defined]
    assert children() == set()


def test_workers_ignore_the_signals_that_end_or_ask_the_consumer(tmp_path: Path) -> None:
    stream = in_process(partial(counting, path=tmp_path / "made"), LaneAssignment(), size=1)
    next(stream)
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(workers()[0], number)
    assert [number for (number, _), _ in zip(stream, range(5), strict=False)] == [1, 2, 3, 4, 5]
    stream.close()


CONSUMER = """
import multiprocessing
import time
from functools import partial

from fnrecipe.data import LaneAssignment, in_worker_processes
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.streams import example
from tests.data.test_processes import folder_config

if __name__ == "__main__":
    import sys

    config = folder_config(sys.argv[1])
    padding = example(config, config.dataset.batch_size // 2)
    make = partial(train_stream, config)
    stream = in_worker_processes(make, None, assignment=LaneAssignment(), workers=2, size=2, padding=padding)
    next(stream)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def folder_config(folder: str) -> LMConfig:
    return recipe(DataSource(folder), epochs=None)


def test_workers_end_with_a_consumer_that_is_killed(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus")
    script = tmp_path / "consumer.py"
    script.write_text(CONSUMER)
    command, environment = [sys.executable, str(script), str(tmp_path / "corpus")], os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert [alive(pid) for pid in pids] == [True, True]
    process.kill()
    assert wait_until(lambda: not any(map(alive, pids)))
    assert process.communicate()[1] == ""

"""Consoles that are closed, full, stand still or know few characters: no status of a command and no file depends on them."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest

from fnrecipe.config import resolve
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell import train as run
from fnrecipe.shell.screen.console import Outlet
from tests.helpers import pairs, remains, start

SMALL = {"regime__num_steps": 6, "dataset__prefetch": 0, "trainer__jit": "off"}
F_GETPIPE_SZ = 1032
PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run of 6 steps leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    config, _ = resolve(recipe.config, (), pairs(texts, **SMALL))
    assert run.train(recipe, config, out) == 0
    return remains(out)


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], TextIO]]:
    """Makes Python's standard output of a descriptor."""
    made: list[TextIO] = []

    def make(descriptor: int, encoding: str = "utf-8") -> TextIO:
        made.append(os.fdopen(descriptor, "w", encoding=encoding))
        monkeypatch.setattr(sys, "__stdout__", made[-1])
        return made[-1]

    yield make
    for stream in made:
        with suppress(OSError):
            stream.close()


def closed_pipe() -> int:
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def full_pipe(*, blocks: bool = True) -> tuple[int, int]:
    """Both ends of a pipe that takes nothing more."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while True:
            os.write(theirs, bytes(4096))
    os.set_blocking(theirs, blocks)
    return ours, theirs


def closed_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


def drain(descriptor: int, size: int) -> bytes:
    read = b""
    while len(read) < size:
        read += os.read(descriptor, size - len(read))
    return read


@pytest.mark.parametrize("make", [closed_pipe, closed_terminal, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_an_outlet_takes_everything_though_its_stream_fails(console: Any, make: Callable[[], int]) -> None:
    with closing(Outlet(console(make()))) as outlet:
        for _ in range(5000):
            assert outlet.write("a line\n") == 7


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_an_outlet_takes_everything_though_its_stream_is_closed(stream: TextIO | None) -> None:
    if stream is not None:
        stream.close()
    with closing(Outlet(stream)) as outlet:
        assert not outlet.isatty()
        assert outlet.write("a line\n") == 7


def test_an_outlet_does_not_wait_for_a_pipe_that_nobody_reads_and_tells_what_it_left_out(console: Any) -> None:
    ours, theirs = full_pipe()
    outlet = Outlet(console(theirs))
    for number in range(1500):
        outlet.write(f"{number:04}\n")
    drain(ours, fcntl.fcntl(ours, F_GETPIPE_SZ))
    shown = drain(ours, 1000 * 5).decode()
    outlet.write("last\n")
    outlet.close()
    *lines, told, last = (shown + os.read(ours, 4096).decode()).splitlines()
    os.close(ours)
    assert lines == [f"{number:04}" for number in range(len(lines))]
    assert told == f"({1500 - len(lines)} pieces of text were left out here: the console stood still)"
    assert last == "last"


def test_an_outlet_waits_in_its_thread_for_a_stream_that_others_made_non_blocking(console: Any) -> None:
    ours, theirs = full_pipe(blocks=False)
    outlet = Outlet(console(theirs))
    outlet.write("a line\n")
    drain(ours, fcntl.fcntl(ours, F_GETPIPE_SZ))
    assert drain(ours, 7) == b"a line\n"
    outlet.close()
    os.close(ours)


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"\\xe9\\u2500"), ("latin-1", b"\xe9\\u2500")])
def test_an_outlet_escapes_what_the_encoding_lacks(console: Any, encoding: str, shown: bytes) -> None:
    ours, theirs = os.pipe()
    with closing(Outlet(console(theirs, encoding))) as outlet:
        outlet.write("é─")
    assert os.read(ours, 99) == shown
    os.close(ours)


def train(texts: Path, out: Path, **changes: Any) -> list[str]:
    return ["train", "lm", "--out", str(out), "--config", *pairs(texts, **{**SMALL, **changes})]


def log(out: Path) -> str:
    return (out / "logs/rank_0.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_whose_reader_goes_away_ends_as_any_other(whole: dict[str, bytes], texts: Path, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    process = start(*train(texts, tmp_path), stdout=theirs, stderr=theirs, env={"PYTHONIOENCODING": "ascii", "TERM": "dumb"})
    os.close(theirs)
    assert os.read(ours, 4).decode() == "lm: "
    os.close(ours)
    assert process.wait() == 0
    assert remains(tmp_path) == whole
    assert "done: step 6" in log(tmp_path)


@pytest.mark.slow
def test_a_run_whose_console_stands_still_ends_as_any_other(whole: dict[str, bytes], texts: Path, tmp_path: Path) -> None:
    ours, theirs = full_pipe()
    process = start(*train(texts, tmp_path), stdout=theirs, stderr=theirs)
    assert process.wait() == 0
    os.close(ours)
    os.close(theirs)
    assert remains(tmp_path) == whole


@pytest.mark.slow
def test_a_run_on_a_full_disk_for_its_console_and_its_log_ends_as_any_other(
    whole: dict[str, bytes], texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_0.log").symlink_to("/dev/full")
    with open("/dev/full", "wb") as full:
        process = start(*train(texts, tmp_path), stdout=full, stderr=full, env={"COLUMNS": "0"})
        assert process.wait() == 0
    assert remains(tmp_path) == whole


@pytest.mark.slow
def test_a_run_without_standard_streams_ends_as_any_other(whole: dict[str, bytes], texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fnrecipe.cli", *train(texts, tmp_path)]
    assert subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False).returncode == 0
    assert remains(tmp_path) == whole


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_ends(texts: Path, tmp_path: Path) -> None:
    pid, master = pty.fork()
    if not pid:
        command = train(texts, tmp_path, regime__num_steps=10**6, regime__publish_metrics_every_n_steps=1)
        os.execv(sys.executable, [sys.executable, "-m", "fnrecipe.cli", *command])  # noqa: S606
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))  # of no width
    seen = b""
    while b"loss" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    last = log(tmp_path).splitlines()[-1]
    saved = sorted((tmp_path / "checkpoints").iterdir())[-1].name
    assert f"SIGHUP: saved step {int(saved.removeprefix('step_')):,}; the same command goes on from there" in last


@pytest.mark.slow
def test_a_run_in_a_locale_without_letters_reads_and_writes_all_of_them(whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "dätä"
    folder.mkdir()
    (folder / "té日本.jsonl").write_text('{"text": "ünïcödé 日本語 text"}\n' * 40, encoding="utf-8")
    command = train(folder, tmp_path / "öut", regime__sample_prompt="日本", dataset__valid_fraction=0)
    ended = [subprocess.run(_python(command), env=os.environ | PLAIN_C, capture_output=True, check=False) for _ in range(2)]
    assert [(one.returncode, one.stderr) for one in ended] == [(0, b""), (0, b"")]
    assert "going on after step 6" in log(tmp_path / "öut")
    assert f"path: {folder}\n" in (tmp_path / "öut/config.yaml").read_text(encoding="utf-8")
    assert (tmp_path / "öut/sample.txt").read_text(encoding="utf-8").startswith("日本")


def _python(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "fnrecipe.cli", *command]

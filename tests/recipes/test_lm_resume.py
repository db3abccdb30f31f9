from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.config import DataSource
from fnrecipe.data import Batch, Cursor, LaneAssignment, Source, collate, endless, files, joint, records
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.data import train_stream
from tests.data.laws import plain
from tests.recipes.streams import recipe, texts, train, write

MIB = 1 << 20
Step = tuple[list[Any], Cursor]


def ranks_of(config: LMConfig, world_size: int) -> list[Source[Batch]]:
    return [train_stream(config, LaneAssignment(rank, world_size)) for rank in range(world_size)]


def steps_of(ranks: Sequence[Source[Batch]], cursor: Cursor = None, limit: int = 60) -> list[Step]:
    """The global batches, row by row, until all ranks have ended; each with the ranks' joint cursors, through JSON."""
    found = []
    for entries in islice(zip(*(endless(rank, cursor) for rank in ranks), strict=True), limit):
        given = [batch for batch, _ in entries if batch is not None]
        if not given:
            break
        padding = collate([[]] * len(given[0].mask), given[0].mask.shape[1])
        columns = [plain(batch or padding) for batch, _ in entries]
        rows = [[name, [row for part in columns for row in part[name][1]]] for name in columns[0]]
        found.append((rows, json.loads(json.dumps(joint(cursor, [after for _, after in entries])))))
    return found


FILES = st.lists(st.lists(st.text(max_size=30), max_size=12), min_size=1, max_size=3).filter(lambda files: any(map(any, files)))
OPTIONS = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(["best_fit", "concat"]),
        "order": st.sampled_from(["blocks", "documents", "sequential"]),
        "shuffle_window": st.sampled_from([1, 3, 256]),
        "pack_window": st.integers(1, 5),
        "seed": st.integers(0, 99),
        "epochs": st.sampled_from([1, 2]),
        "finished_source": st.sampled_from(["drop", "repeat", "stop"]),
    }
)


@settings(max_examples=80, deadline=None, database=None)
@given(files=FILES, num_lanes=st.sampled_from([1, 2, 4, 8]), options=OPTIONS)
def test_world_sizes_change_neither_the_batches_nor_what_a_save_is_followed_by(
    files: list[list[str]], num_lanes: int, options: dict[str, Any]
) -> None:
    with TemporaryDirectory() as folder:
        for number, documents in enumerate(files):
            write(Path(folder, f"{number}.jsonl"), documents)
        config = recipe(DataSource(folder), max_seq_len=16, num_lanes=num_lanes, batch_size=num_lanes, **options)
        worlds = [ranks_of(config, size) for size in (1, 2, 4, 8) if size <= num_lanes]
        whole = steps_of(worlds[0])
        assert all(steps_of(ranks) == whole for ranks in worlds[1:])
        for k, (_, cursor) in list(enumerate(whole, 1))[:: max(len(whole) // 10, 1)]:
            for ranks in worlds:
                assert steps_of(ranks, cursor, 60 - k) == whole[k:], f"{len(ranks)} ranks, from step {k}"


@pytest.mark.parametrize("num_lanes", [1, 8])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_rank_that_never_gave_a_row_does_not_lose_its_lanes(tmp_path: Path, packing: str, num_lanes: int) -> None:
    source = write(tmp_path / "a.jsonl", ["a" * 200, "b" * 3])
    config = recipe(source, packing=packing, num_lanes=num_lanes, batch_size=num_lanes)
    worlds = [ranks_of(config, size) for size in {1, num_lanes}]
    whole = steps_of(worlds[0])
    for ranks in worlds:
        assert [steps_of(ranks, cursor) for _, cursor in whole] == [whole[k:] for k in range(1, len(whole) + 1)]


def cursor_sizes(source: DataSource, at: Sequence[int], **options: Any) -> list[float]:
    """Bytes of the cursor's JSON a lane after so many batches."""
    config = recipe(source, epochs=None, num_lanes=64, batch_size=64, **options)
    stream = train(config)(None)
    found = {step: cursor for step, (_, cursor) in enumerate(islice(stream, max(at)), 1) if step in at}
    return [len(json.dumps(found[step]).encode()) / 64 for step in at]


@pytest.mark.parametrize("order", ["blocks", "documents", "sequential"])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_cursors_are_small_wherever_they_are(tmp_path: Path, packing: str, order: str) -> None:
    source = write(tmp_path / "a.jsonl", texts(0, 640))
    sizes = []
    for window, length in ((2, 16), (512, 256)):
        sizes += cursor_sizes(source, (20, 40), packing=packing, order=order, pack_window=window, max_seq_len=length)
    assert max(sizes) < 80
    assert max(sizes) - min(sizes) < 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """30 MB of documents of a kilobyte and more; every tenth of 10 KB."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    with path.open("w") as file:
        for number in range(16_000):
            size = 10_000 if number % 10 == 0 else 970
            file.write(f'{{"text": "{number:08d}{"x" * size}"}}\n')
    assert 29e6 < path.stat().st_size < 32e6
    return DataSource(str(path))


class Counted:
    """A file that counts the bytes read of it."""

    def __init__(self, file: IO[bytes], counts: list[int]) -> None:
        self.file, self.counts = file, counts

    def read(self, size: int = -1) -> bytes:
        return self.counted(self.file.read(size))

    def read1(self, size: int = -1) -> bytes:
        return self.counted(self.file.read1(size))  # type: ignore[attr-defined]

    def counted(self, data: bytes) -> bytes:
        self.counts.append(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []

    @contextmanager
    def opened(path: str) -> Iterator[Counted]:
        with files.opened(path) as file:
            yield Counted(file, counts)

    monkeypatch.setattr(records, "opened", opened)
    return counts


@pytest.mark.parametrize(("packing", "order"), [("best_fit", "blocks"), ("concat", "sequential")])
def test_the_bytes_read_to_resume_do_not_depend_on_the_position(
    large: DataSource, bytes_read: list[int], packing: str, order: str
) -> None:
    config = recipe(large, packing=packing, order=order, num_lanes=1, batch_size=64, max_seq_len=8192, pack_window=64)
    source = train(config)
    cursors = [json.loads(json.dumps(cursor)) for _, cursor in source(None)]
    whole = sum(bytes_read)
    assert 29e6 < whole < 40e6
    found = []
    for cursor in (cursors[len(cursors) // 10], cursors[len(cursors) * 9 // 10]):
        bytes_read.clear()
        next(source(cursor))
        found.append(sum(bytes_read))
    assert 0 < min(found) <= max(found) < 4 * MIB
    assert max(len(json.dumps(cursor)) for cursor in cursors) < 80


FLAT = """
import sys
from pathlib import Path

from fnrecipe.config import DataSource
from tests.recipes.streams import recipe, train

config = recipe(DataSource(sys.argv[1]), epochs=10, max_seq_len=2048, batch_size=8, num_lanes=8, pack_window=64)
peaks = {}
for batch, cursor in train(config)(None):
    window = cursor["0"][0]
    epoch = window[0][0][0] if window else 0
    peaks[epoch] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(peaks[1], peaks[9])
"""


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(tmp_path: Path) -> None:
    """By the peak that the kernel keeps for the program: `ru_maxrss` begins with that of whoever started it."""
    source = write(tmp_path / "a.jsonl", (f"{number} " + "words and more " * (number % 50) for number in range(12_000)))
    assert Path(source.path).stat().st_size > 4e6
    command = [sys.executable, "-c", FLAT, source.path]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    early, late = (int(number) * 1024 for number in ended.stdout.split())
    assert late <= 1.05 * early + 10e6

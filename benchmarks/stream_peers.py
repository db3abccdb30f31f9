"""The same work with other libraries: JSONL to token ids to rows of `length` + 1 to batches of 8, and their way to resume.

A peer is `open(folder, length) -> read(state)`, where `read` gives `(batch, get_state)`. All use the same tokenizer by
`encode_batch_fast` on chunks of 64 documents, and join documents end to end, as the libraries' own packers do.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tokenizers

Read: TypeAlias = Callable[[Any], Iterator[tuple[Any, Callable[[], Any]]]]
ROWS, CHUNK, END = 8, 64, 0


def encoder(folder: Path) -> Callable[[list[str]], list[list[int]]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: [[*e.ids, END] for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def joined(documents: Iterable[list[int]], size: int) -> Iterator[Any]:
    """Rows of `size` ids from documents end to end; the rest is dropped."""
    buffer: list[int] = []
    for ids in documents:
        buffer += ids
        stop = len(buffer) // size * size
        yield from np.array(buffer[:stop], np.int32).reshape(-1, size)
        buffer = buffer[stop:]


def open_generators(folder: Path, length: int) -> Read:
    """Plain Python generators, without any way to resume but reading again."""
    encode = encoder(folder)

    def documents() -> Iterator[list[int]]:
        with (folder / "text.jsonl").open() as lines:
            while chunk := list(islice(lines, CHUNK)):
                yield from encode([json.loads(line)["text"] for line in chunk])

    def read(state: int | None) -> Iterator[tuple[Any, Callable[[], Any]]]:
        rows = joined(documents(), length + 1)
        for number in range(1, 1 << 60):
            batch = list(islice(rows, ROWS))
            if len(batch) < ROWS:
                return
            if number > (state or 0):
                yield np.stack(batch), partial(int, number)

    return read


def open_datasets(folder: Path, length: int, *, streaming: bool) -> Read:
    import datasets

    datasets.disable_progress_bars()
    encode = encoder(folder)

    def tokenise(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": encode(rows["text"])}

    def group(rows: dict[str, Any]) -> dict[str, Any]:
        return {"ids": list(joined(rows["ids"], length + 1))}

    def read(state: Any) -> Iterator[tuple[Any, Callable[[], Any]]]:
        cache = tempfile.mkdtemp()
        loaded = datasets.load_dataset(
            "json", data_files=str(folder / "text.jsonl"), split="train", streaming=streaming, cache_dir=cache
        )
        mapped = loaded.map(tokenise, batched=True, batch_size=CHUNK, remove_columns=["text"])
        rows = mapped.map(group, batched=True, batch_size=CHUNK)
        if not streaming:
            rows = rows.to_iterable_dataset()
        if state is not None:
            rows.load_state_dict(state)
        for batch in rows.with_format("numpy").iter(ROWS, drop_last_batch=True):
            yield batch["ids"], rows.state_dict
        shutil.rmtree(cache, ignore_errors=True)

    return read


def open_torchdata(folder: Path, length: int) -> Read:
    import torchdata.nodes as nodes

    encode = encoder(folder)

    class Pack(nodes.BaseNode[Any]):
        """Joins documents; its state is that of its source before the documents in hand, and the rows given of them."""

        def __init__(self, source: Any) -> None:
            super().__init__()
            self.source = source

        def reset(self, initial_state: dict[str, Any] | None = None) -> None:
            super().reset(initial_state)
            state = initial_state or {"source": None, "rest": []}
            self.source.reset(state["source"])
            self.rest, self.rows = state["rest"], iter(())

        def next(self) -> Any:
            while (row := next(self.rows, None)) is None:
                ids = [*self.rest, *(token for document in self.source.next() for token in document)]
                stop = len(ids) // (length + 1) * (length + 1)
                self.rest, self.rows = ids[stop:], iter(np.array(ids[:stop], np.int32).reshape(-1, length + 1))
            return row

        def get_state(self) -> dict[str, Any]:
            return {"source": self.source.state_dict(), "rest": self.rest}

    def read(state: Any) -> Iterator[tuple[Any, Callable[[], Any]]]:
        with (folder / "text.jsonl").open() as lines:
            chunks = nodes.Batcher(nodes.IterableWrapper(lines), CHUNK, drop_last=False)
            encoded = nodes.Mapper(chunks, lambda chunk: encode([json.loads(line)["text"] for line in chunk]))
            loader = nodes.Loader(nodes.Batcher(Pack(encoded), ROWS, drop_last=True))
            if state is not None:
                loader.load_state_dict(state)
            for rows in loader:
                yield np.stack(rows), loader.state_dict

    return read


def open_grain(folder: Path, length: int) -> Read:
    import grain
    from grain.experimental import ConcatThenSplitIterDataset

    encode, path = encoder(folder), folder / "text.jsonl"

    class Chunks:
        """Chunks of lines by their number."""

        def __init__(self) -> None:
            with path.open("rb") as lines:
                ends = np.cumsum([0, *(len(line) for line in lines)])
            self.places = [*ends[:-1:CHUNK].tolist(), int(ends[-1])]

        def __len__(self) -> int:
            return len(self.places) - 1

        def __getitem__(self, number: int) -> bytes:
            with path.open("rb") as file:
                file.seek(self.places[number])
                return file.read(self.places[number + 1] - self.places[number])

    def tokenise(chunk: bytes) -> dict[str, Any]:
        ids = encode([json.loads(line)["text"] for line in chunk.splitlines()])
        return {"ids": np.array([token for document in ids for token in document], np.int32)}

    def read(state: Any) -> Iterator[tuple[Any, Callable[[], Any]]]:
        documents = grain.MapDataset.source(Chunks()).map(tokenise)
        stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        rows = ConcatThenSplitIterDataset(stream, length_struct={"ids": length + 1})
        batches = iter(rows.batch(ROWS, drop_remainder=True))
        if state is not None:
            batches.set_state(state)
        for batch in batches:
            yield batch["ids"], batches.get_state

    return read


PEERS: dict[str, tuple[str, Callable[[Path, int], Read]]] = {
    "plain generators": ("json", open_generators),
    "datasets, map": ("datasets", lambda folder, length: open_datasets(folder, length, streaming=False)),
    "datasets, streaming": ("datasets", lambda folder, length: open_datasets(folder, length, streaming=True)),
    "torchdata.nodes": ("torchdata", open_torchdata),
    "grain": ("grain", open_grain),
}

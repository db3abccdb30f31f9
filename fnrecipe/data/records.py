"""Records: the pieces of a file between separators, found from any byte of it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import IO

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.blocks import Block
from fnrecipe.data.files import damage, opened
from fnrecipe.errors import DataError, one_line

WHOLE = int(np.iinfo(np.int64).max)
_CHUNK = 1 << 20
_TAIL = 1 << 15
_BOM = b"\xef\xbb\xbf"


@attrs.frozen
class Record:
    """The bytes of a record with its separator, and the offset in the (decompressed) file at which they start."""

    path: str
    offset: int
    data: bytes

    def bad(self, what: str) -> DataError:
        """The error that names this record: file, line, byte offset and an excerpt."""
        excerpt = one_line(self.data[:80].decode(errors="backslashreplace").rstrip())
        return DataError(f"{self.path}:{_line(self)} (byte {self.offset}): {what}\n  {excerpt}")

    def text(self) -> str | DataError:
        """The record as text; the error is a value, for whoever reads the stream to raise or to count."""
        try:
            return self.data.decode()
        except UnicodeDecodeError as error:
            found = f"byte {self.data[error.start]:#04x} at byte {error.start} of the record"
            return self.bad(f"expected UTF-8, found {found}")


def read_records(block: Block, separator: bytes) -> Iterator[Record | DataError]:
    """The records of a block without those of white space alone; a byte order mark at the start of a file is left out.

    A record starts at the file's start and after each separator. Compressed bytes that are cut off or wrong end the block
    with an error as its last item.

    Raises:
        DataError: if the file cannot be read, or ends before the block does.
    """
    end = 0
    with opened(block.path) as file:
        try:
            records = (record for record in _split(file, block, separator) if not record[1].isspace())
            for offset, data in islice(records, block.stripe, None, block.stripes):
                end = offset + len(data)
                yield Record(block.path, offset, data.removeprefix(_BOM) if offset == 0 else data)
        except Exception as error:
            if not damage(error):
                raise
            if block.stripe == 0:  # one report of each damage
                yield _damaged(block.path, end, error)


def read_whole(path: str) -> Iterator[Record | DataError]:
    """The file as one record; nothing if it is empty."""
    with opened(path) as file:
        try:
            data = file.read().removeprefix(_BOM)
        except Exception as error:
            if not damage(error):
                raise
            yield _damaged(path, 0, error)
        else:
            yield from [Record(path, 0, data)] if data else []


def record_starts(path: str, size: int, separator: bytes) -> NDArray[np.int64]:
    """The offset of each record of an uncompressed file, int64: one pass over its bytes."""
    found = [np.zeros(min(size, 1), np.int64)]
    overlap = len(separator) - 1
    with opened(path) as file:
        base, kept = 0, b""
        while chunk := file.read(_CHUNK):
            data = kept + chunk
            equal = np.ones(max(len(data) - overlap, 0), bool)
            for place, byte in enumerate(separator):
                equal &= np.frombuffer(data, np.uint8)[place : place + len(equal)] == byte
            found.append(np.flatnonzero(equal) + base + len(separator))
            kept = data[max(len(data) - overlap, 0) :]
            base += len(data) - len(kept)
    starts = np.concatenate(found)
    return starts[starts < size]


def _split(file: IO[bytes], block: Block, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, record) of the records that start in the block."""
    size, keep = len(separator), len(separator) - 1
    read = _careful(file)
    base = max(block.start - size, 0)  # offset of the buffer's first byte: before the block stands the separator, if any
    if base:
        file.seek(base)
    buffer, start, inside = b"", 0, block.start == 0  # `inside`: whether a record is known to begin at `start`
    while base + start < block.stop:
        found = buffer.find(separator, max(start - keep, 0))
        if found >= 0:
            if inside:
                yield base + start, buffer[start : found + size]
            start, inside = found + size, True
            if start > _CHUNK:
                buffer, base, start = buffer[start - keep :], base + start - keep, keep
            continue
        left = block.stop - base - len(buffer)
        if left <= 0 and not inside:
            return
        chunk = read(min(left, max(_CHUNK, len(buffer))) if left > 0 else max(_TAIL, len(buffer) - start))
        if not chunk:
            if left > 0 and block.stop != WHOLE:
                expected = f"expected {block.stop:,} bytes or more, as when the run began"
                raise DataError(f"{block.path}: {expected}, found its end after {file.seek(0, 2):,}")
            if inside and start < len(buffer):
                yield base + start, buffer[start:]
            return
        buffer += chunk


def _careful(file: IO[bytes]) -> Callable[[int], bytes]:
    """`file.read` that gives the bytes before damage first, and raises it when it is called again."""
    part_of: Callable[[int], bytes] = getattr(file, "read1", file.read)
    met: list[Exception] = []

    def read(size: int) -> bytes:
        parts: list[bytes] = []
        try:
            while not met and size > 0 and (part := part_of(size)):
                parts.append(part)
                size -= len(part)
        except Exception as error:
            if not damage(error):
                raise
            met.append(error)
        if met and not parts:
            raise met[0]
        return b"".join(parts)

    return read


def _damaged(path: str, end: int, error: Exception) -> DataError:
    return DataError(f"{path} (byte {end} of its content): expected a whole compressed file, found damage: {error}")


def _line(record: Record) -> int:
    """The number of the line that a record starts in, counted from the file's start."""
    number, left = 1, record.offset
    with opened(record.path) as file:
        while left and (chunk := file.read(min(_CHUNK, left))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number

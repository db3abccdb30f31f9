"""Decompression of files in bounded memory, and the errors that mean that a file is damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import IO, Any, TypeAlias

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
Decompressor: TypeAlias = bz2.BZ2Decompressor | lzma.LZMADecompressor

_CHUNK = 1 << 16
_XZ_MEMORY = 1 << 28


class BrokenStreamError(Exception):
    """Compressed bytes are truncated or corrupt."""


def content(raw: IO[bytes], name: str) -> AbstractContextManager[IO[bytes]]:
    """The decompressed content of `raw`, by the suffix of its lower-case `name`; `raw` itself without such a suffix."""
    if name.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        return _zstd().open(raw)  # type: ignore[no-any-return]
    if name.endswith(".bz2"):
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor))
    if name.endswith(".xz"):
        return io.BufferedReader(_Streams(raw, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)))
    return nullcontext(raw)


def is_damage(error: BaseException) -> bool:
    """Whether an error means that compressed bytes are truncated or corrupt."""
    return isinstance(error, EOFError | gzip.BadGzipFile | zlib.error | BrokenStreamError | _zstd().ZstdError)


class _Streams(io.RawIOBase):
    """The content of concatenated bzip2 or xz streams, with zeros allowed between them.

    The standard library's readers silently skip garbage behind a stream, and let an xz header claim any amount of memory.
    """

    def __init__(self, raw: IO[bytes], new: Callable[[], Decompressor]) -> None:
        self._raw, self._new, self._rest = raw, new, b""
        self._stream: Decompressor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = b""
        while not part:
            if self._stream is not None and self._stream.eof:
                self._rest, self._stream = self._stream.unused_data, None
            if not self._rest and (self._stream is None or self._stream.needs_input):
                self._rest = self._raw.read(_CHUNK)
                if not self._rest and self._stream is not None:
                    raise BrokenStreamError("the file ends before its last stream does")
                if not self._rest:
                    return 0
            if self._stream is None:
                self._rest = self._rest.lstrip(b"\0")
                if not self._rest:
                    continue
                self._stream = self._new()
            part = self._decompressed(self._stream, len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def _decompressed(self, stream: Decompressor, size: int) -> bytes:
        data, self._rest = self._rest, b""
        try:
            return stream.decompress(data, size)
        except (OSError, lzma.LZMAError) as error:  # bz2 raises an OSError for corrupt bytes
            raise BrokenStreamError(error) from None


def _zstd() -> ModuleType:
    """The standard library's zstd, which exists since Python 3.14, or its backport."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd

"""Guesses what bytes are that turned out not to be UTF-8."""

from __future__ import annotations

_SIGNATURES = {
    b"\xff\xfe": "UTF-16 (convert it: iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 (convert it: iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "gzip data, whose name should end in .gz",
    b"BZh": "bzip2 data, whose name should end in .bz2",
    b"\xfd7zXZ\0": "xz data, whose name should end in .xz",
    b"\x28\xb5\x2f\xfd": "Zstandard data, whose name should end in .zst",
    b"PK\x03\x04": "a zip archive (unpack it)",
    b"PAR1": "Parquet data (set `format: parquet`)",
}
_SAMPLE = 64


def signature(data: bytes) -> str:
    """The format of data by its first bytes, with what to do about it; empty if they match none."""
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), "")


def every_other_byte_is_zero(data: bytes) -> bool:
    """Whether data looks like UTF-16 without a byte order mark: plain ASCII in it is valid UTF-8, with zeros in between."""
    if b"\0" not in data:
        return False
    sample = data[:_SAMPLE]
    return len(sample) > 3 and not (any(sample[::2]) and any(sample[1::2]))

"""Writing of safetensors files: bytes to the disk and their SHA-256 at the same time, of several files beside each other.

The format is a header in JSON before the tensors' bytes; files are equal to those that the library writes, byte for byte, and
the library reads them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fnrecipe.checkpoint.write_file import Bytes, write_file
from fnrecipe.runtime.background import map_at_once

_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the order in which their tensors lie in a file: the larger ones first, so that each is aligned."""
DTYPES = {name: str(dtype).removeprefix("torch.") for dtype, name in _NAMES.items()}
"""torch's names for the dtypes by those in a file."""
AT_ONCE = 8
"""Files that are written, or read and summed, at once."""
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def write_files(files: Mapping[Path, Mapping[str, Tensor]]) -> dict[Path, str]:
    """Writes tensors of the host to new files, which are on disk then; returns the SHA-256 of each.

    Raises:
        OSError: if one cannot be written.
        ValueError: for a dtype that the format does not have.
    """
    # While a piece of one file is with the disk, those of others are summed and copied.
    parts = {path: _parts(tensors) for path, tensors in files.items()}
    sums = map_at_once(lambda path: write_file(path, parts[path]), list(parts), limit=AT_ONCE)
    return dict(zip(parts, sums, strict=True))


def _parts(tensors: Mapping[str, Tensor]) -> list[Bytes]:
    """The bytes of a file."""
    unknown = [f"{name}: {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _NAMES]
    if unknown:
        raise ValueError(f"expected dtypes of safetensors, found {', '.join(unknown)}")
    ordered = dict(sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])))
    return [np.frombuffer(_header(ordered), np.uint8), *map(_bytes, ordered.values())]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> Bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()

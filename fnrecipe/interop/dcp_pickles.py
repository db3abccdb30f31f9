"""The pickles of torch's distributed checkpoints, read without running anything that they name.

Such a checkpoint describes itself in a pickle, `.metadata`, and each slice of a tensor in another. Unpickling calls what the
bytes ask for. Here a pickle may name the few classes and functions of the table below alone, and gets plain records, tuples
and texts in their place: no code of torch's runs, and no other.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from fnrecipe.errors import one_line

_DCP = "torch.distributed.checkpoint"
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_OTHERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


class Record:
    """An object of a class whose own code does not run: what its pickle says of its fields."""

    state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _arguments(*values: object) -> tuple[object, ...]:
    return values


_STANDINS: dict[tuple[str, str], Callable[..., object] | str] = {
    **{(f"{_DCP}.metadata", f"{kind}StorageMetadata"): type(kind, (Record,), {}) for kind in ("Tensor", "Chunk", "Bytes")},
    **{(f"{_DCP}.metadata", name): type(name, (Record,), {}) for name in ("Metadata", "MetadataIndex", "TensorProperties")},
    (f"{_DCP}.metadata", "StorageMeta"): type("StorageMeta", (Record,), {}),
    (f"{_DCP}.filesystem", "_StorageInfo"): type("StorageInfo", (Record,), {}),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _arguments,
    ("torch.serialization", "_get_layout"): _arguments,
    ("torch", "Size"): tuple,
    **{(module, name): _arguments for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
    ("collections", "OrderedDict"): dict,
    **{("torch._utils", f"_rebuild_tensor_{version}"): _arguments for version in ("v2", "v3")},
    **{("torch", name): name for name in (*_FLOATS, *_OTHERS)},
    **{("torch", f"{name}Storage"): name for name in _STORAGES},
    ("torch.storage", "UntypedStorage"): "Untyped",
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of the table, and storages as (name, its file, its device, its size) and no contents."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _STANDINS:
            raise pickle.UnpicklingError(f"it names {one_line(f'{module}.{name}')}, which is not known to be harmless")
        return _STANDINS[module, name]

    def persistent_load(self, pid: object) -> object:
        return pid


_TOO_MUCH = RecursionError, MemoryError


def unpickled(data: bytes) -> Any:
    """What a pickle holds, in records.

    Raises:
        ValueError: if it is none, or names anything else than distributed checkpoints do.
    """
    # The unpickler keeps what is put aside in an array, up to the greatest index: four bytes of a file would take 64 GB.
    try:
        puts = [index for code, index, _ in pickletools.genops(data) if code.name in ("PUT", "BINPUT", "LONG_BINPUT")]
    except ValueError as error:
        raise ValueError(f"a pickle that is not read: {one_line(str(error))}") from None
    if max((index or 0 for index in puts), default=0) > len(data):
        raise ValueError(f"a pickle that is not read: an object with a number above {len(data):,}")
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, *_TOO_MUCH) as error:
        raise ValueError(f"a pickle that is not read: {one_line(str(error)) or type(error).__name__}") from None

"""A cache of token ids on disk, by content: texts that were tokenised once are found under any file, block, run or machine.

Each entry is a file of its own, renamed into place: any number of processes may share a folder, and it may be deleted at any
time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import attrs
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from fnrecipe.data.blocks import Block
from fnrecipe.data.document import Document, Ids, Read
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError

_FORMAT = b"fnrecipe tokens 1"
_log = logging.getLogger(__name__)


def cached(block: Block, *, read: Callable[[Block], Iterator[Read]], tokenizer: Tokenizer, folder: Path) -> Iterator[Read]:
    """The documents of `read(block)` with their ids; a block with bad records bypasses the cache.

    Raises:
        UsageError: if the folder cannot be written to.
    """
    # The key is a digest of the texts and of the tokenizer, not of path, size and time: an entry may be superfluous, but never
    # out of date. Reading and parsing a block to look it up costs 1 % of tokenising it.
    found = list(read(block))
    documents = [item for item in found if isinstance(item, Document)]
    texts = [document.text for document in documents if document.text is not None]
    if any(isinstance(item, DataError) for item in found) or len(texts) < len(documents) or not texts:
        yield from found
        return
    path = _path(folder, texts, tokenizer)
    ids = _load(path, len(texts))
    if ids is None:
        ids = tokenizer.encode(texts)
        _save(path, ids)
    yield from (attrs.evolve(document, ids=own) for document, own in zip(documents, ids, strict=True))


def _path(folder: Path, texts: Sequence[str], tokenizer: Tokenizer) -> Path:
    digest = hashlib.blake2b(_FORMAT, digest_size=20)
    for part in (tokenizer.fingerprint, *texts):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    name = digest.hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def _load(path: Path, size: int) -> list[Ids] | None:
    """The ids of `size` texts; None if there is no entry, or a damaged one."""
    try:
        entry = safetensors.numpy.load(path.read_bytes())
        flat, lengths, checksum = entry["ids"], entry["lengths"], entry["checksum"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, KeyError) as error:
        _log.warning("%s: damaged cache entry made anew: %s", path, error)
        return None
    if len(lengths) != size or int(lengths.sum()) != len(flat) or _checksum(path, flat, lengths) != checksum[0]:
        _log.warning("%s: damaged cache entry made anew", path)
        return None
    return np.split(flat.astype(np.int32), np.cumsum(lengths)[:-1])


def _save(path: Path, ids: Sequence[Ids]) -> None:
    flat = np.concatenate(ids)
    small = flat.astype(np.uint16 if flat.size and flat.max() < 1 << 16 else np.uint32)
    lengths = np.array([len(i) for i in ids], np.int64)
    checksum = np.array([_checksum(path, small, lengths)], np.uint32)
    content = safetensors.numpy.save({"ids": small, "lengths": lengths, "checksum": checksum})
    tmp = path.with_name(f"{path.stem}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tmp.write_bytes(content)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"dataset.cache: cannot write to {path.parent}: {error.strerror}") from None


def _checksum(path: Path, ids: NDArray[np.generic], lengths: NDArray[np.generic]) -> int:
    """Of the entry's content and its name: an entry under another one's name is damaged, too."""
    head = f"{path.stem} {ids.dtype.str} {lengths.dtype.str}".encode()
    return zlib.crc32(lengths.tobytes(), zlib.crc32(ids.tobytes(), zlib.crc32(head)))

"""Which kernel computes each large matrix product fastest on this processor: measured once, and kept in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fnrecipe.compiler.products import Kernel, Product
from fnrecipe.ops import linear_by_onednn
from fnrecipe.runtime.files import replace
from fnrecipe.runtime.host import cache
from fnrecipe.runtime.processor import processor

_log = logging.getLogger(__name__)
_MOST = 2**28
"""Multiplications of the largest product that is measured, some 5 ms of a core: a larger one is taken to be as fast a piece."""
_TURNS, _MOST_TURNS = 4, 24
"""How often a product is computed: the smaller, the more often."""
_FUSED = 0.36
"""What a copy costs in a compiled kernel, of what it costs torch."""
_GAIN = 0.98
"""Of torch's time, what another kernel may take at most to be chosen."""


@attrs.frozen
class Timing:
    """CPU seconds of a kind of product, the least of some turns.

    mkl, onednn, turned   torch's, oneDNN's and that of the turned product, for each multiplication
    copy, turned_copy     of the copies for these two, for each element
    """

    mkl: float
    onednn: float
    turned: float
    copy: float
    turned_copy: float

    def best(self, product: Product) -> Kernel:
        share = _FUSED if product.fused else 1.0
        others: dict[Kernel, float] = {
            "onednn": self.onednn * product.multiplications + share * self.copy * product.copied,
            "onednn turned": self.turned * product.multiplications + share * self.turned_copy * product.copied_turned,
        }
        fastest = min(others, key=lambda kernel: others[kernel])
        return fastest if others[fastest] < _GAIN * self.mkl * product.multiplications else "mkl"


def measured(products: Collection[Product]) -> dict[Product, Kernel]:
    """The fastest kernel of each product on this processor, which is measured if it has not been before.

    Threads are left out of it: ranks have as many as there are cores for them, and all have to choose the same.
    """
    kinds = {product: _scaled(product) for product in products}
    timings = _measured(sorted(set(kinds.values()), key=str))
    return {product: timings[str(kind)].best(product) for product, kind in kinds.items()}


def _measured(products: Sequence[Product]) -> dict[str, Timing]:
    path = cache("products") / f"{hashlib.sha256(processor().encode()).hexdigest()[:16]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process measures, all know the same
            before = _read(path)
            known = _completed(before, products)
            if known != before:
                rows = {name: attrs.asdict(timing) for name, timing in known.items()}
                replace(path, json.dumps({"processor": processor(), "seconds": rows}, indent=1).encode())
            return known
    except (OSError, RuntimeError) as error:
        _log.warning("matrix products are measured again at the next start, and may be computed otherwise: %s", error)
        return _completed({}, products)


def _completed(known: Mapping[str, Timing], products: Sequence[Product]) -> dict[str, Timing]:
    return {**known, **{str(product): measure(product) for product in products if str(product) not in known}}


def _read(path: Path) -> dict[str, Timing]:
    """What is known of this processor; nothing if the file is not there, or is not what was written."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return {name: Timing(**{key: float(value) for key, value in row.items()}) for name, row in rows.items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def measure(product: Product) -> Timing:
    """Its CPU seconds, on this thread."""
    threads, turns = torch.get_num_threads(), min(_MOST_TURNS, _TURNS * _MOST // product.multiplications)
    torch.set_num_threads(1)
    try:
        left = _random(product.rows, product.inner, product.left_transposed)
        right = _random(product.inner, product.columns, product.right_transposed)
        row_major, flat = left.contiguous(), right.t().contiguous()
        result = torch.mm(left, right)
        ways: list[tuple[Callable[[], object], int]] = [
            (lambda: torch.mm(left, right), product.multiplications),
            (lambda: linear_by_onednn(row_major, right.t()), product.multiplications),
            (lambda: linear_by_onednn(flat, left), product.multiplications),
            (lambda: left.t().contiguous() if left.is_contiguous() else left.contiguous(), left.numel()),
            (lambda: (flat.t().contiguous(), result.t().contiguous()), flat.numel() + result.numel()),
        ]
        seconds = [[_seconds(way) / size for way, size in ways] for _ in range(1 + turns)]  # the first turn warms up
    finally:
        torch.set_num_threads(threads)
    return Timing(*(min(turns) for turns in zip(*seconds[1:], strict=True)))


def _seconds(run: Callable[[], object]) -> float:
    began = time.thread_time()  # whatever else runs on the machine
    run()
    return time.thread_time() - began


def _random(rows: int, columns: int, transposed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if transposed:
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns, generator=generator)


def _scaled(product: Product) -> Product:
    """The product that is measured for it: the largest side is halved until it is not too large."""
    rows, inner, columns = product.rows, product.inner, product.columns
    while rows * inner * columns > _MOST:
        largest = max(rows, inner, columns)
        rows, inner, columns = (side // 2 if side == largest else side for side in (rows, inner, columns))
    return Product(rows, inner, columns, product.left_transposed, product.right_transposed)

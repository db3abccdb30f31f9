"""Packing: the padding that a bound on the documents of a row costs, by the law of their lengths. Nothing is timed."""

from __future__ import annotations

import numpy as np

from benchmarks.report import Result
from fnrecipe.data.pack import best_fit

WINDOW, DOCUMENTS = 512, 20_000
LAWS = {
    "web pages, median 420, log-normal": (np.log(420), 1.0),
    "instructions, median 90, log-normal": (np.log(90), 0.8),
    "short messages, median 22, log-normal": (np.log(22), 0.6),
    "stories, mean 200, normal": None,
}
LIMITS = (8, 16, 32, 64, 128, None)


def run(rounds: int) -> list[Result]:
    results = []
    for law, shape in LAWS.items():
        for length in (1024, 4096):
            for limit in LIMITS:
                values = [100 * _padding(_lengths(shape, seed), length, limit) for seed in range(rounds)]
                system = "no bound" if limit is None else f"at most {limit} documents a row"
                results.append(Result("padding", f"{law}, rows of {length}", system, "padding", values, "%"))
    return results


def _lengths(shape: tuple[float, float] | None, seed: int) -> list[int]:
    """Predictions in each document."""
    generator = np.random.default_rng(seed)
    drawn = generator.normal(200, 60, DOCUMENTS) if shape is None else generator.lognormal(*shape, DOCUMENTS)
    return np.maximum(1, drawn).astype(int).tolist()


def _padding(lengths: list[int], length: int, limit: int | None) -> float:
    rows = 0
    for first in range(0, len(lengths), WINDOW):
        sizes = [min(length, size - start) for size in lengths[first : first + WINDOW] for start in range(0, size, length)]
        rows += len(best_fit(sizes, length, limit))
    return 1 - sum(lengths) / (rows * length)

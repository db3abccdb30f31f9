"""What benchmarks measure, as rows; how they are printed and written."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table


@attrs.frozen
class Result:
    """One figure: the median of `values` is quoted, their range says how noisy the machine was.

    Without values it says of a system that it was not measured; `metric` then tells why.
    """

    benchmark: str
    case: str
    system: str
    metric: str
    values: Sequence[float]
    unit: str

    @property
    def value(self) -> float | None:
        return statistics.median(self.values) if self.values else None


def ratios(results: Sequence[Result], metric: str, base: str) -> list[Result]:
    """For each system and case, `metric` over that of the system `base`, round by round."""
    picked = [r for r in results if r.metric == metric]
    bases = {r.case: r for r in picked if r.system == base}
    return [
        Result(r.benchmark, r.case, r.system, f"{metric}, ratio to {base}", _over(r.values, bases[r.case].values), "x")
        for r in picked
        if r.system != base and r.case in bases
    ]


def show(results: Sequence[Result]) -> None:
    table = Table("case", "system", "metric", "median", "min", "max", "unit")
    for r in results:
        figures = [_digits(f(r.values)) for f in (statistics.median, min, max)] if r.values else [""] * 3
        table.add_row(r.case, r.system, r.metric, *figures, r.unit)
    Console(width=150).print(table)


def write(results: Iterable[Result], path: Path) -> None:
    with path.open("w") as file:
        for result in results:
            row = attrs.asdict(result, filter=lambda attribute, _: attribute.name != "values")
            file.write(json.dumps({**row, "value": result.value}) + "\n")


def _over(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

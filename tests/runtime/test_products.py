"""What is measured of matrix products, what is chosen by it, and what is kept of that."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fnrecipe.compiler.products import Kernel, Product
from fnrecipe.errors import CheckpointError
from fnrecipe.runtime import products
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.processor import processor
from fnrecipe.runtime.products import Timing, measure, measured
from fnrecipe.shell.products import chosen_once

SMALL = Product(64, 32, 48, left_transposed=True, right_transposed=False)
EVEN = Timing(mkl=1e-9, onednn=1e-9, turned=1e-9, copy=0.0, turned_copy=0.0)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fnrecipe/products"


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """What is measured, in place of which a fixed timing is told."""
    asked = list[Product]()

    def fixed(product: Product) -> Timing:
        asked.append(product)
        return Timing(1e-9, 0.5e-9, 0.9e-9, 0.0, 0.0)

    monkeypatch.setattr(products, "measure", fixed)
    return asked


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        (EVEN, "mkl"),
        (Timing(1e-9, 0.99e-9, 2e-9, 0.0, 0.0), "mkl"),
        (Timing(1e-9, 0.9e-9, 2e-9, 0.0, 0.0), "onednn"),
        (Timing(1e-9, 0.9e-9, 0.8e-9, 0.0, 0.0), "onednn turned"),
        (Timing(1e-9, 0.9e-9, 2e-9, 1e-8, 0.0), "mkl"),
        (Timing(1e-9, 0.9e-9, 0.9e-9, 1e-9, 1e-9), "onednn"),
    ],
)
def test_the_fastest_is_chosen_with_its_copies_and_torchs_product_where_little_is_gained(timing: Timing, expected: str) -> None:
    assert timing.best(SMALL) == expected


def test_a_copy_counts_less_where_a_compiled_kernel_makes_it() -> None:
    timing = Timing(1e-9, 0.9e-9, 2e-9, 8e-9, 0.0)
    kinds = [Product(64, 32, 48, True, False, fused) for fused in (False, True)]
    assert [timing.best(kind) for kind in kinds] == ["mkl", "onednn"]


def test_a_product_is_measured_on_one_thread_and_the_others_come_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        timing = measure(SMALL)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert min(timing.mkl, timing.onednn, timing.turned, timing.copy, timing.turned_copy) > 0


def test_each_kind_is_measured_once_and_a_large_one_by_a_piece(timings: list[Product], own_cache: Path) -> None:
    large = Product(8192, 32_000, 4096, False, True)
    kinds = [SMALL, large, Product(64, 32, 48, True, False, fused=True)]
    assert measured(kinds) == dict.fromkeys(kinds, "onednn")
    assert SMALL in timings
    (piece,) = {*timings} - {SMALL}
    assert len(timings) == 2
    assert products._MOST / 2 < piece.multiplications <= products._MOST
    assert (piece.left_transposed, piece.right_transposed) == (False, True)
    assert measured(kinds) == dict.fromkeys(kinds, "onednn")
    assert len(timings) == 2
    (file,) = own_cache.glob("*.json")
    assert json.loads(file.read_text())["processor"] == processor()


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": {"x": 1}}', '{"seconds": {"64x32x48 tn": {"mkl": 1}}}'])
def test_a_file_that_says_something_else_is_written_anew(content: str, timings: list[Product], own_cache: Path) -> None:
    measured([SMALL])
    (file,) = own_cache.glob("*.json")
    file.write_text(content)
    assert measured([SMALL]) == {SMALL: "onednn"}
    assert len(timings) == 2
    assert measured([SMALL]) == {SMALL: "onednn"}
    assert len(timings) == 2


def test_without_a_cache_it_says_so_and_goes_on(
    timings: list[Product], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.parent.parent.write_text("a file where the cache should be")
    assert measured([SMALL]) == {SMALL: "onednn"}
    assert "matrix products are measured again at the next start" in caplog.text


def session(out: Path, lines: list[str]) -> Any:
    return SimpleNamespace(out=out, gang=Gang(), display=SimpleNamespace(line=lines.append))


def test_a_run_goes_on_with_what_it_has_chosen(tmp_path: Path, timings: list[Product]) -> None:
    lines = list[str]()
    other = Product(32, 32, 48, False, False)
    assert chosen_once(session(tmp_path, lines))([SMALL]) == {SMALL: "onednn"}
    file = tmp_path / "products.json"
    stored = json.loads(file.read_text())
    assert stored == {"processor": processor(), "kernels": {"64x32x48 tn": "onednn"}}

    file.write_text(json.dumps(stored | {"kernels": {"64x32x48 tn": "onednn turned"}}))
    expected: dict[Product, Kernel] = {SMALL: "onednn turned", other: "onednn"}
    assert chosen_once(session(tmp_path, lines))([SMALL, other]) == expected
    assert json.loads(file.read_text())["kernels"] == {"64x32x48 tn": "onednn turned", "32x32x48 nn": "onednn"}
    assert not lines


def test_another_processor_is_told(tmp_path: Path, timings: list[Product]) -> None:
    lines = list[str]()
    (tmp_path / "products.json").write_text('{"processor": "a 486", "kernels": {}}')
    chosen_once(session(tmp_path, lines))
    assert lines == [f"the run began on a 486; this is {processor()}: its last digits will be others"]


@pytest.mark.parametrize("content", ["", "{}", '{"processor": "a", "kernels": {"64x32x48 tn": "blas"}}'])
def test_what_is_no_record_of_products_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "products.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"products.json: expected "):
        chosen_once(session(tmp_path, []))

"""Large products by oneDNN: where they are, and against products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe.compiler import interpreter, trace
from fnrecipe.compiler.cost import operation_costs
from fnrecipe.compiler.products import Kernel, Product, by_rule, choose_kernels, products_of
from fnrecipe.transforms import jit

ours = torch.ops.fnrecipe.mm.default
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def large(rows: int = 512, inner: int = 256, columns: int = 256, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inner, generator=generator).to(dtype), torch.randn(inner, columns, generator=generator).to(dtype)


def transposed(matrix: Tensor) -> Tensor:
    """The same matrix, column after column."""
    return matrix.t().contiguous().t()


def multiplied_by_ours(left: Tensor, right: Tensor) -> bool:
    graph, _ = trace(torch.mm, (left, right))
    interpreter(graph)
    return bool(graph.graph.find_nodes(op="call_function", target=ours))


def test_a_large_product_is_as_exact_as_that_of_torch() -> None:
    left, right = large()
    exact = left.double() @ right.double()
    error, error_of_torch = ((product.double() - exact).abs().max() for product in (jit(torch.mm)(left, right), left @ right))
    assert multiplied_by_ours(left, right)
    assert error <= 2 * error_of_torch


def test_the_right_matrix_may_be_a_transposed_view() -> None:
    left, right = large()
    assert multiplied_by_ours(left, transposed(right))
    torch.testing.assert_close(jit(torch.mm)(left, transposed(right)), left @ right, rtol=1e-5, atol=1e-4)


def copied(left: Tensor, right: Tensor, *, fused: bool = False) -> list[list[int]]:
    """The shapes that are copied for a product in which oneDNN multiplies, which must be right."""
    graph = make_fx(torch.mm, tracing_mode="fake")(left, right)
    choose_kernels(graph, by_rule, fused=fused)
    product = graph(left, right)
    torch.testing.assert_close(product, left @ right, rtol=1e-4, atol=1e-3)
    assert product.is_contiguous()
    assert graph.graph.find_nodes(op="call_function", target=ours)
    copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    return [list(copy.meta["val"].shape) for copy in copies]


def test_a_left_matrix_that_is_a_transposed_view_is_copied_where_the_product_is_large() -> None:
    left, right = large(256, 256, 1024)
    assert copied(transposed(left), right) == [[256, 256]]


def test_the_product_is_turned_round_where_that_copies_less() -> None:
    left, right = large(4096, 1200, 64)
    assert copied(transposed(left), right) == [[64, 1200], [4096, 64]]
    assert copied(transposed(left), transposed(right)) == [[4096, 64]]


def test_how_much_a_copy_may_cost_is_for_what_runs_the_graph_to_say() -> None:
    left, right = large()
    assert not multiplied_by_ours(transposed(left), right)
    assert copied(transposed(left), right, fused=True) == [[512, 256]]


def test_what_is_small_or_would_be_copied_or_is_in_another_precision_stays_with_torch() -> None:
    left, right = large()
    assert not multiplied_by_ours(*large(rows=64))
    assert not multiplied_by_ours(transposed(left), right)
    assert not multiplied_by_ours(left, torch.cat([right, right], 1)[:, ::2])
    assert not multiplied_by_ours(*large(dtype=torch.float64))
    assert not multiplied_by_ours(*large(dtype=torch.bfloat16))


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    left, right = large()
    multiply, threads = jit(torch.mm), torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            results.append(multiply(left, right))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def test_it_costs_what_it_costs_torch() -> None:
    graph, _ = trace(torch.mm, large())
    interpreter(graph)
    costs = operation_costs(graph)
    assert {name: cost.flops for name, cost in costs.items()} == {"fnrecipe.mm": 2 * 512 * 256 * 256}


LAYOUTS = [(left, right) for left in (False, True) for right in (False, True)]


@pytest.mark.parametrize("kernel", ["mkl", "onednn", "onednn turned"])
@pytest.mark.parametrize(("turned_left", "turned_right"), LAYOUTS)
def test_each_kernel_computes_the_product_of_each_layout(kernel: Kernel, turned_left: bool, turned_right: bool) -> None:
    left, right = (transposed(x) if turned else x for x, turned in zip(large(), (turned_left, turned_right), strict=True))
    graph, _ = trace(torch.mm, (left, right))
    asked = list[Product]()
    choose_kernels(graph, lambda products: asked.extend(products) or dict.fromkeys(products, kernel))
    assert asked == [Product(512, 256, 256, turned_left, turned_right)]
    torch.testing.assert_close(graph(left, right)[0], left @ right, rtol=1e-5, atol=1e-4)
    assert graph(left, right)[0].is_contiguous()


def test_products_are_those_of_regions_too_each_once() -> None:
    def function(left: Tensor, right: Tensor) -> Tensor:
        return left @ right @ right + (left @ right) @ right.t()

    graph, _ = trace(function, large())
    assert [*map(str, products_of(graph))] == ["512x256x256 nn", "512x256x256 nt"]
    assert [*map(str, products_of(graph, fused=True))] == ["512x256x256 nn compiled", "512x256x256 nt compiled"]
    assert not graph.graph.find_nodes(op="call_function", target=ours)

"""A pass that chooses what computes each large float32 matrix product on a CPU: MKL, as torch does, or oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fnrecipe.compiler.new_nodes import call, contiguous_copy
from fnrecipe.ops import is_large_product, mm

aten = torch.ops.aten

Kernel: TypeAlias = Literal["mkl", "onednn", "onednn turned"]
"""
mkl            torch's own product
onednn         oneDNN's, of a copy of the left matrix if that is a transposed view
onednn turned  the same of (rightᵀ leftᵀ)ᵀ, which may need the smaller copies
"""


@attrs.frozen
class Product:
    """left [rows, inner] @ right [inner, columns], of which each may be the transposed view of a row-major matrix.

    fused   whether copies are made by compiled kernels, at a third of the time
    """

    rows: int
    inner: int
    columns: int
    left_transposed: bool
    right_transposed: bool
    fused: bool = False

    def __str__(self) -> str:
        layout = "".join("t" if transposed else "n" for transposed in (self.left_transposed, self.right_transposed))
        return f"{self.rows}x{self.inner}x{self.columns} {layout}{' compiled' if self.fused else ''}"

    @property
    def multiplications(self) -> int:
        return self.rows * self.inner * self.columns

    @property
    def copied(self) -> int:
        """Elements that are copied for `onednn`."""
        return self.rows * self.inner if self.left_transposed else 0

    @property
    def copied_turned(self) -> int:
        """Elements that are copied for `onednn turned`: the right matrix, and the result."""
        return self.rows * self.columns + (0 if self.right_transposed else self.inner * self.columns)


Choose: TypeAlias = Callable[[Collection[Product]], Mapping[Product, Kernel]]
"""Chooses for all products of a graph, once for each graph."""

_WORTH, _WORTH_FUSED = 900, 256
"""Multiplications that must stand against each element copied, by torch or by a compiled kernel."""


def by_rule(products: Collection[Product]) -> dict[Product, Kernel]:
    """The choice that was right on an AMD Zen 4 with AVX-512: the same on every processor.

    There MKL reaches 90 to 100 GFLOP/s a core and oneDNN 105 to 110. A copied element takes 0.7 ns by torch and 0.25 in a
    kernel of Inductor's, a multiplication by oneDNN saves 0.0022: the copy breaks even at 320 or 114 multiplications an
    element, and is asked to pay two to three times.
    """
    return {product: _by_rule(product) for product in products}


def _by_rule(product: Product) -> Kernel:
    worth = _WORTH_FUSED if product.fused else _WORTH
    if product.multiplications < worth * min(product.copied, product.copied_turned):
        return "mkl"
    return "onednn" if product.copied <= product.copied_turned else "onednn turned"


def choose_kernels(module: GraphModule, choose: Choose, *, fused: bool = False) -> None:
    """Replaces `aten.mm` by `fnrecipe::mm` where `choose` says so, here and in regions. Results are equal within rounding."""
    # torch has oneDNN for float32 only behind `mkldnn._linear_pointwise`, a layer for inference; `fnrecipe::mm` wraps that.
    # oneDNN copies a left matrix that is a transposed view, as in every weight's gradient. Also tried: a 1 x 1 convolution,
    # whose backward is MKL again.
    graphs = [part for part in module.modules() if isinstance(part, GraphModule)]
    nodes = {
        node: product
        for part in graphs
        for node in part.graph.find_nodes(op="call_function", target=aten.mm.default)
        if (product := _product(node, fused)) is not None
    }
    chosen = choose(list(dict.fromkeys(nodes.values()))) if nodes else {}
    for node, product in nodes.items():
        kernel = chosen[product]
        if kernel != "mkl":
            with node.graph.inserting_before(node):
                replacement = (_straight if kernel == "onednn" else _turned)(*_operands(node))
            node.replace_all_uses_with(replacement)
            node.graph.erase_node(node)
    for part in graphs if chosen else ():
        part.recompile()


def products_of(module: GraphModule, *, fused: bool = False) -> list[Product]:
    """The large products of a graph and of its regions, each kind of them once."""
    found = list[Product]()

    def kept(products: Collection[Product]) -> dict[Product, Kernel]:
        found.extend(products)
        return dict.fromkeys(products, "mkl")

    choose_kernels(module, kept, fused=fused)
    return found


def _product(node: Node, fused: bool) -> Product | None:
    """The product, if it is large, and of matrices that oneDNN takes as they are or as the transposed view of one."""
    left, right = (operand.meta["val"] for operand in _operands(node))
    if not is_large_product(left, right.t()) or not all(map(_is_dense, (left, right))):
        return None
    (rows, inner), columns = left.shape, right.shape[1]
    return Product(rows, inner, columns, not left.is_contiguous(), not right.is_contiguous(), fused)


def _operands(node: Node) -> tuple[Node, Node]:
    left, right = node.args
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return left, right


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _straight(left: Node, right: Node) -> Node:
    return call(mm.default, _contiguous(left), right)


def _turned(left: Node, right: Node) -> Node:
    product = _straight(call(aten.t.default, right), call(aten.t.default, left))
    return _contiguous(call(aten.t.default, product))


def _contiguous(matrix: Node) -> Node:
    """The matrix in row-major order; itself if it is that already."""
    return matrix if matrix.meta["val"].is_contiguous() else contiguous_copy(matrix)

"""A pass that computes narrow matrix products with a common operand as one: the projections of a layer's input, and back.

A GPU computes a product in tiles, and is not filled by those of few columns: three of 16,384 x 768 x 768 took an H200 150 µs,
and one of 16,384 x 768 x 2,304 is estimated at 80. W are weights, row-major [columns, inner], and G gradients, row-major
[rows, columns]:

    x Wᵀ for several W          x cat(W)ᵀ, of which each result is some columns
    Gᵀ x for several G          cat(G)ᵀ x, of which each result is some rows
    the sum of G W over pairs   cat(G) cat(W), summed in float32 where it was rounded after each product

Weights are small beside what they are multiplied by, gradients are written into the place that they have in `cat` by the
kernel that makes them, and results are read from theirs by the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from fnrecipe.compiler.new_nodes import call, contiguous_copy
from fnrecipe.ops import opaque_clone

aten = torch.ops.aten
NARROW = 1024
"""Columns, below which products are computed as one."""
_VIEWS = aten.view.default, aten._unsafe_view.default, aten.t.default
_PURE = *_VIEWS, aten._to_copy.default, aten.alias.default
_Cats: TypeAlias = dict[tuple[int, Sequence[Node]], Node]
"""What has been put together, by the dimension and the matrices."""


def stack_products(module: GraphModule) -> None:
    """Rewrites the products of a graph, not those of its regions. Results are equal within rounding."""
    graph = module.graph
    cats = _Cats()
    for side in (0, 1):
        for products in _sharing(graph, side):
            _stack(products, side, cats)
    for total in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):  # whole sums before parts of them
        _stack_sum(total, cats)
    graph.eliminate_dead_code()
    module.recompile()


def _sharing(graph: Graph, side: int) -> Iterator[list[Node]]:
    """Narrow products with a common left (0) or right (1) operand; the others are transposed views of row-major matrices."""
    groups = defaultdict[object, list[Node]](list)
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        if _value(node).shape[1 - side] < NARROW and _value(node.args[1 - side]).t().is_contiguous():
            groups[_written_out(node.args[side])].append(node)
    for products in groups.values():
        if len(products) > 1 and _come_early(products, 1 - side):
            yield products


def _written_out(operand: Argument) -> object:
    """The same for views of one tensor that were made in the same way."""
    if isinstance(operand, Node) and operand.target in _VIEWS:
        return operand.target, *map(_written_out, operand.args)
    return tuple(operand) if isinstance(operand, list) else operand


def _come_early(products: Sequence[Node], side: int) -> bool:
    """Moves the operands on one side before the first of the products, if nothing but views and casts are in between."""
    first, moved = products[0], list[Node]()

    def collect(operand: Node) -> bool:
        if operand < first or operand in moved:
            return True
        if operand.target not in _PURE or not all(map(collect, operand.all_input_nodes)):
            return False
        moved.append(operand)
        return True

    if not all(collect(operand) for each in products if isinstance(operand := each.args[side], Node)):
        return False
    for node in moved:
        first.prepend(node)
    return True


def _stack(products: Sequence[Node], side: int, cats: _Cats) -> None:
    """One product in place of those with a common left (0) or right (1) operand: some of its columns or rows are each's."""
    first, start = products[0], 0
    with first.graph.inserting_before(first):
        parts = [call(aten.t.default, each.args[1 - side]) for each in products]
        operands = [first.args[side], call(aten.t.default, _cat(parts, side, cats))]
        whole = call(aten.mm.default, *(operands if side == 0 else reversed(operands)))
        for each in products:
            end = start + _value(each).shape[1 - side]
            # Columns are copied only where a kernel's operand may have no gaps; others read them where they are. Rows have
            # none, but Inductor would return them from a region as they are, and read beside those that lie further down.
            part = call(aten.slice.Tensor, whole, 1 - side, start, end)
            part = call(opaque_clone.default, part) if side == 1 else contiguous_copy(part)
            each.replace_all_uses_with(part)
            start = end
    for each in products:
        each.graph.erase_node(each)


def _stack_sum(total: Node, cats: _Cats) -> None:
    """One product in place of the narrow products of row-major matrices in a sum, each viewed in its shape."""
    terms = [*_terms(total)] if total.users and _is_sum(total) else []
    found = {term: product for term in terms if (product := _product(term)) is not None}
    if len(found) < 2 or not all(_is_like(term, total) for term in terms):
        return
    lefts, rights = ([product.args[side] for product in found.values()] for side in (0, 1))
    with total.graph.inserting_before(total):
        whole = call(aten.mm.default, _cat(lefts, 1, cats), _cat(rights, 0, cats))
        sum_of_all = call(aten.view.default, whole, [*_value(total).shape])
        for term in terms:
            if term not in found:
                sum_of_all = call(aten.add.Tensor, sum_of_all, term)
    total.replace_all_uses_with(sum_of_all)
    total.graph.erase_node(total)


def _is_sum(node: Argument) -> bool:
    return isinstance(node, Node) and node.target == aten.add.Tensor and not node.kwargs


def _terms(total: Node) -> Iterator[Argument]:
    """What is added up in `total`, and in sums that are only read by it."""
    for operand in total.args:
        if isinstance(operand, Node) and _is_sum(operand) and len(operand.users) == 1:
            yield from _terms(operand)
        else:
            yield operand


def _is_like(term: Argument, total: Node) -> bool:
    return isinstance(term, Node) and (_value(term).shape, _value(term).dtype) == (_value(total).shape, _value(total).dtype)


def _product(term: Argument) -> Node | None:
    """The narrow product of row-major matrices that `term` is, or is a view of, if nothing else reads them."""
    if not isinstance(term, Node) or len(term.users) != 1:
        return None
    found = term.args[0] if term.target in _VIEWS[:2] else term
    if not isinstance(found, Node) or found.target != aten.mm.default or len(found.users) != 1:
        return None
    left, right = map(_value, found.args)
    return found if left.shape[1] < NARROW and left.is_contiguous() and right.is_contiguous() else None


def _cat(parts: Sequence[Argument], dim: int, cats: _Cats) -> Node:
    """The matrices side by side (1) or below each other (0), of which there is one for the same matrices."""
    key = dim, tuple(map(_straight, parts))
    if key not in cats:
        cats[key] = call(aten.cat.default, [*parts], dim)
    return cats[key]


def _straight(matrix: Argument) -> Node:
    """What a matrix is that was transposed twice."""
    assert isinstance(matrix, Node)
    turned = matrix.args[0] if matrix.target == aten.t.default else None
    return _straight(turned.args[0]) if isinstance(turned, Node) and turned.target == aten.t.default else matrix


def _value(operand: Argument) -> Tensor:
    assert isinstance(operand, Node)
    value: Tensor = operand.meta["val"]
    return value

"""Products with weights that are packed for oneDNN once: for the step of generation, which multiplies a few rows by the same
weights a thousand times.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from itertools import accumulate, pairwise
from weakref import ref

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from fnrecipe.compiler.trace import Backend, Run, interpreter
from fnrecipe.ops import mm

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

_LINEAR = mkldnn._linear_pointwise.default
_PRODUCTS = {aten.mm.default, aten.addmm.default, mm.default}
_ROWS = 16
"""The rows for which weights are packed: as fast for 2 and for 64 as what is packed for these."""


def packed_weights() -> Backend:
    """What runs a graph as it is, but for products with those of its fixed inputs that are not donated: it packs these.

    They must not be written into; what another call brings is packed, too. There is a second copy of them, which all graphs of
    this backend share. Results are equal within rounding.
    """
    # A third to a half of the time of a product of 2 to 16 rows goes into rearranging the weight, by MKL as by oneDNN; and so
    # of one row in bfloat16. In float32, for one row, oneDNN reads the weight where it is, as fast as memory allows once it has
    # begun: there only weights that are multiplied by the same row are packed, as one.
    packed = _Packed()

    def backend(graph: GraphModule) -> Run:
        run = interpreter(graph)
        names, held = _read_packed(graph), list[Tensor]()

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            weights = [inputs[number] for numbers in names for number in numbers]
            if len(held) != len(weights) or not all(map(operator.is_, held, weights)):
                held[:] = weights
                for numbers, name in names.items():
                    setattr(graph, name, packed([inputs[number] for number in numbers]))
            return run(*inputs)

        return call

    return backend


class _Packed:
    """Packed weights, kept as long as the first of those that are packed as one."""

    def __init__(self) -> None:
        self._kept: MutableMapping[Tensor, list[tuple[list[ref[Tensor]], Tensor]]] = WeakTensorKeyDictionary()

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        first, *others = weights
        if first not in self._kept:
            self._kept[first] = []
        for known, found in self._kept[first]:
            if len(known) == len(others) and all(other is there() for there, other in zip(known, others, strict=True)):
                return found
        made: Tensor = mkldnn._reorder_linear_weight(torch.cat([*weights]) if others else first, _ROWS)
        self._kept[first].append(([*map(ref, others)], made))
        return made


def _read_packed(graph: GraphModule) -> dict[tuple[int, ...], str]:
    """Replaces products with fixed inputs by oneDNN's: the numbers of those that are to be packed, and what these read."""
    if not torch._C._has_mkldnn:
        return {}
    inputs = enumerate(graph.graph.find_nodes(op="placeholder"))
    fixed = {node: number for number, node in inputs if graph.meta["donated"] <= number < graph.meta["fixed"]}
    names: dict[tuple[int, ...], str] = {}
    for group in _groups(node for node in graph.graph.nodes if _reads_weight(node, fixed)):
        left, weights = _operand(group[0], -2), [_operand(_operand(node, -1), 0) for node in group]
        x, bias = _unviewed(left), group[0].args[0] if group[0].target == aten.addmm.default else None
        with graph.graph.inserting_before(group[0]):
            weight = weights[0]
            if len(group) > 1 or len(left.meta["val"]) > 1 or left.meta["val"].dtype == torch.bfloat16:
                name = names.setdefault(tuple(fixed[each] for each in weights), f"packed_{weight.name}")
                graph.register_buffer(name, torch.empty(0))
                weight = graph.graph.get_attr(name)
            product = graph.graph.call_function(_LINEAR, (x, weight, bias, "none", [], ""))
            ends = [*accumulate(len(each.meta["val"]) for each in weights)]
            parts = [graph.graph.call_function(aten.slice.Tensor, (product, -1, *part)) for part in pairwise([0, *ends])]
        for node, part in zip(group, parts if len(group) > 1 else [product], strict=True):
            _replace(node, part, x.meta["val"].shape[:-1])
    graph.graph.eliminate_dead_code()  # transposed weights
    graph.recompile()
    return names


def _reads_weight(node: Node, fixed: Collection[Node]) -> bool:
    """Whether the node is a product with a fixed input for which oneDNN has kernels."""
    if node.target not in _PRODUCTS:
        return False
    left, right = _operand(node, -2), _operand(node, -1)
    return right.target == aten.t.default and right.args[0] in fixed and _has_kernels(left.meta["val"])


def _groups(products: Iterable[Node]) -> list[list[Node]]:
    """Products of the same single row are one product. (Of more rows, parts of the result would be no contiguous tensors.)"""
    groups: dict[object, list[Node]] = {}
    for node in products:
        single = node.target != aten.addmm.default and len(node.meta["val"]) == 1
        groups.setdefault((single, _unviewed(_operand(node, -2)) if single else node), []).append(node)
    return [*groups.values()]


def _unviewed(left: Node) -> Node:
    """What `left` [N, D] is a view of, [..., D]: oneDNN takes it as it is."""
    if left.target != aten.view.default:
        return left
    source = _operand(left, 0)
    return source if source.meta["val"].shape[-1] == left.meta["val"].shape[-1] else left


def _operand(node: Node, number: int) -> Node:
    operand = node.args[number]
    assert isinstance(operand, Node)
    return operand


def _replace(node: Node, product: Node, leading: Sequence[int]) -> None:
    """Replaces a product of matrices by one whose shape is `leading` but for the last dimension: that of most of its views."""
    product.meta["val"] = node.meta["val"].new_empty(*leading, node.meta["val"].shape[-1])
    for user in [user for user in node.users if user.target == aten._unsafe_view.default]:
        if user.meta["val"].shape == product.meta["val"].shape:
            user.replace_all_uses_with(product)
            node.graph.erase_node(user)
    with node.graph.inserting_before(node):
        flat = node.graph.call_function(aten.view.default, (product, [*node.meta["val"].shape]))
    flat.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(flat)
    node.graph.erase_node(node)


def _has_kernels(left: Tensor) -> bool:
    """Whether oneDNN has kernels for products of `left`."""
    narrow = left.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()
    return left.device.type == "cpu" and (left.dtype == torch.float32 or narrow)

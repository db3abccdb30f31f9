"""What a traced graph costs: FLOPs and bytes of its operations.

A multiply-add is two FLOPs. Only products count (matrices, attention, convolution), by the formulas of torch's own counter;
elementwise operations are bound by memory and count bytes only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import attrs
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from fnrecipe import tree
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.ops import mm
from fnrecipe.tree import Tree

aten = torch.ops.aten

_ATTENTION: dict[object, tuple[int, int | None, int]] = {
    torch.ops.fnrecipe.document_attention: (0, None, 2),
    aten._scaled_dot_product_flash_attention: (0, None, 2),
    aten._scaled_dot_product_efficient_attention: (0, None, 2),
    aten._scaled_dot_product_cudnn_attention: (0, None, 2),
    aten._flash_attention_forward: (0, 6, 2),
    aten._efficient_attention_forward: (0, 7, 2),
    torch.ops.fnrecipe.document_attention_backward: (1, None, 5),
    aten._scaled_dot_product_flash_attention_backward: (1, None, 5),
    aten._scaled_dot_product_efficient_attention_backward: (1, None, 5),
    aten._scaled_dot_product_cudnn_attention_backward: (1, None, 5),
    torch.ops.fnrecipe.flash_attention_backward: (1, 7, 5),
    torch.ops.fnrecipe.efficient_attention_backward: (1, 7, 5),
    torch.ops.fnrecipe.cudnn_attention: (0, 4, 2),
    torch.ops.fnrecipe.cudnn_attention_backward: (1, 7, 5),
}
"""Which argument is the query, the key behind it; which is the length of a row, None for that of the key [B, G, T, E]; and
the number of products of the size of the scores."""
_MORE_VIEWS = {aten._unsafe_view.default, operator.getitem}


@attrs.frozen
class Cost:
    """The cost of an operation, or of several.

    calls  how often it runs
    flops  multiplications and additions of products
    bytes  of the tensors that it reads and writes, as if no cache held any of them; a view costs none, and a lookup counts
           its whole table
    """

    calls: int
    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Cost(0, 0, 0)


def node_cost(node: Node) -> Cost:
    """The cost of a node of a traced graph, by the fake tensors in `meta["val"]`; views, inputs and outputs cost nothing."""
    if node.op != "call_function" or _is_view(node):
        return NOTHING
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda argument: argument.meta.get("val"))
    result = node.meta.get("val")
    packet: object = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    flops = _flops(packet, args, kwargs, result)
    written = result if result is not None else _written(node, args)
    return Cost(1, flops, _bytes((args, kwargs)) + _bytes(written))


def operation_costs(graph: GraphModule) -> dict[str, Cost]:
    """The cost of each kind of operation in a traced graph and its regions, by FLOPs, then bytes, in descending order."""
    costs = sorted(((_name(node), node_cost(node)) for node in all_nodes(graph)), key=lambda entry: entry[0])
    sums = {name: total(cost for _, cost in group) for name, group in groupby(costs, key=lambda entry: entry[0])}
    called = [(name, cost) for name, cost in sums.items() if cost.calls]
    return dict(sorted(called, key=lambda entry: (-entry[1].flops, -entry[1].bytes)))


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, NOTHING)


def _flops(packet: object, args: Sequence[Tree], kwargs: Mapping[str, Tree], result: Tree) -> int:
    # torch counts dense attention likewise, but before 2.13 refuses heads that share keys. For rows of several documents it
    # takes as many of them as there may be, each as long as the row; here all pairs of a row count, whatever the mask.
    if packet in _ATTENTION:
        first, row, products = _ATTENTION[packet]
        query, key = args[first : first + 2]
        return int(products * 2 * query.numel() * (key.shape[2] if row is None else args[row]))
    formula = flop_registry.get(aten.mm if packet is mm else packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def _is_view(node: Node) -> bool:
    """Whether all results are views of the arguments."""
    if node.target in _MORE_VIEWS or not isinstance(node.target, OpOverload):
        return node.target in _MORE_VIEWS
    returns = node.target._schema.returns
    return bool(returns) and all(result.alias_info and not result.alias_info.is_write for result in returns)


def _written(node: Node, args: Sequence[Tree]) -> list[Tree]:
    """The arguments that an operation without results writes into."""
    if not isinstance(node.target, OpOverload):
        return []
    declared = zip(node.target._schema.arguments, args, strict=False)
    return [value for argument, value in declared if argument.alias_info and argument.alias_info.is_write]


def _bytes(value: Tree) -> int:
    return sum(_size(tensor) for tensor in _tensors(value))


def _tensors(value: Tree) -> Iterator[Tensor]:
    return (leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    """Bytes in memory; elements of an expanded dimension are stored once."""
    stored = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(stored) * tensor.element_size()

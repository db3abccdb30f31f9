"""Products with weights that are packed for oneDNN once: for the step of generation, which multiplies a few rows by the same
weights a thousand times.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from fnrecipe.compiler.trace import Backend, Run, interpreter

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

_ROWS = 16
"""The rows for which weights are packed: as fast for 2 and for 64 as what is packed for these."""


def packed_weights() -> Backend:
    """What runs a graph as it is, but for products with those of its fixed inputs that are not donated: it packs these.

    They must not be written into; what another call brings is packed, too. There is a second copy of them, which all graphs of
    this backend share. Results are equal within rounding.
    """
    # A third to a half of the time of a product of 2 to 16 rows goes into rearranging the weight, by MKL as by oneDNN; and so
    # of one row in bfloat16. In float32, for one row, oneDNN reads the weight where it is, as fast as memory allows.
    packed = WeakTensorKeyDictionary()

    def backend(graph: GraphModule) -> Run:
        run = interpreter(graph)
        names, held = _read_packed(graph), list[Tensor]()

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            weights = [inputs[number] for number in names]
            if len(held) != len(weights) or not all(map(operator.is_, held, weights)):
                held[:] = weights
                for weight, name in zip(weights, names.values(), strict=True):
                    if weight not in packed:
                        packed[weight] = mkldnn._reorder_linear_weight(weight, _ROWS)
                    setattr(graph, name, packed[weight])
            return run(*inputs)

        return call

    return backend


def _read_packed(graph: GraphModule) -> dict[int, str]:
    """Replaces products with fixed inputs by oneDNN's: the numbers of those that are to be packed, and what these read."""
    if not torch._C._has_mkldnn:
        return {}
    inputs = enumerate(graph.graph.find_nodes(op="placeholder"))
    fixed = {node: number for number, node in inputs if graph.meta["donated"] <= number < graph.meta["fixed"]}
    names: dict[int, str] = {}
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.graph.find_nodes(op="call_function", target=target):
            *bias, left, right = node.args
            if right.target != aten.t.default or right.args[0] not in fixed or not _has_kernels(left.meta["val"]):
                continue
            weight: Node = right.args[0]
            with graph.graph.inserting_before(node):
                if len(left.meta["val"]) > 1 or left.meta["val"].dtype == torch.bfloat16:
                    name = names.setdefault(fixed[weight], f"packed_{weight.name}")
                    graph.register_buffer(name, torch.empty(0))
                    weight = graph.graph.get_attr(name)
                arguments = left, weight, *(bias or [None]), "none", [], ""
                product = graph.graph.call_function(mkldnn._linear_pointwise.default, arguments)
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()  # transposed weights
    graph.recompile()
    return names


def _has_kernels(left: Tensor) -> bool:
    """Whether oneDNN has kernels for products of `left`."""
    narrow = left.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()
    return left.device.type == "cpu" and (left.dtype == torch.float32 or narrow)

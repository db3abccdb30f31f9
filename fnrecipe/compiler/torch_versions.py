"""What differs between the versions of torch that fnrecipe runs under, 2.11 to 2.13, where no code is right on all of them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule


def inductor_takes_gathers() -> bool:
    """Whether a graph with all-gathers into a given tensor can be compiled.

    Before 2.13 torch functionalises no operator outside of aten whose result is its argument, as `all_gather_into_tensor_out`
    returns `out`; the operator without `out` corrupts the heap on gloo (`fnrecipe.parallel.collectives`).
    """
    return _version() >= (2, 13)


def take_as_calls(graph: GraphModule) -> None:
    """Tells Inductor that fnrecipe's operations are calls, before it meets one in the graph.

    Before 2.13 it then writes a message of all that the operation is given, whether it is logged or not: of a value, also what
    it is computed from, and so on. For the update of 12 layers that took longer than anyone waits.
    """
    if _version() >= (2, 13):
        return
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for target in {node.target for part in graph.modules() if isinstance(part, GraphModule) for node in part.graph.nodes}:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "fnrecipe" and target not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(target, with_default=True))
            make_fallback(target, constraint)  # type: ignore[no-untyped-call]


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)

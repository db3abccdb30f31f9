"""A pass that drops copies which are made only to be written into."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import alias_users, base_allocation, is_new, mutated_base

aten = torch.ops.aten


def write_in_place(module: GraphModule) -> None:
    """Drops copies which are made only to be written into.

    `copy = clone(buffer); write(copy); buffer.copy_(copy)` becomes `write(buffer)`, and `copy = clone(value); write(copy)`
    becomes `write(value)`, if no operation after the first use of `copy` reads the old value.
    """
    # This is what lets a pure update run in place: the function clones its state and gives the clone to torch's fused AdamW,
    # which writes; donation copies the clone back. Without the pass the state exists twice for a moment.
    #
    # Dropping a clone is right if nothing can tell it from its source. The graph is one straight list that runs in order, so
    # "after" is the position in it (this pass runs last of those that move nodes). All operations that touch the source's
    # memory are known: the users of its base allocation, through any view. If all of them come before the first use of the
    # copy, no read sees a value written too early. A graph input may be written if it is donated, that is, if it is copied
    # into at the end; memory that the graph allocates, if no output aliases it. Strides must agree: kernels were chosen by
    # them. Also tried: elementwise operations into their in-place forms where their input dies; 2 to 3 %, not worth its code.
    order = {node: number for number, node in enumerate(module.graph.nodes)}

    def is_last_use(copy: Node, *others: Node) -> bool:
        """Whether all uses of the source's memory but `copy` and `others` come before the first use of `copy`."""
        (source,) = copy.all_input_nodes
        uses = [order[user] for user in copy.users if user not in others and user.op == "call_function"]
        reads = [order[user] for user in alias_users(*base_allocation(source)) if user not in (copy, *others)]
        same_layout = copy.meta["val"].stride() == source.meta["val"].stride()
        return same_layout and bool(uses) and max(reads, default=-1) < min(uses)

    for copy_back in list(module.graph.find_nodes(op="call_function", target=aten.copy_.default)):
        buffer, copy = (mutated_base(arg) for arg in copy_back.args)
        is_clone = copy.target == aten.clone.default and copy.args[0] is buffer
        if buffer.op == "placeholder" and is_clone and is_last_use(copy, copy_back):
            for node in (copy_back, copy):
                node.replace_all_uses_with(buffer)
                module.graph.erase_node(node)
    for copy in list(module.graph.find_nodes(op="call_function", target=aten.clone.default)):
        (source,) = copy.all_input_nodes
        if is_new(*base_allocation(source)) and is_last_use(copy):
            copy.replace_all_uses_with(source)
            module.graph.erase_node(copy)
    module.recompile()

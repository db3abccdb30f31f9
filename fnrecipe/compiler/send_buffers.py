"""A pass that keeps the input of each all-gather allocated, and unchanged, until the gather has been waited for."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fnrecipe.ops import keep_alive, opaque_clone

c10d = torch.ops._c10d_functional


def keep_send_buffers_alive(module: GraphModule) -> None:
    """Adds a reader of each gather's send buffer behind the wait for the gather."""
    # Inductor knows that an asynchronous collective reads its input until its wait, except for `all_gather_into_tensor_out`
    # (which gloo needs, see `collectives._all_rows`): there it reuses the input's memory while it is being sent. Found by one
    # wrong number on two ranks, in code that had passed its tests by luck.
    #
    # `keep_alive` reads the send buffer, so it lives until there; its schema claims to write the gathered tensor, so it cannot
    # move up before the wait. That alone is not enough: a send buffer that is cheap to compute would be computed a second time
    # for the second reader, and the first one freed early. So it is made by an operation that Inductor cannot look into.
    for gather in module.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor_out.default):
        (wait,) = (user for user in gather.users if user.target == c10d.wait_tensor.default)
        with module.graph.inserting_before(gather):
            sent = module.graph.call_function(opaque_clone.default, (gather.args[0],))
        gather.update_arg(0, sent)
        with module.graph.inserting_after(wait):
            module.graph.call_function(keep_alive.default, (wait, sent))
    module.recompile()

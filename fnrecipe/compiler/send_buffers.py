"""What a gather sends stays where it is until the gather is waited for.

Inductor knows that of torch's other exchanges. Of a gather into a tensor that it is given it does not, and would write
something else into the memory that is still being sent.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fnrecipe.ops import keep_alive, opaque_clone

c10d = torch.ops._c10d_functional


def keep_send_buffers_alive(module: GraphModule) -> None:
    """Behind the wait for each gather, has an operation read what was sent, and seem to write what was gathered.

    What is sent is made by an operation that Inductor does not look into, or it would be made again for that reader.
    """
    for gather in module.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor_out.default):
        (wait,) = (user for user in gather.users if user.target == c10d.wait_tensor.default)
        with module.graph.inserting_before(gather):
            sent = module.graph.call_function(opaque_clone.default, (gather.args[0],))
        gather.update_arg(0, sent)
        with module.graph.inserting_after(wait):
            module.graph.call_function(keep_alive.default, (wait, sent))
    module.recompile()

"""What a gather sends stays where it is until the gather is waited for.

Inductor knows that of torch's other exchanges. Of a gather into a tensor that it is given it does not, and would write
something else into the memory that is still being sent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe.transforms.once import once

c10d = torch.ops._c10d_functional

torch.library.define("fnrecipe::hold", "(Tensor(a!) gathered, Tensor sent) -> ()")


def _nothing(gathered: Tensor, sent: Tensor) -> None:
    pass


torch.library.impl("fnrecipe::hold", "CompositeExplicitAutograd", _nothing)
torch.library.register_fake("fnrecipe::hold", _nothing)
hold = torch.ops.fnrecipe.hold


def hold_what_is_sent(module: GraphModule) -> None:
    """Behind the wait for each gather, has an operation read what was sent, and seem to write what was gathered.

    What is sent is made by an operation that Inductor does not look into, or it would be made again for that reader.
    """
    for gather in module.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor_out.default):
        (wait,) = (user for user in gather.users if user.target == c10d.wait_tensor.default)
        with module.graph.inserting_before(gather):
            sent = module.graph.call_function(once.default, (gather.args[0],))
        gather.update_arg(0, sent)
        with module.graph.inserting_after(wait):
            module.graph.call_function(hold.default, (wait, sent))
    module.recompile()

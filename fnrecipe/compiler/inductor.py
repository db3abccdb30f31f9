"""Inductor as the backend of a traced graph: the only place that gives anything to torch's compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fnrecipe.compiler.casts import read_narrow
from fnrecipe.compiler.in_place import write_in_place
from fnrecipe.compiler.products import Choose, by_rule, choose_kernels
from fnrecipe.compiler.regions import inline, name_calls, regions_of
from fnrecipe.compiler.scalars import materialize_scalars
from fnrecipe.compiler.send_buffers import keep_send_buffers_alive
from fnrecipe.compiler.stack_products import stack_products
from fnrecipe.compiler.torch_versions import take_as_calls
from fnrecipe.compiler.trace import Run


def inductor(graph: GraphModule, choose: Choose = by_rule) -> Run:
    """The graph as compiled kernels, made at the first call; torch keeps them on disk for the next process.

    Changes `graph` itself, into one that gives the same within rounding.

    Fused kernels round otherwise than one operation after the other, and what is fused depends on the whole graph: results
    are equal within rounding, not bit for bit, and so are those at other numbers of ranks.

    Raises:
        TypeError: for a Python function: under `torch.func.grad`, `torch.compile` has dropped its custom backward.
    """
    if not isinstance(graph, GraphModule):
        raise TypeError(f"inductor: expected a traced graph, found {type(graph).__name__}")
    compiled: list[Run] = []

    def call(*args: Tensor) -> Sequence[Tensor]:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]  # for each number there is another graph
        with torch.no_grad():
            if not compiled:
                _drop_numbers(graph)
                compiled.append(_compiled(graph, tensors, choose))
            return compiled[0](*tensors)

    return call


def in_one_piece(graph: GraphModule) -> Run:
    """`inductor` of a graph whose regions write into copies of what it may write into: inlined, they write in place."""
    inline(graph)
    write_in_place(graph)
    return inductor(graph)


def _drop_numbers(graph: GraphModule) -> None:
    """Drops inputs that are no tensors, and that no operation reads."""
    for node in graph.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor):
            graph.graph.erase_node(node)
    graph.recompile()


def _decompose_regions(graph: GraphModule) -> None:
    """Writes the operations of regions that a region calls as those that Inductor takes."""
    # torch decomposes what regions do, but looks at a region first without doing so, for what it may write into, and takes the
    # regions in it as it saw them there.
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    for name, region in graph.named_children():
        if isinstance(region, GraphModule):
            _decompose_regions(region)
            inputs = [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]
            decomposed = make_fx(region, decomposition_table=table, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            graph.register_module(name, decomposed)


def _compiled(graph: GraphModule, args: Sequence[Tensor], choose: Choose) -> Run:
    from torch import _inductor  # takes a second to import

    choose_kernels(graph, choose, fused=True)
    for module in graph.modules():
        if isinstance(module, GraphModule):
            if any(tensor.is_cuda for tensor in args):
                read_narrow(module)
                stack_products(module)
            materialize_scalars(module)
            keep_send_buffers_alive(module)
    for region in regions_of(graph):
        _decompose_regions(region)
    name_calls(graph)
    take_as_calls(graph)
    # Inductor without Dynamo, which refuses `invoke_subgraph` and FlexAttention's own operations. Under no fake mode with a
    # `ShapeEnv` it would not look into its cache on disk; sizes must not be symbols, or its C++ for FlexAttention is invalid.
    shapes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    on_cpu = all(tensor.device.type == "cpu" for tensor in args)
    with tracing(TracingContext(shapes)):
        run: Run = _inductor.compile(graph, list(args), options={"cpp.simdlen": _vector_width()} if on_cpu else None)
    return run


def _vector_width() -> int:
    """The bits of the vectors that Inductor takes on this processor: said as an option, they are in the key of its cache.

    Else it would find loops over vectors of another width there, and compile them for this one: wrong numbers, or a crash.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return pick_vec_isa().bit_width()

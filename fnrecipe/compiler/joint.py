"""A function and its gradient as two graphs, from one trace: what is called in a forward and in a backward pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.func import vjp
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.multiprocessing.reductions import StorageWeakRef

from fnrecipe.compiler.alias import base_allocation, mutates, storage
from fnrecipe.compiler.casts import is_widening
from fnrecipe.compiler.regions import results_of
from fnrecipe.compiler.trace import record, rewrite
from fnrecipe.tree import Tree

clone = torch.ops.aten.clone.default


@attrs.frozen(eq=False)
class Joint:
    """
    forward    inputs -> results, then residuals
    backward   leaves, outputs of `forward`, gradients of results -> a gradient for each leaf that is differentiated
    structure  of the results
    inputs     numbers of the leaves that `forward` takes
    leaves     numbers of the leaves that `backward` takes
    outputs    numbers of the outputs that it takes
    tangents   numbers of the results whose gradients it takes
    wanted     whether each leaf is differentiated
    dtypes     of the gradients, each of which `backward` may leave in a narrower one
    """

    forward: GraphModule
    backward: GraphModule
    structure: pytree.TreeSpec
    inputs: Sequence[int]
    leaves: Sequence[int]
    outputs: Sequence[int]
    tangents: Sequence[int]
    wanted: Sequence[bool]
    dtypes: Sequence[torch.dtype]


def trace_joint(
    function: Callable[..., Tree],
    spec: pytree.TreeSpec,
    leaves: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    wanted: Sequence[bool],
) -> Joint | None:
    """`function` of a tree of the `leaves`, cast to `dtypes`, and its gradient for those that are `wanted`, as two graphs.

    None if an operation of one of them writes into what it has not allocated.
    """
    # The trace is one list in the order of execution, first the forward pass, then the backward pass, and is cut between them.
    # So both do what they do in one graph, in the same order: what is recomputed stays in the backward pass, and what the
    # forward pass has computed is kept for it. Of views only what they look into is kept: they are made again, and weights,
    # which they look into, are not copied; nor is a value in a wider dtype kept. (torch's own partitioners choose anew what is
    # kept, and merge equal subexpressions, which would undo recomputation.)
    boundary: list[tuple[frozenset[str], list[str], pytree.TreeSpec]] = []

    def both(*leaves: Tensor) -> list[Tensor]:
        structures: list[pytree.TreeSpec] = []
        wide = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]

        def of_wanted(*chosen: Tensor) -> list[Tensor]:
            given = iter(chosen)
            mixed = [next(given) if want else leaf for leaf, want in zip(wide, wanted, strict=True)]
            results, structure = pytree.tree_flatten(function(*pytree.tree_unflatten(mixed, spec)))
            structures.append(structure)
            return results

        primals = [leaf for leaf, want in zip(wide, wanted, strict=True) if want]
        results, pull = vjp(of_wanted, *primals)[:2] if primals else (of_wanted(), lambda tangents: [])
        mode: Any = get_proxy_mode()
        forward = frozenset(node.name for node in mode.tracer.graph.nodes)
        tangents = [torch.empty_like(result) for result in results]
        names = [mode.tracer.unwrap_proxy(tangent).node.name for tangent in tangents]
        boundary.append((forward, names, structures[0]))
        return [*results, *pull(tangents)]

    graph = record(both, leaves)
    return _cut(graph, *boundary[0], wanted)


def _cut(
    graph: GraphModule, first: frozenset[str], names: Sequence[str], structure: pytree.TreeSpec, wanted: Sequence[bool]
) -> Joint | None:
    """The graphs before and behind the nodes called `names`, which stand for the results' gradients."""
    leaves = [*graph.graph.find_nodes(op="placeholder")]
    operations = [node for node in graph.graph.nodes if node.op in ("call_function", "get_attr")]
    forward = [node for node in operations if node.name in first]
    tangents = [node for node in operations if node.name in names]
    apart = {*leaves, *forward, *tangents}
    backward = [node for node in operations if node not in apart]
    if any(_writes_elsewhere(node, {*part}) for part in (forward, backward) for node in part):
        return None
    returned = results_of(graph)
    results, gradients = returned[: structure.num_leaves], returned[structure.num_leaves :]
    narrow = [_before_widening(gradient) for gradient in gradients]
    read = _read([*narrow, *(source for node in backward for source in node.all_input_nodes)], apart)
    again = [node for node in forward if node in read and _is_made_again(node)]
    kept, saved, lent = ([node for node in part if node in read and node not in again] for part in (leaves, forward, tangents))
    outputs = [*results, *(node for node in saved if node not in results)]
    inputs = [node for node in leaves if node in outputs or not apart.isdisjoint(node.users)]
    return Joint(
        _graph(graph, inputs, forward, outputs),
        _graph(graph, [*kept, *saved, *lent], [*again, *backward], narrow),
        structure,
        [leaves.index(node) for node in inputs],
        [leaves.index(node) for node in kept],
        [outputs.index(node) for node in saved],
        [names.index(node.name) for node in lent],
        wanted,
        [gradient.meta["val"].dtype for gradient in gradients],
    )


def _writes_elsewhere(node: Node, part: Container[Node]) -> bool:
    """Whether the operation writes into memory that no operation of its part allocated."""
    if not (isinstance(node.target, OpOverload) and mutates(node)):
        return False
    arguments = node.target._schema.arguments
    values = {**dict(zip((argument.name for argument in arguments), node.args, strict=False)), **node.kwargs}
    written = [values[name] for name in values if _is_written(node.target, name)]
    bases = [base_allocation(value)[0] for value in pytree.tree_leaves(written) if isinstance(value, Node)]
    return any(base.op != "call_function" or base not in part for base in bases)


def _is_written(target: OpOverload, name: str) -> bool:
    return any(x.name == name and x.alias_info is not None and x.alias_info.is_write for x in target._schema.arguments)


def _before_widening(gradient: Node) -> Node:
    """What a gradient is cast from, if that is narrower. The caller casts it, together with what it does with it."""
    return gradient.all_input_nodes[0] if is_widening(gradient) else gradient


def _read(pending: list[Node], outside: Container[Node]) -> set[Node]:
    """Those of `pending` that are `outside` of the backward pass, and what those of them are made of that are made again."""
    read = set[Node]()
    while pending:
        node = pending.pop()
        if node in outside and node not in read:
            read.add(node)
            pending += node.all_input_nodes if _is_made_again(node) else []
    return read


def _is_made_again(node: Node) -> bool:
    """Whether it is a constant, a view, or a value in a wider dtype: the backward pass makes it of what it is made of."""
    if node.target is operator.getitem:
        return _is_made_again(node.all_input_nodes[0])
    is_view = node.op == "call_function" and not mutates(node) and base_allocation(node)[0] is not node
    return node.op == "get_attr" or is_view or is_widening(node)


def _graph(owner: GraphModule, inputs: Sequence[Node], body: Sequence[Node], returned: Sequence[Node]) -> GraphModule:
    """The graph of the operations `body`, from the values of `inputs` to those of `returned`, each with memory of its own."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in body:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    taken = {storage(node.meta["val"]) for node in copies.values() if node.op == "placeholder"}
    graph.output(tuple(_apart([copies[node] for node in returned], taken)))
    graph.eliminate_dead_code()
    module = _LazyGraphModule(owner, graph)
    rewrite(module)
    return module


def _apart(values: Iterable[Node], taken: set[StorageWeakRef]) -> Iterator[Node]:
    # Callers take the result to be laid out as a new tensor; a gradient may be one number, expanded.
    for node in values:
        value, base = node.meta["val"], base_allocation(node)[0].meta["val"]
        memory = storage(value), storage(base if isinstance(base, Tensor) else value)
        if not taken.isdisjoint(memory) or torch.empty_like(value).stride() != value.stride():
            copy = node.graph.call_function(clone, (node,), {"memory_format": torch.contiguous_format})
            copy.meta["val"] = value.clone(memory_format=torch.contiguous_format)
            yield copy
        else:
            yield node
        taken.update(memory)

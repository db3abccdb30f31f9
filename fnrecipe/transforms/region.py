"""`region`: a function as a graph of its own in the traced graph that calls it: traced and compiled once for all calls.

It is what `jax.jit` within `jax.jit` is. Under `torch.func.grad` it is two graphs: that of the forward pass, which also returns
what the other needs of it, and that of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import CInterpreter, TransformType, _unwrap_for_grad, peek_interpreter_stack, unwrap_if_dead
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import GraphModule, Proxy
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from fnrecipe.compiler.casts import is_widening
from fnrecipe.compiler.joint import Joint, trace_joint
from fnrecipe.compiler.regions import INLINE, results_of
from fnrecipe.ops import Context
from fnrecipe.transforms.jit import signature
from fnrecipe.tree import Tree

Operand: TypeAlias = Proxy | Tensor


def region(function: Callable[..., Tree], name: str, *, inline: bool = False) -> Callable[..., Tree]:
    """`function`, a pure function of trees of tensors, traced once for all calls with the same shapes, as the graph `name`.

    It may be differentiated once by `grad` or `vjp`, if its results are floating. The gradients have the bits of `function`'s;
    where an argument is used elsewhere, too, the sum of both may be rounded otherwise. Outside of a trace, under other
    transforms, and if it writes into its arguments, it is `function` itself.

    inline  whether only compilers see it: the interpreter, and passes over collectives, get its operations in its place
    """
    found: dict[tuple[object, ...], Joint | None] = {}

    def call(*args: Tree) -> Tree:
        leaves, spec = pytree.tree_flatten(args)
        level = peek_interpreter_stack()
        if get_proxy_mode() is None or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return function(*args)
        wanted = [leaf.requires_grad for leaf in leaves]
        if any(wanted) if level is None else not _is_first_gradient(level):
            return function(*args)
        operands = _below(leaves)
        key = _tracer(), str(spec), *wanted, *(leaf.dtype for leaf in leaves), *map(signature, map(_value, operands))
        if key not in found:
            with temporarily_clear_interpreter_stack(), disable_proxy_modes_tracing():
                found[key] = trace_joint(function, spec, [*map(_value, operands)], [leaf.dtype for leaf in leaves], wanted)
            if (joint := found[key]) is not None:
                _register(joint.forward, name, inline)
                _register(joint.backward, f"{name}_backward", inline)
        if (joint := found[key]) is None:
            return function(*args)
        results = _forward(joint, leaves) if level is None else _Region.apply(joint, *leaves)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(list(results[: joint.structure.num_leaves]), joint.structure)

    return call


def _is_first_gradient(level: CInterpreter) -> bool:
    return bool(level.key() == TransformType.Grad and level.level() == 1)


class _Context(Context, Protocol):
    joint: Joint


class _Region(torch.autograd.Function):
    # What runs in a `forward` is below the transform: there calls are recorded.

    @staticmethod
    def forward(joint: Joint, *leaves: Tensor) -> tuple[Tensor, ...]:
        return _forward(joint, leaves)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Joint, *tuple[Tensor, ...]], output: tuple[Tensor, ...]) -> None:
        ctx.joint, *leaves = inputs
        ctx.mark_non_differentiable(*output[ctx.joint.structure.num_leaves :])
        ctx.set_materialize_grads(False)
        kept = [*(leaves[number] for number in ctx.joint.leaves), *(output[number] for number in ctx.joint.outputs)]
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # An argument without a gradient may still be wrapped by a functorch level that has exited.
        kept = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        lent = [gradients[number] for number in ctx.joint.tangents]
        found = iter(_Gradient.apply(ctx.joint, *kept, *lent))  # type: ignore[no-untyped-call]
        return None, *(next(found) if want else None for want in ctx.joint.wanted)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(joint: Joint, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        likes = [node.meta["val"] for node in joint.backward.graph.find_nodes(op="placeholder")]
        first, last = len(joint.leaves), len(tensors) - len(joint.tangents)
        lent = [_laid_out(gradient, like) for gradient, like in zip(tensors[last:], likes[last:], strict=True)]
        kept = [tensor for tensor in tensors[:last] if tensor is not None]  # all of them
        operands = [*map(_source, kept[:first]), *map(_proxy, [*kept[first:], *lent])]
        return tuple(x.to(dtype) for x, dtype in zip(_called(joint.backward, operands), joint.dtypes, strict=True))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Joint, *tuple[Tensor, ...]], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("a region has no second derivative of a first one taken outside of it")


def _forward(joint: Joint, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(_called(joint.forward, [_source(leaves[number]) for number in joint.inputs]))


def _laid_out(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in the layout for which the backward pass was traced; None is zeros."""
    if gradient is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(gradient)


def _tracer() -> Any:
    mode: Any = get_proxy_mode()
    return mode.tracer


def _proxy(tensor: Tensor) -> Operand:
    """What stands for a tensor in the graph that is being traced."""
    operand: Operand = _tracer().unwrap_proxy(tensor)
    return operand


def _source(leaf: Tensor) -> Operand:
    """What stands for a leaf; if it is an input, cast to a wider dtype, that input.

    So where the region casts it back, it is never cast at all, as in one graph (`fnrecipe.compiler.casts`).
    """
    operand = _proxy(leaf)
    if not isinstance(operand, Proxy) or not is_widening(operand.node):
        return operand
    (source,) = operand.node.all_input_nodes
    return Proxy(source, _tracer()) if source.op == "placeholder" else operand


def _below(leaves: Sequence[Tensor]) -> list[Operand]:
    """What stands for the leaves that a region gets, below a gradient."""
    with temporarily_clear_interpreter_stack():
        return [_source(_unwrap_for_grad(leaf, 1)) for leaf in leaves]


def _value(operand: Operand) -> Tensor:
    value: Tensor = operand.node.meta["val"] if isinstance(operand, Proxy) else operand
    return value


def _register(graph: GraphModule, name: str, inline: bool) -> None:
    """Makes the graph a module of what is being traced."""
    tracer = _tracer()
    graph.meta |= {"name": name, INLINE: inline}
    tracer.root.register_module(tracer.get_fresh_qualname(name), graph)


def _called(graph: GraphModule, operands: Sequence[Operand]) -> list[Tensor]:
    """The results of the graph, whose call is recorded."""
    with disable_proxy_modes_tracing():
        results = [torch.empty_like(result.meta["val"]) for result in results_of(graph)]
    tracer = _tracer()
    node = tracer.create_proxy("call_function", invoke_subgraph, (graph, graph.meta["name"], *operands), {})
    tracked: list[Tensor] = track_tensor_tree(results, node, constant=None, tracer=tracer)
    return tracked

"""What a traced function must not do: draw from a global generator, and look at numbers that are not there yet.

A draw would be traced as an operation whose numbers depend on what else has drawn, on the number of ranks, and on whether the
run was resumed. A number that Python looks at, or a shape that depends on one, does not exist while shapes are all there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import ParamSpec, TypeVar

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fnrecipe.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.__file__.removesuffix("__init__.py")


class Refusal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, operations that draw from a global generator raise a UsageError that names the file and line.

    look  whether numbers of tensors may be looked at
    """

    supports_higher_order_operators = True

    def __init__(self, *, look: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.look = look

    def __torch_dispatch__(
        self, func: object, types: Sequence[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        given = dict(kwargs or {})
        if isinstance(func, OpOverload):
            if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, given):
                drawn = f"found {_name(func)}, which draws from a global generator"
                raise UsageError(f"{_place()}: expected random numbers from the loss's key (fnrecipe.random), {drawn}")
            looked = None if self.look else _needs_numbers(func)
            if looked is not None:
                raise UsageError(f"{_place()}: expected operations on tensors (torch.where, say), found {looked}")
        assert callable(func)
        return func(*args, **given)


def without_draws(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, an error at its first call if that draws from a global generator. (Later calls are not looked at.)"""
    first = iter([Refusal(look=True)])

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if (refusal := next(first, None)) is None:
            return function(*args, **kwargs)
        with refusal:
            return function(*args, **kwargs)

    return call


def _drops_nothing(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether it is an operation that could drop out, but does so with a probability of 0."""
    arguments = func._schema.arguments
    given = {
        **{argument.name: argument.default_value for argument in arguments},
        **dict(zip((argument.name for argument in arguments), args, strict=False)),
        **kwargs,
    }
    return given.get("p" if func is torch.ops.aten.native_dropout.default else "dropout_p") == 0


def _needs_numbers(func: OpOverload) -> str | None:
    if func is torch.ops.aten._local_scalar_dense.default:
        return ".item(), int, float, bool or `if` of a tensor, which needs a number while there are only shapes"
    if torch.Tag.data_dependent_output in func.tags:
        return f"{_name(func)}, which needs numbers while there are only shapes"
    if torch.Tag.dynamic_output_shape in func.tags:
        return f"{_name(func)}, the shape of whose result depends on numbers"
    return None


def _name(func: OpOverload) -> str:
    return f"aten.{func.overloadpacket.__name__}"


def _place() -> str:
    """File and line of what called torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_LIBRARY)):
        frame = frame.f_back
    return "a traced function" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"

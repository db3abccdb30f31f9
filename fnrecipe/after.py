"""Order between values that do not depend on each other, where it decides what is in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define("fnrecipe::after", "(Tensor value, Tensor earlier) -> Tensor")


def after(value: Tensor, earlier: Tensor) -> Tensor:
    """A copy of `value` that is not there before `earlier` is, also in the order that a compiler chooses."""
    copy: Tensor = torch.ops.fnrecipe.after(value, earlier)
    return copy


def _copy(value: Tensor, earlier: Tensor) -> Tensor:
    return value.clone()


def _by_shape(value: Tensor, earlier: Tensor) -> Tensor:
    return torch.empty_like(value)


def _mapped(info: Any, dims: Any, value: Tensor, earlier: Tensor) -> tuple[Tensor, Any]:
    return after(value, earlier), dims[0]


torch.library.impl("fnrecipe::after", "CompositeExplicitAutograd", _copy)
torch.library.register_fake("fnrecipe::after", _by_shape)
torch.library.register_vmap("fnrecipe::after", _mapped)

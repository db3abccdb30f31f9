"""Llama: its config, which is free of torch, and its functions, which are imported when one of them is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fnrecipe.models.llama.config import LlamaConfig as LlamaConfig
from fnrecipe.models.llama.config import num_parameters as num_parameters
from fnrecipe.models.llama.config import parameters as parameters

if TYPE_CHECKING:
    from fnrecipe.models.llama.model import apply as apply
    from fnrecipe.models.llama.model import flops as flops
    from fnrecipe.models.llama.model import init as init
    from fnrecipe.models.llama.model import rules as rules


def __getattr__(name: str) -> object:
    if name in ("apply", "flops", "init", "rules"):
        return getattr(importlib.import_module(f"{__name__}.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

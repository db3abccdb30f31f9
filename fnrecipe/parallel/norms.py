"""The norm of each tensor of a list, as one operation of a graph."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from fnrecipe.ops import norms as norms

if find_spec("triton"):  # it takes a second to import, and is there for CUDA only
    torch.library.impl("fnrecipe::norms", "CUDA", lambda *args: import_module("fnrecipe.parallel.norm_kernel").norms(*args))

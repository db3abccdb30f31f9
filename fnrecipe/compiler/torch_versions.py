"""What differs between the versions of torch that fnrecipe runs under, 2.11 to 2.13, where no code is right on all of them."""

from __future__ import annotations

import torch


def inductor_takes_gathers() -> bool:
    """Whether a graph with all-gathers into a given tensor can be compiled.

    Before 2.13 torch functionalises no operator outside of aten whose result is its argument, as `all_gather_into_tensor_out`
    returns `out`; the operator without `out` corrupts the heap on gloo (`fnrecipe.parallel.collectives`).
    """
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 13)

"""Sums over the documents of packed rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_sums(values: Tensor, segments: Tensor) -> Tensor:
    """At each position the sum of integers [B, T] over its document, int64 [B, T]: where the segment changes, one begins."""
    first, behind = document_bounds(segments)
    totals = F.pad(values.cumsum(1), (1, 0))
    return totals.gather(1, behind) - totals.gather(1, first)


def document_bounds(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each position begins in its row, and where it has ended, int64 [B, T]."""
    numbers = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).cumsum(1)
    return torch.searchsorted(numbers, numbers), torch.searchsorted(numbers, numbers, right=True)

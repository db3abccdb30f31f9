"""Bases of eigenvectors that follow a matrix from step to step, as an operator: most steps compute none."""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "fnrecipe::eigenbasis",
    "(Tensor matrix, Tensor basis, Tensor count, int every) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def eigenbasis(matrix: Tensor, basis: Tensor, count: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """A basis of about the eigenvectors of a symmetric [n, n], those of large eigenvalues first, and its order, int64 [n].

    At count 0 it is computed from nothing; at each other count that `every` divides it is `basis`, sorted by how much the
    matrix stretches its vectors, after one iteration and QR; else `basis` itself. Vector i was number order[i] of `basis`. It
    is NaN where the matrix is not finite.

    The operator reads `count` on the host: a graph has no branches, and a decomposition in each step would cost more than all
    else. So it waits for the device, and cannot be a part of a CUDA graph.
    """
    found: tuple[Tensor, Tensor] = torch.ops.fnrecipe.eigenbasis(matrix, basis, count, every)
    return found


def _eigenbasis(matrix: Tensor, basis: Tensor, count: Tensor, every: int) -> tuple[Tensor, Tensor]:
    number, same = int(count), torch.arange(len(matrix), device=matrix.device)
    if number % every:
        return basis.clone(), same
    if not matrix.isfinite().all():
        return torch.full_like(basis, torch.nan), same
    if number == 0:
        return torch.linalg.eigh(matrix).eigenvectors.flip(1).contiguous(), same
    order = ((basis.mT @ matrix) * basis.mT).sum(1).argsort(descending=True, stable=True)
    return torch.linalg.qr(matrix @ basis[:, order]).Q.contiguous(), order


torch.library.impl("fnrecipe::eigenbasis", "CompositeExplicitAutograd", _eigenbasis)
torch.library.register_fake(
    "fnrecipe::eigenbasis",
    lambda matrix, basis, count, every: (torch.empty_like(basis), basis.new_empty(len(matrix), dtype=torch.int64)),
)

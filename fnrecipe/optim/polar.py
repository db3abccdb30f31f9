"""The polar factor of a matrix by products of matrices alone: all singular values become 1, and singular vectors stay."""

from __future__ import annotations

import attrs
from torch import Tensor

Quintic = tuple[float, float, float]
"""a, b and c of x -> a x + b x ** 3 + c x ** 5"""


@attrs.frozen
class PolarMethod:
    """Quintics, one for each iteration, that bring singular values to 1.

    margin, eps  the matrix is first divided by margin times its Frobenius norm, plus eps; a margin above 1 is for quintics by
             which a singular value that is rounded to above 1 would diverge
    """

    quintics: tuple[Quintic, ...]
    margin: float = 1.0
    eps: float = 1e-7


JORDAN = PolarMethod(((3.4445, -4.7750, 2.0315),) * 5)
"""Fast for small singular values; all end between 0.68 and 1.13. (Jordan et al. 2024, kellerjordan.github.io/posts/muon.)"""

POLAR_EXPRESS = PolarMethod(
    (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    margin=1.02,
    eps=1e-6,
)
"""The quintics that are best one after the other. (Amsel et al. 2025, arXiv:2505.16932.)"""

NEWTON_SCHULZ = PolarMethod(((2.0, -1.5, 0.5),) * 12)
"""Converges to the polar factor itself, where no singular value is next to nothing beside the norm."""


def polar_factor(matrix: Tensor, method: PolarMethod) -> Tensor:
    """The polar factor of [..., r, c], as near as the method comes; 0 of 0."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() * method.margin + method.eps)
    for a, b, c in method.quintics:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x

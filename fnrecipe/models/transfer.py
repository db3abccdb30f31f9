"""Rates that hold for wider and deeper models: muP and CompleteP.

(Yang et al. 2022, arXiv:2203.03466; Dey et al. 2025, arXiv:2505.01618.)

With m the width and l the depth over those of the base, and for Adam's updates:

    matrices in layers     initial deviation 1/√m, rate 1/m, decay m, ε 1/(m l)
    vectors in layers      ε 1/(m l)
    embedding, head, norm  ε 1/m
    multipliers            of logits 1/m, of what is added to the residual stream 1/l, of the scores of attention √E'/√E

E' and E are the widths of a head of base and model (the rule is a scale of 1/E and not of 1/√E); muP has l = 1.

Muon's updates change what a matrix gives by as much at any width, so matrices have rate 1 and decay 1; those scaled by
`match_rms`, which are √m as large, 1/√m and √m (`fnrecipe.components.component.Optimizer`).

No multiplier is a product of its own. To train W in y = a W x by updates that do not depend on the gradient's scale is to
train W' = a W, with deviation and rate times a, decay and ε over a: the same numbers come out, no operation is added, and the
exported model is one that others know. That of the logits is in the last norm, which stands before tied embeddings, too.

Where a norm stands behind a branch, the branch's multiplier is in that norm, and the matrix before it has none. A norm that
multiplies by 1 + w has a (1 + w) = 1 + w': w' begins at a - 1, and does not decay, for that would be towards 0. An embedding
that is multiplied by the root of the width has 1/√m; where it is the head, too, this is a part of the logits' 1/m. No torch
here.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import attrs

from fnrecipe.config.patterns import tag
from fnrecipe.config.sections.model import ModelSection
from fnrecipe.models.model import Roles, find_family


class _Sizes(Protocol):
    @property
    def model_dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def head_width(self) -> int: ...


@attrs.frozen
class Factors:
    """What a parameter's initial values, learning rate, weight decay and ε are multiplied by; `shift` is added to the first."""

    init: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0
    shift: float = 0.0

    def multiplied(self, by: float, offset: float = 0.0) -> Factors:
        """Those of a parameter that has taken in the multiplier `by`, and multiplies by `offset` more than itself."""
        decay = self.decay / by if by == 1 or not offset else 0.0
        return Factors(self.init * by, self.rate * by, decay, self.eps / by, offset * (by - 1))


VOCABULARY = "vocabulary"
"""The role of embedding and head, whose rate stays. (An embedding that is multiplied by the root of the width has its own.)"""


def rules(model: ModelSection | None, width_power: float = 1.0) -> dict[str, Factors]:
    """The factors of each role; all of them are 1 without a transfer.

    `width_power`: matrices in layers have rates 1 / m ** width_power.
    """
    if model is None or model.transfer.name is None:
        return {VOCABULARY: Factors()}
    section, sizes = model.transfer, cast("_Sizes", model.config)
    width = sizes.model_dim / (section.base_width or sizes.model_dim)
    depth = sizes.num_layers / (section.base_depth or sizes.num_layers)
    scores = math.sqrt((section.base_head_dim or sizes.head_width) / sizes.head_width)
    roles, slower = _roles(model), width**-width_power
    matrices = Factors(init=width**-0.5, rate=slower, decay=1 / slower, eps=1 / (width * depth))
    vectors = Factors(eps=1 / (width * depth))
    # Without a transfer `output` and `down` begin with 1/√(2 layers) of the deviation; here with that of the base.
    writers = attrs.evolve(matrices, init=matrices.init * math.sqrt(depth))
    outer, offset = Factors(eps=1 / width), roles.norm_offset
    embedding = outer.multiplied(width**-0.5 if roles.scaled_embedding else 1)
    tied = roles.scaled_embedding and getattr(sizes, "tied_embeddings", False)
    return {
        VOCABULARY: outer,
        **({"embedding": embedding} if roles.scaled_embedding else {}),
        "last_norm": outer.multiplied(width**-0.5 if tied else 1 / width, offset),
        "matrices": matrices,
        "vectors": vectors,
        "score_matrices": matrices.multiplied(scores),
        "score_vectors": vectors.multiplied(scores),
        "writer_matrices": writers.multiplied(1 / depth),
        "writer_vectors": vectors.multiplied(1 / depth),
        "normed_matrices": writers,
        "writing_norms": vectors.multiplied(1 / depth, offset),
    }


def _roles(model: ModelSection) -> Roles:
    found = find_family(model.family).roles
    assert found is not None, "the section's conflicts"
    return found


def role(model: ModelSection | None, path: str, dims: int) -> str:
    """The role of the parameter at `path`, of so many dimensions."""
    if model is None or model.transfer.name is None:
        return VOCABULARY
    roles, kind_of = _roles(model), tag(path, dims)
    if kind_of in ("@embedding", "@head"):
        return "embedding" if kind_of == "@embedding" and roles.scaled_embedding else VOCABULARY
    if path in ("norm", "norm_bias"):
        return "last_norm"
    kind, name = "matrices" if dims > 1 else "vectors", path.rpartition(".")[2].removesuffix("_bias")
    if name == roles.scores:
        return f"score_{kind}"
    if name in roles.writers:
        return f"writer_{kind}" if name in WRITERS else "writing_norms"
    return f"normed_{kind}" if name in WRITERS else kind


WRITERS = ("output", "down")
"""What comes last in a branch, but for a norm behind it."""

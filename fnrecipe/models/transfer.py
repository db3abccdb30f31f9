"""Rates that hold for wider and deeper models: muP and CompleteP.

(Yang et al. 2022, arXiv:2203.03466; Dey et al. 2025, arXiv:2505.01618.)

With m the width and l the depth over those of the base, and for Adam's updates:

    matrices in layers     initial deviation 1/√m, rate 1/m, decay m, ε 1/(m l)
    vectors in layers      ε 1/(m l)
    embedding, head, norm  ε 1/m
    multipliers            of logits 1/m, of what is added to the residual stream 1/l, of the scores of attention √E'/√E

E' and E are the widths of a head of base and model (the rule is a scale of 1/E and not of 1/√E); muP has l = 1.

No multiplier is a product of its own. To train W in y = a W x by Adam is to train W' = a W, with deviation and rate times
a, decay and ε over a: the same numbers come out, no operation is added, and the exported model is one that others know. That
of the logits is in the last norm, which stands before tied embeddings, too. No torch here.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import attrs

from fnrecipe.config.patterns import tag
from fnrecipe.config.sections.model import ModelSection
from fnrecipe.models.model import find_family


class _Sizes(Protocol):
    @property
    def model_dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def head_width(self) -> int: ...


@attrs.frozen
class Factors:
    """What a parameter's initial values, learning rate, weight decay and ε are multiplied by."""

    init: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0

    def multiplied(self, by: float) -> Factors:
        """Those of a parameter that has taken in the multiplier `by`."""
        return Factors(self.init * by, self.rate * by, self.decay / by, self.eps / by)


VOCABULARY = "vocabulary"
"""The role of embedding and head, whose rate stays."""


def rules(model: ModelSection | None) -> dict[str, Factors]:
    """The factors of each role; all of them are 1 without a transfer."""
    if model is None or model.transfer.name is None:
        return {VOCABULARY: Factors()}
    section, sizes = model.transfer, cast("_Sizes", model.config)
    width = sizes.model_dim / (section.base_width or sizes.model_dim)
    depth = sizes.num_layers / (section.base_depth or sizes.num_layers)
    scores = math.sqrt((section.base_head_dim or sizes.head_width) / sizes.head_width)
    matrices = Factors(init=width**-0.5, rate=1 / width, decay=width, eps=1 / (width * depth))
    vectors = Factors(eps=1 / (width * depth))
    # Without a transfer a writer begins with 1/√(2 layers) of the deviation; here with that of the base.
    writers = attrs.evolve(matrices, init=matrices.init * math.sqrt(depth))
    return {
        VOCABULARY: Factors(eps=1 / width),
        "last_norm": Factors(eps=1 / width).multiplied(1 / width),
        "matrices": matrices,
        "vectors": vectors,
        "score_matrices": matrices.multiplied(scores),
        "score_vectors": vectors.multiplied(scores),
        "writer_matrices": writers.multiplied(1 / depth),
        "writer_vectors": vectors.multiplied(1 / depth),
    }


def role(model: ModelSection | None, path: str, dims: int) -> str:
    """The role of the parameter at `path`, of so many dimensions."""
    if model is None or model.transfer.name is None or tag(path, dims) in ("@embedding", "@head"):
        return VOCABULARY
    if path in ("norm", "norm_bias"):
        return "last_norm"
    kind, name = "matrices" if dims > 1 else "vectors", path.rpartition(".")[2].removesuffix("_bias")
    if name == find_family(model.family).scores:
        return f"score_{kind}"
    return f"writer_{kind}" if name in ("output", "down") else kind

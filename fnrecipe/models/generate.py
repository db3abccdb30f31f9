"""Sampling from a model: each token by one call of a pure function of a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fnrecipe import nn, random
from fnrecipe.models.next_token import Apply
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree


def generate(
    apply: Apply,
    params: Tree,
    prompt: Sequence[int],
    key: Tensor,
    *,
    length: int,
    window: int,
    vocab_size: int,
    temperature: float = 0.7,
    eos: int | None = None,
) -> list[int]:
    """Up to `length` tokens sampled after `prompt`, each from at most the `window` tokens before it; stops before `eos`.

    Only the first `vocab_size` logits count: an embedding may have more rows than the tokenizer has tokens.
    """
    # Windows are padded on the right to one length, so that the function is traced once; causal attention does not see padding.
    next_token = jit(lambda *args: _sample(apply, *args, vocab_size=vocab_size, temperature=temperature))
    tokens = list(prompt)
    for _ in range(length):
        context = tokens[-window:]
        padded = torch.tensor([context + [0] * (window - len(context))], device=key.device)
        last = torch.tensor(len(context) - 1, device=key.device)
        token = int(next_token(params, padded, last, random.fold_in(key, len(tokens))))
        if token == eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _sample(
    apply: Apply, params: Tree, tokens: Tensor, last: Tensor, key: Tensor, *, vocab_size: int, temperature: float
) -> Tensor:
    """A token sampled after position `last` of `tokens` [1, T], by the Gumbel-max trick; int64 []."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits = nn.all_logits(apply(params, tokens, torch.zeros_like(tokens), positions))[0]
    chosen = logits.index_select(0, last.reshape(1))[0, :vocab_size].float() / temperature
    gumbel = -torch.log(-torch.log(random.uniform(key, vocab_size) + 2.0**-25))
    return torch.argmax(chosen + gumbel)

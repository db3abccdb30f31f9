"""Attention alone on the CPU, forward and backward: with the whole mask as plain loops give it, and fnrecipe's two kinds.

4 query heads and 2 key-value heads of 64; 4096 positions, in rows of four documents, in float32. All systems live in one
process with one thread and take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import Result, ratios
from fnrecipe.nn.attention import AttentionScope, attention, attention_mask

LENGTHS, POSITIONS, HEADS, GROUPS, WIDTH = (256, 1024, 2048, 4096), 4096, 4, 2, 64
PLAIN = "plain torch, mask"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _plain(segments: Tensor) -> Attend:
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (segments[:, None, :, None] == segments[:, None, None, :]) & causal

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


def _ours(segments: Tensor, scope: AttentionScope) -> Attend:
    seen = attention_mask(segments, scope)
    return lambda query, key, value: attention(query, key, value, seen)


SYSTEMS: dict[str, Callable[[Tensor], Attend]] = {
    PLAIN: _plain,
    "fnrecipe, document": lambda segments: _ours(segments, "document"),
    "fnrecipe, row": lambda segments: _ours(segments, "row"),
}


def run(rounds: int) -> list[Result]:
    torch.set_num_threads(1)
    results = [result for length in LENGTHS for result in _measure(length, rounds)]
    return results + [row for metric in ("forward", "backward") for row in ratios(results, metric, PLAIN)]


def _measure(length: int, rounds: int) -> list[Result]:
    """CPU ms of each system; the first round of each is not counted."""
    rows = POSITIONS // length
    segments = (torch.arange(length) * 4 // length).expand(rows, -1)
    sizes = (HEADS, GROUPS, GROUPS, HEADS)
    *inputs, gradient = (torch.randn(rows, length, heads, WIDTH).transpose(1, 2) for heads in sizes)
    systems = {name: make(segments) for name, make in SYSTEMS.items()}
    times: dict[tuple[str, str], list[float]] = {(name, way): [] for name in systems for way in ("forward", "backward")}
    for _ in range(1 + rounds):
        for name, attend in systems.items():
            leaves = [x.detach().requires_grad_() for x in inputs]
            start = time.process_time()
            mixed = attend(*leaves)
            between = time.process_time()
            torch.autograd.grad(mixed, leaves, gradient)
            times[name, "forward"].append(1e3 * (between - start))
            times[name, "backward"].append(1e3 * (time.process_time() - between))
    return [Result("attention", f"rows of {length}", name, way, values[1:], "ms") for (name, way), values in times.items()]

"""CPU kernels, by the formula, for the operations on ragged rows, which have kernels on GPUs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor


def documents(starts: Tensor, window: int | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each document: its part of each of the tensors [N, heads, E], as [heads, n, E], and the pairs that see each other."""
    for first, end in pairwise(starts.tolist()):
        number = torch.arange(end - first)
        away = number[:, None] - number
        yield *(x[first:end].transpose(0, 1) for x in tensors), (away >= 0) & (away < (window or end))


def weights(query: Tensor, key: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The softmax [H, n, n], for key [G, n, E]."""
    return torch.where(seen, query @ repeated(key, query).mT * scale, -torch.inf).softmax(-1)


def repeated(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(len(query) // len(x), 0)


def by_documents(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int | None) -> Tensor:
    """query [N, H, E], key and value [N, G, E]; `window` positions up to the query's."""
    found = documents(starts, window, query, key, value)
    mixed = [(weights(q, k, seen, scale) @ repeated(v, q)).transpose(0, 1) for q, k, v, seen in found]
    return torch.cat(mixed)


def slopes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int | None
) -> tuple[Tensor, ...]:
    """The gradients by the formula of each product and of the softmax."""
    found = []
    for g, q, k, v, seen in documents(starts, window, *(x.double() for x in (gradient, query, key, value))):
        p = weights(q, k, seen, scale)
        above = g @ repeated(v, q).mT
        scores = p * (above - (above * p).sum(-1, keepdim=True)) * scale
        of_inputs = scores @ repeated(k, q), scores.mT @ q, p.mT @ g
        grouped = [x.unflatten(0, (len(like), -1)).sum(1) for x, like in zip(of_inputs, (q, k, v), strict=True)]
        found.append([x.transpose(0, 1) for x in grouped])
    return tuple(torch.cat(parts).to(gradient.dtype) for parts in zip(*found, strict=True))


def flash(query, key, value, starts, _keys, longest, _longest, _dropout, causal, _debug, *, scale, window_size_left=None):  # type: ignore[no-untyped-def]
    assert causal
    assert query.shape[-1] % 8 == 0
    assert max(b - a for a, b in pairwise(starts.tolist())) <= longest
    assert query.is_contiguous()
    assert query.dtype.itemsize < 4
    window = None if window_size_left is None else window_size_left + 1
    wide = (x.double() for x in (query, key, value))
    mixed = by_documents(*wide, starts, scale, window).to(query.dtype)
    return mixed, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.int64), query.new_zeros(()), mixed


def flash_backward(gradient, query, key, value, _out, logsumexp, starts, *_rest, scale, window_size_left=None):  # type: ignore[no-untyped-def]
    assert logsumexp.shape == (query.shape[1], len(query))
    window = None if window_size_left is None else window_size_left + 1
    return slopes(gradient, query, key, value, starts, scale=scale, window=window)


def efficient(query, key, value, _bias, starts, _keys, longest, _longest, _dropout, kind, *_, scale, window_size=None):  # type: ignore[no-untyped-def]
    assert kind == 2  # causal
    assert query.shape[2] == key.shape[2]
    mixed = by_documents(query[0], key[0], value[0], starts, scale, window_size)
    one = torch.zeros((), dtype=torch.int64)
    return mixed[None], query.new_zeros(len(starts) - 1, query.shape[2], longest), one, one.clone(), longest, longest


def efficient_backward(gradient, query, key, value, _bias, _out, starts, *_, scale, window_size=None):  # type: ignore[no-untyped-def]
    found = slopes(gradient[0], query[0], key[0], value[0], starts, scale=scale, window=window_size)
    return *(x[None] for x in found), query.new_zeros(0)


def cudnn(query, key, value, bounds, longest, scale, window):  # type: ignore[no-untyped-def]
    starts = documents_of(bounds, query, key)
    mixed, *_ = flash(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window and window - 1,
    )
    return mixed, query.new_zeros(query.shape[:2], dtype=torch.float32)


def documents_of(bounds, query, key):  # type: ignore[no-untyped-def]
    """Where documents begin, and that all of the bounds say so."""
    lengths, *offsets = bounds
    starts = offsets[2] // query.shape[1]
    sizes = query[0].numel(), key[0].numel(), query.shape[1]
    assert all(torch.equal(found, starts * size) for found, size in zip(offsets, sizes, strict=True))
    assert torch.equal(lengths, starts.diff())
    return starts


def cudnn_backward(gradient, query, key, value, _out, statistics, bounds, _longest, scale, window, deterministic):  # type: ignore[no-untyped-def]
    starts = documents_of(bounds, query, key)
    assert (statistics.shape, statistics.dtype) == (query.shape[:2], torch.float32)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return slopes(gradient, query, key, value, starts, scale=scale, window=window)


KERNELS: dict[str, dict[str, Callable[..., object]]] = {
    "aten": {
        "_flash_attention_forward": flash,
        "_flash_attention_backward": flash_backward,
        "_efficient_attention_forward": efficient,
        "_efficient_attention_backward": efficient_backward,
    },
    "fnrecipe": {"cudnn_attention": cudnn, "cudnn_attention_backward": cudnn_backward},
}


def registered() -> Iterator[None]:
    """The kernels as those of the CPU, as long as the generator is not gone on with."""
    libraries = [torch.library.Library(name, "IMPL") for name in KERNELS]
    for library, kernels in zip(libraries, KERNELS.values(), strict=True):
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU")
    yield
    for library in libraries:
        library._destroy()

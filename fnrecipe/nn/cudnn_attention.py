"""cuDNN's attention for ragged rows, by NVIDIA's frontend: on a Hopper GPU half to two thirds of FlashAttention 2's time.

torch has these kernels, too, but binds their backward so that it writes beside its workspace: it takes the head width for the
length of the longest document (pytorch/pytorch#186142). N positions of all rows, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

_WIDEST, _MOST = 128, 2**31 - 1
"""The head width up to which there are both kernels, and the most elements that their offsets can count."""


@attrs.frozen
class Layout:
    """What kernels are built for. `documents` and `positions` are those of all rows, `longest` bounds those of a document."""

    documents: int
    positions: int
    longest: int
    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    window: int | None


def layout(query: Tensor, key: Tensor, lengths: Tensor, longest: int, scale: float, window: int | None) -> Layout:
    """The layout of query [N, H, E] and key [N, G, E], and of documents of these `lengths`, [documents]."""
    positions, heads, width = query.shape
    sizes = len(lengths), positions, longest, heads, key.shape[1], width
    return Layout(*sizes, query.dtype, query.device, scale, window)


@cache
def is_supported(wanted: Layout, deterministic: bool) -> bool:
    """Whether the frontend is installed, and cuDNN has both kernels for this layout on its device."""
    countable = wanted.positions * wanted.heads * wanted.width <= _MOST
    if wanted.device.type != "cuda" or wanted.width > _WIDEST or not countable or find_spec("cudnn") is None:
        return False
    import cudnn

    try:
        _forward(wanted), _backward(wanted, deterministic)
    except cudnn.cudnnGraphNotSupportedError:
        return False
    return True


def bounds(cumulative: Tensor, lengths: Tensor, query: Tensor, key: Tensor) -> list[Tensor]:
    """`lengths`, and where documents begin, in elements, in what has a query's shape, in what has a key's, and in [N, H]."""
    heads, width = query.shape[1:]
    of_heads = cumulative * (heads * width)
    of_groups = of_heads if key.shape[1] == heads else cumulative * (key.shape[1] * width)
    return [lengths, of_heads, of_groups, cumulative * heads]


# cuDNN runs a graph of its own operations, built once for a layout, on tensors that are named by symbols. The frontend has no
# types.

Graph: TypeAlias = Any
Symbols: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[Mapping[str, Tensor]], None]
"""Runs a graph: reads its inputs among the tensors, by name, and writes its results into the others."""

_OFFSETS = {
    **dict.fromkeys(("query", "out", "gradient", "of_query"), "offsets of heads"),
    **dict.fromkeys(("key", "value", "of_key", "of_value"), "offsets of groups"),
    "statistics": "offsets of statistics",
}
"""What tells where documents begin in a tensor, in elements."""
_BOUNDS = "lengths", *dict.fromkeys(_OFFSETS.values())


@cache
def _forward(wanted: Layout) -> Run:
    graph, symbols, options = _begun(wanted, ("query", "key", "value"))
    results = graph.sdpa(q=symbols["query"], k=symbols["key"], v=symbols["value"], generate_stats=True, **options)
    return _built(graph, wanted, symbols, dict(zip(("out", "statistics"), results, strict=True)))


@cache
def _backward(wanted: Layout, deterministic: bool) -> Run:
    graph, symbols, options = _begun(wanted, ("query", "key", "value", "out", "gradient", "statistics"))
    results = graph.sdpa_backward(
        q=symbols["query"],
        k=symbols["key"],
        v=symbols["value"],
        o=symbols["out"],
        dO=symbols["gradient"],
        stats=symbols["statistics"],
        max_total_seq_len_q=wanted.positions,
        max_total_seq_len_kv=wanted.positions,
        use_deterministic_algorithm=deterministic,
        **options,
    )
    return _built(graph, wanted, symbols, dict(zip(("of_query", "of_key", "of_value"), results, strict=True)))


def _begun(wanted: Layout, inputs: tuple[str, ...]) -> tuple[Graph, Symbols, dict[str, object]]:
    """A graph, the symbols of its inputs, and what both directions say of the scores."""
    import cudnn

    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(intermediate_data_type=single, compute_data_type=single, handle=_handle(wanted.device))

    def numbers(name: str, size: int) -> Any:
        return graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=cudnn.data_type.INT32)

    symbols = {name: numbers(name, wanted.documents + 1) for name in dict.fromkeys(_OFFSETS.values())}
    symbols["lengths"] = numbers("lengths", wanted.documents)
    for name in inputs:
        symbols[name] = graph.tensor(name=name, **_laid_out(wanted, name))
        symbols[name].set_ragged_offset(symbols[_OFFSETS[name]])
    options = {
        "attn_scale": wanted.scale,
        "use_padding_mask": True,
        "seq_len_q": symbols["lengths"],
        "seq_len_kv": symbols["lengths"],
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_left_bound": wanted.window,
        "diagonal_band_right_bound": 0,
    }
    return graph, symbols, options


def _laid_out(wanted: Layout, name: str) -> dict[str, object]:
    """Dimensions, strides and dtype of a tensor as if every document were the longest."""
    import cudnn

    half = cudnn.data_type.BFLOAT16 if wanted.dtype == torch.bfloat16 else cudnn.data_type.HALF
    heads = wanted.groups if _OFFSETS[name] == "offsets of groups" else wanted.heads
    width, dtype = (1, cudnn.data_type.FLOAT) if name == "statistics" else (wanted.width, half)
    dim = [wanted.documents, heads, wanted.longest, width]
    return {"dim": dim, "stride": [heads * wanted.longest * width, width, heads * width, 1], "data_type": dtype}


def _built(graph: Graph, wanted: Layout, symbols: Symbols, results: Symbols) -> Run:
    """The graph with these results."""
    import cudnn

    for name, symbol in results.items():
        described = _laid_out(wanted, name)
        symbol.set_output(True).set_data_type(described["data_type"]).set_dim(described["dim"]).set_stride(described["stride"])
        symbol.set_ragged_offset(symbols[_OFFSETS[name]])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    all_symbols, handle, workspace = symbols | results, _handle(wanted.device), max(1, graph.get_workspace_size())

    def run(tensors: Mapping[str, Tensor]) -> None:
        cudnn.set_stream(handle, torch.cuda.current_stream(wanted.device).cuda_stream)
        given = {all_symbols[name]: tensor for name, tensor in tensors.items() if name in all_symbols}
        graph.execute(given, torch.empty(workspace, dtype=torch.uint8, device=wanted.device), handle=handle)

    return run


@cache
def _handle(device: torch.device) -> object:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def _run_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[Tensor], longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    wanted = layout(query, key, bounds[0], longest, scale, window)
    out, statistics = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    tensors = {"query": query, "key": key, "value": value, "out": out, "statistics": statistics}
    _forward(wanted)({**tensors, **dict(zip(_BOUNDS, bounds, strict=True))})
    return out, statistics


def _run_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    bounds: list[Tensor],
    longest: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    wanted = layout(query, key, bounds[0], longest, scale, window)
    found = {f"of_{name}": torch.empty_like(x) for name, x in (("query", query), ("key", key), ("value", value))}
    tensors = {"gradient": gradient, "query": query, "key": key, "value": value, "out": out, "statistics": statistics}
    _backward(wanted, deterministic)({**tensors, **found, **dict(zip(_BOUNDS, bounds, strict=True))})
    return tuple(found.values())


torch.library.impl("fnrecipe::cudnn_attention", "CUDA", _run_forward)
torch.library.impl("fnrecipe::cudnn_attention_backward", "CUDA", _run_backward)

"""Generation on the CPU: prefill, time to the first token, and decoding, with the same weights, prompts and greedy tokens.

A Llama of 28M parameters in float32 and bfloat16, one thread, one process; systems take turns, and all must say the same in
float32. `transformers` runs `generate` with its dynamic cache, its static one, and that compiled; fnrecipe with packed weights,
as for one prompt, as for many, for which prompts are traced, too, and compiled. The first round of each, in which steps are
traced and compiled, is told by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.report import Result, ratios
from fnrecipe import random, tree
from fnrecipe.compiler import Backend
from fnrecipe.compiler.inductor import in_one_piece
from fnrecipe.compiler.packed import packed_weights
from fnrecipe.generation.generator import Prompt, generate, make_generator
from fnrecipe.generation.sampling import Sampling
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.llama.model import model
from fnrecipe.tree import Tree

CONFIG = LlamaConfig(
    vocab_size=8192,
    max_seq_len=1024,
    model_dim=512,
    num_layers=8,
    num_attn_heads=8,
    num_key_value_heads=4,
    ffn_inner_dim=1408,
    tied_embeddings=True,
)
PROMPT, TOKENS, BATCHES, DTYPES = 128, 64, (1, 16), (torch.float32, torch.bfloat16)
DYNAMIC = "transformers, dynamic cache"
Say = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, number of tokens) -> what is said after each of them"""


def run(rounds: int) -> list[Result]:
    torch.set_num_threads(1)
    results = [result for dtype in DTYPES for batch in BATCHES for result in _measure(_systems(dtype), batch, dtype, rounds)]
    metrics = ("first token", "prefill", "decode")
    return results + [row for metric in metrics for row in ratios(results, metric, DYNAMIC)]


def _systems(dtype: torch.dtype) -> dict[str, Say]:
    params = tree.map(lambda leaf: leaf.to(dtype), model.init(CONFIG, random.key(0), lambda path, leaf: leaf))
    reference, packed = _reference(params).to(dtype), packed_weights()
    return {
        DYNAMIC: partial(_transformers, reference, "dynamic"),
        "transformers, static cache": partial(_transformers, reference, "static"),
        "transformers, static cache, compiled": partial(_transformers, reference, "static", compiled=True),
        "fnrecipe": _fnrecipe(params, dtype, packed),
        "fnrecipe, many prompts": _fnrecipe(params, dtype, packed, packed),
        "fnrecipe, compiled": _fnrecipe(params, dtype, in_one_piece, packed),
    }


def _measure(systems: dict[str, Say], batch: int, dtype: torch.dtype, rounds: int) -> list[Result]:
    prompts = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    texts = []
    for number in range(rounds + 1):
        for name, say in systems.items():
            first, _ = _timed(say, prompts, 1)
            whole, said = _timed(say, prompts, 1 + TOKENS)
            texts.append(said)
            found = {"first token": first, "prefill": batch * PROMPT / first, "decode": batch * TOKENS / (whole - first)}
            if number == 0:
                figures[name]["first round"] = [first + whole]
                continue
            for metric, value in found.items():
                figures[name].setdefault(metric, []).append(value)
    assert dtype != torch.float32 or all(said == texts[0] for said in texts)
    units = {"first token": "CPU s", "first round": "CPU s", "prefill": "tokens/CPU s", "decode": "tokens/CPU s"}
    case = f"{batch} x {PROMPT} + {TOKENS}, {str(dtype).removeprefix('torch.')}"
    return [
        Result("generate", case, name, metric, values, units[metric])
        for name, metrics in figures.items()
        for metric, values in metrics.items()
    ]


def _timed(say: Say, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
    start = time.process_time()
    said = say(prompts, count)
    return time.process_time() - start, said


def _fnrecipe(params: Tree, dtype: torch.dtype, backend: Backend, prompts: Backend | None = None) -> Say:
    assert model.cached is not None
    generator = make_generator(
        model.cached,
        CONFIG,
        Sampling(temperature=0),
        context=CONFIG.max_seq_len,
        vocab_size=CONFIG.vocab_size,
        dtype=dtype,
        backend=backend,
        prompts=prompts,
    )

    def say(prompts: list[list[int]], count: int) -> list[list[int]]:
        columns: Iterator[Any] = generate(generator, params, [Prompt(prompt) for prompt in prompts], random.key(0), count)
        return [list(row) for row in zip(*columns, strict=True)]

    return say


def _transformers(
    reference: Any, cache: str, prompts: list[list[int]], count: int, *, compiled: bool = False
) -> list[list[int]]:
    tokens, options = torch.tensor(prompts), {}
    if compiled:
        options["compile_config"] = transformers.CompileConfig()
        options["compile_config"]._compile_all_devices = True  # on a CPU, too
    with torch.no_grad():
        said = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=not compiled,
            **options,
        )
    found: list[list[int]] = said[:, len(prompts[0]) :].tolist()
    return found


def _reference(params: Tree) -> Any:
    assert model.hugging_face is not None
    places = model.hugging_face.tensors(CONFIG)
    values = {**model.hugging_face.write_config(CONFIG), "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    state = {}
    for path, leaf in tree.paths(params).items():
        number = next((part for part in path.split(".") if part.isdecimal()), "")
        place = places[path.replace(f".{number}.", ".*.")]
        state[place.name.replace("*", number)] = leaf
    reference.load_state_dict(state, strict=False)
    return reference

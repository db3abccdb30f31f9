"""Generation as a fold: `advance(state, params, uniform) -> state` over a stream of uniform numbers, from what `begin` gives.

Both are pure functions, traced once for a number of rows and slots. The cache is donated, so it exists once and is written in
place; attention looks at a power of two of its slots, so that a short text does not pay for a long one's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

import attrs
import torch
from torch import Tensor
from torch.func import vmap

from fnrecipe import random, tree
from fnrecipe.compiler import Backend, interpreter
from fnrecipe.errors import UsageError
from fnrecipe.generation.sampling import Said, Sampling, choose, uniforms
from fnrecipe.models.model import Cached
from fnrecipe.nn.policy import Policy
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree

C = TypeVar("C")

_LEAST_SLOTS, _LEAST_PROMPT = 256, 16
"""Slots that are looked at, and positions of a padded prompt, at least: fewer of them would not be faster."""


@attrs.frozen
class Prompt:
    """Tokens to go on from; `number` and `sample` are folded into the key of what is said after them."""

    tokens: Sequence[int]
    number: int = 0
    sample: int = 0


@tree.node
@attrs.frozen(eq=False)
class State:
    """
    cache      what the model keeps of all tokens but the last
    tokens     int64 [B], the last of each row
    positions  int64 [B], theirs
    said       bool [B, V], the tokens that each row has; nothing where repetition costs nothing
    """

    cache: Tree
    tokens: Tensor
    positions: Tensor
    said: Said


@attrs.frozen(eq=False)
class Generator(Generic[C]):
    """A model that goes on from prompts.

    context  positions that a text may have
    begin    (cache, parameters, tokens [B, T], lengths [B], said, uniform [B]) -> state with the first new token of each row;
             the cache is donated
    advance  (state, parameters, uniform [B], slots that are looked at) -> state with the next; the state is donated
    """

    context: int
    vocab_size: int
    sampling: Sampling
    empty: Callable[[int, int, torch.device], Tree]
    begin: Callable[..., State]
    advance: Callable[..., State]


def make_generator(
    cached: Cached[C],
    config: C,
    sampling: Sampling,
    *,
    context: int,
    vocab_size: int,
    dtype: torch.dtype,
    backend: Backend = interpreter,
    prompts: Backend | None = None,
    captured: Backend | None = None,
) -> Generator[C]:
    """The functions of a model; `dtype` is that of activations and of the cache.

    `backend` runs the graph of a step: one that keeps something of the parameters, as `packed_weights` does, wants them to stay
    as they are. `prompts` runs that of prompts; None: no graph is made of them. On a CPU it takes a tenth less time, and some
    tenths of a second to trace for each number of rows and width, so it is for many prompts. `captured` runs the graph of a
    step in the place of `backend` if it captures it, and so wants state and parameters at addresses that do not change. Then
    texts are generated one batch after the other: the next of as many rows and slots lies where the last one lay.
    Only the first `vocab_size` logits count: an embedding may have more rows than the tokenizer has tokens.
    """
    extend = partial(cached.extend, config, policy=Policy(dtype=dtype))

    def begin(cache: Tree, params: Tree, tokens: Tensor, lengths: Tensor, said: Said, uniform: Tensor) -> State:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits, cache = extend(params, cache, tokens, positions, lengths - 1, limit=tokens.shape[1])
        return said_next(cache, logits, lengths, said, uniform)

    def advance(state: State, params: Tree, uniform: Tensor, limit: int) -> State:
        positions = state.positions.clamp_max(limit - 1)  # a row at the end of its context stays there
        last = torch.zeros_like(positions)
        logits, cache = extend(params, state.cache, state.tokens[:, None], positions[:, None], last, limit=limit)
        return said_next(cache, logits, positions + 1, state.said, uniform)

    def said_next(cache: Tree, logits: Tensor, positions: Tensor, said: Said, uniform: Tensor) -> State:
        tokens = choose(logits[:, :vocab_size], said, uniform, sampling)
        now = said if isinstance(said, tuple) else said.clone().scatter_(1, tokens[:, None], True)
        return State(cache, tokens, positions, now)

    def empty(rows: int, slots: int, device: torch.device) -> Tree:
        return cached.init(config, rows, slots, dtype, device)

    first = begin if prompts is None else jit(begin, donate=1, fixed=2, backend=prompts)
    if captured is None:
        return Generator(context, vocab_size, sampling, empty, first, jit(advance, donate=1, fixed=2, backend=backend))
    step = jit(advance, donate=1, fixed=2, backend=captured)
    return Generator(context, vocab_size, sampling, empty, _at_kept_addresses(first), step)


@torch.inference_mode()  # for each step, and not for who waits for the next
def generate(
    generator: Generator[C], params: Tree, prompts: Sequence[Prompt], key: Tensor, max_tokens: int | None = None
) -> Iterator[list[int | None]]:
    """The next token of each prompt, then the one after it, and so on: `max_tokens` times, None behind the end of the context.

    What a row says depends on its prompt and the key, its number and sample folded in, and not on the other rows: but for
    rounding, which in products of another number of rows may be another one.

    Raises:
        UsageError: if a prompt has no token, or leaves no place for another one in the context.
    """
    for prompt in prompts:
        check(generator.context, prompt.tokens)
    sizes = [len(prompt.tokens) for prompt in prompts]
    longest, free = max(sizes), [generator.context - size for size in sizes]
    count = max(free) if max_tokens is None else min(max_tokens, max(free))
    lengths = torch.tensor(sizes, device=key.device)
    draws = _draws(generator.sampling, key, prompts, lengths, count).unbind(1)
    width = min(_power_of_two(longest, _LEAST_PROMPT), generator.context)
    slots = min(_power_of_two(longest + count, _LEAST_SLOTS), generator.context)
    padded = torch.tensor([[*prompt.tokens, *[0] * (width - len(prompt.tokens))] for prompt in prompts], device=key.device)
    empty = generator.empty(len(prompts), slots, key.device)
    state = generator.begin(empty, params, padded, lengths, _said(generator, prompts, key.device), draws[0])
    del empty
    yield state.tokens.tolist()
    for number, draw in enumerate(draws[1:], 1):
        limit = slots if key.device.type == "cpu" else min(_power_of_two(longest + number, _LEAST_SLOTS), slots)
        state = generator.advance(state, params, draw, limit)
        yield [token if number < size else None for token, size in zip(state.tokens.tolist(), free, strict=True)]


def go_on(
    generator: Generator[C],
    params: Tree,
    begin: Sequence[int],
    key: Tensor,
    length: int,
    ends: Collection[int] = (),
) -> list[int]:
    """Up to `length` tokens after those of `begin`, to before one of `ends`; with a full context, from the later half of it."""
    said: list[int] = []
    while len(said) < length:
        text = [*begin, *said]
        seen = text if len(text) < generator.context else text[-max(generator.context // 2, 1) :]
        for (token,) in generate(generator, params, [Prompt(seen, number=len(said))], key, length - len(said)):
            if token is None or token in ends:
                return said
            said.append(token)
    return said


def check(context: int, tokens: Sequence[int], name: str = "prompt") -> None:
    """Checks that tokens can be gone on from.

    Raises:
        UsageError: if there is none, or no place for another one in the context.
    """
    if not tokens:
        raise UsageError(f"{name}: expected one token at least, found none")
    if len(tokens) >= context:
        raise UsageError(f"{name}: expected fewer tokens than the context of {context:,}, found {len(tokens):,}")


def _at_kept_addresses(begin: Callable[..., State]) -> Callable[..., State]:
    """`begin`, whose state is copied to where the first one of the same shapes lies."""
    kept: dict[tuple[object, ...], State] = {}

    def call(*args: Tree) -> State:
        state = begin(*args)
        place = kept.setdefault(tuple((leaf.shape, leaf.dtype) for leaf in tree.leaves(state)), state)
        if place is not state:
            tree.map(torch.Tensor.copy_, place, state)
        return place

    return call


def _draws(sampling: Sampling, key: Tensor, prompts: Sequence[Prompt], lengths: Tensor, count: int) -> Tensor:
    """Uniform numbers of `count` positions from each prompt's end on, float64 [B, count]; zeros if nobody looks at them."""
    if sampling.temperature == 0:
        return torch.zeros(len(prompts), count, dtype=torch.float64, device=key.device)
    return uniforms(_keys(key, prompts), lengths, count)


def _keys(key: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The key of each prompt, int64 [B, 2]."""
    numbers, samples = (
        torch.tensor(values, device=key.device)
        for values in ([prompt.number for prompt in prompts], [prompt.sample for prompt in prompts])
    )
    return vmap(random.fold_in)(random.fold_in(key, numbers), samples)


def _said(generator: Generator[C], prompts: Sequence[Prompt], device: torch.device) -> Said:
    if generator.sampling.repetition_penalty == 1:
        return ()
    said = torch.zeros(len(prompts), generator.vocab_size, dtype=torch.bool)
    for row, prompt in zip(said, prompts, strict=True):
        row[list(prompt.tokens)] = True
    return said.to(device)


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())

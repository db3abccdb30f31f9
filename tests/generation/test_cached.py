"""A key-value cache against the model that sees all tokens at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fnrecipe import nn, random, tree
from fnrecipe.compiler import cuda_graph, interpreter
from fnrecipe.compiler.packed import packed_weights
from fnrecipe.generation.generator import Generator, Prompt, State, generate, go_on, make_generator
from fnrecipe.generation.sampling import Sampling
from fnrecipe.generation.uncached import uncached
from fnrecipe.models.model import Model, find_model
from fnrecipe.nn.policy import Policy
from fnrecipe.tree import Tree
from tests.compiler.test_cuda_graph import Recorder
from tests.models.families import TINY, random_params, reference, tiny

SLOTS, COLD = 32, Sampling(temperature=0)
PROMPTS = [[3, 1, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1], [5], [11, 12, 13, 14]]


def made(family: str) -> tuple[Model[Any], Any, Tree]:
    model, config = find_model(family), tiny(family)
    return model, config, random_params(model, config)


def whole(model: Model[Any], config: Any, params: Tree, tokens: Tensor) -> Tensor:
    """Logits of all positions, [B, T, V], by the model that training uses."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return nn.all_logits(model.apply(config, params, tokens, torch.zeros_like(tokens), positions, policy=Policy(), scope="row"))


def generator_of(family: str, sampling: Sampling = COLD, **options: Any) -> tuple[Generator[Any], Tree]:
    model, config, params = made(family)
    sizes = {"context": SLOTS, "vocab_size": 64, "dtype": torch.float32}
    cached = options.pop("cached", model.cached)
    return make_generator(cached, config, sampling, **{**sizes, **options}), params


def rows(
    generator: Generator[Any], params: Tree, prompts: list[Prompt], seed: int = 0, count: int | None = 8
) -> list[list[Any]]:
    return [list(row) for row in zip(*generate(generator, params, prompts, random.key(seed), count), strict=True)]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_cache_has_the_logits_of_the_whole_at_every_position(family: str, left: bool) -> None:
    model, config, params = made(family)
    assert model.cached is not None
    text = torch.randint(0, 64, (2, SLOTS - 1), generator=torch.Generator().manual_seed(2))
    expected, lengths, width = whole(model, config, params, text), [5, 9], 12
    cache = model.cached.init(config, 2, SLOTS, torch.float32, torch.device("cpu"))
    # Padding has the last slot, which no token of these texts has.
    tokens, positions = torch.full((2, width), 63), torch.full((2, width), SLOTS - 1)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        tokens[row, place], positions[row, place] = text[row, :length], torch.arange(length)
    last = torch.tensor([width - 1] * 2 if left else [length - 1 for length in lengths])
    found, cache = model.cached.extend(config, params, cache, tokens, positions, last, limit=SLOTS, policy=Policy())
    number = torch.tensor(lengths)
    while True:
        for row in range(2):
            torch.testing.assert_close(found[row], expected[row, number[row] - 1], atol=2e-4, rtol=2e-4)
        if int(number.max()) == SLOTS - 1:
            break
        new = text.gather(1, number[:, None])
        limit = 16 if int(number.max()) < 16 else SLOTS
        zero = torch.zeros(2, dtype=torch.int64)
        found, cache = model.cached.extend(config, params, cache, new, number[:, None], zero, limit=limit, policy=Policy())
        number = number + 1


def test_several_tokens_may_follow_a_text_that_is_kept() -> None:
    model, config, params = made("mistral")
    assert model.cached is not None
    text = torch.randint(0, 64, (1, 20))
    extend = partial(model.cached.extend, config, params, limit=SLOTS, policy=Policy())
    cache = model.cached.init(config, 1, SLOTS, torch.float32, torch.device("cpu"))
    for first, end in ((0, 7), (7, 8), (8, 20)):
        positions = torch.arange(first, end)[None]
        found, cache = extend(cache, text[:, first:end], positions, torch.tensor([end - first - 1]))
        torch.testing.assert_close(found, whole(model, config, params, text)[:, end - 1], atol=2e-4, rtol=2e-4)


def test_prompts_may_be_traced() -> None:
    prompts = [Prompt(tokens, number) for number, tokens in enumerate(PROMPTS)]
    for sampling in (COLD, Sampling(temperature=0.7, repetition_penalty=1.2)):
        (plain, params), (traced, _) = (
            generator_of("llama", sampling),
            generator_of("llama", sampling, prompts=packed_weights()),
        )
        said = rows(plain, params, prompts)
        assert rows(traced, params, prompts) == said
        assert rows(traced, params, prompts) == said  # the graph of before, and another cache
        assert rows(traced, params, prompts[::-1]) == said[::-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_it_says_what_transformers_says(family: str) -> None:
    """Where the two likeliest tokens are as likely, rounding decides; up to there, all tokens agree."""
    model, config = find_model(family), tiny(family, max_seq_len=96)
    params = random_params(model, config)
    assert model.cached is not None
    generator = make_generator(model.cached, config, Sampling(temperature=0), context=96, vocab_size=64, dtype=torch.float32)
    prompt = torch.tensor([[3, 1, 2, 60, 5]])
    with torch.no_grad():
        theirs = reference(model, config, params).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
    assert rows(generator, params, [Prompt(prompt[0].tolist())], count=64) == [theirs[0, 5:].tolist()]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_what_is_said_does_not_depend_on_the_other_rows(family: str) -> None:
    generator, params = generator_of(family, Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.1))
    prompts = [Prompt(tokens, number, sample) for number, tokens in enumerate(PROMPTS[:3]) for sample in range(2)]
    prompts.append(Prompt(PROMPTS[3], 3))
    together = rows(generator, params, prompts)
    assert together == [rows(generator, params, [prompt])[0] for prompt in prompts]
    assert together[0] != together[1], "two samples of a prompt"
    assert rows(generator, params, prompts, seed=1) != together


def test_rows_end_at_the_context_each_by_itself() -> None:
    generator, params = generator_of("llama")
    short, long = rows(generator, params, [Prompt([1]), Prompt([1] * 30)], count=None)
    assert [token is None for token in long] == [False] * 2 + [True] * 29
    assert short == rows(generator, params, [Prompt([1])], count=None)[0]
    assert None not in short
    assert len(short) == 31


def test_without_a_cache_it_says_the_same() -> None:
    model = find_model("mistral")
    cached, params = generator_of("mistral")
    plain, _ = generator_of("mistral", cached=uncached(model.apply))
    prompts = [Prompt(tokens) for tokens in PROMPTS]
    assert rows(plain, params, prompts) == rows(cached, params, prompts)


def test_only_tokens_of_the_vocabulary_are_said_and_a_bfloat16_cache_is_one() -> None:
    generator, params = generator_of("llama", Sampling(temperature=5.0), vocab_size=10, dtype=torch.bfloat16)
    assert max(rows(generator, params, [Prompt([1, 2])], count=20)[0]) < 10
    dtypes = {leaf.dtype for leaf in tree.leaves(generator.empty(1, SLOTS, torch.device("cpu")))}
    assert dtypes == {torch.bfloat16}


def test_a_text_goes_on_from_the_later_half_of_a_full_context() -> None:
    generator, params = generator_of("llama", context=8)
    found = go_on(generator, params, [3, 1, 2], random.key(0), 14)
    expected = [3, 1, 2]
    model, config, _ = made("llama")
    begin = 0
    while len(expected) < 17:
        begin = len(expected) - 4 if len(expected) - begin == 8 else begin
        expected.append(int(whole(model, config, params, torch.tensor([expected[begin:]]))[0, -1].argmax()))
    assert found == expected[3:]
    assert go_on(generator, params, [3, 1, 2], random.key(0), 14, ends=[found[5]]) == found[: found.index(found[5])]


def test_a_captured_step_says_the_same_for_one_batch_after_the_other() -> None:
    """The recorder stands for a CUDA graph: state and parameters must lie where they were captured."""
    expected, params = generator_of("qwen3", Sampling(repetition_penalty=1.2))
    states: list[Tensor] = []
    recorder = Recorder(states)
    captured, _ = generator_of("qwen3", Sampling(repetition_penalty=1.2), captured=cuda_graph(interpreter, recorder))

    def watched(*args: Tree) -> State:
        state = captured.begin(*args)
        states[:] = tree.leaves(state)
        return state

    recorded = attrs.evolve(captured, begin=watched)
    for prompts in ([Prompt(PROMPTS[0])], [Prompt(PROMPTS[1], 5)]):
        assert rows(recorded, params, prompts) == rows(expected, params, prompts)
    assert len(recorder.recorded) == 1


def test_the_cache_is_written_in_place_and_no_mode_leaks_to_the_caller() -> None:
    generator, params = generator_of("llama")
    places = []

    def advance(state: State, *args: Any) -> State:
        before = [leaf.data_ptr() for leaf in tree.leaves(state.cache)]
        state = generator.advance(state, *args)
        places.append(before == [leaf.data_ptr() for leaf in tree.leaves(state.cache)])
        return state

    watched = attrs.evolve(generator, advance=advance)
    for _ in generate(watched, params, [Prompt([1, 2, 3])], random.key(0), 4):
        assert torch.is_grad_enabled()
    assert places == [True] * 3

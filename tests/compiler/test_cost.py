"""Costs against torch's own counter, closed forms and counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from fnrecipe import optim, random
from fnrecipe.compiler import cost, trace
from fnrecipe.compiler.cost import Cost, operation_costs, total
from fnrecipe.config import ModelSection
from fnrecipe.models import llama
from fnrecipe.models.flops import TokenFlops, token_flops
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.attention import attention, attention_mask
from fnrecipe.optim import schedule
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.peaks import peak_flops
from fnrecipe.step import init_state, train_step
from tests.helpers import TINY, documents, packed

ROWS, LENGTH = 4, 16
PARAMETERS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 64 * 32
"""Of TINY in products: query and output, key and value, gate, up and down in two layers, and the tied head."""


@pytest.fixture(scope="module")
def step() -> tuple[Callable[..., Any], Any]:
    """A train step of a tiny Llama in two leaves, and its arguments."""
    key = random.key(0)
    update = optim.adamw(schedule.cosine_annealing(1e-3, num_warmup_steps=1, num_steps=9, final_scale=0.1))
    state = init_state(llama.init(TINY, key), update, key)
    batch = packed([[ids] for ids in documents(*[LENGTH] * ROWS)], LENGTH)
    return train_step(next_token_loss(partial(llama.apply, TINY)), update, 2), (state, batch)


def costs_of(function: Callable[..., Any], *args: Any) -> dict[str, Cost]:
    graph, _ = trace(function, args)
    return operation_costs(graph)


def test_the_traced_step_has_the_flops_of_the_eager_one_and_of_the_closed_form(step: Any) -> None:
    function, args = step
    attention = torch.ops.fnrecipe.document_attention
    backward = torch.ops.fnrecipe.document_attention_backward
    one = 2 * 4 * LENGTH * LENGTH * 8  # a product of attention: 4 heads of 8, for a row
    formulas = {
        attention: lambda query, *_, **__: 2 * one * query[0],  # scores, values
        backward: lambda grad, *_, **__: 5 * one * grad[0],  # scores again, and two products for each of the two
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function(*args)
    found = total(costs_of(function, *args).values()).flops

    assert found == counter.get_total_flops()
    assert found == ROWS * LENGTH * (6 * PARAMETERS + 14 * 2 * 32 * LENGTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_within_documents_on_a_gpu_counts_as_that_of_the_cpu(dtype: torch.dtype) -> None:
    def gradients(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Any:
        mask = attention_mask(segments, "document")
        return torch.func.grad(lambda *inputs: attention(*inputs, mask).sum(), argnums=(0, 1, 2))(query, key, value)

    found = []
    for device in ("cpu", "meta"):
        query, key = (torch.empty(ROWS, heads, LENGTH, 8, dtype=dtype, device=device) for heads in (4, 2))
        costs = costs_of(gradients, query, key, key, torch.empty(ROWS, LENGTH, dtype=torch.int64, device=device))
        found.append(total(costs.values()).flops)
    assert found == [7 * 2 * ROWS * 4 * LENGTH * LENGTH * 8] * 2


def test_the_convention_counts_what_a_llama_is_made_of() -> None:
    expected = TokenFlops(6 * PARAMETERS + 12 * 2 * 32 * LENGTH, 6 * PARAMETERS + 6 * 2 * 32 * LENGTH)
    assert flops_of(TINY) == expected
    assert flops_of(attrs.evolve(TINY, tied_embeddings=False)) == expected, "a head of its own, and a lookup that is no product"


def flops_of(model: LlamaConfig) -> TokenFlops:
    config = recipe.config
    dataset = attrs.evolve(config.dataset, max_seq_len=LENGTH)
    assert recipe.flops is not None
    return recipe.flops(attrs.evolve(config, model=ModelSection(config=model), dataset=dataset))


def test_llama_2_7b_takes_six_times_its_parameters_but_the_embedding_and_its_attention() -> None:
    parameters = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # as published, less the embedding and the norms
    assert flops_of(LlamaConfig()).full == 6 * parameters + 12 * 32 * 4096 * LENGTH


def test_vectors_take_part_in_no_product() -> None:
    assert token_flops([(8,), (2, 4), ()], windows=(), width=4, length=4) == TokenFlops(48, 48)


X, Y = torch.zeros(6, 4), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("function", "args", "flops", "moved"),
    [
        (torch.mm, (X, Y), 2 * 6 * 4 * 3, 4 * (24 + 12 + 18)),
        (torch.add, (X, X), 0, 4 * 72),
        (lambda x: x.t().view(2, 2, 6)[0].unsqueeze(0).expand(5, -1, -1), (X,), 0, 0),
        (lambda x: x[:1].expand(6, 4) + x, (X,), 0, 4 * (4 + 24 + 24)),
        (lambda x: x.chunk(2)[0] * 2, (X,), 0, 4 * 24),
        (lambda x: x.to(torch.float64), (X,), 0, 24 * (4 + 8)),
        (lambda x: x.clone().add_(1), (X,), 0, 4 * 96),
        (lambda x: torch._foreach_add([x, x], 1.0), (X,), 0, 4 * 96),
        (lambda x: x.unbind(0)[1].sum(), (X,), 0, 4 * 5),
        (torch.conv1d, (torch.zeros(2, 3, 8), torch.zeros(5, 3, 1)), 2 * 2 * 8 * 3 * 5, 4 * (48 + 15 + 80)),
    ],
)
def test_operations_cost_their_products_and_what_they_read_and_write(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], flops: int, moved: int
) -> None:
    found = total(costs_of(function, *args).values())
    assert (found.flops, found.bytes) == (flops, moved)


def test_what_gives_nothing_back_writes_what_it_changes() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        torch._foreach_add_([x], [y])
        return x

    assert total(costs_of(function, torch.zeros(8), torch.zeros(8)).values()) == Cost(1, 0, 4 * 24)


def test_kinds_come_with_their_calls_and_the_dearest_first() -> None:
    found = costs_of(lambda x, y: (x @ y).sin() @ (y.t() @ x.t()).cos().sin(), X, Y)
    assert {name: cost.calls for name, cost in found.items()} == {"aten.mm": 3, "aten.sin": 2, "aten.cos": 1}
    assert list(found) == ["aten.mm", "aten.sin", "aten.cos"]


def test_a_graph_without_calls_costs_nothing() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.Identity())
    assert isinstance(graph, GraphModule)
    assert total(operation_costs(graph).values()) == cost.NOTHING


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_or_not_told(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak

"""Where collectives stand in the traced step: started early, waited for late, with the work of a layer in between."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.fx import Node

from fnrecipe import optim, random
from fnrecipe.compiler import trace
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.parallel import collectives
from fnrecipe.step import init_state, train_step
from tests.helpers import TINY, documents, packed
from tests.ranks import mesh_of, on_ranks

c10d = torch.ops._c10d_functional
LAYERS = 3
CONFIG = attrs.evolve(TINY, num_layers=LAYERS, model_dim=128, tied_embeddings=False)
PARTS = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 48 * 128 + 2 * 128
"""Numbers in a layer, all of which are cut."""


RATE = cosine_annealing(0.1, num_warmup_steps=1, num_steps=9, final_scale=0)
ADAMW = optim.adamw(RATE)
STARTS = (c10d.all_gather_into_tensor_out.default, c10d.all_to_all_single.default)


def of_step(mesh: Any, update: optim.Transform = ADAMW) -> list[Node]:
    """The nodes of the traced step of one leaf."""
    key = random.key(0)
    state = init_state(llama.init(CONFIG, key, mesh.cut), update, key)
    step = train_step(next_token_loss(partial(llama.apply, CONFIG)), update, 1, mesh)
    graph, _ = trace(step, (state, packed([documents(15)], 16)), donate=1)
    return list(graph.graph.nodes)


def story(nodes: list[Node], least: int) -> str:
    """What happens, in order: G and S start to gather and sum many numbers, g and s wait for them, dots are matrix products."""
    letters = {c10d.all_gather_into_tensor_out.default: "G", c10d.all_to_all_single.default: "S"}
    told = ""
    for node in nodes:
        waits = node.target == c10d.wait_tensor.default
        start = node.all_input_nodes[0] if waits else node
        if start.target in letters and start.meta["val"].numel() >= least:
            told += letters[start.target].lower() if waits else letters[start.target]
        elif node.target == torch.ops.aten.mm.default and not told.endswith("."):
            told += "."
    return told


def check_layers(rank: int, size: int) -> None:
    # Each layer's gather is started before the wait for the one before it, in the backward pass as well, where every layer is
    # gathered again; and each sum is waited for when the next one has been started.
    forward, backward = "GGg.Gg.Gg.", "Gg.SGg.Ssg.Sss"
    assert story(of_step(mesh_of(rank, size, sharding="fsdp")), PARTS) == forward + backward


def check_buckets(rank: int, size: int) -> None:
    collectives._BUCKET_BYTES = 4 * PARTS
    assert story(of_step(mesh_of(rank, size)), 1000) == ".S.SsG.SgsG.SgsGgsGg"
    for sharding in ("zero1", "zero2"):
        assert story(of_step(mesh_of(rank, size, sharding=sharding)), 1000) == "GGgGgGgg" + ".S.Ss.Ss.Sss"


def check_dealt(rank: int, size: int) -> None:
    # Two matrices, both before and behind sums of other gradients, belong to rank 0; rank 1 has another program.
    dealt = optim.descent(optim.scale_by_parameter_rms(), optim.scale_by_adam(), optim.orthogonalize(), schedule=RATE)
    rest = optim.chain(optim.clip_by_global_norm(1.0), ADAMW)
    update = optim.partition({"head": dealt, "layers.0.query": dealt, "*": rest})
    for sharding in ("replicate", "fsdp"):
        nodes = of_step(mesh_of(rank, size, sharding=sharding), update)
        starts = [(str(node.target), str(node.meta["val"].dtype)) for node in nodes if node.target in STARTS]
        of_ranks: list[Any] = [None] * size
        dist.all_gather_object(of_ranks, ([starts], sum(node.target == torch.ops.aten.mm.default for node in nodes)))
        (first, products), (second, fewer) = of_ranks
        assert first == second
        assert products > fewer


@pytest.mark.slow
def test_ranks_with_other_programs_start_the_same_collectives_in_the_same_order() -> None:
    on_ranks(2, check_dealt)


def test_layers_are_gathered_twice_and_work_goes_on_meanwhile() -> None:
    on_ranks(2, check_layers)


def test_gradients_are_summed_in_buckets_while_the_others_are_computed() -> None:
    on_ranks(2, check_buckets)

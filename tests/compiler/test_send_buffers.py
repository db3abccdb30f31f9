"""Compiled, what a gather sends is not written over before the gather is waited for: read in the code that Inductor makes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe.compiler import inductor
from fnrecipe.compiler.send_buffers import keep_send_buffers_alive
from fnrecipe.ops import keep_alive
from tests.ranks import compiles_gathers, on_ranks

c10d = torch.ops._c10d_functional


def gathered_meanwhile(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Twice x of two ranks, and something that is computed between the start and the wait."""
    rows = x.new_empty(2 * x.shape[0], x.shape[1])
    started = c10d.all_gather_into_tensor_out(x * 2, 2, "0", out=rows)
    between = (y @ y).sin() @ y
    return c10d.wait_tensor(started), between


def sent_and_held(code: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Of each gather and of each hold, in order: the buffer that is sent and the one that is filled."""
    gathers = re.findall(r"all_gather_into_tensor_out\.default\((\w+), .*out=(\w+)\)", code)
    holds = re.findall(r"fnrecipe\.keep_alive\.default\((\w+), (\w+)\)", code)
    return gathers, [(sent, filled) for filled, sent in holds]


def check_held(rank: int, size: int) -> None:
    from torch._inductor.utils import run_and_get_code

    x, y = torch.full((32, 32), rank + 1.0), torch.eye(32)
    found, (code,) = run_and_get_code(inductor(make_fx(gathered_meanwhile)(x, y)), x, y)
    assert torch.equal(found[0], torch.tensor([2.0, 4.0]).repeat_interleave(32)[:, None].expand(64, 32))
    torch.testing.assert_close(found[1], torch.eye(32).sin())
    gathers, holds = sent_and_held(code)
    assert len(gathers) == 1
    assert gathers == holds
    assert code.index("wait_tensor.default(") < code.index("fnrecipe.keep_alive.default(")


@compiles_gathers
@pytest.mark.slow
def test_what_is_sent_is_held_until_the_wait() -> None:
    on_ranks(2, check_held)


def check_in_graph(rank: int, size: int) -> None:
    graph = make_fx(gathered_meanwhile)(torch.ones(4, 4), torch.eye(4))
    keep_send_buffers_alive(graph)
    nodes = list(graph.graph.nodes)
    (held,) = graph.graph.find_nodes(op="call_function", target=keep_alive.default)
    wait, sent = held.args
    assert wait.target == c10d.wait_tensor.default
    assert nodes.index(held) > nodes.index(wait)
    assert wait.args[0].args[0] is sent
    found, _ = graph(torch.full((4, 4), rank + 1.0), torch.eye(4))
    assert found[:, 0].tolist() == [2.0] * 4 + [4.0] * 4


def test_a_graph_with_holds_gives_the_same() -> None:
    on_ranks(2, check_in_graph)

"""A train step on a GPU against the same on the CPU: every level, dtype and form, run twice, and as a run that goes on."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.build import for_mode
from fnrecipe.compiler import cuda_graph
from fnrecipe.compiler.modes import BACKENDS
from fnrecipe.errors import EXIT_AGAIN
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import fused_adamw
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import jit
from tests.helpers import TINY, compiles, documents, end, packed, pairs, remains, rows, signal_at, start

pytestmark = compiles

CPU, CUDA, LENGTH = torch.device("cpu"), torch.device("cuda"), 64
UPDATE = optim.adamw(cosine_annealing(0.01, num_warmup_steps=2, num_steps=6, final_scale=0.1), max_norm=1.0)
KINDS: dict[str, dict[str, Any]] = {
    "eager": {"level": "off"},
    "traced, 2 microbatches": {"level": "trace", "microbatches": 2},
    "traced, layers again, CUDA graph": {"level": "trace", "captured": True, "policy": {"remat": "layerwise"}},
    "traced, pieces again, whole logits": {"level": "trace", "policy": {"remat": "selective", "logits_at_once": None}},
    "compiled, CUDA graph": {"level": "inductor", "captured": True},
    "compiled, 2 microbatches, layers again": {"level": "inductor", "microbatches": 2, "policy": {"remat": "layerwise"}},
}
HALF: dict[str, dict[str, Any]] = {
    "bfloat16": {"policy": {"dtype": torch.bfloat16}},
    "bfloat16, parameters too": {"policy": {"dtype": torch.bfloat16}, "dtype": torch.bfloat16},
    "float16": {"policy": {"dtype": torch.float16}, "scaling": LossScaling(2.0**10, 1.0)},
}


def batch(number: int) -> Any:
    lengths = [(20, 1, 30), (64,), (5, 5), (40, 20)]
    return packed([documents(*row, seed=4 * number + i) for i, row in enumerate(lengths)], LENGTH)


def train(
    device: torch.device,
    level: Any = "trace",
    microbatches: int = 1,
    captured: bool = False,
    policy: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    scaling: LossScaling | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters after six steps, and the losses."""
    apply = partial(llama.apply, TINY, policy=Policy(**{"logits_at_once": 50, "max_documents": 4} | (policy or {})))
    step = train_step(next_token_loss(apply), for_mode(UPDATE, level, device), microbatches, scaling=scaling)
    if level != "off":
        step = jit(step, donate=1, backend=cuda_graph(BACKENDS[level]) if captured else BACKENDS[level])
    key = random.key(0, device)
    state, losses = init_state(llama.init(TINY, key, lambda path, leaf: leaf.to(dtype)), UPDATE, key, scaling), []
    for number in range(6):
        state, metrics = step(state, tree.map(lambda leaf: leaf.to(device), batch(number)))
        losses.append(float(metrics["loss"] / metrics["targets"]))
    return {path: leaf.cpu() for path, leaf in tree.paths(state.params).items()}, losses


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_cpu(kind: str) -> None:
    params, losses = train(CUDA, **KINDS[kind])
    expected, expected_losses = train(CPU)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for path, leaf in params.items():
        assert (leaf - expected[path]).abs().max() <= 2e-3 * expected[path].abs().max(), path


@pytest.mark.parametrize("kind", HALF)
def test_half_precision_is_near_the_cpu(kind: str) -> None:
    _, losses = train(CUDA, captured=True, **HALF[kind])
    _, expected = train(CPU, **HALF[kind])
    assert losses == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_by_triton_is_torchs(dtype: torch.dtype, gradients: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding, and with the random numbers of stochastic rounding; a step that is not accepted changes nothing.

    Gradients that are bfloat16 already are read as they are; torch's kernel wants them in the dtype of the parameters.
    """

    def steps(read: torch.dtype) -> Any:
        params = {"a": draw(70, 50).to(dtype), "b": draw(7).to(dtype), "c": draw(3, 4, 8).to(dtype)}
        state, key = UPDATE.init(params), random.key(3, CUDA)
        for number, accept in ((1, True), (2, False), (3, True)):
            mean = optim.mean_gradient(
                tree.map(lambda x: draw(*x.shape).to(gradients).to(read), params), torch.tensor(3.0, device=CUDA)
            )
            given = state, params, torch.tensor(number, device=CUDA), torch.tensor(accept, device=CUDA), key
            params, state, *_ = optim.guarded_update(UPDATE, mean, *given)
        return params, state

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA)

    found = []
    for triton in (True, False):
        generator = torch.Generator(CUDA).manual_seed(0)
        monkeypatch.setattr(fused_adamw, "has_triton", lambda device, triton=triton: triton)
        found.append(tree.leaves(steps(gradients if triton else dtype)))
    differ = [(one != other).double().mean().item() for one, other in zip(*found, strict=True)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-7)
    assert dtype == torch.float32 or max(differ) < 0.01


@pytest.mark.parametrize("level", ["trace", "inductor"])
@pytest.mark.usefixtures("deterministic")
def test_a_graph_has_the_bits_of_the_launches_that_it_was_captured_from(level: str) -> None:
    policy = {"dtype": torch.bfloat16}
    launched, captured, again = (train(CUDA, level, captured=graph, policy=policy) for graph in (False, True, True))
    assert all(torch.equal(launched[0][path], captured[0][path]) for path in launched[0])
    assert all(torch.equal(again[0][path], captured[0][path]) for path in launched[0])


@pytest.mark.parametrize("jit", ["trace", "inductor"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits_and_tells_its_speed(tmp_path: Path, texts: Path, jit: str) -> None:
    changes = {
        "gang__device": "cuda",
        "trainer__jit": jit,
        "trainer__dtype": "bfloat16",
        "common__torch__deterministic": "true",
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert end(start("train", "lm", "--out", str(whole), "--config", *pairs(texts, **changes))).status == 0
    command = "train", "lm", "--out", str(stopped), "--config", *pairs(texts, **changes)
    assert signal_at(start(*command), stopped, 13, signal.SIGTERM).status == EXIT_AGAIN
    assert end(start(*command)).status == 0
    found, expected = remains(stopped), remains(whole)
    last = [name for name in expected if "00000030" in name and name.endswith(".safetensors")]
    assert last
    assert all(found[name] == expected[name] for name in last)
    speed = rows(whole / "logs/perf.jsonl")
    assert all(row["perf/tokens_per_second"] > 0 and row["perf/peak_memory"] > 0 for row in speed)


def test_memory_that_runs_out_is_one_line(tmp_path: Path, texts: Path) -> None:
    large = {"gang__device": "cuda", "dataset__batch_size": 8 * 65_536, "model__config__model_dim": 4096}
    ended = end(start("train", "lm", "--out", str(tmp_path / "out"), "--config", *pairs(texts, **large)))
    assert ended.status != 0
    assert "Traceback" not in ended.errors
    assert len(ended.errors.strip().splitlines()) == 1, json.dumps(ended.errors)

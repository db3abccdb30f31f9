"""CUDA graphs, with a recorder on the CPU in place of the device: who runs what how often, and on which memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fnrecipe import tree
from fnrecipe.build import for_mode
from fnrecipe.compiler import cuda_graph, interpreter, trace
from fnrecipe.errors import UsageError
from fnrecipe.optim import scale_by_soap
from fnrecipe.step import train_step
from fnrecipe.transforms import jit
from tests.helpers import assert_same_bits
from tests.transforms.test_jit import ALIASING, LOSS, UPDATE, State2, batch, fresh_state, run


@attrs.frozen
class Recorder:
    """A `Capture` for functions that write into `state` only. To record does nothing; to replay does all of it once more, on
    the same tensors, and fills the same results. Until then these hold what nobody should read."""

    state: Sequence[Tensor]
    recorded: list[int] = attrs.field(factory=list)
    replayed: list[int] = attrs.field(factory=list)

    def __call__(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        before = [leaf.clone() for leaf in self.state]
        results = [result if self.holds(result) else torch.full_like(result, 77) for result in function()]
        for leaf, old in zip(self.state, before, strict=True):
            leaf.copy_(old)
        self.recorded.append(1)

        def replay() -> None:
            self.replayed.append(1)
            for place, result in zip(results, function(), strict=True):
                if not self.holds(place):
                    place.copy_(result)

        return replay, results

    def holds(self, result: Tensor) -> bool:
        return any(result is leaf for leaf in self.state)


def counted(runs: list[int], graph: Any) -> Callable[..., Any]:
    """A backend that counts the runs."""

    def call(*inputs: Any) -> Any:
        runs.append(1)
        return graph(*inputs)

    return call


def test_replays_have_the_bits_of_runs_and_their_metrics_stay() -> None:
    step, state = train_step(LOSS, UPDATE, 2), fresh_state()
    recorder, runs = Recorder(tree.leaves(state)), list[int]()
    replayed = jit(step, donate=1, backend=cuda_graph(partial(counted, runs), recorder))
    expected_states, expected_metrics = run(jit(step, donate=1), 5)
    kept = []
    for number in range(5):
        given, copy = batch(number), batch(number)
        state, metrics = replayed(state, given)
        kept.append(metrics)
        assert_same_bits(state, expected_states[number])
        assert_same_bits(given, copy)
    assert_same_bits(kept, expected_metrics)
    assert (len(recorder.recorded), len(recorder.replayed)) == (1, 4)
    assert len(runs) == 1 + 1 + 4  # as it is, to record, and by the recorder's replays


def test_the_first_call_is_a_run_and_nothing_is_recorded_for_it() -> None:
    state = fresh_state()
    recorder = Recorder(tree.leaves(state))
    jit(train_step(LOSS, UPDATE), donate=1, backend=cuda_graph(interpreter, recorder))(state, batch(0))
    assert (recorder.recorded, recorder.replayed) == ([], [])


@pytest.mark.parametrize("function", ALIASING.values(), ids=ALIASING.keys())
def test_replays_are_right_where_results_alias_arguments(function: Callable[[State2, Tensor], tuple[State2, Any]]) -> None:
    eager, donated = ((torch.arange(3.0), torch.arange(3.0, 6.0)) for _ in range(2))
    replayed = jit(function, donate=1, backend=cuda_graph(interpreter, Recorder(donated)))
    addresses = [leaf.data_ptr() for leaf in donated]
    kept, expected = [], []
    for number in range(1, 5):
        x = torch.full((3,), float(number))
        eager, of_eager = function(eager, x.clone())
        donated, of_replay = replayed(donated, x)
        assert_same_bits(donated, eager)
        assert [leaf.data_ptr() for leaf in donated] == addresses
        kept.append(of_replay)
        expected.append(tree.map(torch.clone, of_eager))
    for found, other in zip(kept, expected, strict=True):
        assert_same_bits(found, other)


def test_nothing_in_the_step_comes_from_the_host() -> None:
    """What copies from the host cannot be captured; the `meta` device stands for a GPU."""
    with FakeTensorMode():
        args = tree.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), (fresh_state(), batch(0)))
    for update in (UPDATE, for_mode(UPDATE, "inductor", torch.device("cpu"))):
        graph, _ = trace(train_step(LOSS, update, 2), args, donate=1)
        values = [leaf for node in graph.graph.nodes for leaf in tree.leaves(node.meta.get("val"))]
        assert {leaf.device.type for leaf in values if isinstance(leaf, Tensor)} == {"meta"}
        assert graph.meta["donated"] == len(tree.leaves(args[0]))


def test_a_state_at_other_addresses_is_refused_before_anything_is_done() -> None:
    state = (torch.zeros(3),)
    recorder = Recorder(state)
    step = jit(lambda s, x: ((s[0] + x,), x * 2), donate=1, backend=cuda_graph(interpreter, recorder))
    for _ in range(3):
        state, _ = step(state, torch.ones(3))
    with pytest.raises(ValueError, match="cuda_graph: expected the fixed inputs where they were captured"):
        step((state[0].clone(),), torch.ones(3))
    assert state[0].tolist() == [3, 3, 3]
    assert step(state, torch.ones(3))[0][0].tolist() == [4, 4, 4]


def test_each_signature_is_captured_by_itself_with_its_constants() -> None:
    recorder = Recorder([])
    scaled = jit(lambda x, factor: x * factor, backend=cuda_graph(interpreter, recorder))
    for number in range(1, 4):
        for size, factor in ((2, 3), (2, 5), (4, 5)):
            assert torch.equal(scaled(torch.full((size,), float(number)), factor), torch.full((size,), float(number * factor)))
    assert (len(recorder.recorded), len(recorder.replayed)) == (3, 6)


def test_a_fixed_argument_is_read_where_it_is_and_not_copied() -> None:
    params, recorder = torch.arange(3.0), Recorder(())
    total = jit(lambda p, x: (p * x).sum(), fixed=1, backend=cuda_graph(interpreter, recorder))
    for number in range(1, 4):
        params.fill_(number)  # as a step would, in place
        assert total(params, torch.full((3,), 2.0)) == 6 * number
    assert len(recorder.replayed) == 2
    with pytest.raises(ValueError, match="cuda_graph: expected the fixed inputs where they were captured"):
        total(params.clone(), torch.ones(3))


def soap_step(required: bool) -> tuple[Recorder, Any]:
    """A traced update by SOAP, whose bases are renewed by what the host reads."""
    recorder, soap = Recorder([]), scale_by_soap(every=2)
    return recorder, jit(soap.update, backend=cuda_graph(interpreter, recorder, required=required))


def test_what_reads_a_number_on_the_host_is_not_captured() -> None:
    recorder, traced = soap_step(required=False)
    soap, params = scale_by_soap(every=2), {"a": torch.eye(3, 4)}
    state = soap.init(params)
    for step in range(1, 6):
        gradient = {"a": torch.sin(torch.arange(12.0).view(3, 4) ** 2 * step)}
        found = traced(gradient, state, params, torch.tensor(step))
        expected = soap.update(gradient, state, params, torch.tensor(step))
        assert_same_bits(found, expected)
        state = expected[1]
    assert recorder.recorded == []


def test_it_is_refused_where_it_has_to_be_captured() -> None:
    params = {"a": torch.eye(3, 4)}
    _, traced = soap_step(required=True)
    line = "trainer.cuda_graph: expected auto or false for a step with fnrecipe.eigenbasis.default, found true"
    with pytest.raises(UsageError, match=f"^{line}$"):
        traced(params, scale_by_soap().init(params), params, torch.tensor(1))

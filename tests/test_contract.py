"""A recipe whose functions do not keep their contract: one line that names the recipe and the function, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from attrs import field, frozen

from fnrecipe.build import batches, init_train_state, plain_step, to_host
from fnrecipe.config import GangSection, resolve
from fnrecipe.contract import check_config
from fnrecipe.data import Cursor, LaneAssignment
from fnrecipe.errors import UsageError
from fnrecipe.parallel.mesh import Axis, Mesh
from fnrecipe.recipe import Evaluation, Recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from fnrecipe.shell import train as run
from tests.recipes import regression
from tests.recipes.regression import Config, Pairs, recipe

CPU = torch.device("cpu")


def step_of(made: Recipe[Any], mesh: Mesh | None = None, *given: str) -> None:
    """One step of a recipe, without the shell."""
    config, _ = resolve(made.config, (), given)
    mesh = mesh or make_mesh(config.gang, Gang(), CPU, made.rules)
    state = init_train_state(made, config, mesh, CPU)
    plain_step(made, config, mesh, CPU)(state, to_host(made.example(config, config.dataset.batch_size), CPU))


def refused(made: Recipe[Any], *given: str, mesh: Mesh | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        step_of(made, mesh, *given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_loss(change: Callable[[Any, dict[str, Any]], object]) -> Recipe[Any]:
    """The recipe with a loss that gives what `change` makes of its (total, sums)."""

    def loss(config: Config) -> Any:
        return lambda params, batch, key: change(*regression.loss(config)(params, batch, key))

    return attrs.evolve(recipe, loss=loss)


def test_the_recipe_itself_keeps_it() -> None:
    step_of(recipe)
    step_of(recipe, None, "gang.sharding=fsdp")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda total, sums: total, "(tensor, sums by name), found a tensor of shape []"),
        (lambda total, sums: (total, sums, 0), "(tensor, sums by name), found a tuple of 3"),
        (lambda total, sums: (total, total), "(tensor, sums by name), found a tuple of 2"),
        (lambda total, sums: (total, {"loss": total}), "a sum called 'targets', found 'loss'"),
        (lambda total, sums: (total, {"targets": sums["targets"]}), "a sum called 'loss', found 'targets'"),
        (lambda total, sums: (total, {}), "a sum called 'loss', found no sums"),
        (lambda total, sums: (total, {**sums, "rows": 8}), "a 0-d tensor for 'rows', found a int"),
        (
            lambda total, sums: (total, {**sums, "loss": total.reshape(1)}),
            "a 0-d tensor for 'loss', found a tensor of shape [1]",
        ),
        (
            lambda total, sums: (total.expand(3), sums),
            "a 0-d tensor for the value to differentiate, found a tensor of shape [3]",
        ),
    ],
)
def test_what_a_loss_must_give(change: Callable[[Any, dict[str, Any]], object], expected: str) -> None:
    assert refused(with_loss(change)) == f"regression.loss: expected {expected}"


def test_errors_of_a_loss_that_are_its_own_stay() -> None:
    def loss(config: Config) -> Any:
        return lambda params, batch, key: batch.z

    with pytest.raises(AttributeError, match="has no attribute 'z'"):
        step_of(attrs.evolve(recipe, loss=loss))


USES: dict[str, Callable[[Any, Any], Any]] = {
    "operator": lambda x, weight: x @ weight,
    "reflected": lambda x, weight: weight @ x.T,
    "number": lambda x, weight: 2 * weight,
    "function": torch.mv,
    "method": lambda x, weight: weight.sum(),
    "list": lambda x, weight: torch.stack([weight]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_loss_that_does_not_gather_its_parameters_is_refused_under_fsdp(use: Callable[[Any, Any], Any]) -> None:
    def loss(config: Config) -> Any:
        def of_batch(params: Any, batch: Pairs, key: Any) -> Any:
            error = use(batch.x, params["weight"]).sum()
            return error, {"loss": error, "targets": batch.real.sum()}

        return of_batch

    made = attrs.evolve(recipe, loss=loss)
    step_of(made)
    step_of(made, None, "gang.sharding=zero2")
    expected = "a loss that gathers its parameters by fnrecipe.transforms.unshard or unsharded_layer"
    found = "regression.loss computes with the part of a parameter that this rank has"
    assert refused(made, "gang.sharding=fsdp") == f"gang.sharding=fsdp: expected {expected}, found that {found}"


def test_a_loss_that_knows_nothing_of_tensor_parallelism_is_refused_under_it() -> None:
    mesh = Mesh(tensor=Axis("tensor", 2, blocks=2), rules={"weight": 0})
    found = refused(recipe, mesh=mesh)
    assert found.startswith("gang.tensor_parallel_size: expected a loss whose products are those of")
    assert "regression.loss" in found


def test_tensor_parallelism_needs_rules() -> None:
    with pytest.raises(UsageError, match=r"^gang\.tensor_parallel_size: expected 1 for a recipe without `rules`"):
        make_mesh(GangSection(tensor_parallel_size=2), Gang(), CPU, recipe.rules(recipe.config))


def test_an_init_that_ignores_place_is_refused() -> None:
    def init(config: Config, key: Any, place: Any) -> Any:
        return {**regression.init(config, key, place), "bias": torch.zeros(())}

    expected = "each parameter to be what place(path, parameter) gives, found at bias a Tensor that is not"
    assert refused(attrs.evolve(recipe, init=init)) == f"regression.init: expected {expected}"


def test_rows_that_make_no_equal_microbatches_are_refused() -> None:
    expected = "a multiple of gang.num_microbatches = 16, into which regression's rows are cut"
    assert refused(recipe, "gang.num_microbatches=16") == f"dataset.batch_size: expected {expected}, found 8"


SECTIONS = [each.name for each in attrs.fields(Config)]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_without_a_section_that_every_run_reads_is_refused_where_it_is_made(section: str) -> None:
    kept = {
        each.name: field(factory=type(getattr(Config(), each.name))) for each in attrs.fields(Config) if each.name != section
    }
    partly = attrs.make_class("Partly", kept, frozen=True)
    with pytest.raises(UsageError) as caught:
        attrs.evolve(recipe, config=partly())
    expected = f"the section {section}, which every run reads, found none in Partly"
    assert str(caught.value) == f"regression.config: expected {expected}"


def test_a_section_of_ones_own_needs_what_every_run_reads() -> None:
    @frozen
    class Rows:
        batch_size: int = 8
        num_lanes: int = 8
        prefetch: int = 0

    @frozen
    class Own(Config):
        dataset: Any = field(factory=Rows)

    with pytest.raises(
        UsageError, match=r"^own\.config: expected the key dataset\.num_workers, which every run reads, found none"
    ):
        check_config("own", Own())


def streaming(make: Callable[[], Iterator[Any]]) -> Recipe[Any]:
    return attrs.evolve(recipe, stream=lambda config, assignment: lambda cursor: make())


def batch_of(count: int, labels: int | None = None) -> Pairs:
    shape = (count, regression.WIDTH)
    return Pairs(np.zeros(shape, np.float32), np.zeros(count if labels is None else labels, np.float32), np.ones(count, bool))


@frozen
class Listed:
    x: Any


STREAMS: dict[str, tuple[Callable[[], Any], str]] = {
    "no cursor": (lambda: iter([batch_of(8)]), "expected (batch, cursor) for each item, found Pairs"),
    "three": (lambda: iter([(batch_of(8), 1, 2)]), "expected (batch, cursor) for each item, found a tuple of 3"),
    "no JSON": (
        lambda: iter([(batch_of(8), {1})]),
        "expected (batch, cursor) with a cursor that JSON can keep, found: Object of type set is not JSON serializable",
    ),
    "a list": (lambda: [(batch_of(8), 1)], "expected an iterator of (batch, cursor) from the source, found list"),
    "uneven": (lambda: iter([(batch_of(8, 7), 1)]), "batch.y: expected as many rows as batch.x, 8, found 7"),
    "too few": (
        lambda: iter([(batch_of(6), 1)]),
        "expected batches of 8 rows, this process's part of dataset.batch_size, found 6",
    ),
    "a later one": (
        lambda: iter([(batch_of(8), 1), (batch_of(7), 2)]),
        "expected batches of 8 rows, this process's part of dataset.batch_size, found 7",
    ),
    "no array": (
        lambda: iter([(Listed([1.0] * 8), 1)]),
        "batch.x.0: expected a NumPy array, or an attrs value, dict, tuple or list, found float",
    ),
    "tensors": (
        lambda: iter([(Listed(torch.zeros(8)), 1)]),
        "batch.x: expected a NumPy array, or an attrs value, dict, tuple or list, found Tensor",
    ),
    "no rows": (lambda: iter([(Listed(np.array(1.0)), 1)]), "batch.x: expected rows along the first dimension, found none"),
    "nothing": (lambda: iter([({}, 1)]), "batch: expected rows along the first dimension, found none"),
}


@pytest.mark.parametrize(("make", "expected"), STREAMS.values(), ids=STREAMS)
def test_what_a_stream_must_give(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(batches(streaming(make), recipe.config, LaneAssignment(), CPU)(None))
    assert str(caught.value).startswith(f"regression.stream: {expected}")


def test_a_stream_that_is_no_source_is_refused() -> None:
    made = attrs.evolve(recipe, stream=lambda config, assignment: iter(()))
    with pytest.raises(
        UsageError, match=r"^regression\.stream: expected a source, a function of a cursor, found tuple_iterator$"
    ):
        list(batches(made, recipe.config, LaneAssignment(), CPU)(None))


def uncursed(config: Config, assignment: LaneAssignment) -> Any:
    def source(cursor: Cursor) -> Iterator[Any]:
        yield batch_of(assignment.rows(8))

    return source


def test_it_is_told_in_workers_too() -> None:
    config, _ = resolve(recipe.config, (), ["dataset.num_workers=2"])
    with pytest.raises(UsageError) as caught:
        list(batches(attrs.evolve(recipe, stream=uncursed), config, LaneAssignment(), CPU)(None))
    assert str(caught.value) == "regression.stream: expected (batch, cursor) for each item, found Pairs"


def test_the_shell_tells_it_of_validation_too(tmp_path: Path) -> None:
    made = attrs.evolve(recipe, evaluations=lambda config: {"valid": Evaluation(uncursed)})
    config, _ = resolve(recipe.config, (), ["regime.num_steps=1", "trainer.jit=off"])
    with pytest.raises(UsageError, match=r"^regression\.evaluations\['valid'\]: expected \(batch, cursor\)"):
        run.train(made, config, tmp_path / "out")


@pytest.mark.parametrize("jit", ["off", "trace"])
def test_the_shell_tells_it_of_a_traced_loss_too(tmp_path: Path, jit: str) -> None:
    made = with_loss(lambda total, sums: (total, {"loss": total}))
    config, _ = resolve(recipe.config, (), ["regime.num_steps=1", f"trainer.jit={jit}"])
    with pytest.raises(UsageError, match=r"^regression\.loss: expected a sum called 'targets'"):
        run.train(made, config, tmp_path / "out")

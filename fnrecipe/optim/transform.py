"""Updates as pure transforms of gradients, in optax's shape: a pair of functions, and `chain` to compose them.

    init(params) -> state
    update(gradients, state, params, step) -> (updates, state, report)

`updates` are added to the parameters. `step` counts from 1 and is the only clock, so that a schedule has no counter of its
own. `report` holds 0-d tensors worth showing (a learning rate), by name.

Updates are taken in float32 at least, also those of parameters and states that are kept in bfloat16: these are rounded
stochastically (`fnrecipe.optim.stochastic_rounding`).

A transform sees this rank's shard of each tensor as if it were the tensor: a rule for single elements need not know. A rule
that needs whole tensors says so by `needs`, wherever it stands: as the only transform, in a `chain`, in a `partition`. Each
matrix of one for "matrices" is computed by one rank; one for "everything" gets parameters, gradients and state all-gathered.

A transform may also know a faster way to the same end, `fused_update`, for when it is the whole update and not a link of a
chain.

An update whose parameters or state would not be finite is not made. That takes a look at the new values while the old ones are
still allocated, unless the transform can tell beforehand, by `bounded`: then each tensor is overwritten in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice
from typing import Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import UsageError
from fnrecipe.optim import stochastic_rounding
from fnrecipe.optim.dealt import Init, Update, init_dealt, update_dealt
from fnrecipe.optim.dealt import Report as Report
from fnrecipe.parallel.finite import finite
from fnrecipe.parallel.global_norm import global_norm
from fnrecipe.parallel.mesh import global_slice, is_shard, rank_axes
from fnrecipe.parallel.whole import cut_like, whole
from fnrecipe.tree import Tree

Needs: TypeAlias = Literal["elements", "matrices", "everything"]
"""What an update of one thing depends on, of gradients, state and parameters.

elements    each element of the updates on the same element of each, and on what the transform itself sums over ranks
matrices    that of each tensor on that tensor's alone. `init` and `update` work for any of the parameters, as a dict by path,
            and the state has the same paths for these; `init` reads no numbers but to copy them; there is no report
everything  anything
"""


@attrs.frozen(eq=False)
class MeanGradient:
    """The gradients `total / count`, not divided yet: that saves a pass over memory.

    count, norm  0-d; `norm` is the global norm of the quotient
    """

    total: Tree
    count: Tensor
    norm: Tensor


@attrs.frozen
class Transform:
    """`init` and `update` as above.

    needs         what an update of one thing depends on
    fused_update  if there is one, makes the update where its 0-d bool holds, as `guarded_update` below would, in fewer passes
    bounded       if there is one, (gradients, state, params, step) -> a 0-d bool, the same on all ranks: whether the update of
             a finite state is known to be finite
    shown         if there is one, (state, params) -> the parameters that the model is evaluated and exported with, where those
                  at which the loss is differentiated are others
    """

    init: Init
    update: Update
    needs: Needs = "elements"
    fused_update: Callable[[MeanGradient, Tree, Tree, Tensor, Tensor, Tensor], tuple[Tree, Tree, Report]] | None = None
    bounded: Callable[[MeanGradient, Tree, Tree, Tensor], Tensor] | None = None
    shown: Callable[[Tree, Tree], Tree] | None = None


def init_parts(transform: Transform, params: Tree) -> Tree:
    """The state of `transform` for parameters of which this rank may have parts.

    Of a transform of matrices each rank has the state of those that it computes. Of one that needs everything, what has path
    and shape of a parameter is cut like it; the rest each rank has whole.
    """
    if transform.needs == "elements":
        return transform.init(params)
    if transform.needs == "matrices" and _on_several_ranks(params):
        return init_dealt(transform.init, params)
    state, owners = transform.init(whole(params)), tree.paths(params, is_shard)

    def like(path: str, leaf: Tensor) -> Tree:
        owner = max((name for name in owners if f".{path}".endswith(f".{name}")), key=len, default="")
        return owners[owner] if owner and global_slice(owners[owner])[0] == leaf.shape else leaf

    return cut_like(state, tree.like(state, [like(path, leaf) for path, leaf in tree.paths(state).items()]))


def update_parts(transform: Transform, gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
    """`transform.update`, of whole tensors unless it needs single elements only.

    What needs everything is computed on each rank, of parameters, gradients and state that are whole in its memory at once: it
    costs three gathers, and a work that is not divided.

    Raises:
        UsageError: if a transform of matrices reports something.
    """
    if transform.needs == "elements":
        return transform.update(gradients, state, params, step)
    update = transform.update if transform.needs == "everything" else _without_report(transform.update)
    if transform.needs == "matrices" and _on_several_ranks(params):
        return update_dealt(transform.init, update, gradients, state, params, step)
    whole_gradients, whole_state, whole_params = whole((gradients, state, params))
    updates, new, report = update(whole_gradients, whole_state, whole_params, step)
    return cut_like(updates, params), cut_like(new, state), report


def _on_several_ranks(params: Tree) -> bool:
    return any(rank_axes(leaf) for leaf in tree.leaves(params, is_shard))


def _without_report(update: Update) -> Update:
    def checked(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        updates, state, report = update(gradients, state, params, step)
        if report:
            found = ", ".join(map(repr, report))
            raise UsageError(f"Transform: expected no report from an update of single matrices, found {found}")
        return updates, state, report

    return checked


def mean_gradient(total: Tree, count: Tensor) -> MeanGradient:
    return MeanGradient(total, count, global_norm(total) / count)


def guarded_update(
    transform: Transform, gradients: MeanGradient, state: Tree, params: Tree, step: Tensor, accept: Tensor, key: Tensor
) -> tuple[Tree, Tree, Report, Tensor]:
    """The parameters and the state after `transform`'s update if it is made, else as they were; and whether it is, bool [].

    It is made if the 0-d bool `accept` holds and what it gives is finite.

    `key`, int64 [2], is the run's: what is bfloat16 is rounded by it and the step.
    """
    if transform.bounded is not None:
        accept = accept & transform.bounded(gradients, state, params, step)
    way = _by_update if transform.fused_update is None else _by_fused_update
    return way(transform, gradients, state, params, step, accept, key)


def _by_update(
    transform: Transform, gradients: MeanGradient, state: Tree, params: Tree, step: Tensor, accept: Tensor, key: Tensor
) -> tuple[Tree, Tree, Report, Tensor]:
    before = params, state
    wide_params, wide_state = tree.map(stochastic_rounding.wide, before)
    divided = tree.map(lambda g: stochastic_rounding.wide(g) / gradients.count, gradients.total)
    updates, new_state, report = update_parts(transform, divided, wide_state, wide_params, step)
    new = apply_updates(wide_params, updates), new_state
    if transform.bounded is None:
        accept = accept & finite(new, before, params)
    chosen = tree.select(accept, new, (wide_params, wide_state))
    return (*stochastic_rounding.like(before, chosen, key, step), report, accept)


def _by_fused_update(
    transform: Transform, gradients: MeanGradient, state: Tree, params: Tree, step: Tensor, accept: Tensor, key: Tensor
) -> tuple[Tree, Tree, Report, Tensor]:
    assert transform.fused_update is not None
    before = params, state
    new_params, new_state, report = transform.fused_update(gradients, state, params, step, accept, key)
    if transform.bounded is None:
        accept = accept & finite((new_params, new_state), before, params)
        new_params, new_state = tree.select(accept, (new_params, new_state), before)
    return new_params, new_state, report, accept


def chain(*transforms: Transform) -> Transform:
    """The transforms one after the other; the state is the tuple of theirs."""
    # Neighbours with the same needs are one transform: so matrices travel to their owners and back once for all of these.
    links = [_link(needs, [*group]) for needs, group in groupby(transforms, lambda transform: transform.needs)]

    def init(params: Tree) -> Tree:
        return tuple(state for link, _ in links for state in init_parts(link, params))

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        rest, states, reports = iter(state), [], Report()
        for link, length in links:
            updates, after, report = update_parts(link, updates, tuple(islice(rest, length)), params, step)
            states += after
            reports |= report
        return updates, tuple(states), reports

    def shown(state: Tree, params: Tree) -> Tree:
        for transform, own in zip(transforms, state, strict=True):
            params = transform.shown(own, params) if transform.shown else params
        return params

    return Transform(init, update, shown=shown if any(transform.shown for transform in transforms) else None)


def _link(needs: Needs, transforms: Sequence[Transform]) -> tuple[Transform, int]:
    """Transforms with the same needs, one after the other, and how many they are."""

    def init(params: Tree) -> Tree:
        return tuple(transform.init(params) for transform in transforms)

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        states, reports = [], Report()
        for transform, before in zip(transforms, state, strict=True):
            updates, after, report = transform.update(updates, before, params, step)
            states.append(after)
            reports |= report
        return updates, tuple(states), reports

    return Transform(init, update, needs), len(transforms)


def stateless(function: Callable[[Tree, Tree, Tensor], tuple[Tree, Report]], *, needs: Needs = "elements") -> Transform:
    """A transform that keeps nothing: `function(updates, params, step) -> (updates, report)`."""

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        updates, report = function(updates, params, step)
        return updates, state, report

    return Transform(lambda params: (), update, needs)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    return tree.map(torch.add, params, updates)

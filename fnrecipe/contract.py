"""What a recipe's functions must give: looked at where it is first seen, so that what is wrong is told in one line."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from operator import attrgetter

from torch import Tensor

from fnrecipe import tree
from fnrecipe.config.reads import READ_BY_SHELL
from fnrecipe.errors import UsageError
from fnrecipe.loss import Loss, Sums
from fnrecipe.parallel.mesh import Shard, is_shard
from fnrecipe.tree import Tree


def check_config(name: str, config: object) -> None:
    """Whether the config of the recipe `name` has all that the shell reads of it.

    Raises:
        UsageError: naming the first section or key that is not there.
    """
    for section, keys in READ_BY_SHELL.items():
        for path in (section, *(f"{section}.{key}" for key in keys)):
            try:
                attrgetter(path)(config)
            except AttributeError:
                what = "section" if path == section else "key"
                raise UsageError(
                    f"{name}.config: expected the {what} {path}, which every run reads, found none in {type(config).__name__}"
                ) from None


def check_batch_size(name: str, batch_size: int, num_microbatches: int) -> None:
    """Whether the rows of the global batch make equal microbatches.

    Raises:
        UsageError: if they do not.
    """
    if batch_size % num_microbatches:
        expected = f"a multiple of gang.num_microbatches = {num_microbatches}, into which {name}'s rows are cut"
        raise UsageError(f"dataset.batch_size: expected {expected}, found {batch_size}")


def check_params(name: str, params: Tree) -> None:
    """Whether `init` of the recipe `name` has left all parameters as `place` gave them.

    Raises:
        UsageError: naming the first that it has not.
    """
    for path, leaf in tree.paths(params, is_shard).items():
        if not is_shard(leaf):
            raise UsageError(
                f"{name}.init: expected each parameter to be what place(path, parameter) gives, "
                f"found at {path or 'the root'} a {type(leaf).__name__} that is not"
            )


def checked_loss(name: str, loss: Loss) -> Loss:
    """The loss of the recipe `name`, whose results are looked at.

    Raises:
        UsageError: at a call, if they are not (0-d tensor, sums with `loss` and `targets`), or the loss computes with a part
            of a parameter as if it were all of it.
    """

    @wraps(loss)
    def call(params: Tree, *args: Tree) -> tuple[Tensor, Sums]:
        try:
            found = loss(params, *args)
        except (AttributeError, TypeError) as error:
            if Shard.__name__ not in str(error):
                raise
            raise UsageError(_of_parts(name, params)) from error
        _check_sums(name, found)
        return found

    return call


def _check_sums(name: str, found: object) -> None:
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
        raise UsageError(f"{name}.loss: expected (tensor, sums by name), found {_kind(found)}")
    for key in ("loss", "targets"):
        if key not in found[1]:
            raise UsageError(f"{name}.loss: expected a sum called {key!r}, found {', '.join(map(repr, found[1])) or 'no sums'}")
    for key, value in {"the value to differentiate": found[0], **{repr(key): value for key, value in found[1].items()}}.items():
        if not isinstance(value, Tensor) or value.ndim:
            raise UsageError(f"{name}.loss: expected a 0-d tensor for {key}, found {_kind(value)}")


def _of_parts(name: str, params: Tree) -> str:
    shards = [leaf for leaf in tree.leaves(params, is_shard) if isinstance(leaf, Shard)]
    if any(shard.axis.name == "tensor" for shard in shards):
        key, mend = "gang.tensor_parallel_size", "whose products are those of fnrecipe.parallel.tensor_parallel"
    else:
        key, mend = "gang.sharding=fsdp", "that gathers its parameters by fnrecipe.transforms.unshard or unsharded_layer"
    return f"{key}: expected a loss {mend}, found that {name}.loss computes with the part of a parameter that this rank has"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"

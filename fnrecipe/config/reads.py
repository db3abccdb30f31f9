"""Which keys of a config are read, so that a key that a user has changed and that nothing reads is not ignored in silence.

What is read is seen in two ways, neither of which is enough. A copy of the config records what is read of it; but some
functions run late, or in other processes. The code of a recipe's functions, and of what they reach by name, mentions the
attributes that it may ever read; but it may also read them by computed names. A key is unread if it is neither recorded nor
mentioned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, Generic, TypeVar

import attrs
from attrs import AttrsInstance

C = TypeVar("C", bound=AttrsInstance)
R = TypeVar("R")

READ_BY_SHELL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gang": (
            "num_microbatches",
            "sharding",
            "shard_size",
            "tensor_parallel_size",
            "parameter_dtype",
            "reduction",
            "device",
            "timeout",
            "step_timeout",
        ),
        "trainer": ("jit", "cuda_graph", "dtype", "fp16_loss_scale", "trains", "max_skipped_steps", "average"),
        "dataset": ("batch_size", "num_lanes", "num_workers", "prefetch"),
        "regime": (
            "num_steps",
            "max_minutes",
            "batch_size_schedule",
            "checkpoint_every_n_steps",
            "checkpoint_every_n_minutes",
            "keep_last_n_checkpoints",
            "checkpoint_in_background",
            "keep_checkpoint_every_n_steps",
            "keep_best_n_checkpoints",
            "score_metric",
            "lower_score_is_better",
            "keep_model_only",
            "copy_checkpoints_to",
            "validate_every_n_steps",
            "num_validation_batches",
            "publish_metrics_every_n_steps",
            "on_spike",
            *(f"spikes.{key}" for key in ("window", "bound", "pass_over", "max_rollbacks")),
            "hash_every_n_steps",
            "recompute_every_n_steps",
            "num_sample_tokens",
            "export_hugging_face",
        ),
        "common": (
            "seed",
            "torch.num_threads",
            "torch.deterministic",
            "metric_recorders.tensorboard.enabled",
            *(f"metric_recorders.wandb.{key}" for key in ("enabled", "entity", "project", "run_name", "mode")),
        ),
    }
)
"""The keys that the shell reads of any recipe's config, by section."""


@attrs.frozen
class Watched(Generic[R]):
    """A function of a config, to which a copy is given that adds what is read of it to `paths`. It pickles as the function."""

    function: Callable[..., R]
    paths: set[str]

    def __call__(self, config: AttrsInstance, *args: object) -> R:
        return self.function(recorded(config, self.paths), *args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        return _same, (self.function,)


def recorded(config: C, paths: set[str], prefix: str = "") -> C:
    """A copy of a config that adds the dotted path of each of its values that is read, but not of sections, to `paths`.

    The copy equals the config, is an instance of its class, and pickles as the config itself.
    """
    copy: C = object.__new__(_recording(type(config)))
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        section = attrs.has(type(value))
        object.__setattr__(copy, field.name, recorded(value, paths, f"{prefix}{field.name}.") if section else value)
    object.__setattr__(copy, "_recorded", (config, paths, prefix))
    return copy


@cache
def _recording(cls: type[AttrsInstance]) -> type[Any]:
    names = {field.name for field in attrs.fields(cls)}

    def read(self: object, name: str) -> object:
        value = object.__getattribute__(self, name)
        if name in names and not attrs.has(type(value)):
            _, paths, prefix = object.__getattribute__(self, "_recorded")
            paths.add(f"{prefix}{name}")
        return value

    def reduce(self: object, protocol: int) -> tuple[Callable[..., object], tuple[object]]:
        return _same, (object.__getattribute__(self, "_recorded")[0],)

    # Generated methods of attrs compare `__class__`, and `attrs.evolve` constructs it.
    return type(cls.__name__, (cls,), {"__getattribute__": read, "__reduce_ex__": reduce, "__class__": property(lambda _: cls)})


def _same(value: object) -> object:
    return value


def mentioned(values: Iterable[object]) -> set[str]:
    """The names and texts in the code of functions and of all that they reach by name, within fnrecipe and their packages."""
    seen: dict[int, object] = {}
    waiting = list(_functions(values, seen))
    packages = {"fnrecipe", *map(_package, waiting)}
    names: set[str] = set()
    while waiting:
        function = waiting.pop()
        if _package(function) in packages:
            for code in _codes(function.__code__):
                names.update(code.co_names, *map(_texts, code.co_consts))
                waiting += _functions(_reached(function, code, packages), seen)
    return names


def _functions(values: Iterable[object], seen: dict[int, object]) -> Iterator[FunctionType]:
    """The functions among values and what they are made of, but for what was `seen`."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, FunctionType):
            yield value
        waiting += _parts(value)


def _parts(value: object) -> list[object]:
    cls: type[object] = type(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__]
    if isinstance(value, dict | MappingProxyType):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    return [getattr(value, field.name) for field in attrs.fields(cls)] if attrs.has(cls) else []


def _reached(function: FunctionType, code: CodeType, packages: set[str]) -> Iterator[object]:
    """What the code of a function names: globals, functions in modules, and variables of the functions around it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in code.co_names:
        value = function.__globals__.get(name)
        if not isinstance(value, ModuleType):
            yield value
        elif value.__name__.partition(".")[0] in packages:
            yield from (vars(value).get(other) for other in code.co_names)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _texts(constant: object) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, tuple | frozenset):
        for inner in constant:
            yield from _texts(inner)


def _package(value: object) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def unread(changed: Iterable[str], paths: set[str], names: set[str]) -> list[str]:
    """The `changed` keys of which neither the path nor a mapping that they are in was read, and whose name is not mentioned."""

    def is_read(key: str) -> bool:
        return key.rpartition(".")[2] in names or any(key == path or key.startswith(f"{path}.") for path in paths)

    return [key for key in changed if not is_read(key)]

"""Keys of `config.json`, read and written: parts of a family's `read_config` and `write_config`. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import attrs
from attrs import AttrsInstance

from fnrecipe.config.structure import structure, unstructure
from fnrecipe.errors import ConfigError, Problem
from fnrecipe.models.rope import SCALINGS, RopeScaling

C_contra = TypeVar("C_contra", contravariant=True)
T = TypeVar("T", bound=AttrsInstance)

SOURCE = "config.json"

DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "model_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attn_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_inner_dim": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Fields of a Llama's config, and the keys of `config.json`."""


@attrs.frozen
class Keys(Generic[C_contra]):
    """Some keys of `config.json`.

    read   the mapping in the file -> fields of a config as plain data. Raises a ConfigError for what cannot be computed
    write  config -> the keys that they are read from
    names  the key of each field, for what is wrong with its value
    """

    read: Callable[[Mapping[str, object]], Mapping[str, object]]
    write: Callable[[C_contra], Mapping[str, object]]
    names: Mapping[str, str] = attrs.field(factory=dict)


def same(keys: Mapping[str, str] = DECODER_KEYS, defaults: Mapping[str, object] | None = None) -> Keys[AttrsInstance]:
    """Keys whose values are those of fields of ours, by field; one that a family lacks is left out.

    `defaults`: by key, where transformers' default is not that of our class. Null is written only where the default is another.
    No key-value heads are as many as query heads.
    """
    others = defaults or {}

    def read(values: Mapping[str, object]) -> dict[str, object]:
        known = {**others, **values}
        if "num_key_value_heads" in known and known["num_key_value_heads"] is None:
            known["num_key_value_heads"] = known.get("num_attention_heads")
        return {field: known[key] for field, key in keys.items() if key in known}

    def write(config: AttrsInstance) -> dict[str, object]:
        data = unstructure(config)
        given = {key: data[field] for field, key in keys.items() if field in data}
        return {key: value for key, value in given.items() if value is not None or others.get(key) is not None}

    return Keys(read, write, keys)


def fixed(**expected: object) -> Keys[object]:
    """Keys that have one value in all models of the family that are supported; null: none, and not written."""

    def read(values: Mapping[str, object]) -> dict[str, object]:
        found = {key: values.get(key, value) for key, value in expected.items()}
        wrong = [
            Problem(key, _shown(expected[key]).strip("'"), _shown(value), SOURCE)
            for key, value in found.items()
            if value != expected[key]
        ]
        if wrong:
            raise ConfigError(wrong)
        return {}

    return Keys(read, lambda config: {key: value for key, value in expected.items() if value is not None})


def rope(theta: float = 10000.0, kind: str = "llama3") -> Keys[HasRope]:
    """The base of the rotary frequencies and their scaling: `rope_parameters` of transformers 5, and the two keys of 4.

    Both are written, and they agree; transformers 5 reads `rope_scaling` first. `theta`: where there is no base; `kind`: the
    only type of scaling that the family's config takes.
    """

    def read(values: Mapping[str, object]) -> dict[str, object]:
        key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        parameters = section(values, key)
        base = parameters.get("rope_theta", values.get("rope_theta", theta))
        return {"rope_theta": base, "rope_scaling": _scaling(key, kind, parameters, values)}

    def write(config: HasRope) -> dict[str, object]:
        given = unstructure(config.rope_scaling) if config.rope_scaling else {}
        scaling = {"rope_type": kind, **{key: value for key, value in given.items() if value is not None}} if given else None
        parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
        return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}

    return Keys(read, write)


def rope_by_kind(theta: float, kind: str, local: tuple[str, float] | None = None) -> Keys[HasRope]:
    """`rope`, for the layers that see everything; those with a window are not scaled, and may have a base of their own.

    `local`: the field that this is, and it where there is none. None: it is that of the others.
    """
    full, key = rope(theta, kind), "rope_local_base_freq"  # as transformers 4 calls it

    def read(values: Mapping[str, object]) -> dict[str, object]:
        by_kind = section(values, "rope_parameters")
        data = full.read({**values, "rope_parameters": by_kind.get("full_attention")})
        sliding = section(by_kind, "sliding_attention")
        if (found := sliding.get("rope_type", "default")) != "default":
            raise ConfigError([Problem("rope_parameters.sliding_attention.rope_type", "default", _shown(found), SOURCE)])
        other = values.get(key, local[1]) if local else data["rope_theta"]
        base = sliding.get("rope_theta", other)
        if local is None and base != other:
            raise ConfigError([Problem("rope_parameters.sliding_attention.rope_theta", _shown(other), _shown(base), SOURCE)])
        return {**data, local[0]: base} if local else {**data}

    def write(config: HasRope) -> dict[str, object]:
        data, base = full.write(config), getattr(config, local[0]) if local else config.rope_theta
        sliding = {"rope_type": "default", "rope_theta": base}
        by_kind = {"full_attention": data["rope_parameters"], "sliding_attention": sliding}
        return {**data, "rope_parameters": by_kind, **({key: base} if local else {})}

    return Keys(read, write)


def every_nth(field: str, default: int, *, values: str, interval: str, nth: object, others: object) -> Keys[HasLayers]:
    """The list `values` with an item for each layer, of which every n-th is `nth` and all others `others`; `field` is n.

    `interval`: a key for n, which is read where there is no list, or one that is too short to tell, and written beside it.
    """

    def items(number: int, layers: int) -> list[object]:
        return [others if (layer + 1) % number else nth for layer in range(layers)]

    def read(config: Mapping[str, object]) -> dict[str, object]:
        given, number = config.get(values), config.get(interval, default)
        if given is None:
            return {field: number}
        layers = given if isinstance(given, list) else []
        if len(layers) != (wanted := config.get("num_hidden_layers", len(layers))):
            raise ConfigError([Problem(values, f"an item for each of {wanted} layers", _shown(given), SOURCE)])
        first = layers.index(nth) if nth in layers else len(layers)
        for n in (number, first + 1):
            if isinstance(n, int) and n > 0 and given == items(n, len(layers)):
                return {field: n}
        raise ConfigError([Problem(values, f"{nth} in every n-th layer and {others} in the others", _shown(given), SOURCE)])

    def write(config: HasLayers) -> dict[str, object]:
        number = getattr(config, field)
        return {values: items(number, config.num_layers), interval: number}

    return Keys(read, write)


def windows(default: int) -> Keys[HasLayers]:
    """Of which layers every n-th sees all positions; n is `sliding_window_pattern`."""
    pattern, kinds = "sliding_window_pattern", {"nth": "full_attention", "others": "sliding_attention"}
    return every_nth(pattern, default, values="layer_types", interval=pattern, **kinds)


def all_layers(key: str, value: object) -> Keys[object]:
    """A list with an item for each layer that may be there, all of them `value`; it is not written."""

    def read(config: Mapping[str, object]) -> dict[str, object]:
        found = config.get(key)
        if found is not None and (not isinstance(found, list) or any(item != value for item in found)):
            raise ConfigError([Problem(key, f"{value} in each layer", _shown(found), SOURCE)])
        return {}

    return Keys(read, lambda config: {})


class HasLayers(Protocol):
    """What is read of a config with kinds of layers."""

    @property
    def num_layers(self) -> int: ...


class HasRope(Protocol):
    """What is read of a config with rotary positions."""

    @property
    def rope_theta(self) -> float: ...

    @property
    def rope_scaling(self) -> RopeScaling | None: ...


def _scaling(key: str, kind: str, parameters: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object] | None:
    found = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ConfigError([Problem(f"{key}.partial_rotary_factor", "1", _shown(parameters["partial_rotary_factor"]), SOURCE)])
    if found == "default":
        return None
    if found != kind:
        raise ConfigError([Problem(f"{key}.rope_type", f"default or {kind}", _shown(found), SOURCE)])
    known = {"original_max_position_embeddings": values.get("max_position_embeddings"), **parameters}
    given = {name: value for name, value in known.items() if value is not None and name not in _NOT_OF_SCALING}
    fields = {field.name for field in attrs.fields(SCALINGS[kind])}
    problems = [Problem(f"{key}.{name}", "nothing", _shown(given[name]), SOURCE) for name in given if name not in fields]
    problems += [Problem(f"{key}.{name}", "a number", "nothing", SOURCE) for name in _NEEDED[kind] if name not in given]
    if problems:
        raise ConfigError(problems)
    return given


_NOT_OF_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_NEEDED = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def section(values: Mapping[str, object], key: str) -> Mapping[str, object]:
    """The mapping at `key`; an empty one if there is none."""
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError([Problem(key, "an object", _shown(found), SOURCE)])
    return found


def reader(cls: type[T], *parts: Keys[T]) -> Callable[[Mapping[str, object]], T]:
    """A `read_config` of such parts. Quantised weights and partly rotated heads are no family's."""

    all_parts: list[Keys[T]] = [fixed(quantization_config=None, partial_rotary_factor=1.0), *parts]
    names = {field: key for part in parts for field, key in part.names.items()}

    def by_key(problem: Problem) -> Problem:
        """A problem of a field, told of the key that the field was read from."""
        field, dot, rest = problem.path.partition(".")
        return attrs.evolve(problem, path=f"{names.get(field, field)}{dot}{rest}", source=SOURCE, hint="")

    def read(values: Mapping[str, object]) -> T:
        data: dict[str, object] = {}
        problems: list[Problem] = []
        for part in all_parts:
            try:
                data |= part.read(values)
            except ConfigError as error:
                problems += error.problems
        try:
            config = structure(data, cls())
        except ConfigError as error:
            problems += map(by_key, error.problems)
        if problems:
            raise ConfigError(problems)
        return config

    return read


def writer(*parts: Keys[T]) -> Callable[[T], dict[str, object]]:
    """A `write_config` of such parts."""
    return lambda config: {key: value for part in parts for key, value in part.write(config).items()}


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)

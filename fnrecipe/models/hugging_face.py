"""Where the parameters and the shape of a model lie in the files of Hugging Face: names, and the keys of `config.json`.

A family gives a `HuggingFace` value. Its tables are data and are read in both directions. Nothing here imports torch or reads
a file: a `config.json` is given as the mapping that its JSON is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import attrs
from attrs import AttrsInstance

from fnrecipe.config.structure import structure, unstructure
from fnrecipe.errors import ConfigError, Problem
from fnrecipe.models.rope import SCALINGS, RopeScaling

C = TypeVar("C")
T = TypeVar("T", bound=AttrsInstance)

SOURCE = "config.json"


@attrs.frozen
class Stored:
    """Where a parameter lies in Hugging Face's files: a part of the tensor `name`, transposed if that is kept [in, out].

    name   with `*` for the number of the layer: "model.layers.*.self_attn.q_proj.weight"
    part   which of `parts` equal parts along the first dimension of the tensor, once that is [out, in]
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


@attrs.frozen(kw_only=True)
class HuggingFace(Generic[C]):
    """A family as transformers knows it.

    model_type    of `config.json`: "llama"
    architecture  the class of the model: "LlamaForCausalLM"
    tensors       config -> pattern of our parameter paths ("layers.*.query") -> where such a parameter lies; one that is tied
                  to another is not there
    read_config   the mapping in a `config.json` of transformers 4 or 5 -> the config. Absent keys have transformers' defaults;
                  dtypes, dropout, token ids and everything else that is not the model's shape are not looked at
    write_config  config -> what `config.json` says of it in both versions, without `model_type` and `architectures`

    `read_config` raises a ConfigError that names each key with a wrong value, or one that the family cannot compute.
    """

    model_type: str
    architecture: str
    tensors: Callable[[C], Mapping[str, Stored]]
    read_config: Callable[[Mapping[str, object]], C]
    write_config: Callable[[C], dict[str, object]]


DECODER_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers.*.attention_norm": "model.layers.*.input_layernorm.weight",
    "layers.*.query": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.key": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.value": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.output": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.gate": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.up": "model.layers.*.mlp.up_proj.weight",
    "layers.*.down": "model.layers.*.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Our parameters of a Llama, and where they lie."""

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


def stored(names: Mapping[str, str], *, tied: bool) -> dict[str, Stored]:
    """A table of names as one of places, without the head of a model whose head is the embedding."""
    return {path: Stored(name) for path, name in names.items() if not (tied and path == "head")}


@attrs.frozen
class Keys(Generic[C]):
    """Some keys of `config.json`: `read` gives fields of a config as plain data, `write` the keys that they are read from.
    `read` raises a ConfigError for what the family cannot compute.
    """

    read: Callable[[Mapping[str, object]], Mapping[str, object]]
    write: Callable[[C], Mapping[str, object]]


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

    return Keys(read, write)


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


def rope_by_kind(theta: float, kind: str, sliding_theta: float | None = None) -> Keys[Any]:
    """`rope`, for the layers that see everything; those with a window are not scaled, and have a base of their own.

    `sliding_theta`: theirs, where there is none: of the field `rope_local_theta`. None: theirs is that of the others.
    """
    full, local = rope(theta, kind), "rope_local_base_freq"  # as transformers 4 calls it

    def read(values: Mapping[str, object]) -> dict[str, object]:
        by_kind = section(values, "rope_parameters")
        data = full.read({**values, "rope_parameters": by_kind.get("full_attention")})
        sliding = section(by_kind, "sliding_attention")
        if (found := sliding.get("rope_type", "default")) != "default":
            raise ConfigError([Problem("rope_parameters.sliding_attention.rope_type", "default", _shown(found), SOURCE)])
        other = data["rope_theta"] if sliding_theta is None else values.get(local, sliding_theta)
        base = sliding.get("rope_theta", other)
        if sliding_theta is not None:
            return {**data, "rope_local_theta": base}
        if base != other:
            raise ConfigError([Problem("rope_parameters.sliding_attention.rope_theta", _shown(other), _shown(base), SOURCE)])
        return dict(data)

    def write(config: Any) -> dict[str, object]:
        data = full.write(config)
        base = config.rope_theta if sliding_theta is None else config.rope_local_theta
        by_kind = {
            "full_attention": data["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": base},
        }
        return {**data, "rope_parameters": by_kind, **({} if sliding_theta is None else {local: base})}

    return Keys(read, write)


def every_nth(field: str, default: int, *, values: str, interval: str, nth: object, others: object) -> Keys[HasLayers]:
    """The list `values` with an item for each layer, of which every n-th is `nth` and all others `others`; `field` is n.

    `interval`: a key for n, which is read where there is no list, and written beside it.
    """

    def items(number: int, layers: int) -> list[object]:
        return [others if (layer + 1) % number else nth for layer in range(layers)]

    def read(config: Mapping[str, object]) -> dict[str, object]:
        found, number = config.get(values), config.get(interval, default)
        if found is None:
            return {field: number}
        first = found.index(nth) if isinstance(found, list) and nth in found else len(found) if isinstance(found, list) else 0
        for n in (number, first + 1):
            if isinstance(n, int) and n > 0 and isinstance(found, list) and found == items(n, len(found)):
                return {field: n}
        raise ConfigError([Problem(values, f"{nth} in every n-th layer and {others} in the others", _shown(found), SOURCE)])

    def write(config: HasLayers) -> dict[str, object]:
        number = getattr(config, field)
        return {values: items(number, config.num_layers), interval: number}

    return Keys(read, write)


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


def reader(cls: type[T], *parts: Keys[Any]) -> Callable[[Mapping[str, object]], T]:
    """A `read_config` of such parts. Quantised weights and partly rotated heads are no family's."""

    def read(values: Mapping[str, object]) -> T:
        data: dict[str, object] = {}
        problems: list[Problem] = []
        for part in (fixed(quantization_config=None, partial_rotary_factor=1.0), *parts):
            try:
                data |= part.read(values)
            except ConfigError as error:
                problems += error.problems
        try:
            config = structure(data, cls())
        except ConfigError as error:
            problems += map(_by_key, error.problems)
        if problems:
            raise ConfigError(problems)
        return config

    return read


def writer(*parts: Keys[Any]) -> Callable[[Any], dict[str, object]]:
    """A `write_config` of such parts."""
    return lambda config: {key: value for part in parts for key, value in part.write(config).items()}


def _by_key(problem: Problem) -> Problem:
    """A problem of a field, told of the key that the field was read from."""
    field, dot, rest = problem.path.partition(".")
    return attrs.evolve(problem, path=f"{DECODER_KEYS.get(field, field)}{dot}{rest}", source=SOURCE, hint="")


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)

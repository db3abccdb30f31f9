"""The keys of `config.json` against transformers' own config classes: read, written, refused."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import transformers

from fnrecipe.config.find import find_component, known
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.errors import ConfigError

ALL = {name: find_component(name, FAMILIES) for name in known(FAMILIES)}
ARCHS = [(family, arch) for family, found in ALL.items() for arch in found.archs]


def theirs(family: str, **values: Any) -> Any:
    """transformers' config with these keys."""
    return transformers.AutoConfig.for_model(hugging_face(family).model_type, **values)


def hugging_face(family: str) -> Any:
    return ALL[family].hugging_face


def comparable(config: Any) -> Any:
    """`config` with the width of a head in full, as transformers always writes it."""
    return attrs.evolve(config, head_dim=config.head_width) if hasattr(config, "head_dim") else config


@pytest.mark.parametrize(("family", "arch"), ARCHS)
def test_what_is_written_is_read_again_here_and_by_transformers(family: str, arch: str) -> None:
    config, found = ALL[family].archs[arch], hugging_face(family)
    written = found.write_config(config)
    assert found.read_config(written) == config
    assert comparable(found.read_config(theirs(family, **written).to_dict())) == comparable(config)


@pytest.mark.parametrize("family", ALL)
def test_absent_keys_have_the_defaults_of_transformers(family: str) -> None:
    found = hugging_face(family)
    assert comparable(found.read_config({})) == comparable(found.read_config(theirs(family).to_dict()))


@pytest.mark.parametrize("family", ALL)
def test_the_class_of_the_model_is_transformers(family: str) -> None:
    found = hugging_face(family)
    assert getattr(transformers, found.architecture).config_class.model_type == found.model_type


def test_a_config_of_transformers_4_is_read() -> None:
    scaling = {"factor": 32, "high_freq_factor": 4, "low_freq_factor": 1, "original_max_position_embeddings": 8192}
    values = {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", **scaling},
        "torch_dtype": "bfloat16",
        "quantization_config": None,
    }
    assert hugging_face("llama").read_config(values) == ALL["llama"].archs["llama3_2_1b"]


def test_everything_that_cannot_be_computed_is_told_at_once_by_its_key() -> None:
    values = {
        "hidden_act": "gelu",
        "mlp_bias": True,
        "vocab_size": "32000",
        "hidden_size": None,
        "num_key_value_heads": 3,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "quantization_config": {"quant_method": "gptq"},
    }
    with pytest.raises(ConfigError) as caught:
        hugging_face("llama").read_config(values)
    assert str(caught.value).splitlines() == [
        "quantization_config: expected null, found {'quant_method': 'gptq'} (config.json)",
        "rope_scaling.rope_type: expected default or llama3, found 'linear' (config.json)",
        "hidden_act: expected silu, found 'gelu' (config.json)",
        "mlp_bias: expected false, found true (config.json)",
        "vocab_size: expected an integer, found '32000' (config.json)",
        "hidden_size: expected an integer, found null (config.json)",
        "num_key_value_heads: expected a divisor of num_attn_heads = 32, found 3 (config.json)",
    ]


@pytest.mark.parametrize(
    ("rope", "line"),
    [
        ({"rope_parameters": 3}, "rope_parameters: expected an object, found 3"),
        (
            {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
            "rope_parameters.high_freq_factor: expected a number, found nothing",
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor: expected 1, found 0.5",
        ),
    ],
)
def test_rotary_positions_that_cannot_be_computed_are_told(rope: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hugging_face("llama").read_config(rope)
    assert str(caught.value) == f"{line} (config.json)"


SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral_7b_v0_3": (
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
    ),
    "qwen2_5_0_5b": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "olmo3_7b": (
        "olmo3",
        {
            "vocab_size": 100278,
            "max_position_embeddings": 65536,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": YARN,
            "rope_theta": 500000,
            "sliding_window": 4096,
        },
    ),
    "smollm3_3b": (
        "smollm3",
        {
            "max_position_embeddings": 65536,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "no_rope_layer_interval": 4,
            "layer_types": [FULL] * 36,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "gemma3_1b": (
        "gemma3",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    "gpt2_medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_inner": None, "attn_pdrop": 0.1}),
}
"""Configs in the form of transformers 4, as they were released, without what is not the model's shape."""


@pytest.mark.parametrize("arch", RELEASED)
def test_what_was_released_is_the_arch(arch: str) -> None:
    family, values = RELEASED[arch]
    assert hugging_face(family).read_config(values) == ALL[family].archs[arch]


@pytest.mark.parametrize(
    ("family", "values", "line"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: expected false, found true"),
        ("qwen3", {"layer_types": [FULL, SLIDING]}, f"layer_types: expected {FULL} in each layer, found {[FULL, SLIDING]}"),
        (
            "olmo3",
            {"layer_types": [SLIDING, FULL, FULL]},
            f"layer_types: expected {FULL} in every n-th layer and {SLIDING} in the others, found {[SLIDING, FULL, FULL]}",
        ),
        (
            "olmo3",
            {"rope_parameters": {FULL: {"rope_theta": 5.0}, SLIDING: {"rope_theta": 6.0}}},
            f"rope_parameters.{SLIDING}.rope_theta: expected 5.0, found 6.0",
        ),
        ("olmo3", {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate: expected nothing, found false"),
        (
            "gemma3",
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rope_scaling.rope_type: expected default or llama3, found 'linear'",
        ),
        ("smollm3", {"no_rope_layers": [0, 1, 1]}, "no_rope_layers: expected 0 in every n-th layer and 1 in the others, found"),
        (
            "olmo3",
            {"num_hidden_layers": 2, "layer_types": [SLIDING]},
            "layer_types: expected an item for each of 2 layers, found",
        ),
        ("gpt2", {"n_embd": "7", "n_inner": 4}, "n_embd: expected an integer, found '7'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: expected gelu_new, found 'relu'"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation: expected gelu_pytorch_tanh, found 'silu'"),
    ],
)
def test_what_a_family_cannot_compute_is_told(family: str, values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hugging_face(family).read_config(values)
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith("(config.json)")


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize("family", ["olmo3", "gemma3", "smollm3"])
def test_few_layers_do_not_hide_the_pattern(family: str, layers: int) -> None:
    config = attrs.evolve(ALL[family].config(), num_layers=layers)
    assert hugging_face(family).read_config(hugging_face(family).write_config(config)) == config

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

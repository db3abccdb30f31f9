"""Plain data to config: nothing is converted silently, every bound and contradiction is told in one line."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.config import resolve, structure, unstructure
from fnrecipe.errors import ConfigError
from fnrecipe.recipes.lm.config import LMConfig, config

ADAMW = ("lr", "betas", "eps", "weight_decay", "decay_vectors", "cautious_weight_decay")
OPTIMIZER = ("name", "config", "state_dtype", "weight_decay_scheduler", "momentum_scheduler", "groups")


def refusal(*pairs: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(config, pairs=pairs)
    return str(caught.value).splitlines()


def with_value(path: str, value: object) -> dict[str, Any]:
    """The recipe's plain data with `value` at the dotted `path`."""
    data = unstructure(config)
    *parents, key = path.split(".")
    section = data
    for parent in parents:
        section = section[parent]
    section[key] = value
    return data


@pytest.mark.parametrize(
    ("pair", "expected", "found"),
    [
        ("gang.num_microbatches=2.7", "an integer", "2.7"),
        ("gang.num_microbatches=2.0", "an integer", "2.0"),
        ("gang.num_microbatches=true", "an integer", "true"),
        ("gang.num_microbatches='3'", "an integer", "'3'"),
        ("gang.num_microbatches=1e3", "an integer", "1000.0"),
        ("gang.num_microbatches=null", "an integer", "null"),
        ("gang.num_microbatches=[8]", "an integer", "[8]"),
        ("gang.num_microbatches=.nan", "an integer", "nan"),
        ("regime.num_steps=2.7", "an integer or null", "2.7"),
        ("regime.num_steps='3'", "an integer or null", "'3'"),
        ("regime.num_steps=0", "an integer of at least 1 or null", "0"),
        ("model.config.tied_embeddings=1", "true or false", "1"),
        ("model.config.tied_embeddings=yes", "true or false", "'yes'"),
        ("model.config.tied_embeddings=null", "true or false", "null"),
        ("regime.sample_prompt=3", "text", "3"),
        ("regime.sample_prompt=true", "text", "true"),
        ("regime.sample_prompt=null", "text", "null"),
        ("regime.sample_prompt=[a]", "text", "['a']"),
        ("tokenizer.path=3", "text or null", "3"),
        ("optimizer.config.lr=fast", "a finite number", "'fast'"),
        ("optimizer.config.lr='1e-3'", "a finite number", "'1e-3'"),
        ("optimizer.config.lr=true", "a finite number", "true"),
        ("optimizer.config.lr=null", "a finite number", "null"),
        ("optimizer.config.lr=.nan", "a finite number", "nan"),
        ("optimizer.config.lr=.inf", "a finite number", "inf"),
        ("optimizer.config.lr=-.inf", "a finite number", "-inf"),
        ("optimizer.config.lr=1e400", "a finite number", "inf"),
        ("optimizer.config.lr=-1", "a number of at least 0", "-1"),
        ("optimizer.config.eps=0", "a number above 0", "0"),
        ("trainer.max_grad_norm=0", "a number above 0 or null", "0"),
        ("lr_scheduler.config.final_lr_scale=1.5", "a number from 0 up to 1", "1.5"),
        ("dataset.valid_fraction=1", "a number from 0 up to, but not including, 1", "1"),
        ("dataset.batch_size=0", "an integer of at least 1", "0"),
        ("common.seed=-1", "an integer of at least 0", "-1"),
        *(
            (f"lr_scheduler.config.num_warmup_steps={value}", "an integer of at least 0 or a fraction below 1", found)
            for value, found in [
                ("-1", "-1"),
                ("1.0", "1.0"),
                ("-0.1", "-0.1"),
                ("x", "'x'"),
                ("null", "null"),
                ("true", "true"),
            ]
        ),
        ("gang.num_microbatches=3", "a power of two", "3"),
        ("gang.num_microbatches=0", "a power of two", "0"),
        ("gang.num_microbatches=-8", "a power of two", "-8"),
        ("dataset.sources={path: a}", "text or a list", "{'path': 'a'}"),
        ("dataset.sources=null", "text or a list", "null"),
        ("optimizer.config.betas=0.9", "a list", "0.9"),
        ("optimizer.config.betas=[]", "a list of 2 values", "[]"),
        ("optimizer.config.betas=[0.9, 0.95, 0.99]", "a list of 2 values", "[0.9, 0.95, 0.99]"),
        ("optimizer.config=null", f"a section with the keys {', '.join(ADAMW)}", "null"),
        (
            "optimizer=adamw",
            f"a section with the keys {', '.join(OPTIMIZER)}",
            "'adamw'",
        ),
        ("optimizer=[1]", f"a section with the keys {', '.join(OPTIMIZER)}", "[1]"),
        ("trainer.jit=false", "auto or off or trace or inductor", "false"),
        ("trainer.jit=null", "auto or off or trace or inductor", "null"),
        ("dataset.packing=[1]", "best_fit or concat", "[1]"),
    ],
)
def test_a_wrong_value_is_one_line(pair: str, expected: str, found: str) -> None:
    assert refusal(pair) == [f"{pair.partition('=')[0]}: expected {expected}, found {found} (command line)"]


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        (
            "trainer.jit=trac",
            "trainer.jit: expected auto or off or trace or inductor, found 'trac' (command line); did you mean trace?",
        ),
        ("gang.device=gpu", "gang.device: expected auto or cpu or cuda, found 'gpu' (command line); did you mean cpu?"),
        (
            "dataset.sources=[{path: a}, 3]",
            "dataset.sources[1]: expected text or a section with the keys path, name, format, text_key, "
            "separator, dtype, weight, weight_schedule, found 3 (command line)",
        ),
        (
            "dataset.sources=[{path: a}, {path: 3}]",
            "dataset.sources[1].path: expected text, found 3 (command line)",
        ),
        (
            "dataset.sources=[{path: a, weight: -1}]",
            "dataset.sources[0].weight: expected a number of at least 0, found -1 (command line)",
        ),
        ("dataset.sources=[{weight: 1}]", "dataset.sources[0].path: expected a value, found nothing (command line)"),
    ],
)
def test_a_wrong_choice_or_item_is_one_line(pair: str, line: str) -> None:
    assert refusal("dataset={sources: [{path: a}]}", pair) == [line]


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[0.9, -0.1]", "[0.9, .nan]", "[0.9, x]", "[null, 0.9]"])
def test_a_wrong_beta_is_refused(betas: str) -> None:
    (line,) = refusal(f"optimizer.config.betas={betas}")
    assert line.startswith("optimizer.config.betas")
    assert line.endswith("(command line)")


@pytest.mark.parametrize(
    "pair",
    [
        f"optimizer.config.lr={'9' * 400}",
        f"regime.num_steps={2**63}",
        f"common.seed={2**63}",
    ],
)
def test_numbers_that_no_machine_holds_are_refused(pair: str) -> None:
    (line,) = refusal(pair)
    assert line.startswith(pair.partition("=")[0])
    assert len(line) < 300


def test_text_that_utf8_cannot_hold_is_refused() -> None:
    (line,) = refusal(r'regime.sample_prompt="\ud800"')
    assert line.startswith("regime.sample_prompt: expected text")


def test_a_long_value_is_shown_in_part() -> None:
    (line,) = refusal(f"common.seed={'x' * 1000}")
    assert line == f"common.seed: expected an integer, found '{'x' * 56}... (command line)"


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (
            ["model.config.model_dim=60", "model.config.num_attn_heads=4"],
            "model.config.model_dim: expected a multiple of 2 * num_attn_heads = 8 "
            "(rotary positions pair up the head's dimensions), found 60 (command line)",
        ),
        (
            ["model.config.num_key_value_heads=3"],
            "model.config.num_key_value_heads: expected a divisor of num_attn_heads = 4, found 3 (command line)",
        ),
        (
            ["model.config.num_key_value_heads=8"],
            "model.config.num_key_value_heads: expected a divisor of num_attn_heads = 4, found 8 (command line)",
        ),
        (
            ["dataset.max_seq_len=257"],
            "dataset.max_seq_len: expected at most model.config.max_seq_len = 256, found 257 (command line)",
        ),
        (
            ["dataset.num_lanes=3"],
            "dataset.batch_size: expected a multiple of dataset.num_lanes = 3, found 8 (default)",
        ),
        (
            ["gang.num_microbatches=16"],
            "dataset.batch_size: expected a multiple of gang.num_microbatches = 16, found 8 (default)",
        ),
        (
            ["regime.num_steps=40", "lr_scheduler.config.num_warmup_steps=40"],
            "lr_scheduler.config.num_warmup_steps: expected less than regime.num_steps = 40, or a fraction below 1, "
            "found 40 (command line)",
        ),
        (
            ["regime.num_steps=null", "lr_scheduler.config.cycle_len=100"],
            "regime.num_steps: expected a number where regime.num_data_epochs is null, found null (command line)",
        ),
        (
            ["regime.num_steps=null", "regime.num_data_epochs=1"],
            "lr_scheduler.config.cycle_len: expected a number where regime.num_steps is null, found null (default)",
        ),
        (
            ["trainer.jit=off", "trainer.cuda_graph=true"],
            "trainer.cuda_graph: expected auto or false for trainer.jit=off, found true (command line)",
        ),
    ],
)
def test_values_that_contradict_each_other_are_one_line(pairs: list[str], line: str) -> None:
    assert refusal(*pairs) == [line]


@pytest.mark.parametrize(
    "pairs",
    [
        ["dataset.max_seq_len=256"],
        ["regime.num_steps=1"],
        ["regime.num_steps=41", "lr_scheduler.config.num_warmup_steps=40"],
        ["regime.num_steps=1", "lr_scheduler.config.num_warmup_steps=0.999"],
        [f"regime.num_steps={2**63 - 1}", f"common.seed={2**63 - 1}"],
        ["gang.num_microbatches=1", "dataset.num_lanes=1", "dataset.batch_size=1"],
        ["model.config.num_key_value_heads=4"],
        ["regime.num_steps=null", "regime.num_data_epochs=1", "lr_scheduler.config.cycle_len=100"],
        ["optimizer.config.lr=0", "optimizer.config.weight_decay=0", "optimizer.config.betas=[0, 0]"],
        ["lr_scheduler.config.final_lr_scale=1", "dataset.prefetch=0", "regime.num_sample_tokens=0"],
        ["trainer.jit=trace", "trainer.cuda_graph=true"],
        ["trainer.jit=off", "trainer.cuda_graph=false"],
    ],
)
def test_values_at_their_bounds_are_taken(pairs: list[str]) -> None:
    resolve(config, pairs=pairs)


def test_a_wrong_value_hides_the_contradictions_that_its_default_would_make() -> None:
    assert refusal("dataset.batch_size=x", "gang.num_microbatches=16") == [
        "dataset.batch_size: expected an integer, found 'x' (command line)"
    ]


def test_a_whole_number_becomes_a_float_where_a_float_is_expected() -> None:
    lr = structure(with_value("optimizer.config.lr", 1), config).optimizer.config.lr
    assert (lr, type(lr)) == (1.0, float)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_config_that_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(ConfigError, match="config: expected a section with the keys model, dataset"):
        structure(data, config)


def test_missing_sections_take_the_defaults_of_their_class() -> None:
    plain = structure({"regime": {"num_steps": 3}, "lr_scheduler": {"config": {"cycle_len": 2}}}, config)
    assert plain.model == LMConfig().model


def test_data_is_plain_and_in_the_order_of_the_fields() -> None:
    data = unstructure(config)
    assert list(data) == [field.name for field in attrs.fields(LMConfig)]
    assert data["optimizer"] == {
        "name": "adamw",
        "config": {
            "lr": config.optimizer.config.lr,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "decay_vectors": False,
            "cautious_weight_decay": False,
        },
        "state_dtype": None,
        "weight_decay_scheduler": None,
        "momentum_scheduler": None,
        "groups": [],
    }
    assert structure(data, config) == config


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s, max_size=2)))
def test_whatever_stands_for_a_number_is_taken_unchanged_or_refused(value: object) -> None:
    data = with_value("optimizer.config.weight_decay", value)
    if (type(value) is float and 0 <= value < math.inf) or (type(value) is int and 0 <= value < 2**63):
        assert structure(data, config).optimizer.config.weight_decay == value
    else:
        with pytest.raises(ConfigError) as caught:
            structure(data, config)
        assert [problem.path for problem in caught.value.problems] == ["optimizer.config.weight_decay"]

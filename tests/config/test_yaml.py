"""YAML in and out: plain values only, each with its line; what is written reads back as it was."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe import config as c
from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig
from fnrecipe.components.optimizers.adamw import AdamWConfig
from fnrecipe.config import resolve, scalars, unstructure, yaml
from fnrecipe.config.layers import flatten, values
from fnrecipe.errors import UsageError
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.recipes.lm.config import LMConfig, config


def read(text: str) -> dict[str, Any]:
    return values(yaml.load(text, "c.yaml"))


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        yaml.load(text, "c.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        ("-.5", -0.5),
        ("7", 7),
        ("-7", -7),
        ("+5", 5),
        ("0", 0),
        ("-0", 0),
        ("1_000", 1000),
        ("1_0_0", 100),
        ("0o17", 15),
        ("0x1F", 31),
        ("0xFF_FF", 65535),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("0.10", 0.1),
        ("1_0.5", 10.5),
        ("1.5e-03", 0.0015),
        ("-.inf", -math.inf),
        ("-_", "-_"),
        ("_1", "_1"),
        ("1_a", "1_a"),
        ("0bad", "0bad"),
        ("1-2", "1-2"),
        ("1e3x", "1e3x"),
        (".", "."),
        ("tRUE", "tRUE"),
        ("<<", "<<"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("2020-01-01 10:00:00", "2020-01-01 10:00:00"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ('"a\\nb"', "a\nb"),
        ("[1, a, [null]]", [1, "a", [None]]),
        ("{a: {b: [1]}}", {"a": {"b": [1]}}),
        ("a # comment", "a"),
        ("data/*.jsonl", "data/*.jsonl"),
        ("äöü 漢字", "äöü 漢字"),
    ],
)
def test_a_value_is_read_by_the_rules_of_yaml_1_2(text: str, value: object) -> None:
    loaded = yaml.load_value(text, "pair")
    assert (loaded, type(loaded)) == (value, type(value))


def test_values_have_the_lines_that_they_start_on() -> None:
    located = yaml.load("a:\n  b: 1\n\n  c: [1,\n    2]\n# comment\nd:\n- x\n- {y: 2}\ne: |\n  text\n", "c.yaml")
    assert {path: (entry.value, entry.source) for path, entry in located.items()} == {
        "a.b": (1, "c.yaml:2"),
        "a.c": ([1, 2], "c.yaml:4"),
        "d": (["x", {"y": 2}], "c.yaml:8"),
        "e": ("text\n", "c.yaml:10"),
    }


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n"])
def test_an_empty_text_is_an_empty_mapping(text: str) -> None:
    assert read(text) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "c.yaml:2: expected each key once, found 'a' again"),
        ("s:\n  a: 1\n  a: 2", "c.yaml:3: expected each key once, found 'a' again"),
        ("l:\n- a: 1\n  a: 2", "c.yaml:3: expected each key once, found 'a' again"),
        ("a: &x 1", "c.yaml:1: anchors and aliases (&, *) are not supported"),
        ("a: 1\nb: *x", "c.yaml:2: anchors and aliases (&, *) are not supported"),
        ("a: 1\n---\nb: 2", "c.yaml:2: expected one YAML document, found another"),
        ("- a", "c.yaml:1: expected a mapping of keys to values at the top"),
        ("a", "c.yaml:1: expected a mapping of keys to values at the top"),
        ("\nnull", "c.yaml:2: expected a mapping of keys to values at the top"),
        ("a: 1\n2: 3", "c.yaml:2: expected a key that is text, found 2"),
        ("s: {null: 3}", "c.yaml:1: expected a key that is text, found None"),
        ("s:\n  true: 3", "c.yaml:2: expected a key that is text, found True"),
        ("? [a, b]\n: 3", "c.yaml:1: expected a key that is text, found ['a', 'b']"),
        ("a:\n\tb: 1", "c.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: [1, 2", "c.yaml:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: }", "c.yaml:2: not valid YAML: expected the node content, but found '}'"),
    ],
)
def test_what_is_no_plain_mapping_is_refused_with_its_line(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    "text", ["a: 'x", "a: b: c", "@a: 1", "a: %b", "a: \x00", "a: \x07", "%YAML 9.9\n---\na: 1", "a\nb: 1"]
)
def test_broken_yaml_is_refused(text: str) -> None:
    assert refusal(text).startswith("c.yaml")


@pytest.mark.parametrize(
    "tagged",
    [
        "!!python/object/apply:pathlib.Path.touch [{canary}]",
        '!!python/object/apply:os.system ["touch {canary}"]',
        '!!python/object/new:os.system ["touch {canary}"]',
        '!<tag:yaml.org,2002:python/object/apply:os.system> ["touch {canary}"]',
        "!!python/name:os.system",
        "!local {{a: 1}}",
        "!!set {{a, b}}",
        "!!omap [a: 1]",
        "!!binary aGVsbG8=",
        "!!timestamp 2020-01-01",
        '!!int "7"',
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!null x",
        "!!str 7",
        "!!map {{a: 1}}",
    ],
)
@pytest.mark.parametrize("place", ["a: {}", "a: [1, {}]", "? {}\n: 1", "{}"])
def test_tags_are_refused_and_construct_nothing(tmp_path: Path, place: str, tagged: str) -> None:
    canary = tmp_path / "canary"
    assert refusal(place.format(tagged.format(canary=canary))).startswith("c.yaml:1: ")
    assert not canary.exists()


def test_a_billion_laughs_is_refused() -> None:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert refusal("\n".join(lines)) == "c.yaml:1: anchors and aliases (&, *) are not supported"


@pytest.mark.parametrize("key", ["<<: {a: 1}", "s: {<<: {a: 1}}", "s:\n  <<: [{a: 1}, {b: 2}]"])
def test_merge_keys_merge_nothing(key: str) -> None:
    with pytest.raises(UsageError):
        resolve(config, pairs=[f"common={{{key}}}"])


@pytest.mark.parametrize("start", ["[", "{a: ", "- ", "? ", "[{a: "])
def test_deep_nesting_is_refused(start: str) -> None:
    assert refusal(start * 100_000) == "c.yaml:1: expected at most 32 levels of nesting"


def test_nesting_up_to_the_bound_is_read() -> None:
    text = "a: " + "[" * 31 + "]" * 31
    assert list(read(text)) == ["a"]
    assert "levels of nesting" in refusal(text.replace("[]", "[[]]"))


def test_a_file_above_one_mebibyte_is_refused() -> None:
    assert refusal("#" + "é" * (1 << 19)) == "c.yaml: expected at most 1048576 bytes of YAML, found 1048577"


@pytest.mark.parametrize("value", ["1, ", "[], ", "{}, "])
def test_more_values_than_anybody_writes_are_refused(value: str) -> None:
    assert refusal(f"a: [{value * yaml.MAX_VALUES}]") == "c.yaml:1: expected at most 20,000 keys and values, found more"


def test_what_fnrecipe_wrote_itself_may_have_more() -> None:
    text = "a: [" + "[], " * yaml.MAX_VALUES + "]"
    assert len(values(yaml.load(text, "c.yaml", bounded=False))["a"]) == yaml.MAX_VALUES


def test_bytes_of_an_argument_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(UsageError):
        resolve(config, pairs=["regime.sample_prompt=a\udcff"])


@pytest.mark.parametrize(
    "text",
    [
        *("012", "-012", "00", "0_1", "1__0", "1_", "-1_", "1_.5", "1._5", "01.5", "1e", "1e_3", "1e5_", "0x", "0x_", "0x1__F"),
        *("0X1F", "0O17", "0o18", "0o", "-0x1F", "0b11", "9" * 5000, f"0x{'f' * 5000}"),
    ],
)
def test_what_only_looks_like_a_number_is_neither_number_nor_text(text: str) -> None:
    for quoted in (f"'{text}'", f'"{text}"'):
        assert yaml.load_value(quoted, "pair") == text
    with pytest.raises(UsageError) as caught:
        yaml.load_value(text, "pair")
    expected = "pair:1: expected a number (12, 1_000, 0x1F, 1.5e-3) or text between quotes, found "
    assert str(caught.value).removeprefix(expected).removesuffix("...") in text


def test_a_number_of_a_megabyte_is_read_in_one_pass() -> None:
    for start, end in (("9", "x"), ("0.9", "ee"), ("0x9", "x"), ("9_9", "x")):
        text = f"{start}{'9' * 1_000_000}{end}"
        assert scalars.read(text) == text


def test_another_version_of_yaml_is_refused() -> None:
    assert refusal("%YAML 1.1\n---\na: no") == "c.yaml:2: YAML is read as version 1.2; expected no %YAML line"


def test_dotted_keys_in_a_file_are_refused() -> None:
    assert "expected a section for each part of 'regime.num_steps'" in refusal("regime.num_steps: 700")


@settings(deadline=None)
@given(st.text("ab01:-_.,?!&*#|>'\"%@[]{}<=~ \n\t") | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert all(entry.source.startswith("c.yaml:") for entry in yaml.load(text, "c.yaml").values())


def test_a_value_in_a_pair_can_span_no_second_document() -> None:
    with pytest.raises(UsageError, match="one YAML document"):
        yaml.load_value("1\n---\n2", "pair")


ODD_TEXTS = [
    "",
    " ",
    " a ",
    "a ",
    "\n",
    "\n a",
    "a\n\n",
    "null",
    "~",
    "1e3",
    "1e-4",
    "no",
    "true",
    "'",
    '"',
    "#a",
    "a #b",
    "a: b",
]
ODD_TEXTS += [
    "- a",
    "[",
    "{}",
    "*a",
    "&a",
    "!a",
    "%a",
    "|",
    ">",
    "---",
    "...",
    "\t",
    "\r\n",
    "\ufeff",
    "\x00",
    "\x85\u2028",
    "😀",
]
ODD_TEXTS += ["012", "1__0", "0X1", "1_"]
ODD_TEXTS += ["2020-01-01", "0x1F", "=", "<<", "?", "a" * 300 + " " + "b" * 300, "1_000", "\\", "\x7f"]

texts = st.sampled_from(ODD_TEXTS) | st.text("01_.xeE+-", max_size=5) | st.text()
counts = st.integers(1, 2**62)
positives = st.sampled_from([1e-30, 5e-324, 1e308, 1.0, 1e16]) | st.floats(0, exclude_min=True, allow_infinity=False)
naturals = st.just(0.0) | positives
fractions = st.floats(0, 1, exclude_max=True)
schedules = st.dictionaries(counts, naturals, max_size=4).map(lambda points: tuple(sorted(points.items())))
formats = st.sampled_from(["auto", "jsonl", "parquet", "text", "python", "tokens"])


@st.composite
def data_sources(draw: st.DrawFn) -> tuple[tuple[c.DataSource, ...], tuple[c.DataSource, ...]]:
    """Sources of training, the first of them with a weight from start to end, and of validation: each with its own name."""
    lasting = schedules.filter(lambda points: not points or points[-1][1] > 0)
    names = draw(st.lists(texts.filter(bool), min_size=1, max_size=5, unique=True))
    sources = [
        c.DataSource(
            path=draw(texts.filter(bool)),
            name=name,
            format=draw(formats),
            text_key=draw(texts),
            separator=draw(st.none() | texts.filter(bool)),
            dtype=draw(st.sampled_from(["uint16", "uint32"])),
            weight=draw(naturals if number > 0 and any(weight for _, weight in schedule) else positives),
            weight_schedule=schedule,
        )
        for number, (name, schedule) in enumerate((name, draw(lasting if not i else schedules)) for i, name in enumerate(names))
    ]
    size = draw(st.integers(1, len(sources)))
    return tuple(sources[:size]), tuple(sources[size:])


@st.composite
def lm_configs(draw: st.DrawFn) -> LMConfig:
    """Any valid config: the values that depend on each other are drawn from each other."""
    groups, heads_per_group, lanes = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    heads, leaves, length, steps = (
        groups * heads_per_group,
        2 ** draw(st.integers(0, 9)),
        draw(counts),
        draw(st.none() | counts),
    )
    sources, valid_sources = draw(data_sources())
    order = draw(st.sampled_from(["blocks", "documents", "sequential"]))
    marks = st.booleans(), st.booleans()
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    scales = draw(st.tuples(positives, positives).map(lambda pair: (max(pair), min(pair))))
    model = draw(
        st.builds(
            LlamaConfig,
            vocab_size=counts,
            max_seq_len=st.integers(length, 2**62),
            model_dim=st.integers(1, 999).map(lambda n: 2 * heads * n),
            num_attn_heads=st.just(heads),
            num_key_value_heads=st.just(groups),
            tied_embeddings=st.booleans(),
            rope_theta=positives,
            norm_eps=positives,
        )
    )
    dataset = c.DatasetSection(
        sources=sources,
        valid_sources=valid_sources,
        valid_fraction=0.0 if valid_sources else draw(fractions),
        max_bad_records=draw(st.integers(0, 9)),
        order=order,
        shuffle_window=draw(counts),
        finished_source=draw(st.sampled_from(["drop", "repeat", "stop"])),
        packing=draw(st.sampled_from(["best_fit", "concat"])),
        pack_window=draw(counts),
        max_seq_len=length,
        attention=draw(st.sampled_from(["document", "row"])),
        batch_size=lanes * leaves * draw(st.integers(1, 9)),
        num_lanes=lanes,
        num_workers=draw(st.sampled_from([0, 1, lanes])),
        prefetch=draw(st.integers(0, 9)),
        cache=None if order == "documents" else draw(st.none() | texts),
    )
    none, ends = (st.none(), st.just(())), (st.none() | texts, st.none() | texts)
    ranks = (st.sampled_from(["gpt2", "llama3"]), st.lists(texts).map(tuple))
    tokenizers = st.builds(c.TokenizerSection, st.just("hf"), texts, *none, *ends, *marks)
    tokenizers |= st.builds(c.TokenizerSection, st.just("tiktoken"), texts, *ranks, *ends, *marks)
    tokenizers |= st.builds(c.TokenizerSection, st.just("byte"), st.none(), *none, st.none(), st.none(), *marks)
    adamw = st.builds(AdamWConfig, naturals, st.tuples(fractions, fractions), positives, naturals)
    cycle = draw(st.none() | counts if steps else counts)
    regime = st.builds(
        c.RegimeSection,
        num_steps=st.just(steps),
        num_data_epochs=st.none() | counts if steps else counts,
        checkpoint_every_n_steps=st.none() | counts,
        sample_prompt=texts,
    )
    return LMConfig(
        model=c.ModelSection(
            dtype="float32" if dtype == "float16" else draw(st.sampled_from(["float32", "bfloat16"])), config=model
        ),
        dataset=dataset,
        tokenizer=draw(tokenizers),
        gang=c.GangSection(
            leaves,
            draw(st.sampled_from(["replicate", "zero1", *(["zero2", "fsdp"] if lanes % leaves == 0 else [])])),
            draw(st.none() | st.sampled_from([1, 2, 8])),
            1,
            draw(st.sampled_from(["float32", "bfloat16"])),
            draw(st.sampled_from(["invariant", "fast"])),
            draw(st.sampled_from(["auto", "cpu", "cuda"])),
            draw(positives),
        ),
        trainer=c.TrainerSection(
            jit := draw(st.sampled_from(["auto", "off", "trace", "inductor"])),
            False if jit == "off" else draw(st.booleans()),
            dtype,
            scales if dtype == "float16" else c.TrainerSection().fp16_loss_scale,
            draw(st.builds(c.ActivationCheckpointingSection, st.just("layerwise"), counts)),
            draw(st.none() | counts),
            draw(st.none() | positives),
        ),
        optimizer=c.OptimizerSection(config=draw(adamw)),
        lr_scheduler=c.LRSchedulerSection(
            config=CosineAnnealingConfig(draw(fractions | st.integers(0, (steps or 2**62) - 1)), cycle, draw(st.floats(0, 1)))
        ),
        regime=draw(regime),
        common=draw(st.builds(c.CommonSection, st.integers(0, 2**62), st.builds(c.TorchSection, st.none() | counts))),
    )


@settings(deadline=None)
@given(lm_configs())
def test_every_config_survives_being_written_and_read(tmp_path_factory: pytest.TempPathFactory, written: LMConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(yaml.dump(unstructure(written)), encoding="utf-8")
    read_back, sources = resolve(config, [path])
    assert read_back == written
    assert all(source.startswith(f"{path}:") for source in sources.values())


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(flatten(unstructure(config), ""))), texts), lm_configs())
def test_comments_change_no_value(comments: dict[str, str], written: LMConfig) -> None:
    data = unstructure(written)
    assert read(yaml.dump(data, comments)) == values(flatten(data, ""))


def test_comments_stand_behind_their_values() -> None:
    text = yaml.dump({"a": {"b": 1, "c": [1]}, "d": []}, {"a.b": "one", "a.c": "two", "d": "three"})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == ["a:", "b: 1 # one", "c: # two", "- 1", "d: [] # three"]


@settings(deadline=None)
@given(st.dictionaries(texts, st.none() | st.integers() | texts, min_size=1))
def test_every_mapping_of_texts_survives(data: dict[str, Any]) -> None:
    assert yaml.load_value(yaml.dump(data), "text") == data


def test_the_frozen_config_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.regime.num_steps = 3  # type: ignore[misc]

"""The sections of data and precision: which values cannot stand together, where that is told, and what sources are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig, schedule_steps
from fnrecipe.config import DataSource, resolve, source_names, unstructure, yaml
from fnrecipe.errors import ConfigError
from fnrecipe.recipes.lm.config import config

HOW_TO_NAME = "a `name` of its own for each source of training and validation"


def refusal(*pairs: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(config, pairs=pairs)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("second", "key", "expected", "found"),
    [
        ("weight_schedule: [[5, 1], [5, 2]]", "weight_schedule", "numbers of tokens above 0 that increase", "[5, 5]"),
        ("weight_schedule: [[9, 1], [5, 2]]", "weight_schedule", "numbers of tokens above 0 that increase", "[9, 5]"),
        ("weight_schedule: [[0, 1]]", "weight_schedule", "numbers of tokens above 0 that increase", "[0]"),
        ("weight: 0", "weight", "a number above 0, at least later in weight_schedule", "0"),
        ("weight: 0, weight_schedule: [[5, 0]]", "weight", "a number above 0, at least later in weight_schedule", "0"),
        ("separator: ''", "separator", "text, or null for one document a file", "''"),
    ],
)
@pytest.mark.parametrize("key_of_list", ["sources", "valid_sources"])
def test_a_contradiction_in_a_source_is_told_with_its_place_in_the_list(
    key_of_list: str, second: str, key: str, expected: str, found: str
) -> None:
    other = "sources: [{path: c}], " if key_of_list == "valid_sources" else ""
    pair = f"dataset={{{other}{key_of_list}: [{{path: a}}, {{path: b, {second}}}], valid_fraction: 0}}"
    assert refusal(pair) == [f"dataset.{key_of_list}[1].{key}: expected {expected}, found {found} (command line)"]


def test_contradictions_of_several_sources_come_at_once() -> None:
    lines = refusal("dataset.sources=[{path: a, separator: ''}, {path: b}, {path: c, weight_schedule: [[0, 1]], weight: 0}]")
    assert [line.partition(":")[0] for line in lines] == [
        "dataset.sources[0].separator",
        "dataset.sources[2].weight_schedule",
    ]


def test_a_wrong_value_in_one_source_hides_the_contradictions_of_the_list() -> None:
    line = "dataset.sources[1].path: expected text, found 3 (command line)"
    assert refusal("dataset.sources=[{path: a, separator: ''}, {path: 3}]") == [line]


@pytest.mark.parametrize(
    ("source", "path", "expected", "found"),
    [
        ("weight_schedule: 3", "weight_schedule", "a list", "3"),
        ("weight_schedule: [3]", "weight_schedule[0]", "a list", "3"),
        ("weight_schedule: [[1, 1], [1]]", "weight_schedule[1]", "a list of 2 values", "[1]"),
        ("weight_schedule: [[1, -1]]", "weight_schedule[0]", "a number of at least 0", "-1"),
        ("weight_schedule: [[-1, 1]]", "weight_schedule[0]", "an integer of at least 0", "-1"),
        ("weight_schedule: [[1.5, 1]]", "weight_schedule[0]", "an integer", "1.5"),
        ("weight: -1", "weight", "a number of at least 0", "-1"),
        ("name: 3", "name", "text or null", "3"),
        ("format: csv", "format", "auto or jsonl or parquet or text or python or tokens", "'csv'"),
        ("dtype: float", "dtype", "uint16 or uint32", "'float'"),
        ("text_key: null", "text_key", "text", "null"),
    ],
)
def test_a_wrong_value_of_a_source_is_one_line(source: str, path: str, expected: str, found: str) -> None:
    line = f"dataset.sources[1].{path}: expected {expected}, found {found} (command line)"
    assert refusal(f"dataset.sources=[{{path: a}}, {{path: b, {source}}}]") == [line]


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("dataset.sources=[]", "dataset.sources: expected at least one source, found none (command line)"),
        (
            "dataset={sources: [{path: a}], valid_sources: [{path: b}]}",
            "dataset.valid_fraction: expected 0 where dataset.valid_sources is given, found 0.05 (default)",
        ),
        ("dataset.num_workers=3", "dataset.num_workers: expected a divisor of dataset.num_lanes = 8, found 3 (command line)"),
        ("dataset.num_workers=16", "dataset.num_workers: expected a divisor of dataset.num_lanes = 8, found 16 (command line)"),
        (
            "dataset={order: documents, cache: c}",
            "dataset.cache: expected null for dataset.order=documents: the cache keeps blocks, found 'c' (command line)",
        ),
        (
            "dataset.sources=[{path: a, weight: 0, weight_schedule: [[5, 1]]}, "
            "{path: b, weight: 0, weight_schedule: [[9, 1]]}]",
            "dataset.sources: expected a source whose weight is above 0 from the start, found none (command line)",
        ),
        ("dataset.sources=[{path: x/a.txt}, {path: a}]", f"dataset.sources: expected {HOW_TO_NAME}, found a, a (command line)"),
        (
            "dataset={sources: [{path: b}], valid_sources: [{path: a, name: b}], valid_fraction: 0}",
            f"dataset.sources: expected {HOW_TO_NAME}, found b, b (command line)",
        ),
        (
            "trainer={dtype: float16, fp16_loss_scale: [1, 2]}",
            "trainer.fp16_loss_scale: expected an initial scale of at least the minimum, found 1, 2 (command line)",
        ),
        (
            "trainer={dtype: bfloat16, fp16_loss_scale: [8, 1]}",
            "trainer.fp16_loss_scale: expected [128.0, 0.0001] for trainer.dtype=bfloat16, which needs no loss scale, "
            "found [8.0, 1.0] (command line)",
        ),
        (
            "trainer={dtype: float16, fp16_loss_scale: [8, 0]}",
            "trainer.fp16_loss_scale: expected a number above 0, found 0 (command line)",
        ),
        (
            "tokenizer.family=hf",
            "tokenizer.path: expected the path of a tokenizer.json for tokenizer.family=hf, found null (default)",
        ),
        *(
            (f"tokenizer.{key}=a", f"tokenizer.{key}: expected null for tokenizer.family=byte, found 'a' (command line)")
            for key in ("path", "eos_token", "bos_token")
        ),
        (
            "tokenizer={family: sentencepiece}",
            "tokenizer.path: expected the path of a SentencePiece model for tokenizer.family=sentencepiece, "
            "found null (default)",
        ),
        (
            "tokenizer={family: tiktoken, path: a}",
            "tokenizer.pattern: expected how a rank file's text is cut before BPE, for tokenizer.family=tiktoken, found null "
            "(default)",
        ),
        (
            "tokenizer={family: hf, path: a, pattern: gpt2}",
            "tokenizer.pattern: expected null for tokenizer.family=hf, found 'gpt2' (command line)",
        ),
        (
            "tokenizer={family: hf, path: a, special_tokens: [b, c]}",
            "tokenizer.special_tokens: expected none for tokenizer.family=hf, found b, c (command line)",
        ),
    ],
)
def test_values_that_contradict_each_other_are_one_line(pair: str, line: str) -> None:
    assert refusal(pair) == [line]


def test_activations_in_float16_need_wider_parameters() -> None:
    line = "trainer.dtype: expected float32 or bfloat16 for model.dtype=bfloat16, found 'float16' (command line)"
    assert refusal("model.dtype=bfloat16", "trainer.dtype=float16") == [line]


@pytest.mark.parametrize(
    "pair",
    [
        "model.dtype=bfloat16",
        "dataset={sources: [{path: a}], valid_sources: [{path: b}], valid_fraction: 0}",
        "dataset.sources=[{path: a, name: b}, {path: a}]",
        "dataset.sources=[{path: a}, {path: b, weight: 0, weight_schedule: [[1, 0], [2, 0.5]]}]",
        "dataset.sources=[{path: a, separator: ' '}]",
        "dataset.num_workers=8",
        "dataset.num_workers=0",
        "dataset={cache: c, order: sequential}",
        "trainer={dtype: float16, fp16_loss_scale: [1, 1]}",
        "trainer.fp16_loss_scale=[128, 0.0001]",
        "tokenizer={family: hf, path: a, bos_token: <s>, eos_token: </s>}",
        "tokenizer={add_bos: false, add_eos: false}",
    ],
)
def test_values_at_their_bounds_are_taken(pair: str) -> None:
    resolve(config, pairs=[pair])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("stdlib:", "stdlib"),
        ("wiki.jsonl", "wiki"),
        ("data/wiki.jsonl.zst", "wiki"),
        ("data/wiki/", "wiki"),
        ("s3://bucket/wiki/", "wiki"),
        ("data/*.jsonl", "*"),
        ("/", "/"),
        ("..", ".."),
    ],
)
def test_a_source_is_called_by_the_end_of_its_path(path: str, name: str) -> None:
    assert source_names([DataSource(path), DataSource(path, name="mine"), DataSource("b")]) == [name, "mine", "b"]


def sources(*pairs: str, key: str = "sources") -> list[str]:
    resolved, _ = resolve(config, pairs=[*pairs, "dataset.valid_fraction=0"])
    return [source.path for source in getattr(resolved.dataset, key)]


SHORT = {
    "a path": ("data/web", ["data/web"]),
    "an address": ("s3://bucket/*.jsonl", ["s3://bucket/*.jsonl"]),
    "paths": ("[a, b/c.jsonl]", ["a", "b/c.jsonl"]),
    "paths and mappings": ("[a, {path: b, weight: 2}]", ["a", "b"]),
    "quoted": ("'a: b'", ["a: b"]),
}


@pytest.mark.parametrize("key", ["sources", "valid_sources"])
@pytest.mark.parametrize(("text", "expected"), SHORT.values(), ids=SHORT)
def test_a_path_stands_for_a_source_and_comes_back_from_yaml(tmp_path: Path, text: str, expected: list[str], key: str) -> None:
    assert sources(f"dataset.{key}={text}", key=key) == expected
    (tmp_path / "short.yaml").write_text(f"dataset: {{{key}: {text}, valid_fraction: 0}}")
    short, _ = resolve(config, [tmp_path / "short.yaml"])
    (tmp_path / "dumped.yaml").write_text(yaml.dump(unstructure(short)))
    assert resolve(config, [tmp_path / "dumped.yaml"])[0] == short
    assert [source.path for source in getattr(short.dataset, key)] == expected


WRONG = {
    "3": "dataset.sources: expected text or a list, found 3 (command line)",
    "''": "dataset.sources[0].path: expected a file, a directory, a glob or an address, found '' (command line)",
}


@pytest.mark.parametrize(("text", "expected"), WRONG.items(), ids=WRONG)
def test_what_is_no_source(text: str, expected: str) -> None:
    assert refusal(f"dataset.sources={text}") == [expected]


def test_every_path_of_a_config_may_begin_in_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    pairs = ["dataset.sources=[~/a, {path: ~}]", "dataset.cache=~/c", "tokenizer={family: hf, path: ~/t.json}"]
    with pytest.raises(ConfigError, match=r"sources\[1\]\.path: expected text, found null"):
        resolve(config, pairs=pairs)
    resolved, _ = resolve(config, pairs=["dataset.sources=[~/a, {path: '~'}, b/~, ./~c, ~nobody-of-this-name]", *pairs[1:]])
    assert [source.path for source in resolved.dataset.sources] == [
        "/home/me/a",
        "/home/me",
        "b/~",
        "./~c",
        "~nobody-of-this-name",
    ]
    assert (resolved.dataset.cache, resolved.tokenizer.path) == ("/home/me/c", "/home/me/t.json")


@pytest.mark.parametrize(
    ("warmup", "cycle", "num_steps", "expected"),
    [
        (40, None, 600, (40, 600)),
        (0, None, 600, (0, 600)),
        (40, 100, 600, (40, 140)),
        (40, 100, None, (40, 140)),
        (0.067, None, 600, (40, 600)),
        (0.5, None, 600, (300, 600)),
        (0.29, None, 100, (29, 100)),
        (0.0, None, 600, (0, 600)),
        (0.067, None, 1, (0, 1)),
        (0.999, None, 10, (9, 10)),
        (0.1, 100, 600, (60, 160)),
        (0.2, 80, None, (20, 100)),
    ],
)
def test_warm_up_is_steps_or_a_fraction_of_all_steps(
    warmup: float, cycle: int | None, num_steps: int | None, expected: tuple[int, int]
) -> None:
    assert schedule_steps(CosineAnnealingConfig(warmup, cycle), num_steps) == expected


counts = st.integers(1, 2**62)


@given(st.floats(0, 1, exclude_max=True), st.none() | counts, counts)
def test_a_fraction_of_warm_up_fits_into_any_number_of_steps(fraction: float, cycle: int | None, num_steps: int) -> None:
    warmup, _ = schedule_steps(CosineAnnealingConfig(fraction, cycle), num_steps)
    assert 0 <= warmup < num_steps
    assert abs(warmup - fraction * num_steps) <= max(1, 1e-15 * num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 20, 600, 2**62])
def test_the_number_of_steps_may_be_changed_alone(num_steps: int) -> None:
    changed, _ = resolve(config, pairs=[f"regime.num_steps={num_steps}"])
    assert schedule_steps(changed.lr_scheduler.config, num_steps)[0] < num_steps
    assert schedule_steps(config.lr_scheduler.config, config.regime.num_steps) == (40, 600)

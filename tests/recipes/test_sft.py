"""Supervised fine-tuning: masks of `transformers`, rows that keep examples whole, a plain loss, and what is wrong told."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from fnrecipe import presets, random, tree
from fnrecipe.build import to_host
from fnrecipe.config import resolve
from fnrecipe.data import Batch, LaneAssignment, Source, huggingface_tokenizer
from fnrecipe.errors import ConfigError, DataError, UsageError
from fnrecipe.nn import all_logits
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.sft.config import SFTConfig, config
from fnrecipe.recipes.sft.data import make_tokenizer, train_stream, valid_stream
from fnrecipe.recipes.sft.train import recipe
from fnrecipe.step import init_state, train_step
from tests.data.kinds import byte_level, save
from tests.data.laws import check_resumes, items
from tests.data.test_chat_template import CHATML, FORGETFUL, MARKED, NAMES, SPECIAL
from tests.helpers import WORDS, assert_close

MODEL = "{vocab_size: 300, max_seq_len: 256, model_dim: 16, num_layers: 1, num_attn_heads: 2, num_key_value_heads: 1}"
TEMPLATES: Mapping[str, str] = {"tags": MARKED, "prefixes": CHATML}


def chats(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Chats of one to three turns, all different."""
    draw = np.random.default_rng(seed)

    def text(*before: str) -> str:
        return " ".join([*before, *draw.choice(WORDS, draw.integers(1, 5)), "größe 🙂"])

    found = []
    for number in range(count):
        system = [{"role": "system", "content": text()}] * (number % 3 == 0)
        turns = [
            {"role": role, "content": text(str(number), str(turn))}
            for turn in range(1 + number % 3)
            for role in ("user", "assistant")
        ]
        found.append([*system, *turns])
    return found


CHATS = chats(24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a file of chats, each template in a folder of its own with them."""
    root = tmp_path_factory.mktemp("sft")
    for name, source in TEMPLATES.items():
        (root / name).mkdir()
        save(root / name, byte_level(*SPECIAL))
        (root / name / "chat_template.jinja").write_text(source)
    write(root / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    return root


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config_of(source: Path, *pairs: str, tokenizer: Path | None = None) -> SFTConfig:
    """One epoch in two lanes of two rows, for bytes unless there is a tokenizer."""
    family = "{family: byte}" if tokenizer is None else f"{{family: hf, path: {tokenizer}, bos_token: <s>, eos_token: </s>}}"
    small = ["dataset.max_seq_len=256", "dataset.batch_size=4", "dataset.num_lanes=2", "dataset.valid_fraction=0"]
    given = [f"model.config={MODEL}", f"dataset.sources={source}", f"tokenizer={family}", *small, "regime.num_data_epochs=1"]
    found, _ = resolve(config, pairs=[*given, "gang={device: cpu, num_microbatches: 1}", *pairs])
    return found


def train(config: SFTConfig) -> Source[Batch]:
    return train_stream(config, LaneAssignment())


def examples(batches: Sequence[Batch]) -> list[tuple[list[int], list[bool]]]:
    """The ids of each piece, and which of those behind the first are trained; in the order of their ids."""
    found = []
    for batch in batches:
        for row, segments in enumerate(batch.segments):
            for segment in range(segments.max() + 1):
                here = segments == segment
                assert batch.positions[row][here].tolist() == list(range(here.sum()))
                ids = [*batch.tokens[row][here].tolist(), int(batch.targets[row][here][-1])]
                assert ids[1:] == batch.targets[row][here].tolist()
                found.append((ids, batch.mask[row][here].tolist()))
    return sorted(found)


# Masks.


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tags/tokenizer.json"), **NAMES)


def by_prefixes(theirs: PreTrainedTokenizerFast, chat: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """The ids of a chat; trained are those with a character that an answer adds to the text before it."""
    text = theirs.apply_chat_template(chat, chat_template=CHATML, tokenize=False)
    encoded = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = []
    for number, message in enumerate(chat):
        if message["role"] == "assistant":
            before, upto = (
                theirs.apply_chat_template(chat[:size], chat_template=CHATML, tokenize=False, add_generation_prompt=prompt)
                for size, prompt in ((number, True), (number + 1, False))
            )
            spans.append((len(before), len(upto)))
    mask = [any(start < end and stop > begin for begin, end in spans) for start, stop in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


@pytest.mark.parametrize("form", TEMPLATES)
def test_examples_and_their_masks_are_those_of_transformers(folder: Path, theirs: PreTrainedTokenizerFast, form: str) -> None:
    found = examples(items(train(config_of(folder / "chats.jsonl", tokenizer=folder / form))))
    if form == "tags":
        asked: Any = {"chat_template": MARKED, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = [theirs.apply_chat_template(chat, **asked) for chat in CHATS]
        expected = [(e["input_ids"], [bool(bit) for bit in e["assistant_masks"]]) for e in encoded]
    else:
        expected = [by_prefixes(theirs, chat) for chat in CHATS]
    assert found == sorted((ids, mask[1:]) for ids, mask in expected)
    assert 0 < sum(sum(mask) for _, mask in found) < sum(len(mask) for _, mask in found)


def test_the_last_answer_alone_is_trained_if_the_config_says_so(folder: Path, theirs: PreTrainedTokenizerFast) -> None:
    given = config_of(folder / "chats.jsonl", "dataset.train_on=last", tokenizer=folder / "prefixes")
    texts = [
        theirs.decode([i for i, trained in zip(ids[1:], mask, strict=True) if trained])
        for ids, mask in examples(items(train(given)))
    ]
    assert sorted(texts) == sorted(f"{chat[-1]['content']}<|im_end|>\n" for chat in CHATS)


PAIR_RECORDS = [{"instruction": f"größe {n}", "output": "ab" * (n + 1)} for n in range(9)]


@pytest.mark.parametrize("ends", [True, False])
def test_without_a_template_a_response_and_its_end_are_trained(tmp_path: Path, ends: bool) -> None:
    pairs = [f"tokenizer.add_bos={str(ends).lower()}", f"tokenizer.add_eos={str(ends).lower()}"]
    given = config_of(write(tmp_path / "a.jsonl", PAIR_RECORDS), *pairs)
    batches = items(train(given))
    expected = []
    for record in PAIR_RECORDS:
        before, after = [256] * ends + [*f"{record['instruction']}\n".encode()], [*record["output"].encode()] + [256] * ends
        expected.append(([*before, *after], [False] * (len(before) - 1) + [True] * len(after)))
    assert examples(batches) == sorted(expected)
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == sum(len(r["output"]) for r in PAIR_RECORDS)


def test_a_template_makes_pairs_chats(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", PAIR_RECORDS)
    template = f"dataset.chat_template={folder}/prefixes/chat_template.jinja"
    turns = [
        [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}] for r in PAIR_RECORDS
    ]
    as_chats = write(tmp_path / "b.jsonl", [{"messages": chat} for chat in turns])
    assert examples(items(train(config_of(source, template)))) == examples(items(train(config_of(as_chats, template))))


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% generation %}{{ messages[1].content }}{% endgeneration %}"
    )
    given = config_of(write(tmp_path / "a.jsonl", PAIR_RECORDS[:1]), f"dataset.chat_template={tmp_path}/a.jinja")
    assert [bytes(ids) for ids, _ in examples(items(train(given)))] == [b"26 Jul 2024ab"]


# The stream.


def test_the_stream_resumes(folder: Path) -> None:
    given = config_of(folder / "chats.jsonl", "regime.num_data_epochs=2", "dataset.shuffle_window=4", tokenizer=folder / "tags")
    assert check_resumes(train(given), limit=12) >= 8


def test_the_splits_share_the_examples_out(folder: Path) -> None:
    pairs, whole = ["dataset.valid_fraction=0.4"], config_of(folder / "chats.jsonl", tokenizer=folder / "tags")
    split = config_of(folder / "chats.jsonl", *pairs, tokenizer=folder / "tags")
    sides = [examples(items(stream(split, LaneAssignment()))) for stream in (train_stream, valid_stream)]
    assert all(sides)
    assert sorted(sides[0] + sides[1]) == examples(items(train(whole)))


def lengths(given: SFTConfig) -> list[int]:
    return sorted(len(ids) - 1 for ids, _ in examples(items(train(given))))


def test_what_is_too_long_or_trains_nothing_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [*PAIR_RECORDS, {"prompt": "x" * 300, "completion": "y"}, {"prompt": "x", "completion": "y" * 400}]
    source = write(tmp_path / "a.jsonl", [*records, {"prompt": "nothing", "completion": ""}])
    expected = lengths(config_of(write(tmp_path / "b.jsonl", PAIR_RECORDS), "tokenizer.add_eos=false"))
    with caplog.at_level(logging.WARNING):
        assert lengths(config_of(source, "tokenizer.add_eos=false")) == expected
    said = [record.message for record in caplog.records if record.message.startswith("a: ")]
    assert len(said) == 3, "each reason once, and the sum"
    assert said[-1].startswith("a: 3 of 12 examples are left out: ")
    assert "2 of more than 256 tokens (dataset.max_seq_len; dataset.too_long)" in said[-1]
    assert "1 without a token that is trained" in said[-1]


def test_what_is_too_long_is_cut_or_refused_if_the_config_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*PAIR_RECORDS, {"prompt": "x", "completion": "y" * 400}])
    cut = examples(items(train(config_of(source, "dataset.too_long=cut"))))
    (longest,) = [ids for ids, _ in cut if len(ids) == 257]
    assert bytes(longest[1:]) == b"x" + b"y" * 255
    with pytest.raises(DataError, match=r"a.jsonl:10 \(byte \d+\): expected an example of at most 256 tokens .* found 402; "):
        items(train(config_of(source, "dataset.too_long=error")))
    assert len(examples(items(train(config_of(source, "dataset.too_long=error", "dataset.max_bad_records=1"))))) == 9


# The loss.


@pytest.fixture(scope="module")
def packed(folder: Path) -> tuple[SFTConfig, Any, Batch]:
    """A config, parameters, and the first batch."""
    given = config_of(folder / "chats.jsonl", "dataset.batch_size=8", "dataset.num_lanes=8", tokenizer=folder / "tags")
    batch = to_host(next(train(given)(None))[0], torch.device("cpu"))
    return given, recipe.init(given, random.key(0), replicated), batch


def test_the_loss_is_that_of_a_plain_loop_over_examples(packed: tuple[SFTConfig, Any, Batch]) -> None:
    given, params, batch = packed
    total, sums = recipe.loss(given)(params, batch, None)
    arrays = Batch(*(getattr(batch, field.name).numpy() for field in attrs.fields(Batch)))
    apply, expected, count = presets.apply(given.model, given.trainer, "row"), torch.zeros((), dtype=torch.float64), 0
    assert max(arrays.segments.max(1)) > 0
    for ids, mask in examples([arrays]):
        tokens, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
        positions = torch.arange(len(mask))[None]
        logits = all_logits(apply(params, tokens, torch.zeros_like(tokens), positions))
        nats = F.cross_entropy(logits[0].double(), targets, reduction="none")
        expected, count = expected + nats[torch.tensor(mask)].sum(), count + sum(mask)
    assert sums["targets"] == count
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)


def test_every_target_weighs_the_same_in_whatever_microbatch(packed: tuple[SFTConfig, Any, Batch]) -> None:
    given, params, batch = packed
    assert len(set(batch.mask.sum(1).tolist())) > 4
    update = recipe.update(given)
    after = []
    for size in (1, 2, 8):
        step = train_step(recipe.loss(given), update, num_microbatches=size)
        state, metrics = step(init_state(tree.map(torch.clone, params), update, random.key(0)), batch)
        after.append({"params": state.params, "loss": metrics["loss"], "norm": metrics["grad_norm"]})
    for found in after[1:]:
        assert_close(found, after[0], 1e-5)


# What is wrong.

BAD = {
    "a key": ({"text": "a"}, "expected an example by its keys, messages, "),
    "no messages": ({"messages": []}, "expected a list of messages under 'messages', found none"),
    "a role": (
        {"messages": [{"role": "usr", "content": "a"}]},
        "messages[0]: expected a known role, found 'usr'; did you mean user?",
    ),
    "content": (
        {"messages": [{"role": "user", "content": 3}]},
        "messages[0]: expected text as the content of a message, found int",
    ),
    "the template": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "message 2 of 2 (system): expected the system message first",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_a_bad_record_is_told_with_its_line(folder: Path, tmp_path: Path, record: object, message: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, record, {"messages": CHATS[1]}])
    with pytest.raises(DataError) as caught:
        items(train(config_of(source, tokenizer=folder / "tags")))
    line, excerpt = str(caught.value).split("\n")
    assert line.startswith(f"{source}:2 (byte ")
    assert message in line
    assert excerpt.strip() == json.dumps(record)[:80]
    tolerant = config_of(source, "dataset.max_bad_records=1", tokenizer=folder / "tags")
    assert len(examples(items(train(tolerant)))) == 2


def test_a_template_that_forgets_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "forgetful.jinja").write_text(FORGETFUL)
    with pytest.raises(
        DataError, match=r"chats.jsonl:\d+ .*forgetful.jinja: message \d of \d \(assistant\): not prefix-preserving"
    ):
        items(train(config_of(folder / "chats.jsonl", f"dataset.chat_template={tmp_path}/forgetful.jinja")))


def test_a_template_that_is_not_there_is_told_by_its_key(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.chat_template: expected .*, found nothing at .*/none\.jinja"):
        items(train(config_of(folder / "chats.jsonl", f"dataset.chat_template={tmp_path}/none.jinja")))


def test_chats_without_a_template_are_wrong_usage(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"chats.jsonl:\d+ .*expected a chat template for messages, found none"):
        items(train(config_of(folder / "chats.jsonl", "dataset.max_bad_records=99")))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("dataset.packing=concat", "dataset.packing: expected best_fit, which keeps examples whole, found concat"),
        ("dataset.cache=x", "dataset.cache: expected null: the cache keeps no masks"),
        ("dataset.too_long=keep", "dataset.too_long: expected drop or cut or error"),
        ("dataset.train_on=first", "dataset.train_on: expected all or last"),
        ("dataset.sources=[{path: a, format: text}]", "dataset.sources[0].format: expected auto or jsonl or parquet or python"),
    ],
)
def test_a_config_that_cannot_be_is_told(tmp_path: Path, pair: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path / "a.jsonl", pair)
    assert message in str(caught.value)


def test_another_template_is_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "tags", tmp_path / "copy"))
    ways = [(folder / "tags",), (folder / "prefixes",), (folder / "tags", "dataset.train_on=last"), (copy,)]
    made = [make_tokenizer(config_of(folder / "chats.jsonl", *pairs, tokenizer=path)) for path, *pairs in ways]
    prints = [tokenizer.fingerprint for tokenizer in made]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_a_sample_is_an_answer(folder: Path) -> None:
    pairs = ["regime.num_sample_tokens=3", "regime.sample_prompt=hi"]
    given = config_of(folder / "chats.jsonl", *pairs, tokenizer=folder / "prefixes")
    params = recipe.init(given, random.key(0), replicated)
    assert recipe.sample is not None
    assert recipe.sample(given, params, random.key(1)).startswith("hi\n")
    assert huggingface_tokenizer(str(folder / "prefixes")).vocab_size <= 300

"""Preference optimization: ids of `transformers`, a stream that resumes, a reference that stays, a run that learns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fnrecipe
from fnrecipe import random, tree
from fnrecipe.build import to_host
from fnrecipe.config import resolve
from fnrecipe.config.needs import Need
from fnrecipe.data import LaneAssignment
from fnrecipe.data.judged import CHOSEN, REJECTED, UNRELATED, JudgedBatch
from fnrecipe.errors import CheckpointError, ConfigError, DataError, UsageError
from fnrecipe.models.answers import REFERENCE, answer_sums
from fnrecipe.optim.partition import chosen as chosen_paths
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.preference.config import PreferenceConfig, config, needs
from fnrecipe.recipes.preference.data import make_tokenizer, train_stream, valid_stream
from fnrecipe.recipes.preference.train import recipe
from fnrecipe.shell.trained.evaluation_subject import subject
from fnrecipe.shell.trained.score import score
from fnrecipe.step import init_state, train_step
from tests.data.kinds import byte_level, save
from tests.data.laws import check_resumes, items
from tests.data.test_chat_template import CHATML, NAMES, SPECIAL
from tests.helpers import WORDS, assert_close, assert_same_bits, rows

MODEL = "{vocab_size: 300, max_seq_len: 128, model_dim: 16, num_layers: 1, num_attn_heads: 2, num_key_value_heads: 1}"


def preferences(count: int) -> list[dict[str, str]]:
    """Prompts of some words, to which the better answer begins with yes."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 5))) for _ in range(2 * count)]
    return [
        {"prompt": f"{number} {one}", "chosen": f"yes {other}", "rejected": f"no {other}"}
        for number, (one, other) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]


RECORDS = preferences(24)


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a template, and a file of pairs."""
    root = tmp_path_factory.mktemp("preference")
    save(root, byte_level(*SPECIAL))
    (root / "chat_template.jinja").write_text(CHATML)
    write(root / "pairs.jsonl", RECORDS)
    return root


def config_of(source: Path, *pairs: str, tokenizer: Path | None = None) -> PreferenceConfig:
    """One epoch in two lanes of two rows, for bytes unless there is a tokenizer."""
    family = "{family: byte}" if tokenizer is None else f"{{family: hf, path: {tokenizer}, bos_token: <s>, eos_token: </s>}}"
    small = ["dataset.max_seq_len=128", "dataset.batch_size=4", "dataset.num_lanes=2", "dataset.valid_fraction=0"]
    given = [f"model.config={MODEL}", f"dataset.sources={source}", f"tokenizer={family}", *small, "regime.num_data_epochs=1"]
    return resolve(config, pairs=[*given, "gang={device: cpu, num_microbatches: 1}", *pairs])[0]


def train(given: PreferenceConfig) -> list[JudgedBatch]:
    found: list[JudgedBatch] = items(train_stream(given, LaneAssignment()))
    return found


def answers(batches: Sequence[JudgedBatch], verdict: int) -> list[tuple[list[int], list[int]]]:
    """The ids of each answer of a verdict with its prompt, and of those that are trained."""
    found = []
    for batch in batches:
        for row, slot in np.argwhere(batch.verdicts == verdict):
            here = batch.segments[row] == slot
            ids = [int(batch.tokens[row][here][0]), *batch.targets[row][here].tolist()]
            found.append((ids, batch.targets[row][here & batch.mask[row]].tolist()))
    return sorted(found)


# The stream.


def test_each_side_is_what_transformers_writes(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMES)
    batches = train(config_of(folder / "pairs.jsonl", tokenizer=folder))
    for key, verdict in (("chosen", CHOSEN), ("rejected", REJECTED)):
        expected = []
        for record in RECORDS:
            chat = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record[key]}]
            whole, before = (
                theirs.apply_chat_template(part, chat_template=CHATML, return_dict=False, add_generation_prompt=prompt)
                for part, prompt in ((chat, False), (chat[:1], True))
            )
            assert whole[: len(before)] == before
            expected.append((whole, whole[len(before) :]))
        assert answers(batches, verdict) == sorted(expected)


@pytest.mark.parametrize("criterion", ["dpo", "kto"])
def test_the_stream_resumes(folder: Path, criterion: str) -> None:
    pairs = [f"criterion.name={criterion}", "regime.num_data_epochs=2", "dataset.shuffle_window=4", "dataset.pack_window=4"]
    given = config_of(folder / "pairs.jsonl", *pairs)
    assert check_resumes(train_stream(given, LaneAssignment()), limit=8) >= 6


def test_kto_takes_pairs_and_labels_and_answers_to_other_prompts_beside(tmp_path: Path) -> None:
    labelled = [{"prompt": f"p{n}", "completion": "ab" * (1 + n), "label": bool(n % 3)} for n in range(6)]
    source = write(tmp_path / "a.jsonl", [*labelled, RECORDS[0]])
    batches = train(config_of(source, "criterion.name=kto"))
    good, bad, others = (answers(batches, verdict) for verdict in (CHOSEN, REJECTED, UNRELATED))
    assert [bytes(ids[:-1]).decode() for _, ids in good] == [
        "yes " + RECORDS[0]["chosen"][4:],
        *["ab" * n for n in (2, 3, 5, 6)],
    ]
    assert [bytes(ids[:-1]).decode() for _, ids in bad] == ["no " + RECORDS[0]["rejected"][3:], "ab", "ab" * 4]
    assert len(others) == 7
    prompts = {record["prompt"]: record.get("completion", record.get("chosen")) for record in [*labelled, RECORDS[0]]}
    for ids, trained in others:
        prompt, answer = (bytes(i for i in part if i < 256).decode() for part in (ids[: -len(trained)], trained))
        assert answer in prompts.values()
        assert answer != prompts[prompt]


def test_the_splits_share_the_pairs_out(folder: Path) -> None:
    given = config_of(folder / "pairs.jsonl", "dataset.valid_fraction=0.4")
    sides = [answers(items(stream(given, LaneAssignment())), CHOSEN) for stream in (train_stream, valid_stream)]
    assert all(sides)
    assert sorted(sides[0] + sides[1]) == answers(train(config_of(folder / "pairs.jsonl")), CHOSEN)


# Parameters and steps.


def test_a_step_changes_the_model_alone_and_is_the_same_in_any_microbatches(folder: Path) -> None:
    given = config_of(folder / "pairs.jsonl", "dataset.batch_size=4", "dataset.num_lanes=4")
    (batch, *_) = [to_host(batch, torch.device("cpu")) for batch in train(given)]
    params, update = recipe.init(given, random.key(0), replicated), recipe.update(given)
    assert_same_bits(params[REFERENCE], recipe.model(given, params))

    def trains(path: str, parameter: torch.Tensor) -> bool:
        return recipe.trains(given, path, parameter)

    assert chosen_paths(params, trains) == set(tree.paths(recipe.model(given, params)))
    after = []
    for size in (1, 2, 4):
        step = train_step(recipe.loss(given), update, num_microbatches=size, trains=trains)
        state, metrics = step(init_state(tree.map(torch.clone, params), update, random.key(0), trains=trains), batch)
        assert_same_bits(state.params[REFERENCE], params[REFERENCE])
        after.append({"model": recipe.model(given, state.params), "loss": metrics["loss"], "norm": metrics["grad_norm"]})
    assert bool((after[0]["model"]["embedding"] != params["embedding"]).any())
    assert float(after[0]["loss"]) == pytest.approx(np.log(2) * int(metrics["targets"]), rel=1e-5), "models that are the same"
    for found in after[1:]:
        assert_close(found, after[0], 1e-5)


def test_log_probabilities_in_the_data_do_as_well_as_the_model_that_gave_them(folder: Path, tmp_path: Path) -> None:
    own = config_of(folder / "pairs.jsonl")
    params = recipe.init(own, random.key(0), replicated)
    other = recipe.model(own, recipe.init(own, random.key(1), replicated))
    apply = fnrecipe.presets.apply(own.model, own.trainer, "document")
    scores: dict[tuple[bytes, int], float] = {}
    for batch in train(own):
        sums = answer_sums(apply, other, to_host(batch, torch.device("cpu")))
        for row, slot in np.argwhere(batch.verdicts):
            text = bytes(batch.targets[row][(batch.segments[row] == slot) & batch.mask[row]][:-1].astype(np.uint8))
            scores[text, int(batch.verdicts[row, slot])] = float(sums[row, slot])
    records = [
        {
            **record,
            "reference_score_chosen": scores[record["chosen"].encode(), CHOSEN],
            "reference_score_rejected": scores[record["rejected"].encode(), REJECTED],
        }
        for record in RECORDS
    ]
    given = config_of(write(tmp_path / "pairs.jsonl", records), "reference.precomputed=true")
    assert REFERENCE not in recipe.init(given, random.key(0), replicated)
    totals = []
    for each, values in ((own, {**params, REFERENCE: other}), (given, recipe.model(own, params))):
        sums = [recipe.loss(each)(values, to_host(batch, torch.device("cpu")), None)[1] for batch in train(each)]
        totals.append({name: sum(float(found[name]) for found in sums) for name in sums[0]})
    assert totals[1] == pytest.approx(totals[0], rel=1e-4)
    assert totals[0]["loss"] != pytest.approx(np.log(2) * totals[0]["targets"], rel=1e-3)


def test_pairs_without_log_probabilities_are_refused_where_they_are_needed(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"pairs.jsonl:\d+ .*reference_score_chosen and .* found none \(reference.precomputed\)"
    ):
        train(config_of(folder / "pairs.jsonl", "reference.precomputed=true"))


@pytest.mark.parametrize("name", ["cpo", "orpo", "simpo"])
def test_without_a_reference_there_is_no_second_model(folder: Path, name: str) -> None:
    given = config_of(folder / "pairs.jsonl", f"criterion.name={name}")
    assert REFERENCE not in recipe.init(given, random.key(0), replicated)


def test_the_reference_is_among_the_needs(folder: Path) -> None:
    def named(*pairs: str) -> dict[str, Need]:
        return {need.what: need for need in needs(config_of(folder / "pairs.jsonl", *pairs), 1)}

    name, with_it, halved = "the reference model's parameters", named(), named("reference.dtype=bfloat16")
    size = sum(leaf.numel() * 4 for leaf in tree.leaves(recipe.init(config_of(folder), random.key(0), replicated)[REFERENCE]))
    assert size * 0.9 < with_it[name].size <= size
    assert halved[name].size == with_it[name].size // 2
    assert name not in named("criterion.name=orpo")


def test_the_criterion_of_the_documents_is_found_in_a_file(folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/preference.md").read_text()
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "# my_ipo.py" in block]
    (tmp_path / "my_ipo.py").write_text(source)
    given = config_of(folder / "pairs.jsonl", f"criterion.name={tmp_path}/my_ipo.py", "criterion.config.beta=0.25")
    batch = to_host(train(given)[0], torch.device("cpu"))
    total, sums = recipe.loss(given)(recipe.init(given, random.key(0), replicated), batch, None)
    assert float(total) == pytest.approx(4 * int(sums["targets"]), rel=1e-5), "(0 - 1 / 2 beta)² of models that are the same"


# Runs.

RUN = [
    "dataset.valid_fraction=0.2",
    "regime={num_steps: 60, num_data_epochs: null, num_sample_tokens: 4, validate_every_n_steps: 60, sample_prompt: hi}",
    "regime.checkpoint_every_n_steps=60",
    "optimizer.config.lr=1e-2",
    "trainer.jit=off",
    "common={torch: {num_threads: 1}, metric_recorders: {tensorboard: {enabled: false}}}",
]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DPO."""
    out = tmp_path_factory.mktemp("runs") / "dpo"
    assert fnrecipe.train(recipe, config_of(folder / "pairs.jsonl", *RUN, tokenizer=folder), out) == 0
    return out


def test_a_run_learns_what_is_preferred(run: Path) -> None:
    first, last = (rows(run / "metrics/train.jsonl")[number] for number in (0, -1))
    assert first["train/rewards/margins"] == 0
    assert last["train/loss"] < 0.3
    (valid,) = rows(run / "metrics/valid.jsonl")
    assert valid["valid/rewards/accuracies"] == 1
    assert valid["valid/rewards/margins"] == pytest.approx(
        valid["valid/rewards/chosen"] - valid["valid/rewards/rejected"], rel=1e-4
    )
    assert (run / "sample.txt").read_text().startswith("hi\n")


def test_the_model_of_a_run_is_used_without_its_reference(run: Path, folder: Path, tmp_path: Path) -> None:
    found = fnrecipe.load(run, recipe)
    assert REFERENCE in found.params
    fnrecipe.export(run, tmp_path / "hf", recipe=recipe)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([[5, 3, 9]])
    own = fnrecipe.presets.apply(found.config.model, found.config.trainer, "row")(
        recipe.model(found.config, found.params), ids, ids * 0, torch.arange(3)[None]
    )
    torch.testing.assert_close(fnrecipe.nn.all_logits(own), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    next_run = config_of(folder / "pairs.jsonl", f"model.path={run}", "model.dtype=float32", tokenizer=folder)
    assert recipe.pretrained is not None
    begun = recipe.pretrained(next_run, random.key(0), replicated)
    assert begun is not None
    for name in (REFERENCE, None):
        assert_same_bits(begun[name] if name else recipe.model(next_run, begun), recipe.model(found.config, found.params))


def test_a_run_is_evaluated_on_the_text_of_all_answers(run: Path, folder: Path) -> None:
    scored = score(subject(str(run), recipe=recipe))
    sides = [answers(train(config_of(folder / "pairs.jsonl", tokenizer=folder)), verdict) for verdict in (CHOSEN, REJECTED)]
    assert scored.total.documents == 2 * len(RECORDS)
    assert scored.total.targets == sum(len(ids) + 1 for side in sides for ids, _ in side), "between BOS and EOS"
    assert 0 < scored.total.loss < 20


def test_the_reference_may_be_another_model(run: Path, folder: Path) -> None:
    given = config_of(folder / "pairs.jsonl", f"reference.path={run}", "reference.dtype=bfloat16", tokenizer=folder)
    assert recipe.pretrained is not None
    begun = recipe.pretrained(given, random.key(3), replicated)
    assert begun is not None
    found = fnrecipe.load(run, recipe)
    expected = tree.map(torch.Tensor.bfloat16, recipe.model(found.config, found.params))
    assert_same_bits(begun[REFERENCE], expected)
    assert_same_bits(recipe.model(given, begun), recipe.model(given, recipe.init(given, random.key(3), replicated)))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "reference.path: expected the tokenizer of the model, 257 tokens, "),
        (
            ["model={family: qwen2, config: {vocab_size: 300, max_seq_len: 128}}"],
            "expected a model of the family qwen2, found llama",
        ),
        (["reference.path=nowhere"], "reference.path: expected a directory of Hugging Face or of a run, "),
    ],
)
def test_a_reference_of_another_kind_is_refused(run: Path, folder: Path, pairs: list[str], message: str) -> None:
    given = config_of(folder / "pairs.jsonl", f"reference.path={run}", *pairs)
    assert recipe.pretrained is not None
    with pytest.raises(UsageError) as caught:
        recipe.pretrained(given, random.key(0), replicated)
    assert message in str(caught.value)


def test_a_reference_of_another_shape_is_refused(run: Path, folder: Path) -> None:
    pairs = [f"reference.path={run}", "model.config.model_dim=32"]
    assert recipe.pretrained is not None
    with pytest.raises(CheckpointError, match=r"embedding: expected .*\[300, 32\].*found .*\[300, 16\]"):
        recipe.pretrained(config_of(folder / "pairs.jsonl", *pairs, tokenizer=folder), random.key(0), replicated)


# What is wrong.


def test_a_bad_record_is_told_with_its_line(tmp_path: Path) -> None:
    bad = {"prompt": "a", "chosen": "b", "rejected": "b"}
    source = write(tmp_path / "a.jsonl", [RECORDS[0], bad, RECORDS[1]])
    with pytest.raises(DataError, match=r"a.jsonl:2 \(byte \d+\): expected two answers that differ"):
        train(config_of(source))
    assert len(answers(train(config_of(source, "dataset.max_bad_records=1")), CHOSEN)) == 2


def test_a_label_is_no_pair(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(
        DataError, match=r"a.jsonl:1 .*expected a pair of answers, found one with a label, which criterion.name=kto"
    ):
        train(config_of(source))


def test_a_pair_that_is_too_long_is_refused_if_the_config_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b" * 70, "rejected": "c" * 70}])
    with pytest.raises(DataError, match=r"expected answers with their prompt of at most 128 tokens .* found 145; "):
        train(config_of(source, "dataset.too_long=error"))
    assert train(config_of(source)) == []


def test_chats_without_a_template_are_wrong_usage(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    source = write(tmp_path / "a.jsonl", [{"prompt": chat, "chosen": "b", "rejected": "c"}])
    with pytest.raises(UsageError, match="expected a chat template for messages, found none"):
        train(config_of(source))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("dataset.packing=concat", "dataset.packing: expected best_fit, which keeps pairs whole, found concat"),
        ("dataset.attention=row", "dataset.attention: expected document, or the two answers of a pair would see each other"),
        (
            "dataset.max_documents_per_row=1",
            "dataset.max_documents_per_row: expected at least 2, the answers of a pair, found 1",
        ),
        ("dataset.cache=x", "dataset.cache: expected null: the cache keeps no verdicts"),
        ("reference={precomputed: true, path: x}", "reference.path: expected null for reference.precomputed=true, found 'x'"),
        ("dataset.too_long=cut", "dataset.too_long: expected drop or error"),
        ("criterion.name=dpoo", "criterion.name: expected cpo or dpo or kto or orpo or simpo or path/to/file.py"),
        ("criterion.config.beta=0", "criterion.config.beta: expected a number above 0"),
        ("criterion={name: orpo, config: {beta: 1}}", "criterion.config.beta: expected a known key"),
    ],
)
def test_a_config_that_cannot_be_is_told(tmp_path: Path, pair: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path / "a.jsonl", pair)
    assert message in str(caught.value)


def test_kto_needs_a_reference_model(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"reference.precomputed: expected false for criterion.name=kto, which is not of pairs"
    ):
        config_of(tmp_path / "a.jsonl", "criterion.name=kto", "reference.precomputed=true")


def test_a_reference_is_refused_where_none_is_used(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"reference: expected nothing for criterion.name=simpo, which has no reference model"
    ):
        config_of(tmp_path / "a.jsonl", "criterion.name=simpo", "reference.path=x")


def test_another_template_is_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(CHATML + " ")
    changed = config_of(folder / "pairs.jsonl", f"dataset.chat_template={tmp_path}/a.jinja", tokenizer=folder)
    own = config_of(folder / "pairs.jsonl", tokenizer=folder)
    assert make_tokenizer(changed).fingerprint != make_tokenizer(own).fingerprint

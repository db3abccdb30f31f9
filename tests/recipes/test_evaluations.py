"""Evaluations that a config names: what they find is what commands and plain computations find of the checkpoints."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest

import fnrecipe
from fnrecipe import random
from fnrecipe.config import resolve
from fnrecipe.data.chat_template import encode_prompt, read_chat_template
from fnrecipe.errors import EXIT_AGAIN, ConfigError, FnrecipeError
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.recipes.preference.train import encode as encode_preference
from fnrecipe.recipes.preference.train import recipe as preference
from fnrecipe.recipes.sft.train import encode
from fnrecipe.recipes.sft.train import recipe as sft
from fnrecipe.shell.train import train
from fnrecipe.shell.trained.choices import choose
from fnrecipe.shell.trained.evaluation_subject import subject
from fnrecipe.shell.trained.score import score
from fnrecipe.streams import tokenizer_of
from tests.data.test_chat_template import CHATML
from tests.helpers import WORDS, end, pairs, remains, rows, start

LM = attrs.evolve(lm, origin="lm")
NAMES = ("held", "arc", "talk")
STEPS = {
    "regime__num_steps": 6,
    "lr_scheduler__config__num_warmup_steps": 0,
    "regime__checkpoint_every_n_steps": 2,
    "regime__keep_last_n_checkpoints": "null",
    "regime__num_validation_batches": 16,
    "dataset__prefetch": 0,
    "trainer__jit": "off",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text, questions, and prompts, more than are generated from together."""
    root = tmp_path_factory.mktemp("evaluations")
    held = [{"text": " ".join(WORDS[n % 7 : n % 7 + 5])} for n in range(40)]
    asked = [{"context": WORDS[n], "choices": [f" {WORDS[n + 1]}", " fold of"], "answer": n % 2} for n in range(9)]
    for name, records in {"held": held, "arc": asked, "talk": [{"prompt": WORDS[n]} for n in range(9)]}.items():
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return root


def named(files: Path) -> str:
    return (
        f"[{{name: held, config: {{sources: {files}/held.jsonl}}, every_n_steps: 4}}, "
        f"{{name: arc, kind: choices, config: {{file: {files}/arc.jsonl}}, every_n_steps: 2}}, "
        f"{{name: talk, kind: samples, config: {{file: {files}/talk.jsonl, max_tokens: 6}}, every_n_steps: 3}}]"
    )


def configured(texts: Path, files: Path, **changes: Any) -> Any:
    return resolve(lm.config, (), pairs(texts, **{**STEPS, "evaluations": named(files), **changes}))[0]


def left(out: Path) -> dict[str, bytes]:
    """What a run leaves, with what its evaluations wrote."""
    paths = [*(f"metrics/{name}.jsonl" for name in NAMES), "samples/talk.jsonl"]
    return {**remains(out), **{path: (out / path).read_bytes() for path in paths}}


@pytest.fixture(scope="module")
def run(texts: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(LM, configured(texts, files), out) == 0
    return out


def test_each_is_made_at_its_steps_and_at_the_end(run: Path) -> None:
    steps = {name: [row["step"] for row in rows(run / f"metrics/{name}.jsonl")] for name in (*NAMES, "valid")}
    assert steps == {"held": [4, 6], "arc": [2, 4, 6], "talk": [3, 6], "valid": [6]}
    assert [row["step"] for row in rows(run / "samples/talk.jsonl")] == [3] * 9 + [6] * 9


def test_the_loss_is_that_of_the_command(run: Path, files: Path) -> None:
    """All of a source that fits in the batches of a validation."""
    found = rows(run / "metrics/held.jsonl")[-1]
    total = score(subject(str(run), pairs=[f"dataset.sources={files}/held.jsonl"])).total
    assert found["held/targets"] == total.targets
    assert found["held/loss"] == pytest.approx(total.loss, rel=1e-6)
    assert found["held/bits_per_byte"] == pytest.approx(total.bits_per_byte, rel=1e-6)


def test_accuracies_are_those_of_the_command(run: Path, files: Path) -> None:
    for row in rows(run / "metrics/arc.jsonl"):
        told = choose(subject(str(run), step=row["step"]), f"{files}/arc.jsonl").accuracy
        assert [row[f"arc/{key}"] for key in ("acc", "acc_norm", "acc_centred")] == [
            told.acc.value,
            told.acc_norm.value,
            told.centred.value,
        ]


def test_samples_are_what_the_checkpoint_says(run: Path, files: Path) -> None:
    found = [row for row in rows(run / "samples/talk.jsonl") if row["step"] == 6]
    assert [row["prompt"] for row in found] == WORDS[:9]
    _, config, params = fnrecipe.load(run)
    tokenizer = tokenizer_of(config.tokenizer)
    from fnrecipe import presets
    from fnrecipe.generation.generator import Prompt, generate
    from fnrecipe.generation.sampling import Sampling

    made = presets.generator(
        config.model, config.trainer, Sampling(temperature=0.7), context=32, vocab_size=tokenizer.vocab_size
    )
    key = random.fold_in(random.key(config.common.seed), "evaluations.talk")
    prompts = [Prompt([tokenizer.bos, *tokenizer.encode([word])[0].tolist()], n) for n, word in enumerate(WORDS[:9])]
    alone = [[token for (token,) in generate(made, params, [prompt], key, 6)] for prompt in prompts]
    ends = [ids.index(tokenizer.eos) if tokenizer.eos in ids else len(ids) for ids in alone]
    assert [row["tokens"] for row in found] == ends
    assert [row["text"] for row in found] == [tokenizer.decode(ids[:size]) for ids, size in zip(alone, ends, strict=True)]
    told = rows(run / "metrics/talk.jsonl")[-1]
    assert told["talk/tokens"] == pytest.approx(sum(ends) / 9)
    assert told["talk/ended"] == pytest.approx(sum(row["finish"] == "stop" for row in found) / 9)


def stopping(step: int) -> Callable[..., Any]:
    """The stream of training, in which a signal comes on the way to the batch of a step."""
    calls = count(1)

    def stream(config: Any, place: Any) -> Any:
        source = lm.stream(config, place)

        def stopped(cursor: Any = None) -> Any:
            for entry in source(cursor):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield entry

        return stopped

    return stream


def test_stopped_and_killed_each_is_recorded_once(run: Path, texts: Path, files: Path, tmp_path: Path) -> None:
    config = configured(texts, files)
    assert train(attrs.evolve(lm, stream=stopping(4)), config, tmp_path) == EXIT_AGAIN
    for path in (tmp_path / "metrics/arc.jsonl", tmp_path / "samples/talk.jsonl"):  # as a kill behind the checkpoint leaves it
        with path.open("a") as file:
            file.write('{"step": 5, "x": 1}\n{"step": 6, "x"')
    assert train(LM, config, tmp_path) == 0
    found, expected = left(tmp_path), left(run)
    assert {name: found[name] for name in expected} == expected


def test_a_run_may_go_on_with_others(run: Path, texts: Path, files: Path, tmp_path: Path) -> None:
    assert train(attrs.evolve(lm, stream=stopping(4)), configured(texts, files, evaluations="[]"), tmp_path) == EXIT_AGAIN
    assert train(LM, configured(texts, files), tmp_path) == 0
    found, expected = (rows(out / "metrics/arc.jsonl") for out in (tmp_path, run))
    assert found == expected[1:]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_two_processes_leave_the_same_bytes(run: Path, texts: Path, files: Path, tmp_path: Path, sharding: str) -> None:
    values = pairs(texts, **STEPS, evaluations=named(files), gang__sharding=sharding)
    done = end(start("train", "lm", "--out", str(tmp_path), "--nproc", "2", "--config", *values))
    assert done.status == 0, done.errors
    names = [f"metrics/{name}.jsonl" for name in NAMES] + ["samples/talk.jsonl"]
    assert [(tmp_path / name).read_bytes() for name in names] == [(run / name).read_bytes() for name in names]


@pytest.mark.parametrize(("recipe", "encode"), [(sft, encode), (preference, encode_preference)], ids=["sft", "preference"])
def test_prompts_are_messages_where_there_is_a_template(recipe: Any, encode: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "chatml.jinja").write_text(CHATML)
    config, _ = resolve(recipe.config, (), [f"dataset.chat_template={tmp_path}/chatml.jinja"])
    tokenizer = tokenizer_of(config.tokenizer)
    chat = [{"role": "user", "content": "why"}]
    template = read_chat_template(str(tmp_path / "chatml.jinja"))
    assert encode(config, "why") == encode_prompt(template, chat, tokenizer).tolist()  # type: ignore[arg-type]
    assert encode(recipe.config, "why") == [tokenizer.bos, *tokenizer.encode(["why"])[0].tolist()]


def test_a_run_with_a_reference_measures_the_model(texts: Path, files: Path, tmp_path: Path) -> None:
    """And the preference loss on pairs of its own."""
    made = [{"prompt": f"{n}", "chosen": "yes yes", "rejected": "no"} for n in range(24)]
    for name in ("pairs", "more"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in made))
    evaluations = named(files).replace(f"{files}/held.jsonl", f"{tmp_path}/more.jsonl")
    changes = {**STEPS, "dataset__sources": tmp_path / "pairs.jsonl", "evaluations": evaluations, "regime__num_steps": 2}
    config, _ = resolve(preference.config, (), pairs(texts, **changes))
    out = tmp_path / "out"
    assert train(attrs.evolve(preference, origin="preference"), config, out) == 0
    row = rows(out / "metrics/held.jsonl")[-1]
    assert row["held/targets"] == 24
    assert row["held/loss"] > 0
    told = choose(subject(str(out)), f"{files}/arc.jsonl").accuracy
    assert rows(out / "metrics/arc.jsonl")[-1]["arc/acc"] == told.acc.value
    assert len(rows(out / "samples/talk.jsonl")) == 9


def test_averages_are_measured(texts: Path, files: Path, tmp_path: Path) -> None:
    average = {"trainer__average__decay": 0.5, "regime__num_steps": 3}
    assert train(LM, configured(texts, files, **average), tmp_path) == 0
    found = rows(tmp_path / "metrics/held.jsonl")[-1]["held/loss"]
    held = [f"dataset.sources={files}/held.jsonl"]
    assert found == pytest.approx(score(subject(str(tmp_path), weights="average", pairs=held)).total.loss, rel=1e-6)
    assert found != pytest.approx(score(subject(str(tmp_path), pairs=held)).total.loss, rel=1e-6)


def test_what_cannot_be_read_is_told_before_the_run_begins(texts: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "the " * 9}) + "\n")
    (tmp_path / "none.jsonl").write_text("\n")
    samples, choices = "kind: samples, config: {file: ", "kind: choices, config: {file: "
    for section, message in {
        f"{choices}{tmp_path}/no.jsonl": "no.jsonl",
        f"{choices}{tmp_path}/bad.jsonl": "bad.jsonl:1: expected the field 'context', found none",
        f"{samples}{tmp_path}/bad.jsonl": "bad.jsonl:1: expected an object with text in the field 'prompt', found int",
        f"{samples}{tmp_path}/long.jsonl": "long.jsonl:1: prompt: expected fewer tokens than the context of 32, found 37",
        f"{samples}{tmp_path}/none.jsonl": "none.jsonl: expected a prompt on each line, found none",
        f"config: {{sources: {tmp_path}/no.jsonl": "no.jsonl",
    }.items():
        config = configured(texts, files, evaluations=f"[{{name: x, {section}}}}}]")
        with pytest.raises(FnrecipeError) as caught:
            train(lm, config, tmp_path / "out")
        assert message in str(caught.value)
        assert not list((tmp_path / "out/metrics").iterdir())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            "{name: valid, config: {sources: a}}",
            "[0].name: expected letters, digits, '_', '-' and '.', and none of train, perf, valid",
        ),
        ("{config: {sources: a}}", "[0].name: expected letters"),
        ("{name: a/b, config: {sources: a}}", "[0].name: expected letters"),
        ("{name: a, kind: choice, config: {file: a}}", "[0].kind: expected loss or choices or samples, found 'choice'"),
        ("{name: a, kind: choices}", "[0].config.file: expected a file of questions, found ''"),
        ("{name: a}", "[0].config.sources: expected at least one source, found none"),
        ("{name: a, kind: samples}", "[0].config.prompts: expected texts, or a file of them, found neither"),
        (
            "{name: a, kind: samples, config: {prompts: [b], file: c}}",
            "[0].config.prompts: expected texts, or a file of them, found both",
        ),
        ("{name: a, config: {file: b}}", "[0].config.file: expected a known key, found 'file'"),
        ("{name: a, config: {sources: [{path: b, format: x}]}}", "[0].config.sources[0].format: expected auto or"),
        ("{name: a, config: {sources: b}}, {name: a, config: {sources: b}}", "[1].name: expected a name of its own"),
    ],
)
def test_what_they_cannot_be_is_told(sections: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(lm.config, (), [f"evaluations=[{sections}]"])
    assert str(caught.value).startswith(f"evaluations{message}")

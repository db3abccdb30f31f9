"""`fnrecipe evaluate`: loss and accuracy are those of transformers with the same weights, on any number of processes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F

from fnrecipe.data.windows import ScoredBatch, Window, collate_windows
from fnrecipe.shell.trained import score
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here
from tests.cli.helpers import fnrecipe as fnrecipe_apart
from tests.helpers import WORDS
from tests.interop.conftest import model_of, write_tokenizer

Run = Callable[..., Ended]
LENGTH, EOS, BOS = 32, 0, 1


@pytest.fixture
def fnrecipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, *args)

    return run


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A directory of Hugging Face with a tokenizer."""
    root = tmp_path_factory.mktemp("evaluate") / "model"
    model.save_pretrained(root)
    write_tokenizer(root)
    return root


def nats_by(model: Any, ids: Sequence[int], start: int = 1) -> float:
    """The nats of `ids[start:]`, each by transformers' model of all ids before it."""
    given = torch.tensor([ids])
    with torch.no_grad():
        logits = model(given).logits[0, start - 1 : -1].double()
    return float(F.cross_entropy(logits, given[0, start:], reduction="sum"))


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def documents_in(path: Path, there: Path) -> list[list[int]]:
    return [[BOS, *encode(there, text), EOS] for text in texts_in(path)]


def encode(there: Path, text: str) -> list[int]:
    found: list[int] = tokenizers.Tokenizer.from_file(str(there / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return found


def test_the_loss_is_that_of_transformers_for_each_source_and_in_all(
    fnrecipe: Run, there: Path, model: Any, texts: Path, tmp_path: Path
) -> None:
    sources = [texts / "a.jsonl", texts / "b.jsonl"]
    ended = fnrecipe("evaluate", there, "--data", *sources, "--out", "new/found.json")
    assert (ended.status, ended.err) == (0, "")
    assert f"{there}, float32: rows of 32 tokens; a longer document is cut" in ended.out
    found = json.loads((tmp_path / "new/found.json").read_text())
    assert (found["model"], found["step"], found["max_seq_len"], found["stride"]) == (str(there), None, LENGTH, LENGTH)
    total = dict.fromkeys(("nats", "targets", "bytes", "documents"), 0.0)
    for path in sources:
        documents = documents_in(path, there)
        pieces = [ids[start : start + LENGTH + 1] for ids in documents for start in range(0, len(ids) - 1, LENGTH)]
        expected = {
            "nats": sum(nats_by(model, piece) for piece in pieces),
            "targets": sum(len(ids) - 1 for ids in documents),
            "bytes": sum(len(text.encode()) for text in texts_in(path)),
            "documents": len(documents),
        }
        assert len(pieces) > len(documents)
        check(found["sources"][path.stem], expected)
        total = {key: total[key] + value for key, value in expected.items()}
    check(found["total"], total)
    assert list(found["sources"]) == ["a", "b"]


def check(found: dict[str, float], expected: dict[str, float]) -> None:
    nats, targets, num_bytes, documents = expected.values()
    assert (found["targets"], found["bytes"], found["documents"]) == (targets, num_bytes, documents)
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_windows_overlap_as_perplexity_is_commonly_measured(
    fnrecipe: Run, there: Path, model: Any, texts: Path, tmp_path: Path
) -> None:
    path, stride = tmp_path / "some.jsonl", 12
    path.write_text("".join(f"{line}\n" for line in (texts / "a.jsonl").read_text().splitlines()[:12]))
    ended = fnrecipe(
        "evaluate", there, "--data", path, "--stride", str(stride), "--out", "found.json", "--config", "trainer.jit=off"
    )
    assert (ended.status, ended.err) == (0, "")
    assert "a longer document is scored in windows 12 tokens apart" in ended.out
    nats, targets = 0.0, 0
    for ids in documents_in(path, there):  # the loop that transformers' documentation shows, in positions of targets
        end = 0
        for start in range(0, len(ids), stride):
            stop = min(start + LENGTH, len(ids) - 1)
            nats += nats_by(model, ids[start : stop + 1], end - start + 1)
            targets += stop - end
            end = stop
            if stop == len(ids) - 1:
                break
    found = json.loads((tmp_path / "found.json").read_text())["total"]
    assert found["targets"] == targets
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-6)


def test_a_small_text_is_a_small_batch_that_finds_the_same(
    fnrecipe: Run, there: Path, model: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []

    def collated(rows: Sequence[Sequence[Window]], length: int) -> ScoredBatch:
        shapes.append((len(rows), length))
        return collate_windows(rows, length)

    monkeypatch.setattr(score, "_LEAST_LENGTH", 8)
    monkeypatch.setattr(score, "collate_windows", collated)
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": " ".join(WORDS[:3])}) + "\n")
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": " ".join(WORDS[: 1 + n % 5])}) + "\n" for n in range(20)))
    config = ["trainer.jit=off", "dataset.attention=row", "dataset.batch_size=16"]
    ended = fnrecipe("evaluate", there, "--data", "few.jsonl", "some.jsonl", "--out", "found.json", "--config", *config)
    assert (ended.status, ended.err) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())["sources"]
    pieces = {
        name: [
            ids[start : start + LENGTH + 1]
            for ids in documents_in(tmp_path / f"{name}.jsonl", there)
            for start in range(0, len(ids) - 1, LENGTH)
        ]
        for name in ("few", "some")
    }
    for name, each in pieces.items():
        nats, targets = sum(nats_by(model, ids) for ids in each), sum(len(ids) - 1 for ids in each)
        assert (found[name]["targets"], found[name]["loss"]) == (targets, pytest.approx(nats / targets, rel=1e-6))
    (few,) = pieces["few"]
    full, rest = divmod(len(pieces["some"]), 16)  # two rows are a microbatch
    assert shapes[0] == (2, 8 if len(few) <= 9 else 16)
    assert [rows for rows, _ in shapes[1:]] == [*[16] * full, 2 << (math.ceil(rest / 2) - 1).bit_length()]
    assert rest <= 8
    assert shapes[1][1] > shapes[-1][1]  # longer windows come first


@pytest.mark.slow
def test_two_processes_find_the_same_bits_as_one(fnrecipe: Run, there: Path, texts: Path, tmp_path: Path) -> None:
    args = ["evaluate", there, "--data", f"{{path: {texts}, name: all of it}}", "--stride", "20"]
    ended = fnrecipe_apart(*map(str, args), "--nproc", "2", "--out", "two.json", cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
    alone = fnrecipe(*args, "--out", "one.json")
    assert alone.out == ended.out
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def questions() -> list[dict[str, Any]]:
    """Questions with contexts of all lengths, some of which end in white space, are empty, or do not fit."""
    draw = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(WORDS[int(number)] for number in torch.randint(len(WORDS), (count,), generator=draw))

    lengths = [0, 1, 2, 3, 4, 5, 6, 7, 8, 40] * 2
    made = [{"context": words(n), "choices": [words(1 + k) for k in range(2 + n % 3)], "answer": n % 2} for n in lengths]
    made[3]["context"] += " "
    return made


def write_questions(path: Path) -> None:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions()))


def test_accuracies_are_those_of_a_plain_loop_over_transformers(fnrecipe: Run, there: Path, model: Any, tmp_path: Path) -> None:
    write_questions(tmp_path / "some.jsonl")
    args = ["evaluate", there, "--choices", "some.jsonl", "--delimiter", " ", "--out", "found.json"]
    ended = fnrecipe(*args)
    assert (ended.status, ended.err) == (0, "")
    right, by_byte, cut, choices = [], [], 0, 0
    for question in questions():
        values, each = [], []
        for choice in question["choices"]:
            before = len(encode(there, question["context"].rstrip()))
            ids = [BOS, *encode(there, f"{question['context']} {choice}")]
            lost = max(len(ids) - 1 - LENGTH, 0)
            cut, choices = cut + (lost > 0), choices + 1
            values.append(-nats_by(model, ids[lost:], 1 + before - lost))
            each.append(values[-1] / len(choice.encode()))
        right.append(float(values.index(max(values)) == question["answer"]))
        by_byte.append(float(each.index(max(each)) == question["answer"]))
    found = json.loads((tmp_path / "found.json").read_text())
    chance = sum(1 / len(question["choices"]) for question in questions()) / len(right)
    acc = sum(right) / len(right)
    assert 0 < acc < 1
    assert cut > 0
    assert (found["acc"], found["acc_norm"]) == (acc, sum(by_byte) / len(by_byte))
    assert found["acc_stderr"] == pytest.approx(torch.tensor(right).double().std().item() / math.sqrt(len(right)))
    assert found["acc_centred"] == pytest.approx((acc - chance) / (1 - chance))
    assert (found["questions"], found["choices"], found["cut"]) == (len(right), choices, cut)
    assert f"20 questions with {choices} choices, {cut} of them behind a context that was cut to 32 tokens" in ended.out


@pytest.mark.slow
def test_two_processes_choose_as_one_does(fnrecipe: Run, there: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "some.jsonl")
    args = ["evaluate", str(there), "--choices", "some.jsonl", "--delimiter", " "]
    ended = fnrecipe_apart(*args, "--nproc", "2", "--out", "two.json", cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert fnrecipe(*args, "--out", "one.json").out == ended.out
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_a_run_is_evaluated_as_what_it_is_exported_as(fnrecipe: Run, uninterrupted: Path, texts: Path, tmp_path: Path) -> None:
    assert fnrecipe("export", uninterrupted, "--out", "exported").status == 0
    found = {}
    for name, args in {"run": [uninterrupted], "exported": ["exported"], "earlier": [uninterrupted, "--step", "28"]}.items():
        ended = fnrecipe("evaluate", *args, "--data", texts / "a.jsonl", "--out", f"{name}.json")
        assert (ended.status, ended.err) == (0, "")
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert [found[name]["step"] for name in ("run", "exported", "earlier")] == [30, None, 28]
    assert found["run"]["total"] == pytest.approx(found["exported"]["total"], rel=1e-6)
    assert found["run"]["total"]["loss"] != found["earlier"]["total"]["loss"]


def test_what_cannot_be_evaluated_is_told_in_a_line(
    fnrecipe: Run, there: Path, uninterrupted: Path, texts: Path, tmp_path: Path
) -> None:
    text = texts / "a.jsonl"
    shutil.copytree(there, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 2}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", "the of a " * 20], "answer": 0}))
    neither = "expected text to read (--data PATH) or questions (--choices FILE), found "
    for args, expected in (
        ([there], f"{neither}neither"),
        ([there, "--data", text, "--choices", text], f"{neither}both"),
        (["nowhere", "--data", text], "nowhere: expected the directory of a run, or one of Hugging Face, found no directory"),
        ([tmp_path, "--data", text], "found neither config.json nor config.yaml in it"),
        ([there, "--data", "nowhere"], "nowhere: expected data, found no file"),
        ([there, "--data", "empty.jsonl"], "empty: expected text to score, found none"),
        ([there, "--data", "{path: bad.jsonl, format: csv}"], "dataset.sources[0].format: expected auto or jsonl"),
        ([there, "--data", text, "--stride", "33"], "--stride: expected at most dataset.max_seq_len = 32, found 33"),
        ([there, "--data", text, "--step", "3"], "--step: expected the directory of a run, found one of Hugging Face"),
        ([there, "--data", text, "--delimiter", " "], "--delimiter: expected --choices"),
        ([there, "--data", text, "--config", "dataset.max_seq_len=64"], "dataset.max_seq_len: expected at most"),
        ([there, "--data", text, "--config", "gang.num_microbatches=16"], "dataset.batch_size: expected a multiple of"),
        (["mute", "--data", text], "mute: expected a tokenizer.json in it, or tokenizer.path in the config"),
        ([there, "--choices", text, "--stride", "3"], "--stride: expected --data"),
        ([there, "--choices", "bad.jsonl"], "bad.jsonl:1: expected the index of one of 2 choices"),
        ([there, "--choices", "long.jsonl"], "long.jsonl:1: expected 1 to 32 tokens (dataset.max_seq_len) in 'the of"),
    ):
        ended = fnrecipe("evaluate", *args)
        assert_usage_error(ended, expected)
        assert len([line for line in ended.err.splitlines() if line.startswith("error: ")]) == 1
    missing = fnrecipe("evaluate", uninterrupted, "--data", text, "--step", "5")
    assert missing.status == 1
    assert "expected a checkpoint of step 5, found those of" in missing.err

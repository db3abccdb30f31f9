"""`fnrecipe generate` and `fnrecipe chat` on a tiny run and on a directory that transformers wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers

import fnrecipe
from fnrecipe.cli import chat as chat_module
from fnrecipe.config import resolve
from fnrecipe.generation.answer import Answer
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell.train import train
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here
from tests.helpers import compiles, pairs, write_texts
from tests.interop.conftest import TEMPLATE, model_of, write_tokenizer

Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    write_texts(root / "texts")
    changes = {"regime__num_steps": 2, "lr_scheduler__config__num_warmup_steps": 1, "trainer__jit": "off"}
    config, _ = resolve(recipe.config, pairs=pairs(root / "texts", **changes))
    origin = "fnrecipe.recipes.lm.train:recipe"
    assert train(attrs.evolve(recipe, origin=origin), config, root / "run") == 0
    return root / "run"


@pytest.fixture(scope="module")
def from_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "model"
    model_of().save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(fnrecipe_here, monkeypatch, capsys)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_one_answer_is_shown_and_many_are_lines_of_the_same_texts(run: Run, trained: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", "8", "--seed", "3", "--stop", "zzz")
    shown = run("generate", trained, "--prompt", "the fold", *options)
    assert shown.status == 0, shown
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in ("the fold", "of a", "")))
    assert run("generate", trained, "--file", file, "--out", out, "--n", "2", *options).status == 0
    found = lines(out.read_text(encoding="utf-8"))
    assert [(row["prompt"], row["sample"]) for row in found] == [(t, n) for t in ("the fold", "of a", "") for n in (0, 1)]
    assert f"{found[0]['text']}\n" == shown.out
    assert {row["finish"] for row in found} <= {"length", "stop"}
    again = run("generate", trained, "--file", file, "--n", "2", "--batch-size", "4", *options)
    assert lines(again.out) == found


@compiles
@pytest.mark.slow
def test_a_compiled_step_says_the_same(run: Run, trained: Path) -> None:
    options = ("--prompt", "the fold", "--max-tokens", "8", "--temperature", "0")
    assert run("generate", trained, "--compile", *options).out == run("generate", trained, *options).out != ""


def test_a_directory_of_hugging_face_says_what_transformers_says(run: Run, from_elsewhere: Path) -> None:
    found = run("generate", from_elsewhere, "--prompt", "the fold", "--temperature", "0", "--max-tokens", "9")
    assert found.status == 0, found
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(from_elsewhere)
    model = transformers.LlamaForCausalLM.from_pretrained(from_elsewhere)
    ids = torch.tensor([tokenizer.encode("the fold", add_special_tokens=False)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert found.out == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ["expected --prompt or --file, found neither"]),
        (("--prompt", "a", "--file", "b"), ["expected --prompt or --file, found both"]),
        (("--prompt", "word " * 20), ["--prompt: expected fewer tokens than the context of 32, found 101"]),
        (("--file", "{bad}"), ['bad.jsonl:2: expected an object with a text "prompt", found none']),
        (("--file", "{empty}"), ["empty.jsonl: expected a prompt, found an empty file"]),
        (("--file", "missing.jsonl"), ["--file: cannot read missing.jsonl"]),
        (("--prompt", "a", "--stop", ""), ["--stop: expected a text, found an empty one"]),
        (("--prompt", "a", "--device", "cuda"), ["--device: expected cpu on this machine, found cuda"]),
    ],
)
def test_what_cannot_be_said_is_told_in_a_line(
    run: Run, trained: Path, tmp_path: Path, args: tuple[str, ...], parts: list[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    filled = [arg.format(bad=tmp_path / "bad.jsonl", empty=tmp_path / "empty.jsonl") for arg in args]
    assert_usage_error(run("generate", trained, *filled), *parts)


def test_no_model_no_tokenizer_no_template(run: Run, trained: Path, from_elsewhere: Path, tmp_path: Path) -> None:
    assert_usage_error(run("generate", tmp_path, "--prompt", "a"), "expected the output directory of a run")
    bare = tmp_path / "bare"
    model_of().save_pretrained(bare)
    assert_usage_error(run("generate", bare, "--prompt", "a"), "expected a tokenizer.json beside config.json, found none")
    assert_usage_error(run("chat", trained), "expected a chat template, found none; give one by --chat-template")
    assert_usage_error(run("generate", from_elsewhere, "--prompt", ""), "--prompt: expected one token at least, found none")


def test_a_chat_keeps_its_history_until_it_is_reset(
    run: Run, from_elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = f"/save {tmp_path / 'chat.jsonl'}"
    typed = ["the fold", "of", save, "", "/reset", "the fold", "/sav", save]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    ended = run("chat", from_elsewhere, "--system", "a", "--temperature", "0", "--max-tokens", "4")
    assert ended.status == 0, ended
    assert "error: /sav: did you mean /save?" in ended.err
    first, second = (row["messages"] for row in lines((tmp_path / "chat.jsonl").read_text(encoding="utf-8")))
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user", "assistant"]
    assert second == first[:3]
    assert ended.out == "".join(f"{message['content']}\n" for message in (first[2], first[4], second[2]))


def test_an_answer_ends_with_the_token_that_the_template_writes_behind_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, end = model_of(tied=False), 1  # a model that says nothing but <|begin|>, which is not its EOS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float(name.endswith(("norm.weight", "embed_tokens.weight"))))
        model.lm_head.weight[end] = 1.0
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    template = TEMPLATE.replace("eos_token", "'<|begin|>'")
    (tmp_path / "chat_template.jinja").write_text(template)
    said: list[Answer] = []
    answer = chat_module._answer

    def seen(*args: Any) -> Iterator[tuple[Answer, ...]]:
        for answers in answer(*args):
            said[:] = answers
            yield answers

    monkeypatch.setattr(chat_module, "_answer", seen)
    monkeypatch.setattr("sys.stdin", io.StringIO("the fold"))
    ended = run("chat", tmp_path, "--temperature", "0", "--max-tokens", "3")
    assert (ended.status, ended.out, said) == (0, "\n", [Answer(finish="stop")])


@pytest.mark.parametrize("terminal", [True, False])
def test_only_who_types_is_prompted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    stdin = io.StringIO("a\n\nb")
    monkeypatch.setattr(stdin, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdin", stdin)
    assert list(chat_module._lines()) == ["a", "b"]
    assert capsys.readouterr().out == ("> > > > \n" if terminal else "")


def test_ctrl_c_ends_an_answer_and_keeps_what_there_is_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    from fnrecipe.generation.answer import Answer

    def said() -> Iterator[tuple[Answer, ...]]:
        yield (Answer(words="the"),)
        yield (Answer(words="the fold"),)
        raise KeyboardInterrupt

    assert chat_module._say(said(), ()) == "the fold"
    assert capsys.readouterr().out == "the fold …\n"


def test_a_sample_is_generated_with_the_cache(trained: Path) -> None:
    found, config, params = fnrecipe.load(trained)
    assert found.sample is not None
    text = found.sample(config, params, fnrecipe.random.key(0))
    assert text == found.sample(config, params, fnrecipe.random.key(0))

"""`docs/stages.md`: its lines, one behind the other, make a model, teach it to answer, let it prefer, and take it away."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import end, rows, start

PAGE = (Path(__file__).parent.parent / "docs/stages.md").read_text()


def lines() -> list[list[str]]:
    """The words of each command."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.mark.slow
def test_the_stages_of_the_page_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/stages.md", "exec", dont_inherit=True), {})  # noqa: S102 the document is ours
    said = {}
    for program, verb, *args in lines():
        assert program == "fnrecipe"
        args, given = (args[:-2], args[-1]) if args[-2] == "<" else (args, os.devnull)
        with open(given) as stdin:
            done = end(start(verb, *args, cwd=tmp_path, stdin=stdin))
        assert done.status == 0, done
        said[verb] = done.output
    for run in ("base", "chat", "dpo"):
        metrics = rows(tmp_path / "runs" / run / "metrics/train.jsonl")
        assert metrics[-1]["train/loss"] < 0.7 * metrics[0]["train/loss"], run
    assert metrics[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-3), "the scores are those of what it begins with"
    assert metrics[-1]["train/rewards/accuracies"] == 1
    assert json.loads((tmp_path / "base.json").read_text())["total"]["targets"] > 200
    theirs, words = (kind.from_pretrained(tmp_path / "dpo-hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    chat = [{"role": "user", "content": "two plus three?"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = words.decode(theirs.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer
    assert answer in said["chat"], "what the exported model answers is what the run's does"

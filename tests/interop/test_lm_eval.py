"""The adapter to lm-evaluation-harness finds what the harness's own model of transformers finds with the same weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell.trained.export import import_model

MODULE = "fnrecipe.interop.lm_eval"
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
    {"context": "the state of a fold", "choices": ["the key", "a tree of", "loss"], "answer": 2},
    {"context": "lane ", "choices": ["batch", "the stream"], "answer": 0},
    {"context": "", "choices": ["batch", "the stream"], "answer": 1},
    {"context": "the of a fold state step key leaf tree " * 8, "choices": ["batch", "the stream"], "answer": 1},
]
TEXTS = ["the state of a fold", "é", "a leaf of the tree and the key of a step " * 9, "x"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The harness, which keeps what it caches to itself and asks nobody else for data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'fnrecipe[lm-eval]'")
        importlib.import_module(MODULE)
        yield found


@pytest.fixture(scope="module")
def models(harness: Any, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ours on a directory of Hugging Face and on a run with the same weights, and the harness's own on that directory."""
    run = tmp_path_factory.mktemp("runs") / "imported"
    config, _ = resolve(lm.config, (), [f"model.path={saved / 'tied'}", "dataset.max_seq_len=32"])
    import_model(lm, config, run)
    find = harness.api.registry.get_model
    return {
        "directory": find("fnrecipe")(pretrained=str(saved / "tied"), device="cpu", batch_size=3),
        "run": find("fnrecipe")(pretrained=str(run), device="cpu"),
        "own": find("hf")(pretrained=str(saved / "tied"), device="cpu", batch_size=2),
    }


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.mark.parametrize("ours", ["directory", "run"])
def test_likelihoods(models: dict[str, Any], ours: str) -> None:
    pairs = [(question["context"], f" {choice}") for question in QUESTIONS for choice in question["choices"]]
    asked = requests("loglikelihood", *pairs)
    found, expected = models[ours].loglikelihood(asked), models["own"].loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("ours", ["directory", "run"])
def test_likelihoods_of_whole_texts(models: dict[str, Any], ours: str) -> None:
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    found, expected = models[ours].loglikelihood_rolling(asked), models["own"].loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ours", ["directory", "run"])
def test_what_is_generated(models: dict[str, Any], ours: str) -> None:
    asked = requests("generate_until", *((text, {"until": ["of"], "max_gen_toks": 9}) for text in TEXTS))
    found, expected = models[ours].generate_until(asked), models["own"].generate_until(asked)
    assert found == expected
    assert any(found)


def test_a_local_task_has_the_same_results(harness: Any, models: dict[str, Any], tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "some.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.format(path=tmp_path / "some.jsonl"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = {
        name: harness.simple_evaluate(model, tasks=["local_questions"], task_manager=manager, bootstrap_iters=0)
        for name, model in models.items()
    }
    results = {name: each["results"]["local_questions"] for name, each in found.items()}
    assert results["directory"] == results["run"] == results["own"]
    assert 0 < results["own"]["acc,none"] < 1


def test_what_is_wrong_is_told(harness: Any, models: dict[str, Any], saved: Path) -> None:
    make = harness.api.registry.get_model("fnrecipe")
    with pytest.raises(UsageError, match="pretrained: expected a directory of Hugging Face or of a run"):
        make(pretrained="nowhere")
    with pytest.raises(UsageError, match=r"pretrained: expected a tokenizer\.json in .*untied, found none"):
        make(pretrained=str(saved / "untied"))
    with pytest.raises(UsageError, match="batch_size: expected a number of rows from 1, found auto"):
        make(pretrained=str(saved / "tied"), batch_size="auto")
    with pytest.raises(UsageError, match="max_gen_toks: expected less than the 32 tokens of a row, found 256"):
        models["run"].generate_until(requests("generate_until", ("a", {})))

"""Directories that cannot be used: each is refused in a line that names the file, what was expected and what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

from fnrecipe import random
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.interop import pretrained
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.lm.config import config as lm
from tests.interop.reading import read, section

Change = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def config(**values: Any) -> Change:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Change:
    def write(path: Path) -> None:
        found = load_file(path / name)
        change(found)
        save_file(found, path / name)

    return write


def index(change: Callable[[dict[str, str]], object]) -> Change:
    def write(path: Path) -> None:
        found = json.loads((path / INDEX).read_text())
        change(found["weight_map"])
        (path / INDEX).write_text(json.dumps(found))

    return write


def truncated(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:-1])


def pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def twice(path: Path) -> None:
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    found = load_file(first)
    save_file({**load_file(second), next(iter(found)): next(iter(found.values()))}, second)


def last_shard(path: Path) -> Path:
    return max(path.glob("model-*.safetensors"))


CONFIGS: dict[str, tuple[Change, str]] = {
    "an unknown model type": (
        config(model_type="lama"),
        "; DIR/config.json: expected a model_type that is known, found 'lama'; did you mean llama?",
    ),
    "no model type": (config(model_type=None), "; DIR/config.json: expected a model_type that is known, found None; valid"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq"}),
        "; DIR/config.json: expected weights that are not quantised, found those of quantization_config 'gptq'",
    ),
    "what the family cannot compute": (
        config(hidden_act="gelu"),
        "; DIR: hidden_act: expected silu, found 'gelu' (config.json)",
    ),
    "a wrong type": (config(hidden_size="32"), "; DIR: hidden_size: expected an integer, found '32' (config.json)"),
    "a torn config": (
        lambda path: (path / "config.json").write_text("{"),
        "; DIR/config.json: expected JSON, found JSONDecode",
    ),
    "a list": (lambda path: (path / "config.json").write_text("[]"), "; DIR/config.json: expected a JSON object, found list"),
    "a deep config": (
        lambda path: (path / "config.json").write_text("[" * 10**5),
        "; DIR/config.json: expected JSON, found Rec",
    ),
    "no config": (lambda path: (path / "config.json").unlink(), "; DIR: neither config.json nor config.yaml in it"),
    "a file": (lambda path: [shutil.rmtree(path), path.write_text("")], "; DIR: no directory"),
    "nothing": (shutil.rmtree, "; DIR: no such directory"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_used(saved: Path, tmp_path: Path, name: str) -> None:
    change, message = CONFIGS[name]
    path = Path(shutil.copytree(saved / "tied", tmp_path / "d"))
    change(path)
    with pytest.raises(UsageError) as caught:
        resolve(lm, pairs=[f"model.path={path}", "dataset.max_seq_len=32"])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        "model.path: expected a directory of Hugging Face or of a run, with a model of a family that fnrecipe"
    )
    assert f"(command line){message}" in line.replace(str(path), "DIR")


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("HuggingFaceTB/SmolLM2-1.7B", "; if it is the name of a model on a hub: hf download HuggingFaceTB/SmolLM2-1.7B"),
        ("runs/first", ""),
        ("/models/smollm", ""),
        ("models/smollm/base", ""),
        ("smollm", ""),
    ],
)
def test_a_name_on_a_hub_is_told_how_it_comes_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, advice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError) as caught:
        resolve(lm, pairs=[f"model.path={path}"])
    line, _, name = str(caught.value).partition(" --local-dir ")
    assert line.endswith(f"(command line); {path}: no such directory{advice}")
    assert name == ("SmolLM2-1.7B" if advice else "")


BROKEN: dict[str, tuple[str, Change, str]] = {
    "pickled": (
        "tied",
        pickled,
        "DIR: expected model.safetensors or model.safetensors.index.json, found only pytorch_model.bin, a pickle, which "
        "executes code when it is read",
    ),
    "no weights": (
        "tied",
        lambda path: (path / WEIGHTS).unlink(),
        "DIR: expected model.safetensors or model.safetensors.index.json, found neither",
    ),
    "truncated": ("tied", truncated, "DIR/model.safetensors: not a whole safetensors file: Error while deserializing header: "),
    "empty": ("tied", lambda path: (path / WEIGHTS).write_bytes(b""), "DIR/model.safetensors: not a whole safetensors file: "),
    "missing": (
        "tied",
        tensors(lambda found: found.pop("model.norm.weight")),
        "DIR: expected every tensor that model.config has, missing: model.norm.weight",
    ),
    "left over": (
        "tied",
        tensors(lambda found: found.update({f"model.layers.{n}.extra": torch.ones(1) for n in range(12)})),
        "DIR: expected no tensor that model.config has not, left over: model.layers.0.extra, model.layers.1.extra, "
        "model.layers.10.extra, model.layers.11.extra, model.layers.2.extra, model.layers.3.extra, model.layers.4.extra, "
        "model.layers.5.extra, model.layers.6.extra, model.layers.7.extra, … (12 in all)",
    ),
    "another shape": (
        "tied",
        tensors(lambda found: found.update({"model.norm.weight": torch.ones(31)})),
        "DIR/model.safetensors: model.norm.weight: expected the shape [32] by model.config, found [31]",
    ),
    "integers": (
        "tied",
        tensors(lambda found: found.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "DIR: expected tensors of F32, BF16, F16, not quantised ones, found model.norm.weight (I8)",
    ),
    "a head of its own": (
        "untied",
        config(tie_word_embeddings=True),
        "DIR: expected no head of its own for model.config.tied_embeddings=true, found lm_head.weight in model.safetensors, "
        "which is not model.embed_tokens.weight",
    ),
    "no head": (
        "tied",
        config(tie_word_embeddings=False),
        "DIR: expected every tensor that model.config has, missing: lm_head.weight",
    ),
    "more layers": (
        "tied",
        config(num_hidden_layers=1),
        "DIR: expected no tensor that model.config has not, left over: model.layers.1.input_layernorm.weight, ",
    ),
    "in two shards": (
        "sharded",
        twice,
        f"DIR/{INDEX}: expected each tensor once, in the file that it names, found tensors in two files: "
        "model.embed_tokens.weight (model-00001-of-00005.safetensors and model-00002-of-00005.safetensors)",
    ),
    "a lost shard": ("sharded", lambda path: last_shard(path).unlink(), "DIR/model-00005-of-00005.safetensors: no such file"),
    "not in its shard": (
        "sharded",
        index(lambda places: places.update({"model.more.weight": "model-00001-of-00005.safetensors"})),
        f"DIR/{INDEX}: expected each tensor once, in the file that it names, found tensors that are not in their files: "
        "model.more.weight (model-00001-of-00005.safetensors)",
    ),
    "in another shard": (
        "sharded",
        index(lambda places: places.update({"model.norm.weight": "model-00001-of-00005.safetensors"})),
        f"DIR/{INDEX}: expected each tensor once, in the file that it names, found tensors that it says are "
        "elsewhere, or nowhere: model.norm.weight (model-00005-of-00005.safetensors)",
    ),
    "out of the directory": (
        "sharded",
        index(lambda places: places.update({"model.norm.weight": "../model.safetensors"})),
        f"DIR/{INDEX}: expected a weight_map of names of tensors to names of files in this directory",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_cannot_be_used(saved: Path, tmp_path: Path, name: str) -> None:
    kind, change, message = BROKEN[name]
    path = Path(shutil.copytree(saved / kind, tmp_path / "d"))
    change(path)
    with pytest.raises(UsageError) as caught:
        read(path)
    found = str(caught.value).replace(str(path), "DIR")
    assert found.startswith(message)
    assert "\n" not in found


def test_everything_is_told_at_once(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved / "tied", tmp_path / "d"))
    tensors(lambda found: [found.pop("model.norm.weight"), found.update({"a": torch.ones(1)})])(path)
    config(intermediate_size=40)(path)
    with pytest.raises(UsageError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 + 6
    assert sum("expected the shape " in line for line in lines) == 6


def test_what_a_user_writes_of_the_shape_is_held_against_the_weights(saved: Path) -> None:
    found, _ = resolve(lm, pairs=[f"model.path={saved / 'tied'}", "model.config.vocab_size=300", "dataset.max_seq_len=32"])
    with pytest.raises(
        UsageError, match=r"embed_tokens\.weight: expected the shape \[300, 32\] by model\.config, found \[288, 32\]"
    ):
        read(saved / "tied", config=found.model.config)


def test_a_directory_that_is_gone_gives_no_weights(saved: Path, tmp_path: Path) -> None:
    gone = attrs.evolve(section(saved / "tied"), path=str(tmp_path / "gone"))
    with pytest.raises(UsageError) as caught:
        pretrained(gone, random.key(0), replicated)
    assert str(caught.value) == f"model.path: expected a directory with weights to begin with, found none: {tmp_path / 'gone'}"


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (["model.arch=llama_1b"], "model.arch: expected null beside model.path=DIR, found 'llama_1b' (command line)"),
        (["model.name=llama_1b"], "model.name: expected null beside model.path=DIR, found 'llama_1b' (command line)"),
        (
            ["model.family=my_model.py"],
            "model.family: expected llama, which DIR/config.json says, found 'my_model.py' (command line)",
        ),
    ],
)
def test_tags_that_speak_of_another_model_are_refused(saved: Path, pairs: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(lm, pairs=[f"model.path={saved / 'tied'}", *pairs])
    assert str(caught.value).replace(str(saved / "tied"), "DIR") == line

"""What the documents say is true: their code runs, their keys exist, their commands are the tested ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fnrecipe.config import DataSource, resolve, unstructure, yaml
from fnrecipe.config.find import Kind, find_component, known
from fnrecipe.config.sections.model import named
from fnrecipe.config.sections.optim import CRITERIA, LR_SCHEDULERS, OPTIMIZERS
from fnrecipe.data.examples import KEYS
from fnrecipe.data.preferences import KEYS as PREFERENCE_KEYS
from fnrecipe.recipes.lm.config import config
from fnrecipe.recipes.preference.config import config as preference_config
from fnrecipe.recipes.sft.config import config as sft_config

ROOT = Path(__file__).parent.parent


def python_blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


PAGES = (
    "streams",
    "data",
    "config",
    "checkpoints",
    "updates",
    "recipes",
    "models",
    "generate",
    "sft",
    "preference",
    "adapters",
)
DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in PAGES)]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_python_in_the_documents_runs(path: str) -> None:
    names: dict[str, Any] = {}
    blocks = python_blocks(path)

    assert blocks
    for block in blocks:
        exec(compile(block, path, "exec", dont_inherit=True), names)  # noqa: S102 the documents are ours


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/faults.md").read_text())

    assert len(named) > 100
    text = (ROOT / "docs/faults.md").read_text()
    numbered = re.findall(r"^\| (\d+) \| .*`[\w/]+\.py::\w+` \|$", text, re.MULTILINE)
    assert [int(number) for number in numbered] == list(range(1, 41))
    for path, function in named:
        source = (ROOT / "tests" / path).read_text()
        assert f"def {function}(" in source if function else source, f"{path}::{function}"


def test_the_recipe_of_the_readme_reads_the_config_that_it_is_given() -> None:
    names: dict[str, Any] = {}
    (source,) = [block for block in python_blocks("README.md") if "my_recipe.py" in block]
    exec(compile(source, "README.md", "exec"), names)  # noqa: S102 the document is ours
    recipe = names["recipe"]
    changed, _ = resolve(
        config, pairs=["optimizer.config.lr=0.5", "regime.num_steps=20", "lr_scheduler.config.num_warmup_steps=4"]
    )
    update, params = recipe.update(changed), {"x": torch.ones(3)}

    rates = [update.update(params, update.init(params), params, torch.tensor(step))[2]["lr"] for step in (1, 4, 20)]
    assert [float(rate) for rate in rates] == pytest.approx([0.125, 0.5, 0.05], abs=1e-6)


def test_every_key_of_the_config_is_explained_once_and_no_other() -> None:
    explained = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/config.md").read_text(), re.MULTILINE)

    assert explained == leaves(config)


def test_every_key_that_sft_has_beside_those_of_lm_is_explained_once_and_no_other() -> None:
    explained = re.findall(r"^\| `(dataset\.\w+)` \|", (ROOT / "docs/sft.md").read_text(), re.MULTILINE)

    assert explained == [key for key in leaves(sft_config) if key not in leaves(config)]


def test_every_key_of_an_example_is_explained_and_no_other() -> None:
    (table,) = re.findall(r"^\| keys \| example \|\n((?:\|.*\n)+)", (ROOT / "docs/sft.md").read_text(), re.MULTILINE)
    named = {word for line in table.splitlines() for word in re.findall(r"`(\w+)`", line.split(" | ")[0])}

    assert named | {"input"} == KEYS


def test_every_key_that_preference_has_beside_those_of_lm_is_explained_once_and_no_other() -> None:
    explained = re.findall(r"^\| `([\w.]+\.\w+)` \|", (ROOT / "docs/preference.md").read_text(), re.MULTILINE)

    assert explained == [key for key in leaves(preference_config) if key not in leaves(config)]


def test_every_key_of_a_preference_is_explained_and_no_other() -> None:
    (table,) = re.findall(r"^\| keys \| preference \|\n((?:\|.*\n)+)", (ROOT / "docs/preference.md").read_text(), re.MULTILINE)
    named = {word for line in table.splitlines() for word in re.findall(r"`(\w+)`", line.split(" | ")[0])}

    assert named | KEYS == PREFERENCE_KEYS
    assert not named & KEYS


@pytest.mark.parametrize(
    ("section", "kind", "page"),
    [
        ("optimizer", OPTIMIZERS, "config"),
        ("lr_scheduler", LR_SCHEDULERS, "config"),
        ("criterion", CRITERIA, "preference"),
    ],
)
def test_every_component_and_its_keys_are_explained(section: str, kind: Kind[Any], page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    for name in known(kind):
        keys = [f"{section}.config.{field.name}" for field in attrs.fields(find_component(name, kind).config)]
        assert not [word for word in [name, *keys] if f"`{word}`" not in text]


def test_every_named_architecture_is_explained() -> None:
    (row,) = re.findall(r"^\| `model.name` \| (.*) \|$", (ROOT / "docs/config.md").read_text(), re.MULTILINE)
    assert re.findall(r"`(\w+)`", row.partition(";")[0]) == list(named())


def test_the_dump_of_the_documents_is_what_is_dumped() -> None:
    pairs = ["model.name=llama3_2_1b", "model.config.num_layers=2"]
    changed, sources = resolve(config, pairs=pairs)
    (shown,) = re.findall(r"(model:\n.*?)```", (ROOT / "docs/config.md").read_text(), re.DOTALL)
    assert yaml.dump(unstructure(changed), sources).startswith(shown)


def test_every_key_of_a_source_is_explained_once_and_no_other() -> None:
    keys, _, _ = (ROOT / "docs/data.md").read_text().partition("| format |")
    explained = re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)

    assert explained == [field.name for field in attrs.fields(DataSource)]


def test_the_readme_shows_what_the_program_says(capsys: pytest.CaptureFixture[str]) -> None:
    from fnrecipe.errors import ConfigError
    from fnrecipe.shell.find_recipe import find

    shown = re.findall(r"^error: (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    with pytest.raises(ConfigError) as error:
        resolve(find("lm").config, pairs=["optimizer.config.lr=-1", "regime.num_stepz=5", "gang.num_microbatches=3"])

    assert str(error.value).splitlines() == shown


def leaves(section: Any, path: str = "") -> list[str]:
    if not attrs.has(type(section)):
        return [path.removesuffix(".")]
    names = [field.name for field in attrs.fields(type(section))]
    return [leaf for name in names for leaf in leaves(getattr(section, name), f"{path}{name}.")]

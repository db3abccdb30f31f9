"""Tags: which config they choose, what of the values written under other tags counts, and how a wrong tag is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig
from fnrecipe.components.lr_schedulers.wsd import WSDConfig
from fnrecipe.config import LRSchedulerSection, ModelSection, OptimizerSection, resolve, unstructure, yaml
from fnrecipe.config.find import known
from fnrecipe.config.layers import flatten
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.config.sections.optim import LR_SCHEDULERS, OPTIMIZERS
from fnrecipe.errors import ConfigError
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.llama.config import ARCHS
from fnrecipe.recipes.lm.config import LMConfig, config
from tests.cli.helpers import python

MODEL = """
from attrs import frozen
from fnrecipe.models.model import Model

@frozen
class MyConfig:
    vocab_size: int = 300
    max_seq_len: int = 512
    width: int = 7

@frozen
class Bare:
    width: int

@frozen
class NoText:
    width: int = 3

without_default = Model(config=Bare, init=None, apply=None)
no_text = Model(config=NoText, init=None, apply=None)
model = Model(config=MyConfig, archs={"wide": MyConfig(width=70), "long": MyConfig(max_seq_len=9999)}, init=None, apply=None)
"""
OPTIMIZER = """
from attrs import frozen
from fnrecipe.components.component import Optimizer

@frozen
class SGDConfig:
    lr: float = 0.1
    momentum: float = 0.5

sgd = Optimizer(SGDConfig, None)
"""
Sources = dict[str, str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to be in, with components of a user."""
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "my_optimizer.py").write_text(OPTIMIZER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_model", "my_optimizer", "wrong"):
        sys.modules.pop(name, None)


def resolved(*layers: str | list[str]) -> tuple[LMConfig, Sources]:
    """What texts of files, and the pairs behind them, make of the recipe."""
    texts, pairs = [layer for layer in layers if isinstance(layer, str)], [layer for layer in layers if isinstance(layer, list)]
    files = [Path(f"{number}.yaml") for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return resolve(config, files, *pairs)


def refusal(*layers: str | list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(*layers)
    return str(caught.value).splitlines()


def sources_of(sources: Sources, section: str) -> Sources:
    return {path.removeprefix(f"{section}."): source for path, source in sources.items() if path.startswith(f"{section}.")}


@pytest.mark.parametrize(
    ("pairs", "tags", "derived"),
    [
        (["model.name=llama3_2_1b"], ("llama3_2_1b", "llama", "llama3_2_1b"), "name llama3_2_1b"),
        (["model.arch=llama3_2_1b"], (None, "llama", "llama3_2_1b"), "command line"),
        (["model={family: llama, arch: llama3_2_1b}"], (None, "llama", "llama3_2_1b"), "command line"),
    ],
)
def test_an_arch_is_a_layer_over_the_defaults_of_its_class(
    pairs: list[str], tags: tuple[str | None, ...], derived: str
) -> None:
    found, sources = resolved([*pairs, "model.config.num_layers=3"])
    assert (found.model.name, found.model.family, found.model.arch) == tags
    assert found.model.config == attrs.evolve(ARCHS["llama3_2_1b"], num_layers=3)
    of_config = sources_of(sources, "model.config")
    assert of_config["num_layers"] == "command line"
    assert (of_config["head_dim"], of_config["norm_eps"]) == ("arch llama3_2_1b", "default")
    assert set(of_config.values()) == {"default", "arch llama3_2_1b", "command line"}
    assert sources["model.arch"] == derived


def test_a_tag_that_is_written_as_it_is_switches_nothing() -> None:
    found, sources = resolved(
        ["model.family=llama", "model.arch=null", "optimizer.name=adamw", "lr_scheduler.name=cosine_annealing"]
    )
    assert found == config
    assert sources["model.config.model_dim"] == sources["optimizer.config.lr"] == "recipe"


def test_of_a_switched_section_nothing_of_the_recipe_is_left() -> None:
    found, sources = resolved(["lr_scheduler.name=wsd", "model.arch=llama_125m"])
    assert found.lr_scheduler.config == WSDConfig()
    assert found.model.config == ARCHS["llama_125m"]
    assert "recipe" not in {**sources_of(sources, "lr_scheduler"), **sources_of(sources, "model")}.values()
    assert "lr_scheduler.config.cycle_len" not in flatten(unstructure(found), "")
    assert sources.keys() == flatten(unstructure(found), "").keys()
    assert found.optimizer == config.optimizer


@pytest.mark.parametrize("pairs", [["lr_scheduler.config.final_lr_scale=0.5"], []])
@pytest.mark.parametrize("behind", [True, False])
def test_the_order_of_pairs_does_not_matter_to_a_tag(pairs: list[str], behind: bool) -> None:
    tag = ["lr_scheduler.name=wsd"]
    found, _ = resolved([*tag, *pairs] if behind else [*pairs, *tag])
    assert found.lr_scheduler.config == WSDConfig(final_lr_scale=0.5 if pairs else 0.0)


def test_a_file_loses_what_it_says_of_a_config_that_a_later_source_switches_from() -> None:
    file = "lr_scheduler: {name: cosine_annealing, config: {cycle_len: 100, final_lr_scale: 0.5}}"
    assert resolved(file, ["lr_scheduler.name=wsd"])[0].lr_scheduler == LRSchedulerSection("wsd", WSDConfig())
    wsd = "lr_scheduler: {config: {num_decay_steps: 7}, name: wsd}"
    assert resolved(file, wsd, ["lr_scheduler.config.final_lr_scale=0.25"])[0].lr_scheduler.config == WSDConfig(0, 7, 0.25)


def test_what_was_said_before_a_tag_was_switched_and_switched_back_counts() -> None:
    layers = "lr_scheduler: {config: {cycle_len: 100}}", "lr_scheduler: {name: wsd, config: {final_lr_scale: 0.7}}"
    found, sources = resolved(*layers, ["lr_scheduler.name=cosine_annealing"])
    assert found.lr_scheduler.config == CosineAnnealingConfig(0.067, 100, 0.1)
    assert sources["lr_scheduler.config.num_warmup_steps"] == "recipe"


@pytest.mark.parametrize(
    ("file", "pairs", "tags"),
    [
        ("model: {name: llama_1b}", ["model.arch=llama_tiny"], (None, "llama", "llama_tiny")),
        ("model: {name: llama_1b}", ["model.arch=null"], (None, "llama", None)),
        ("model: {name: llama_1b}", ["model.name=llama_tiny"], ("llama_tiny", "llama", "llama_tiny")),
        ("model: {name: llama_1b}", ["model.name=null"], (None, "llama", "llama_1b")),
        ("model: {name: llama_1b}", ["model.family=my_model.py"], (None, "my_model.py", None)),
        ("model: {family: my_model.py, arch: wide}", ["model.arch=long"], (None, "my_model.py", "long")),
        ("model: {family: my_model.py, arch: wide}", ["model.family=llama"], (None, "llama", None)),
        ("model: {family: my_model.py, arch: wide}", ["model.family=my_model.py"], (None, "my_model.py", "wide")),
        ("model: {family: my_model.py, arch: wide}", ["model.name=llama_1b"], ("llama_1b", "llama", "llama_1b")),
        ("model: {family: no_such, arch: wide}", ["model.name=llama_1b"], ("llama_1b", "llama", "llama_1b")),
    ],
)
def test_a_tag_of_a_model_ends_those_of_earlier_sources_that_it_contradicts(
    file: str, pairs: list[str], tags: tuple[str | None, ...]
) -> None:
    model = resolved(file, pairs)[0].model
    assert (model.name, model.family, model.arch) == tags
    chosen = ModelSection(family=tags[1] or "", arch=tags[2])
    assert model.config == (config.model.config if chosen == ModelSection() else chosen.config), "the recipe speaks of its own"


@pytest.mark.parametrize("name", ["my_model.py", "./my_model.py", "{here}/my_model.py", "my_model:model"])
def test_a_family_of_a_user_has_its_own_config_and_archs(name: str, here: Path) -> None:
    name = name.format(here=here)
    found, sources = resolved([f"model.family={name}", "model.arch=wide", "model.config.max_seq_len=256"])
    assert unstructure(found.model) == {
        "name": None,
        "path": None,
        "family": name,
        "arch": "wide",
        "dtype": "float32",
        "adapter": {"name": None, "path": None, "rank": 16, "alpha": 32.0, "targets": ["layers.*"], "dropout": 0.0},
        "transfer": {"name": None, "base_width": None, "base_depth": None, "base_head_dim": None},
        "dropout_p": 0.0,
        "config": {"vocab_size": 300, "max_seq_len": 256, "width": 70},
    }
    assert sources_of(sources, "model.config") == {"vocab_size": "default", "max_seq_len": "command line", "width": "arch wide"}


def test_an_optimizer_of_a_user_has_its_own_config() -> None:
    found, _ = resolved(["optimizer={name: my_optimizer:sgd, config: {momentum: 0.9}}"])
    expected = {
        "name": "my_optimizer:sgd",
        "config": {"lr": 0.1, "momentum": 0.9},
        "state_dtype": None,
        "weight_decay_scheduler": None,
        "momentum_scheduler": None,
        "groups": [],
    }
    assert unstructure(found.optimizer) == expected
    assert refusal(["optimizer={name: my_optimizer:sgd, config: {betas: [0.9, 0.9]}}"]) == [
        "optimizer.config.betas: expected a known key, found 'betas' (command line); valid names: lr, momentum"
    ]


PAIRS = {
    "arch": ["model.name=llama_125m", "model.config.num_layers=2"],
    "family": ["model.family=my_model.py", "model.arch=wide", "model.config.max_seq_len=256"],
    "optimizer": ["optimizer.name=my_optimizer:sgd", "optimizer.config.lr=0.7"],
    "schedule": ["lr_scheduler.name=wsd", "lr_scheduler.config.num_decay_steps=5"],
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_dump_with_other_tags_reads_back_from_the_file_alone(name: str) -> None:
    written, _ = resolved(PAIRS[name])
    read, sources = resolved(yaml.dump(unstructure(written)))
    assert read == written
    assert type(read.model.config) is type(written.model.config)
    assert {source.partition(":")[0] for source in sources.values()} == {"0.yaml"}


NAMES = "path/to/file.py or module:attribute"
OPTIMIZER_NAMES = " or ".join(known(OPTIMIZERS))
SCHEDULES = " or ".join(known(LR_SCHEDULERS))
FAMILY = f"{' or '.join(known(FAMILIES))} or {NAMES}"


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("model.family=lama", f"expected {FAMILY}, found 'lama' (command line); did you mean llama?"),
        ("model.family=3", f"expected {FAMILY}, found 3 (command line)"),
        ("model.family=null", f"expected {FAMILY}, found null (command line)"),
        ("model.family=flops", f"expected {FAMILY}, found 'flops' (command line); valid names: {', '.join(known(FAMILIES))}"),
        ("model.family=no.py", f"expected {FAMILY}, found 'no.py' (command line); no.py: no such file"),
        (
            "model.family=no_such:model",
            f"expected {FAMILY}, found 'no_such:model' (command line); no_such: no module called no_such here or installed",
        ),
        (
            "model.family=my_optimizer.py",
            f"expected {FAMILY}, found 'my_optimizer.py' (command line); "
            "my_optimizer.py: expected a fnrecipe Model called 'model' in it, found none",
        ),
        (
            "model.family=my_model:without_default",
            f"expected {FAMILY}, found 'my_model:without_default' (command line); "
            "my_model:without_default: expected its `config` to be an attrs class with a default for each field",
        ),
        (
            "model.family=my_optimizer:sgd",
            f"expected {FAMILY}, found 'my_optimizer:sgd' (command line); "
            "my_optimizer:sgd: expected a fnrecipe Model called 'sgd' in it, found Optimizer",
        ),
        (
            "lr_scheduler.name=my_optimizer:sgd",
            f"expected {SCHEDULES} or {NAMES}, found 'my_optimizer:sgd' (command line); "
            "my_optimizer:sgd: expected a fnrecipe LRScheduler called 'sgd' in it, found Optimizer",
        ),
        (
            "model.family=my_model:no_text",
            "expected a family whose config has max_seq_len and vocab_size, found 'my_model:no_text' (command line)",
        ),
        (
            "model.arch=llama_1bb",
            "expected null or an architecture of the family llama, found 'llama_1bb' (command line); did you mean llama_1b?",
        ),
        (
            "model.name=llama3_2b",
            "expected null or the name of an architecture, found 'llama3_2b' (command line); did you mean llama3_2_3b?",
        ),
        ("optimizer.name=adam", f"expected {OPTIMIZER_NAMES} or {NAMES}, found 'adam' (command line); did you mean adamw?"),
        (
            "lr_scheduler.name=cosine",
            f"expected {SCHEDULES} or {NAMES}, found 'cosine' (command line); valid names: constant, ",
        ),
        ("optimizer.name={a: 1}", f"expected {OPTIMIZER_NAMES} or {NAMES}, found {{'a': 1}} (command line)"),
        ("model.arch=[1]", "expected null or an architecture of the family llama, found [1] (command line); valid names: "),
    ],
)
def test_a_tag_that_chooses_nothing_is_one_line(pair: str, line: str) -> None:
    (found,) = refusal([pair])
    assert found.startswith(f"{pair.partition('=')[0]}: {line}")


def test_a_name_beside_another_arch_is_one_line() -> None:
    line = "model.name: expected null beside model.family=llama, model.arch=llama_1b, found 'llama_tiny' (command line)"
    assert refusal(["model={name: llama_tiny, arch: llama_1b}"]) == [line]


def test_a_wrong_tag_hides_the_values_of_its_config_and_nothing_else() -> None:
    lines = refusal(["model={family: lama, dtype: x, config: {a: 1}}", "regime.num_steps=x", "dataset.batch_size=12"])
    assert [line.partition(":")[0] for line in lines] == [
        "model.family",
        "model.dtype",
        "regime.num_steps",
        "dataset.batch_size",
        "dataset.batch_size",
    ]


def test_a_wrong_value_beside_a_switched_tag_leaves_its_own_conflicts_to_be_told() -> None:
    pairs = ["lr_scheduler={name: wsd, config: {num_decay_steps: 601}}", "optimizer.config.lr=x"]
    assert [line.partition(":")[0] for line in refusal(pairs)] == ["optimizer.config.lr", "lr_scheduler.config.num_decay_steps"]


@pytest.mark.parametrize(
    ("values", "num_steps", "line"),
    [
        ("{}", "null", "num_decay_steps: expected 0 where regime.num_steps is null, found 0.2 (default)"),
        (
            "{num_decay_steps: 0, num_warmup_steps: 0.5}",
            "null",
            "num_warmup_steps: expected an integer where regime.num_steps is null, found 0.5 (command line)",
        ),
        (
            "{num_decay_steps: 51, num_warmup_steps: 50}",
            "100",
            "num_decay_steps: expected at most the 50 steps that warm-up leaves of regime.num_steps = 100, "
            "found 51 (command line)",
        ),
        (
            "{num_warmup_steps: 100}",
            "100",
            "num_warmup_steps: expected less than regime.num_steps = 100, or a fraction below 1, found 100 (command line)",
        ),
        ("{num_decay_steps: 0}", "null", None),
        ("{num_decay_steps: 50, num_warmup_steps: 50}", "100", None),
    ],
)
def test_a_schedule_tells_what_does_not_fit_into_the_steps(values: str, num_steps: str, line: str | None) -> None:
    regime = f"regime={{num_steps: {num_steps}, num_data_epochs: 1}}"
    pairs = [f"lr_scheduler={{name: wsd, config: {values}}}", regime]
    if line is None:
        resolved(pairs)
    else:
        assert refusal(pairs) == [f"lr_scheduler.config.{line}"]


@pytest.mark.parametrize("name", ["linear", "polynomial_decay", "tri_stage", "cosine_with_restarts"])
def test_a_schedule_with_an_end_needs_steps(name: str) -> None:
    lines = refusal([f"lr_scheduler.name={name}", "regime={num_steps: null, num_data_epochs: 1}"])
    expected = {
        "cosine_with_restarts": "config.cycle_len: expected a number where regime.num_steps is null, found null (default)"
    }
    other = f"name: expected a schedule without an end where regime.num_steps is null, found '{name}' (command line)"
    assert lines == [f"lr_scheduler.{expected.get(name, other)}"]


def test_a_fraction_of_warm_up_needs_steps() -> None:
    pairs = ["lr_scheduler={name: noam, config: {num_warmup_steps: 0.5}}", "regime={num_steps: null, num_data_epochs: 1}"]
    line = "num_warmup_steps: expected an integer where regime.num_steps is null, found 0.5 (command line)"
    assert refusal(pairs) == [f"lr_scheduler.config.{line}"]


def test_the_stages_of_tri_stage_are_all_steps() -> None:
    line = "stage_ratio: expected three numbers whose sum is 1, found [0.5, 0.5, 0.5] (command line)"
    assert refusal(["lr_scheduler={name: tri_stage, config: {stage_ratio: [0.5, 0.5, 0.5]}}"]) == [
        f"lr_scheduler.config.{line}"
    ]


def test_an_exponential_has_two_steps_at_least() -> None:
    line = "first_step: expected less than the last step, 9, found 9 (command line)"
    pairs = ["lr_scheduler={name: exponential, config: {first_step: 9}}", "regime.num_steps=9"]
    assert refusal(pairs) == [f"lr_scheduler.config.{line}"]
    endless = ["lr_scheduler.name=exponential", "regime={num_steps: null, num_data_epochs: 1}"]
    line = "last_step: expected an integer where regime.num_steps is null, found null (default)"
    assert refusal(endless) == [f"lr_scheduler.config.{line}"]


def test_a_section_in_python_has_the_config_that_its_tags_choose() -> None:
    assert ModelSection().config == LlamaConfig()
    assert ModelSection(name="llama_1b") == ModelSection(name="llama_1b", arch="llama_1b", config=ARCHS["llama_1b"])
    assert ModelSection(family="my_model.py", arch="wide").config.width == 70  # type: ignore[attr-defined]
    assert LRSchedulerSection("wsd").config == WSDConfig()
    assert OptimizerSection() == attrs.evolve(config.optimizer, config=OptimizerSection().config)


def test_a_recipe_with_an_arch_of_its_own_passes_through(here: Path) -> None:
    mine = attrs.evolve(config, model=ModelSection(name="llama_tiny", config=attrs.evolve(ARCHS["llama_tiny"], num_layers=2)))
    found, sources = resolve(mine)
    assert found == mine
    assert (sources["model.config.num_layers"], sources["model.config.model_dim"]) == ("recipe", "arch llama_tiny")
    assert resolve(mine, pairs=["model.arch=null"])[0].model == ModelSection()


def test_nothing_that_comes_with_fnrecipe_imports_torch_to_be_chosen(here: Path) -> None:
    code = """if True:
        import sys
        from fnrecipe.config import resolve
        from fnrecipe.recipes.lm.config import config, needs
        changed, _ = resolve(config, pairs=["model.name=llama3_2_1b", "lr_scheduler.name=wsd"])
        needs(changed, 1)
        print("torch" in sys.modules)
    """
    assert python("-c", code, cwd=here).out == "False\n"

"""Layers of a config: which value wins, where each value says it comes from, and how problems are told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import pytest

from fnrecipe.config import resolve, unstructure
from fnrecipe.config.layers import difference, flatten, values
from fnrecipe.errors import ConfigError, UsageError
from fnrecipe.recipes.lm.config import LMConfig, config

LR = "optimizer.config.lr"


def write_files(folder: Path, texts: Sequence[str]) -> list[Path]:
    paths = [folder / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def refusal(*pairs: str, files: Sequence[Path] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(config, files, pairs)
    assert caught.value.exit_status == 2
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("path", "files", "pairs", "value", "source"),
    [
        ("optimizer.config.weight_decay", [], [], 0.1, "default"),
        (LR, [], [], config.optimizer.config.lr, "recipe"),
        (LR, ["optimizer:\n  config:\n    lr: 0.1"], [], 0.1, "0.yaml:3"),
        (LR, ["optimizer: {config: {lr: 0.1}}", "\noptimizer: {config: {lr: 0.2}}"], [], 0.2, "1.yaml:2"),
        (LR, ["optimizer: {config: {lr: 0.1}}", "common: {seed: 3}"], [], 0.1, "0.yaml:1"),
        (LR, ["optimizer: {config: {lr: 0.1}}"], [f"{LR}=0.3"], 0.3, "command line"),
        (LR, [], [f"{LR}=0.3", f"{LR}=0.4"], 0.4, "command line"),
        (LR, ["optimizer: {config: {lr: 0.1}}"], ["common.seed=3"], 0.1, "0.yaml:1"),
        (LR, ["optimizer: {config: {lr: 0.002}}"], [], 2e-3, "0.yaml:1"),
        ("optimizer.config.weight_decay", [], ["optimizer.config.weight_decay=0.1"], 0.1, "command line"),
    ],
)
def test_the_last_layer_wins(tmp_path: Path, path: str, files: list[str], pairs: list[str], value: object, source: str) -> None:
    resolved, sources = resolve(config, write_files(tmp_path, files), pairs)
    assert attrgetter(path)(resolved) == value
    assert sources[path].removeprefix(f"{tmp_path}/") == source


def test_without_files_and_pairs_the_recipe_is_what_it_was() -> None:
    assert resolve(config) == (config, resolve(config)[1])
    assert set(resolve(config)[1].values()) == {"default", "recipe"}


def test_every_value_has_a_source() -> None:
    resolved, sources = resolve(config, pairs=["dataset={order: documents, sources: [{path: a}]}"])
    assert sources.keys() == flatten(unstructure(resolved), "").keys()
    assert {path for path, source in sources.items() if source == "command line"} == {"dataset.order", "dataset.sources"}


def test_a_section_merges_with_what_is_below_it(tmp_path: Path) -> None:
    files = write_files(tmp_path, ["dataset: {batch_size: 16}", "dataset: {order: documents}"])
    resolved, _ = resolve(config, [str(files[0]), *files[1:]])
    assert (resolved.dataset.batch_size, resolved.dataset.order) == (16, "documents")
    assert resolved.dataset.max_seq_len == config.dataset.max_seq_len
    assert resolved.model == config.model


def test_a_list_takes_the_place_of_a_list(tmp_path: Path) -> None:
    files = write_files(tmp_path, ["dataset: {sources: [{path: a, weight: 2}, {path: b}]}"])
    resolved, _ = resolve(config, files, ["dataset.sources=[{path: c}]", "optimizer.config.betas=[0.5, 0.6]"])
    assert [(source.path, source.weight) for source in resolved.dataset.sources] == [("c", 1.0)]
    assert resolved.optimizer.config.betas == (0.5, 0.6)


def test_a_pair_can_give_a_whole_section() -> None:
    resolved, sources = resolve(config, pairs=["optimizer.config={lr: 1, eps: 0.5}", f"{LR}=2"])
    assert (resolved.optimizer.config.lr, resolved.optimizer.config.eps) == (2.0, 0.5)
    assert resolved.optimizer.config.betas == config.optimizer.config.betas
    assert sources["optimizer.config.eps"] == "command line"


def test_null_takes_the_place_of_a_value() -> None:
    resolved, _ = resolve(config, pairs=["trainer.max_grad_norm=null", "regime.keep_last_n_checkpoints="])
    assert resolved.trainer.max_grad_norm is None
    assert resolved.regime.keep_last_n_checkpoints is None


def test_a_value_and_a_section_of_one_name_take_each_others_place() -> None:
    assert resolve(config, pairs=[f"{LR}.x=1", f"{LR}=0.1"])[0].optimizer.config.lr == 0.1
    assert refusal(f"{LR}=0.1", f"{LR}.x=1") == [f"{LR}: expected a finite number, found {{'x': 1}} (command line)"]


@pytest.mark.parametrize(
    ("pair", "hint"),
    [
        ("regime.num_stps=1", "did you mean num_steps?"),
        ("optimiser.config.lr=1", "did you mean optimizer?"),
        ("dataset.sources=[{path: a, wieght: 1}]", "did you mean weight?"),
        ("lr=1", "did you mean optimizer.config.lr?"),
        ("optimizer.lr=1", "did you mean optimizer.config.lr?"),
        ("model.config.seed=1", "did you mean common.seed?"),
        (
            "trainer.zzz=1",
            "valid names: activation_checkpointing, average, cuda_graph, dtype, fp16_loss_scale, jit, logits_at_once, "
            "max_grad_norm, max_skipped_steps",
        ),
        ("regime.zzz={}", "valid names: "),
    ],
)
def test_an_unknown_key_gets_a_hint(pair: str, hint: str) -> None:
    (line,) = refusal(pair)
    path, key = pair.partition("=")[0], pair.partition("=")[0].rpartition(".")[2]
    if "sources" in pair:
        path, key = "dataset.sources[0].wieght", "wieght"
    if "optimiser" in pair:
        path = key = "optimiser"
    assert line.startswith(f"{path}: expected a known key, found '{key}' (command line); {hint}")


@pytest.mark.parametrize("pair", ["regime.num_steps={}", "dataset.order={}", "optimizer.config.betas={}", "zzz={}"])
def test_an_empty_mapping_is_not_ignored_where_no_section_is(pair: str) -> None:
    (line,) = refusal(pair)
    assert line.startswith(f"{pair.partition('=')[0]}: expected ")


def test_an_empty_section_changes_nothing() -> None:
    assert resolve(config, pairs=["optimizer={}", "model.config={}"])[0] == config


def test_all_problems_come_at_once_one_line_each_with_their_sources(tmp_path: Path) -> None:
    text = "regime:\n  num_steps: 2.7\n  seed: 3\noptimizer:\n  config:\n    betas: [0.9]\nlr: 1\n"
    (path,) = write_files(tmp_path, [text])
    lines = refusal("trainer.jit=trac", "dataset.batch_size=12", files=[path])
    assert sorted(lines) == [
        "dataset.batch_size: expected a multiple of dataset.num_lanes = 8, found 12 (command line)",
        "dataset.batch_size: expected a multiple of gang.num_microbatches = 8, found 12 (command line)",
        f"lr: expected a known key, found 'lr' ({path}:7); did you mean optimizer.config.lr?",
        f"optimizer.config.betas: expected a list of 2 values, found [0.9] ({path}:6)",
        f"regime.num_steps: expected an integer or null, found 2.7 ({path}:2)",
        f"regime.seed: expected a known key, found 'seed' ({path}:3); did you mean common.seed?",
        "trainer.jit: expected auto or off or trace or inductor, found 'trac' (command line); did you mean trace?",
    ]


def test_a_problem_in_a_list_has_the_line_of_the_list(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path, ["dataset:\n  order: blocks\n  sources:\n  - path: a\n  - path: b\n    weight: -1\n"])
    assert refusal(files=[path]) == [f"dataset.sources[1].weight: expected a number of at least 0, found -1 ({path}:4)"]


def test_a_contradiction_names_the_source_of_its_value(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path, ["model:\n  config:\n    max_seq_len: 30\n"])
    line = "dataset.max_seq_len: expected at most model.config.max_seq_len = 30, found 256"
    assert refusal(files=[path]) == [f"{line} (recipe)"]
    assert refusal("dataset.max_seq_len=256", files=[path]) == [f"{line} (command line)"]


def test_of_thousands_of_problems_the_first_are_told_and_the_others_counted(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path, ["".join(f"key_{number}: {number}\n" for number in range(8000)) + "regime: {num_steps: x}"])
    first, *lines, last = refusal(files=[path])
    assert first == f"regime.num_steps: expected an integer or null, found 'x' ({path}:8001)"
    assert lines[0].startswith(f"key_0: expected a known key, found 'key_0' ({path}:1); valid names: common, dataset, ")
    assert (len(lines), last) == (19, "  … and 7,981 more")


LARGE = {
    "unknown keys": lambda size: "".join(f"key_{number}: 1\n" for number in range(size)),
    "unknown keys of a section": lambda size: "regime:\n" + "".join(f"  num_step{number}: 1\n" for number in range(size)),
    "unknown sections": lambda size: "".join(f"s{number}: {{a: 1, b: {{c: 1}}}}\n" for number in range(size)),
    "sources": lambda size: "dataset:\n  sources:\n" + "".join(f"  - path: {number}\n" for number in range(size)),
    "conflicts": lambda size: "dataset:\n  sources:\n" + "  - {path: a, weight: 0}\n" * size,
    "unknown keys of sources": lambda size: "dataset:\n  sources:\n" + "  - {path: a, formt: jsonl}\n" * size,
    "wrong choices": lambda size: "dataset:\n  sources:\n" + "  - {path: a, format: jsnl}\n" * size,
}


@pytest.mark.parametrize("name", LARGE)
def test_twice_as_much_is_about_twice_the_work(tmp_path: Path, name: str) -> None:
    once, twice = (calls(path) for path in write_files(tmp_path, [LARGE[name](size) for size in (300, 600)]))
    assert twice < 2.2 * once


def calls(path: Path) -> int:
    """How many functions are called to resolve a config."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        resolve(config, [path])
    except ConfigError:
        pass
    finally:
        sys.setprofile(None)
    return count


def test_sections_and_values_that_take_each_others_place_again_and_again_are_settled() -> None:
    pairs = [pair for _ in range(50) for pair in ("regime.x.y=1", "regime.x=2", "regime.x.z.a=1")]
    assert [line.partition(":")[0] for line in refusal(*pairs)] == ["regime.x"]


def test_odd_keys_make_one_line_too(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path, ['"regime\\nfoo": 3\n"": 4\n'])
    assert len(refusal(files=[path])) == 2


@pytest.mark.parametrize("pair", ["", "lr", "=1", ".a=1", "a.=1", "a..b=1", "a-b=1", "1a=1", "a b=1", " a=1"])
def test_what_is_no_pair_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match=r"expected section\.key=value"):
        resolve(config, pairs=[pair])


@pytest.mark.parametrize("pair", ["common.seed=[1", "common.seed='1", "common.seed={a: 1, a: 2}", "common.seed=&a 1"])
def test_a_pair_that_is_not_yaml_names_itself(pair: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(config, pairs=[pair])
    assert str(caught.value).startswith(f"--config {pair}:1: ")


@pytest.mark.parametrize("key", ["a.", "optimizer.config.lr."])
def test_a_key_of_a_thousand_parts_is_refused(key: str) -> None:
    with pytest.raises(UsageError):
        resolve(config, pairs=[f"{key}{'a.' * 3000}a=1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"common: {seed: 1}\n# \xff", ": expected UTF-8 text, found byte 0xff at offset 20"),
        ("common: {seed: 1}".encode("utf-16"), ": expected UTF-8 text, found byte 0xff at offset 0"),
        (None, ": cannot read the config file: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        resolve(config, [path])
    assert str(caught.value) == f"{path}{message}"


def test_a_directory_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(config, [tmp_path])
    assert str(caught.value) == f"{tmp_path}: cannot read the config file: Is a directory"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# nothing\n", b"{}", b"\xef\xbb\xbf"])
def test_an_empty_file_changes_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert resolve(config, [path])[0] == config


@pytest.mark.parametrize(
    "content",
    [
        b"common:\n  seed: 7\n",
        b"common:\r\n  seed: 7\r\n",
        b"\xef\xbb\xbfcommon:\n  seed: 7\n",
        b"---\ncommon:\n  seed: 7\n...\n",
        b"common: {\n  seed: 7}\n",
    ],
)
def test_line_ends_byte_order_marks_and_document_marks_do_not_matter(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    resolved, sources = resolve(config, [path])
    assert resolved.common.seed == 7
    assert sources["common.seed"] == f"{path}:{3 if content.startswith(b'---') else 2}"


def test_difference_tells_changed_new_and_missing_values() -> None:
    old, new = flatten({"a": {"b": 1, "c": None}, "d": [1]}, "old"), flatten({"a": {"b": 2}, "d": [1], "e": None}, "new")
    assert difference(values(old), values(new)) == {"a.b": (1, 2), "a.c": (None, None), "e": (None, None)}


def test_a_recipe_of_another_class_has_its_own_layers() -> None:
    plain = LMConfig()
    with pytest.raises(ConfigError) as caught:
        resolve(plain)
    paths = [problem.path for problem in caught.value.problems]
    assert sorted(paths) == ["lr_scheduler.config.cycle_len", "regime.num_steps"]

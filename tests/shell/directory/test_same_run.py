"""What a run may go on with in its directory: its own config, and its own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fnrecipe import checkpoint
from fnrecipe.config import yaml
from fnrecipe.config.affects import runtime_paths
from fnrecipe.errors import UsageError
from fnrecipe.recipes.lm.config import config
from fnrecipe.shell.directory import layout, same_run
from tests.nobody import error_of_nobody, public

BASE: dict[str, Any] = {
    "optimizer": {"config": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "regime": {"num_steps": 30, "validate_every_n_steps": None},
}


def changed(**regime: Any) -> dict[str, Any]:
    return {**BASE, "regime": {**BASE["regime"], **regime}}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A directory with the config BASE and a checkpoint."""
    write_config(tmp_path)
    checkpoint.save(tmp_path / layout.CHECKPOINTS, 1, {"x": torch.ones(1)}, None, {})
    return tmp_path


def write_config(out: Path) -> None:
    (out / layout.CONFIG).write_text(yaml.dump(BASE))


def test_the_same_config_is_allowed(trained: Path) -> None:
    same_run.check_config(trained, BASE)


def test_a_tuple_in_a_config_is_the_list_in_its_file(trained: Path) -> None:
    same_run.check_config(trained, BASE)
    with pytest.raises(UsageError, match="betas"):
        same_run.check_config(trained, {**BASE, "optimizer": {"config": {"lr": 0.1, "betas": [0.9, 0.99]}}})


def test_another_config_is_refused_with_the_difference_alone(trained: Path) -> None:
    other = changed(validate_every_n_steps=5)
    other["optimizer"] = {"config": {"lr": 0.2, "betas": [0.9, 0.95]}}
    with pytest.raises(UsageError) as caught:
        same_run.check_config(trained, other)
    first, *lines = str(caught.value).splitlines()
    assert str(trained) in first
    assert "--resume-with-changes" in first
    assert lines == ["  optimizer.config.lr: 0.1 there, 0.2 now", "  regime.validate_every_n_steps: null there, 5 now"]


def test_a_section_that_is_new_is_told_by_its_keys(trained: Path) -> None:
    other = changed(validate_every_n_steps={"first": 5, "then": None})
    other["optimizer"] = {"config": {"lr": 0.1, "nesterov": None}}
    with pytest.raises(UsageError) as caught:
        same_run.check_config(trained, other)
    assert str(caught.value).splitlines()[1:] == [
        "  optimizer.config.betas: [0.9, 0.95] there, nothing now",
        "  optimizer.config.nesterov: nothing there, null now",
        "  regime.validate_every_n_steps.first: nothing there, 5 now",
        "  regime.validate_every_n_steps.then: nothing there, null now",
    ]


def test_a_key_that_is_new_or_gone_is_a_difference(trained: Path) -> None:
    for other in (changed(extra=1), {"regime": BASE["regime"]}):
        with pytest.raises(UsageError):
            same_run.check_config(trained, other)


def test_more_steps_are_allowed(trained: Path) -> None:
    same_run.check_config(trained, changed(num_steps=40))


@pytest.mark.parametrize("num_steps", [29, 1, None, 40.5])
def test_fewer_steps_and_no_number_of_steps_are_refused(trained: Path, num_steps: Any) -> None:
    with pytest.raises(UsageError, match=r"regime.num_steps: 30 there"):
        same_run.check_config(trained, changed(num_steps=num_steps))


def test_more_steps_do_not_excuse_another_change(trained: Path) -> None:
    with pytest.raises(UsageError) as caught:
        same_run.check_config(trained, changed(num_steps=40, validate_every_n_steps=5))
    assert "num_steps:" not in str(caught.value)


@pytest.mark.parametrize("key", ["num_workers", "prefetch", "cache"])
def test_how_data_is_read_may_change_and_what_is_read_may_not(tmp_path: Path, key: str) -> None:
    old = {"dataset": {"num_workers": 0, "prefetch": 2, "cache": None, "order": "blocks"}, **BASE}
    (tmp_path / layout.CONFIG).write_text(yaml.dump(old))
    checkpoint.save(tmp_path / layout.CHECKPOINTS, 1, {"x": torch.ones(1)}, None, {})
    new = {**old, "dataset": {**old["dataset"], key: 4}}
    runtime = set(runtime_paths(config))
    same_run.check_config(tmp_path, new, runtime)
    with pytest.raises(UsageError) as caught:
        same_run.check_config(tmp_path, {**new, "dataset": {**new["dataset"], "order": "documents"}}, runtime)
    assert str(caught.value).splitlines()[1:] == ["  dataset.order: 'blocks' there, 'documents' now"]


FILES = {"a: 1": "x", "a: 2": "y", "b: 1": "z"}


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        ({**FILES, "a: 2": "x"}, ["  changed: a: 2"]),
        ({"a: 2": "y"}, ["  missing: a: 1, b: 1"]),
        ({**FILES, "b: 2": "z", "c: 1": "z"}, ["  added: b: 2, c: 1"]),
        ({"b: 1": "y", "a: 1": "z", "a: 3": "y"}, ["  changed: a: 1, b: 1", "  missing: a: 2", "  added: a: 3"]),
        ({}, ["  missing: a: 1, a: 2, b: 1"]),
    ],
)
def test_other_data_is_refused_by_the_names_of_its_files(tmp_path: Path, new: dict[str, str], lines: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        same_run.check_identity(tmp_path, FILES, new)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: holds a run on other data; ")
    assert "--resume-with-changes" in first
    assert rest == lines


@pytest.mark.parametrize("files", [FILES, dict(reversed(FILES.items())), {}])
def test_the_same_data_in_any_order_is_allowed(tmp_path: Path, files: dict[str, str]) -> None:
    same_run.check_identity(tmp_path, files, FILES if files else {})


@pytest.mark.parametrize(("number", "end"), [(10, "a: 9"), (11, "a: 9, … (11 in all)"), (12_345, "a: 9, … (12,345 in all)")])
def test_many_files_are_named_in_part(tmp_path: Path, number: int, end: str) -> None:
    with pytest.raises(UsageError) as caught:
        same_run.check_identity(tmp_path, {}, {f"a: {i}": "x" for i in range(number)})
    assert str(caught.value).splitlines()[1] == f"  added: {', '.join(f'a: {i}' for i in range(9))}, {end}"


def test_without_a_checkpoint_anything_is_allowed(tmp_path: Path) -> None:
    write_config(tmp_path)
    same_run.check_config(tmp_path, changed(num_steps=2))


def test_checkpoints_of_another_user_are_told() -> None:
    with public() as out:
        write_config(out)
        (out / layout.CHECKPOINTS).mkdir(mode=0o000)
        told = error_of_nobody(lambda: same_run.check_config(out, BASE))
    assert told == f"UsageError: {out}/checkpoints: cannot read the output directory: Permission denied"


# A claim holds for one directory, not for its name.


@pytest.mark.parametrize("content", [b"\xff", b"a: [", b"- 1", b"a: 1\na: 2"])
def test_a_config_in_the_directory_that_is_none_is_a_usage_error(trained: Path, content: bytes) -> None:
    (trained / layout.CONFIG).write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        same_run.check_config(trained, BASE)

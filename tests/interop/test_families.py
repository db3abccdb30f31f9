"""Every family both ways: transformers' own files give our parameters, and these give the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fnrecipe.config import ModelSection, TokenizerSection
from fnrecipe.interop.hugging_face.export import export
from fnrecipe.models.model import find_model
from tests.helpers import assert_same_bits, bits
from tests.interop.reading import read, section
from tests.models.families import TINY, random_params, reference, tiny


@pytest.mark.parametrize("family", TINY)
def test_files_of_transformers_are_read_and_written_again(family: str, tmp_path: Path) -> None:
    model, config = find_model(family), tiny(family)
    params = random_params(model, config)
    reference(model, config, params).save_pretrained(tmp_path / "theirs")
    found = section(tmp_path / "theirs")
    assert found == ModelSection(path=found.path, family=family, config=found.config)
    assert_same_bits(read(tmp_path / "theirs"), params)
    export(tmp_path / "ours", found, TokenizerSection(), params, dtype=None, shard_size=10_000)
    written = [load_file(file) for file in (tmp_path / "ours").glob("*.safetensors")]
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert len(written) > 2
    ours = {name: bits(leaf) for part in written for name, leaf in part.items()}
    assert ours == {name: bits(leaf) for name, leaf in theirs.items()}
    assert section(tmp_path / "ours").config == found.config


@pytest.mark.parametrize("family", TINY)
def test_files_without_the_first_part_of_names_are_read(family: str, tmp_path: Path) -> None:
    """As those of the first GPT-2 are, and of any model that was saved without its head."""
    model, config = find_model(family), tiny(family)
    params = random_params(model, config)
    reference(model, config, params).save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.partition(".")[2] if name != "lm_head.weight" else name: leaf for name, leaf in found.items()},
        tmp_path / "model.safetensors",
    )
    assert_same_bits(read(tmp_path), params)

"""The recipe's table of formats: names are checked with the config, and a config class of one's own may know more of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import attrs
import pytest

from fnrecipe.config import DataSource, resolve
from fnrecipe.data import FORMATS, LaneAssignment
from fnrecipe.errors import ConfigError
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.config import config as defaults
from fnrecipe.recipes.lm.data import train_stream, valid_stream
from fnrecipe.streams import all_corpora
from tests.cli.helpers import ROOT, fnrecipe, fnrecipe_here
from tests.data.laws import check_resumes, items
from tests.data.test_formats import TSV
from tests.helpers import pairs, rows
from tests.recipes.streams import DOCUMENTS, expected_pieces, pieces, recipe


@attrs.frozen
class Config(LMConfig):
    FORMATS: ClassVar = {**FORMATS, "tsv": TSV}


def with_tsv(config: LMConfig) -> Config:
    return Config(**attrs.asdict(config, recurse=False))


def write(path: Path) -> None:
    path.write_text("".join(f"{number}\t{text}\n" for number, text in enumerate(DOCUMENTS)), encoding="utf-8")


def test_a_format_of_ones_own_gives_every_prediction_of_an_epoch_once_and_resumes(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv")
    config = with_tsv(recipe(DataSource(str(tmp_path)), epochs=2, num_lanes=4, shuffle_window=7))
    source = train_stream(config, LaneAssignment())
    assert Counter(pieces(items(source))) == Counter({piece: 2 * n for piece, n in expected_pieces(DOCUMENTS).items()})
    assert check_resumes(source, limit=30) > 10


def test_validation_and_fingerprints_read_it_too(tmp_path: Path) -> None:
    write(tmp_path / "a.data")
    config = with_tsv(recipe(DataSource(str(tmp_path / "a.data"), format="tsv"), valid_fraction=0.5))
    found = Counter(pieces(items(valid_stream(config, LaneAssignment())))) + Counter(
        pieces(items(train_stream(config, LaneAssignment())))
    )
    assert found == expected_pieces(DOCUMENTS)
    assert [file.name for corpus in all_corpora(config) for file in corpus.files] == ["a.data"]


def test_the_config_knows_its_names() -> None:
    pair = "dataset={sources: [{path: a}, {path: b, format: tsvv}], valid_sources: [{path: c, format: x}], valid_fraction: 0}"
    known = "auto or jsonl or parquet or text or python or tokens"
    for config, names, hint in ((defaults, known, ""), (with_tsv(defaults), f"{known} or tsv", "; did you mean tsv?")):
        with pytest.raises(ConfigError) as caught:
            resolve(config, pairs=[pair])
        assert str(caught.value).splitlines() == [
            f"dataset.sources[1].format: expected {names}, found 'tsvv' (command line){hint}",
            f"dataset.valid_sources[0].format: expected {names}, found 'x' (command line)",
        ]
    found, _ = resolve(with_tsv(defaults), pairs=["dataset.sources=[{path: a, format: tsv}]"])
    assert type(found) is Config


def test_a_wrong_name_is_told_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "lm", "--out", str(tmp_path / "out"), "--config", "dataset.sources=[{path: a, format: jsnl}]"]
    ended = fnrecipe_here(monkeypatch, capsys, *args)
    assert (ended.status, ended.err.count("\n"), ended.err.endswith("did you mean jsonl?\n")) == (2, 1, True)
    code = f"""
import sys
from fnrecipe.cli.main import main
sys.argv = ['fnrecipe', *{args!r}]
try:
    main()
finally:
    assert 'torch' not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 2


@pytest.mark.slow
def test_the_recipe_of_the_documents_trains_on_its_format_also_with_workers(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(# my_recipe\.py.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (tmp_path / "my_recipe.py").write_text(source)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/a.tsv")
    quick = {"regime__num_steps": 2, "lr_scheduler__config__num_warmup_steps": 0, "trainer__jit": "off"}
    settings = pairs(tmp_path / "data", **quick, dataset__num_readers=2)
    for workers in (0, 2):
        args = ["my_recipe.py", "--out", f"out{workers}", "--config", *settings, f"dataset.num_workers={workers}"]
        ended = fnrecipe("train", *args, cwd=tmp_path)
        assert (ended.status, ended.err) == (0, "")
    one, two = (rows(tmp_path / f"out{workers}/metrics/train.jsonl") for workers in (0, 2))
    assert one == two
    assert [row["step"] for row in one] == [1, 2]

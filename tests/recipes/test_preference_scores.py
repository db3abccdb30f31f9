"""`fnrecipe data score`: what is written is the reference model's, and training with it is training beside that model."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import fnrecipe
from fnrecipe.cli.data import data
from fnrecipe.errors import UsageError
from fnrecipe.recipes.preference.score import score
from fnrecipe.recipes.preference.train import recipe
from fnrecipe.runtime.host import pick_device
from tests.helpers import rows

from .test_preference import MODEL, RUN, config_of, preferences, write

NAMES, OLD = ("reference_score_chosen", "reference_score_rejected"), ("ref_chosen_logps", "ref_rejected_logps")
SHORT = "regime={num_steps: 3, num_data_epochs: null, num_sample_tokens: 0, checkpoint_every_n_steps: 3}"
SAME = ["dataset.valid_fraction=0", "dataset.order=sequential"]
"""Otherwise the split follows from the records' bytes, and the order from their places in the file."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is another one than that which the others begin with."""
    out = tmp_path_factory.mktemp("scores")
    given = config_of(write(out / "pairs.jsonl", preferences(8)), *RUN, SHORT, "common.seed=7")
    assert fnrecipe.train(recipe, given, out / "run") == 0
    return out / "run"


def test_training_with_what_is_written_is_training_beside_the_model(other: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "pairs.jsonl", preferences(24)), tmp_path / "scored.jsonl"
    sizes = [
        "dataset.max_seq_len=128",
        "dataset.batch_size=4",
        "dataset.num_lanes=2",
        "gang={device: cpu, num_microbatches: 1}",
    ]
    given = [f"model.config={MODEL}", f"dataset.sources={source}", f"reference.path={other}", "tokenizer.family=byte", *sizes]
    done = CliRunner().invoke(data, ["score", "preference", "--out", str(out), "--config", *given], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.startswith(f"{out}: 24 records")
    runs = {"model": (source, f"reference.path={other}"), "data": (out, "reference.precomputed=true")}
    metrics = {}
    for name, (path, reference) in runs.items():
        assert fnrecipe.train(recipe, config_of(path, *RUN, SHORT, *SAME, reference), tmp_path / name) == 0
        metrics[name] = rows(tmp_path / name / "metrics/train.jsonl")
    assert len(metrics["model"]) == 3
    assert abs(metrics["model"][0]["train/rewards/margins"]) > 1e-3, "another model than that at the beginning"
    for ours, theirs in zip(metrics["data"], metrics["model"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_records_keep_their_order_and_their_other_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And lose the scores that they had; a pair that is too long has none, and is told."""
    records = [
        {**record, "id": number, **dict(zip(OLD, (-1.0, -2.0), strict=True))} for number, record in enumerate(preferences(9))
    ]
    longer = {"prompt": "a", "chosen": "b" * 70, "rejected": "c" * 70}
    found = [dict(r) for r in score(config_of(write(tmp_path / "a.jsonl", [*records, longer])), pick_device("cpu"))]
    assert all(record.pop(name) < -1 for record in found for name in NAMES)
    assert found == [{key: value for key, value in record.items() if key not in OLD} for record in records]
    assert "a: 1 of 10 examples are left out: 1 of more than 128 tokens" in caplog.text


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", preferences(9))
    ways = ("dataset.pack_window=2", "dataset.pack_window=64"), ("gang.num_microbatches=4", "gang.num_microbatches=1")
    found = [[*score(config_of(source, *way), pick_device("cpu"))] for way in zip(*ways, strict=True)]
    for ours, theirs in zip(*found, strict=True):
        assert [ours[name] for name in NAMES] == pytest.approx([theirs[name] for name in NAMES], rel=1e-5)


@pytest.mark.parametrize("pair", ["criterion.name=kto", "criterion.name=simpo", "reference.precomputed=true"])
def test_without_a_reference_model_of_pairs_there_is_nothing_to_score(tmp_path: Path, pair: str) -> None:
    given = config_of(write(tmp_path / "a.jsonl", preferences(2)), pair)
    with pytest.raises(UsageError, match=f"^score: expected a criterion of pairs with its reference model, .* found {pair}$"):
        next(score(given, pick_device("cpu")))

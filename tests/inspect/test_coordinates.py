"""Coordinate checks: what steps change is as large in all widths and depths with a transfer, and grows without."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import pytest

from fnrecipe.config import resolve
from fnrecipe.data import Batch, Cursor, LaneAssignment, Source
from fnrecipe.errors import UsageError
from fnrecipe.inspect.coordinates import QUANTITIES, Along, Coordinates, coordinates, resized, slope
from fnrecipe.recipes.lm.config import LMConfig, config
from fnrecipe.recipes.lm.train import recipe as lm

ROWS, LENGTH = 8, 32


def stream(config: LMConfig, assignment: LaneAssignment) -> Source[Batch]:
    """Random rows of a few frequent tokens and many rare ones, whose targets follow from them."""

    def source(cursor: Cursor = None) -> Iterator[tuple[Batch, Cursor]]:
        generator = np.random.default_rng(0)
        zeros, ones = np.zeros((ROWS, LENGTH), np.int64), np.ones((ROWS, LENGTH), bool)
        while True:
            tokens = (200 * generator.random((ROWS, LENGTH)) ** 4).astype(np.int64)
            places = np.broadcast_to(np.arange(LENGTH), tokens.shape).copy()
            yield Batch(tokens, (tokens * 7 + 3) % 200, zeros, places, zeros, ones, np.full(ROWS, LENGTH)), None

    return source


recipe = attrs.evolve(lm, stream=stream)


def sized(*pairs: str) -> LMConfig:
    shape = "model_dim=32 num_layers=2 num_attn_heads=2 num_key_value_heads=2 ffn_inner_dim=64 vocab_size=264"
    fixed = [f"model.config.{pair}" for pair in shape.split()]
    fixed += [f"dataset.max_seq_len={LENGTH}", f"dataset.batch_size={ROWS}", "dataset.num_lanes=1", "gang.num_microbatches=1"]
    fixed += ["trainer.jit=off", "dataset.prefetch=0"]
    return resolve(config, [], [*fixed, *pairs])[0]


def measured(along: Along, sizes: list[int], *pairs: str, steps: int) -> dict[str, float]:
    found = coordinates(recipe, sized(*pairs), along, sizes, steps)
    assert [each.size for each in found] == sizes
    assert all(len(each.means[name]) == steps + 1 for each in found for name in QUANTITIES)
    return {name: slope(found, name) for name in QUANTITIES}


CHANGES = ("change of stream", "change of logits")
BASE = "model.transfer.base_width=32"


def test_changes_grow_with_the_width_without_mup_and_not_with_it() -> None:
    sizes, rate = [32, 128], "optimizer.config.lr=1e-2"
    plain = measured("width", sizes, rate, steps=6)
    transferred = measured("width", sizes, rate, "model.transfer.name=mup", BASE, steps=6)
    assert all(plain[name] > 0.7 for name in CHANGES), plain
    assert all(abs(transferred[name]) < 0.15 for name in CHANGES), transferred


GEMMA = ["model.config.head_dim=16", "model.config.query_pre_attn_scalar=16"]
NORMED = {
    "olmo2": [],
    "gemma2": ["model.config.tied_embeddings=false", *GEMMA],
    "gemma3": GEMMA,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMED)
def test_changes_do_not_depend_on_the_width_of_models_with_norms_behind_branches(name: str) -> None:
    pairs = [f"model.family={name}", "optimizer.config.lr=1e-2", *NORMED[name]]
    plain = measured("width", [32, 128], *pairs, steps=6)
    transferred = measured("width", [32, 128], *pairs, "model.transfer.name=mup", BASE, steps=6)
    assert max(abs(plain[each]) for each in CHANGES) > 0.2, plain
    assert all(abs(transferred[each]) < 0.15 for each in CHANGES), transferred


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_changes_do_not_depend_on_their_depth(name: str) -> None:
    pairs = [f"model.family={name}", "optimizer.config.lr=1e-3", *NORMED[name]]
    mup = measured("depth", [2, 8], *pairs, "model.transfer.name=mup", BASE, steps=4)
    base = ["model.transfer.name=completep", BASE, "model.transfer.base_depth=2"]
    completep = measured("depth", [2, 8], *pairs, *base, steps=4)
    assert mup["change of stream"] > 0.6, mup
    assert all(abs(completep[each]) < 0.2 for each in CHANGES), completep


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "normuon", "muon, match_rms"])
def test_changes_by_muon_do_not_depend_on_the_width(name: str) -> None:
    scale = "match_rms" if "," in name else "spectral"
    pairs = [f"optimizer.name={name.partition(',')[0]}", "optimizer.config.lr=2e-2", f"optimizer.config.scale={scale}"]
    pairs += ["optimizer.config.adamw.lr=1e-2"]
    plain = measured("width", [32, 128], *pairs, steps=6)
    transferred = measured("width", [32, 128], *pairs, "model.transfer.name=mup", BASE, steps=6)
    assert plain["change of logits"] > 0.7, plain
    assert all(abs(transferred[each]) < 0.15 for each in CHANGES), transferred


@pytest.mark.slow
def test_changes_grow_with_the_depth_under_mup_and_not_under_completep() -> None:
    sizes, rate = [2, 8], "optimizer.config.lr=1e-3"
    mup = measured("depth", sizes, rate, "model.transfer.name=mup", BASE, steps=4)
    completep = measured("depth", sizes, rate, "model.transfer.name=completep", BASE, "model.transfer.base_depth=2", steps=4)
    assert mup["change of stream"] > 0.3, mup
    assert all(abs(completep[name]) < 0.1 for name in CHANGES), completep


def test_a_rate_that_changes_nothing_has_no_slope() -> None:
    with pytest.raises(
        UsageError, match=r"^optimizer: .* change of stream of the model of width 32 is finite and not 0, found 0.0$"
    ):
        measured("width", [32], "optimizer.config.lr=0", steps=1)


def test_a_slope_is_the_exponent_of_a_power() -> None:
    found = [Coordinates(size, dict.fromkeys(QUANTITIES, (1.0, 3 * size**0.7))) for size in (2, 6, 9)]
    assert slope(found, "logits") == pytest.approx(0.7)


def test_heads_keep_their_width_and_their_number_must_be_an_integer() -> None:
    wide = resized(recipe, sized("model.config.num_key_value_heads=1"), "width", 64).model.config
    assert (wide.model_dim, wide.num_attn_heads, wide.num_key_value_heads, wide.ffn_inner_dim) == (64, 4, 2, 128)
    assert wide.head_width == 16
    with pytest.raises(
        UsageError, match=r"--widths: expected widths at which model.config.num_attn_heads = 2 at 32 is an integer"
    ):
        resized(recipe, sized(), "width", 24)

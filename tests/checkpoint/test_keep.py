"""What is kept of a run's checkpoints."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.checkpoint.keep import Entry, Plan, Policy, plan

TEN = [Entry(step) for step in range(100, 1001, 100)]
SCORED = [Entry(step, score) for step, score in ((100, 3.0), (200, 1.0), (300, 2.0), (400, None), (500, math.nan), (600, 2.5))]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(), [entry.step for entry in TEN]),
        (Policy(last=3), [800, 900, 1000]),
        (Policy(last=1, every_n_steps=400), [400, 800, 1000]),
        (Policy(last=20), [entry.step for entry in TEN]),
        (Policy(last=2, every_n_steps=13), [900, 1000]),
    ],
)
def test_the_last_ones_and_every_nth_stay(policy: Policy, kept: list[int]) -> None:
    found = plan(TEN, policy)
    assert list(found.whole) == kept
    assert found.model_only == ()
    assert {*found.whole, *found.removed} == {entry.step for entry in TEN}


@pytest.mark.parametrize(("lower", "best"), [(True, [200, 300]), (False, [100, 600])])
def test_the_best_of_those_with_a_score_stay(lower: bool, best: list[int]) -> None:
    found = plan(SCORED, Policy(last=1, best=2, lower_is_better=lower))
    assert list(found.whole) == sorted({*best, 600})


def test_of_equal_scores_the_earliest_stays() -> None:
    found = plan([Entry(1, 2.0), Entry(2, 2.0), Entry(3, 5.0)], Policy(last=1, best=1))
    assert found == Plan((1, 3), (), (2,))


def test_older_ones_keep_their_model_alone_and_still_count_among_the_best() -> None:
    policy = Policy(last=2, every_n_steps=300, best=1, model_only=True)
    first = plan(SCORED, policy)
    assert first == Plan((500, 600), (200, 300), (100, 400))
    later = [
        Entry(200, 1.0, model_only=True),
        Entry(300, 2.0, model_only=True),
        Entry(600, 0.5),
        Entry(700, 3.0),
        Entry(800, 3.0),
    ]
    assert plan(later, policy) == Plan((700, 800), (300, 600), (200,))


def test_what_holds_a_model_alone_is_never_the_last_and_never_whole_again() -> None:
    entries = [Entry(100), Entry(200, model_only=True), Entry(300, model_only=True)]
    assert plan(entries, Policy(last=1)) == Plan((100,), (), (200, 300))
    assert plan(entries, Policy(last=1, every_n_steps=100)) == Plan((100,), (200, 300), ())


def test_steps_that_are_not_to_be_touched_neither_count_nor_change() -> None:
    found = plan(TEN, Policy(last=1, model_only=True), untouched=800)
    assert found.whole == (100, 200, 300, 400, 500, 600, 700, 800, 1000)
    assert found.removed == (900,)


entries = st.lists(
    st.builds(Entry, st.integers(0, 50), st.none() | st.floats(), st.booleans()),
    unique_by=lambda entry: entry.step,
    max_size=12,
)
policies = st.builds(
    Policy, st.none() | st.integers(1, 5), st.none() | st.integers(1, 9), st.integers(0, 4), st.booleans(), st.booleans()
)


@given(entries, policies, st.integers(-1, 30))
def test_each_step_has_one_fate_and_a_second_look_changes_nothing(found: list[Entry], policy: Policy, untouched: int) -> None:
    made = plan(found, policy, untouched=untouched)
    assert sorted((*made.whole, *made.model_only, *made.removed)) == sorted(entry.step for entry in found)
    whole = [entry.step for entry in found if not entry.model_only]
    assert not whole or max(whole) in made.whole  # a run can always go on
    assert set(made.whole) <= set(whole)
    left = [attrs.evolve(entry, model_only=entry.step in made.model_only) for entry in found if entry.step not in made.removed]
    assert plan(left, policy, untouched=untouched) == attrs.evolve(made, removed=())

"""Preferences in the forms that people have them, what is wrong with others, and rows in which pairs stay whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data.judged import CHOSEN, REJECTED, UNRELATED, Judged, answers_of, collate_judged, pack_judged, with_unrelated
from fnrecipe.data.preferences import SCORES, parse_preference
from fnrecipe.errors import DataError

HI = {"role": "user", "content": "hi"}
YES, NO = ({"role": "assistant", "content": content} for content in ("yes", "no"))
SYSTEM = {"role": "system", "content": "Be brief."}


def said(content: str, role: str = "gpt") -> dict[str, str]:
    return {"from": role, "value": content}


def part(role: str, text: str, weight: float) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}], "loss_weight": weight}


FORMS: Mapping[str, Mapping[str, Any]] = {
    "trl, text": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "trl, messages": {"prompt": [HI], "chosen": [YES], "rejected": [NO]},
    "trl, prompt within": {"chosen": [HI, YES], "rejected": [HI, NO], "score_chosen": 3},
    "ultrafeedback": {"prompt": "hi", "messages": [HI, YES], "chosen": [HI, YES], "rejected": [HI, NO]},
    "text behind a chat": {"messages": [HI], "chosen": "yes", "rejected": "no"},
    "llamafactory, sharegpt": {"conversations": [said("hi", "human")], "chosen": said("yes"), "rejected": said("no")},
    "llamafactory, alpaca": {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"},
    "llamafactory, weights": {
        f"{side}_messages": [part("user", "hi", 0.0), part("assistant", answer, 1.0)]
        for side, answer in (("chosen", "yes"), ("rejected", "no"))
    },
    "orca": {"question": "hi", "chosen": "yes", "rejected": "no"},
    "fairseq2": {"src": "hi", "tgt_chosen": "yes", "tgt_rejected": "no"},
}


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS)
def test_pairs_are_read_in_the_forms_that_people_have(record: Mapping[str, Any]) -> None:
    for system in ({}, {"system": "Be brief."}):
        chosen, rejected = parse_preference(json.dumps({**record, **system}))
        before = [SYSTEM, HI] if system else [HI]
        assert (chosen.is_good, rejected.is_good) == (True, False)
        for verdict, answer in ((chosen, YES), (rejected, NO)):
            messages = [{key: value for key, value in m.items() if key != "loss_weight"} for m in verdict.example.messages]
            assert messages == [*before, answer]


LABELLED: Sequence[Mapping[str, Any]] = [
    {"prompt": "hi", "completion": "yes", "label": False},
    {"messages": [HI, YES], "label": False},
    {"instruction": "hi", "output": "yes", "kto_tag": False},
]


@pytest.mark.parametrize("record", LABELLED)
def test_labelled_answers_are_read(record: Mapping[str, Any]) -> None:
    (verdict,) = parse_preference(json.dumps(record))
    assert not verdict.is_good
    assert verdict.example.messages == [HI, YES]
    key = [*record][-1]
    assert parse_preference(json.dumps({**record, key: True}))[0].is_good


@pytest.mark.parametrize("keys", SCORES.items())
def test_log_probabilities_of_a_reference_model_are_read(keys: tuple[str, str]) -> None:
    record = FORMS["trl, text"]
    scored = parse_preference(json.dumps({**record, keys[0]: -3.5, keys[1]: -4}))
    assert [verdict.score for verdict in scored] == [-3.5, -4]
    assert [verdict.score for verdict in parse_preference(json.dumps(record))] == [None, None]
    for wrong in (None, "-1", 0.5, True):
        with pytest.raises(DataError, match=f"expected a log-probability in the field '{keys[1]}', found {wrong!r}"):
            parse_preference(json.dumps({**record, keys[0]: -3.5, keys[1]: wrong}))


BAD: Mapping[str, tuple[object, str]] = {
    "no object": (["hi"], "expected a JSON object, found list"),
    "a key": ({"prompt": "hi", "completion": "yes"}, "expected a preference by its keys, chosen and rejected, "),
    "one side": (
        {"prompt": "hi", "chosen": "yes"},
        "expected an answer under 'rejected' beside that of a pair, found none",
    ),
    "no prompt": ({"chosen": "a: hi", "rejected": "a: ho"}, "expected a prompt beside the text under 'chosen', by its key, "),
    "the same": ({"prompt": "hi", "chosen": "yes", "rejected": "yes"}, "expected two answers that differ under 'chosen' and"),
    "two prompts": (
        {"chosen": [HI, YES], "rejected": [{"role": "user", "content": "ho"}, NO]},
        "expected the same messages before the last one of 'chosen' and of 'rejected', found others from message 1 on",
    ),
    "longer": (
        {"chosen": [HI, YES], "rejected": [HI, NO, HI, NO]},
        "of 'rejected', found others from message 2 on",
    ),
    "no answer": (
        {"chosen": [HI, YES], "rejected": [SYSTEM, HI]},
        "expected an answer of the assistant as the last message by 'rejected', found one of 'user'",
    ),
    "empty": ({"prompt": "hi", "chosen": "yes", "rejected": ""}, "expected text in the answer by 'rejected', found none"),
    "a number": ({"prompt": "hi", "chosen": 3, "rejected": "a"}, "expected text or messages under 'chosen', found int"),
    "no messages": ({"prompt": "hi", "chosen": [], "rejected": "a"}, "expected text or messages under 'chosen', found none"),
    "a role": (
        {"prompt": [HI], "chosen": {"role": "asistant", "content": "a"}, "rejected": "no"},
        "messages[1]: expected a known role, found 'asistant'; did you mean assistant?",
    ),
    "a label": ({"prompt": "hi", "completion": "yes", "label": "good"}, "expected true or false in the field 'label', found"),
    "a weight": (
        {"messages": [HI, {**YES, "weight": 0.5}], "label": True},
        "messages[1]: expected a weight of 1, for answers weigh the same, found 0.5",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told(record: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_preference(json.dumps(record))
    assert message in str(caught.value)


# Rows.


def judged(number: int, *parts: tuple[int, int, int], epoch: int = 0) -> Judged:
    """Answers of (verdict, tokens of the prompt, tokens of the answer), whose ids tell where they are from."""
    ids = [
        np.arange(before + after, dtype=np.int32) + 1000 * (10 * number + side) for side, (_, before, after) in enumerate(parts)
    ]
    trained = np.concatenate([np.arange(before + after) >= before for _, before, after in parts])
    sizes = tuple(map(len, ids))
    return Judged(np.concatenate(ids), 7, epoch=epoch, trained=trained, verdicts=tuple(each[0] for each in parts), sizes=sizes)


def pair(number: int, prompt: int, chosen: int, rejected: int) -> Judged:
    return judged(number, (CHOSEN, prompt, chosen), (REJECTED, prompt, rejected))


lengths = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


@given(st.lists(lengths, min_size=1, max_size=20), st.sampled_from([2, 5, 8]))
def test_both_answers_of_a_pair_are_neighbours_in_one_row_and_nothing_is_lost(sizes: list[Any], limit: int) -> None:
    items = [pair(number, *each) for number, each in enumerate(sizes)]
    rows = pack_judged(items, 0, length=24, limit=limit, key=(0, 1))
    batch = collate_judged(rows, 24, slots=8)
    found = []
    for row in range(len(rows)):
        count = int(batch.segments[row].max()) + 1
        assert count <= limit
        assert batch.verdicts[row].tolist() == [CHOSEN, REJECTED] * (count // 2) + [0] * (8 - count)
        for segment in range(count):
            here = batch.segments[row] == segment
            ids = [int(batch.tokens[row][here][0]), *batch.targets[row][here].tolist()]
            assert batch.positions[row][here].tolist() == list(range(len(ids) - 1))
            found.append((ids, batch.mask[row][here].tolist()))
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first[0][0] // 10_000 == second[0][0] // 10_000, "of the same pair"
    expected = [(a.ids.tolist(), a.trained[1:].tolist()) for item in items for a in answers_of(item) if a.trained is not None]
    assert sorted(found) == sorted(expected)
    assert batch.num_bytes.sum() == 7 * len(items)


def test_unrelated_answers_follow_their_prompt_and_are_cut_to_the_row() -> None:
    items = [judged(0, (CHOSEN, 3, 2)), pair(1, 2, 4, 1), judged(2, (REJECTED, 1, 6), epoch=1)]
    found = with_unrelated(items, length=6)
    assert found[::2] == items
    others = found[1::2]
    assert [other.ids.tolist() for other in others] == [
        [0, 1, 2, 10_002, 10_003, 10_004, 10_005],
        [10_000, 10_001, 20_001, 20_002, 20_003, 20_004, 20_005],
        [20_000, 3, 4],
    ]
    for other, item, prompt in zip(others, items, (3, 2, 1), strict=True):
        assert isinstance(other, Judged)
        assert other.trained is not None
        assert other.trained.tolist() == [False] * prompt + [True] * (len(other.ids) - prompt)
        assert (other.verdicts, other.sizes, other.epoch) == ((UNRELATED,), (len(other.ids),), item.epoch)
    assert with_unrelated(items[:1], 6) == items[:1], "there is no other answer"


def test_an_empty_row_is_padding() -> None:
    batch = collate_judged([()], 4, slots=2)
    assert not batch.mask.any()
    assert batch.verdicts.tolist() == [[0, 0]]

"""Text that grows by tokens, up to a stop, with characters and stop strings across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import byte_tokenizer
from fnrecipe.generation.answer import Answer, Decode, Stops, ended, said, shown

DECODE, NONE = byte_tokenizer().decode, Stops()
TEXTS = st.text(st.sampled_from("ab\n é€😀\u0301�"), max_size=12)


def steps(tokens: Sequence[int], stops: Stops = NONE, decode: Decode = DECODE) -> list[Answer]:
    found = [Answer()]
    for token in tokens:
        found.append(said(found[-1], token, decode, stops))
    return [*found, ended(found[-1], decode, stops)]


@given(TEXTS)
def test_the_text_is_that_of_all_tokens_and_grows_by_whole_characters(text: str) -> None:
    found = steps(list(text.encode()))
    assert found[-1].words == text
    assert all(text.startswith(answer.words) for answer in found)


@given(st.lists(st.integers(0, 255), max_size=20))
def test_what_is_no_text_is_shown_all_the_same(tokens: list[int]) -> None:
    found = steps(tokens)
    assert found[-1].tokens == tuple(tokens)
    assert all(now.words.startswith(before.words) for before, now in pairwise(found))
    assert (found[-1].words == "") == (not tokens)


@given(TEXTS, st.lists(st.text(st.sampled_from("ab\né€"), min_size=1, max_size=3), min_size=1, max_size=3))
def test_it_ends_before_the_first_stop_string(text: str, strings: list[str]) -> None:
    stops = Stops(strings=tuple(strings))
    found = steps(list(text.encode()), stops)
    places = [text.find(string) for string in strings if string in text]
    ends = {string: text.find(string) + len(string) for string in strings if string in text}
    if not places:
        assert (found[-1].words, found[-1].finish) == (text, "length")
        return
    first = min(ends.values())  # the string that is complete first
    expected = min(text.find(string) for string, end in ends.items() if end == first)
    assert (found[-1].words, found[-1].finish) == (text[:expected], "stop")


@given(TEXTS, st.text(st.sampled_from("abé"), min_size=1, max_size=4))
def test_what_is_shown_is_never_taken_back(text: str, string: str) -> None:
    stops = Stops(strings=(string,))
    parts = [shown(answer, stops) for answer in steps(list(text.encode()), stops)]
    assert all(now.startswith(before) for before, now in pairwise(parts))
    assert parts[-1] == text.partition(string)[0]


def test_it_ends_before_a_stop_token_and_stays_so() -> None:
    found = steps([97, 98, 256, 99], Stops(tokens=frozenset({256})))
    assert (found[-1].words, found[-1].finish, found[-1].tokens) == ("ab", "stop", (97, 98))


def test_the_end_of_the_context_ends_it() -> None:
    answer = said(said(Answer(), 0xC3, DECODE), None, DECODE)
    assert (answer.words, answer.finish) == ("\N{REPLACEMENT CHARACTER}", "length")


@pytest.mark.parametrize("spaced", [True, False])
def test_a_decoder_that_drops_the_first_space_loses_no_other(spaced: bool) -> None:
    """As SentencePiece decodes: a word brings its space, the first of a text loses it."""
    words = [" the", " fold", "ed", " state"] if spaced else ["the", " fold", "ed", " state"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert steps(range(4), decode=decode)[-1].words == "the folded state"

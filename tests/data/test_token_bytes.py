"""The bytes that tokens stand for, of all kinds of tokenizers: dropped and unknown characters are none of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.data import Document, Tokenizer, huggingface_tokenizer, tokenize
from tests.data.kinds import ALPHABET, KINDS, save


@cache
def of_kind(name: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return huggingface_tokenizer(save(Path(folder), KINDS[name].make()))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(ALPHABET), max_size=12))
def test_the_bytes_of_a_document_are_those_of_the_characters_that_it_keeps(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    [tokens] = tokenize([Document(text)], tokenizer=of_kind(name))
    assert tokens.num_bytes == len(KINDS[name].kept(text).encode())
    assert tokens.num_bytes + tokens.lost == len(text.encode())

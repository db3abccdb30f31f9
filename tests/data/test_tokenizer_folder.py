"""A directory in Hugging Face's layout: its tokenizer, and the tokens that its other files say begin and end documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from fnrecipe.data import huggingface_tokenizer
from fnrecipe.errors import UsageError
from tests.data.kinds import byte_level, save

SPECIAL = ("<a>", "<b>", "<|endoftext|>", "<s>")
CHOICES: Mapping[str, tuple[Mapping[str, Any], tuple[str | None, str | None], tuple[str, str]]] = {
    "no file": ({}, (None, None), ("<s>", "<|endoftext|>")),
    "strings": ({"tokenizer_config.json": {"bos_token": "<a>", "eos_token": "<b>"}}, (None, None), ("<a>", "<b>")),
    "objects": ({"tokenizer_config.json": {"eos_token": {"content": "<b>"}}}, (None, None), ("<s>", "<b>")),
    "a null": ({"tokenizer_config.json": {"bos_token": None, "eos_token": "<b>"}}, (None, None), ("<s>", "<b>")),
    "the map": ({"special_tokens_map.json": {"bos_token": "<a>"}}, (None, None), ("<a>", "<|endoftext|>")),
    "the config before the map": (
        {"special_tokens_map.json": {"eos_token": "<a>"}, "tokenizer_config.json": {"eos_token": "<b>"}},
        (None, None),
        ("<s>", "<b>"),
    ),
    "ids": ({"generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]}}, (None, None), ("<a>", "<b>")),
    "names before ids": (
        {"generation_config.json": {"eos_token_id": 0}, "tokenizer_config.json": {"eos_token": "<b>"}},
        (None, None),
        ("<s>", "<b>"),
    ),
    "the user's before all": ({"tokenizer_config.json": {"eos_token": "<b>"}}, ("<b>", "<a>"), ("<b>", "<a>")),
}


@pytest.mark.parametrize(("files", "asked", "expected"), CHOICES.values(), ids=CHOICES)
def test_a_directory_names_the_ends(
    tmp_path: Path, files: Mapping[str, Any], asked: tuple[str | None, str | None], expected: tuple[str, str]
) -> None:
    save(tmp_path, byte_level(*SPECIAL))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    bos_token, eos_token = asked
    assert huggingface_tokenizer(str(tmp_path), eos_token, bos_token).names == expected


def test_what_stands_beside_a_file_says_nothing_of_it(tmp_path: Path) -> None:
    path = save(tmp_path, byte_level(*SPECIAL))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<b>"}')
    assert huggingface_tokenizer(path).names == ("<s>", "<|endoftext|>")


def test_files_that_are_wrong_are_named_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, byte_level(*SPECIAL))
    for content, expected in {
        '{"eos_token": "<c>"}': r"expected the eos_token that .* names in the vocabulary, found none called '<c>'; set tok",
        "[]": r"tokenizer_config\.json is not a tokenizer_config\.json: expected an object, found list",
        "{": r"tokenizer_config\.json is not a tokenizer_config\.json: ",
    }.items():
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UsageError, match=expected) as caught:
            huggingface_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_pieces_have_the_ids_and_places_of_the_library(tmp_path: Path, scheme: str) -> None:
    """What stands before a text, and how much white space a special token takes, depend on both."""
    names = ["<unk>", "<s>", "</s>", *"▁abc<>/s\n", "▁a", "ab"]
    library = Tokenizer(models.Unigram([(name, -float(9 - len(name))) for name in names], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.add_special_tokens([AddedToken("<s>", rstrip=True), AddedToken("</s>", lstrip=True), "<c>"])
    tokenizer = huggingface_tokenizer(save(tmp_path, library), "</s>", "<s>")
    special = tokenizer.special
    for pieces in (
        [special["<s>"], "a b", special["</s>"], special["<c>"], "abc"],
        [special["<s>"], "  ab \n", special["</s>"], " c"],
        ["a", special["<c>"], "a\n", special["<c>"]],
        [],
    ):
        text = "".join(piece if isinstance(piece, str) else {i: n for n, i in special.items()}[piece] for piece in pieces)
        expected, found = library.encode(text, add_special_tokens=False), tokenizer.encode_pieces(pieces)
        assert found.ids.tolist() == expected.ids
        names_of = {number: name for name, number in special.items()}
        for number, ours, theirs in zip(expected.ids, found.spans.tolist(), expected.offsets, strict=True):
            if number not in names_of:
                assert tuple(ours) == theirs
            else:
                assert text[slice(*ours)].strip() == names_of[number]

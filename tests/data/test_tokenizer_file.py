"""Files that are no tokenizers, or would block, fill the memory or crash: one line says what is wrong with each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.data import huggingface_tokenizer
from fnrecipe.errors import UsageError
from tests.data.kinds import EOS, dropping, unigram

ROOT = Path(__file__).resolve().parents[2]
GOOD: Mapping[str, Any] = json.loads(dropping().to_str())


def nested(levels: int) -> str:
    """A tokenizer whose normalizer holds another one, and so on."""
    inside = '{"type": "Sequence", "normalizers": [' * levels + '{"type": "Lowercase"}' + "]}" * levels
    return json.dumps({**GOOD, "normalizer": "HERE"}).replace('"HERE"', inside)


def model(**changes: Any) -> str:
    return json.dumps({**GOOD, "model": {**GOOD["model"], **changes}})


def added(*tokens: Any) -> str:
    return json.dumps({**GOOD, "added_tokens": tokens})


FILES = {
    "a list": ("[]", "is not a tokenizer.json: expected an object, found list"),
    "a number": ("5", "is not a tokenizer.json: expected an object, found int"),
    "no model": ('{"model": 3}', "is not a tokenizer.json: expected tokens in model.vocab and added_tokens"),
    "a vocabulary that is none": (model(vocab=3), "is not a tokenizer.json: expected tokens in model.vocab"),
    "an empty vocabulary": ('{"model": {"vocab": {}}}', "expected ids below about the number of tokens, 0, found none"),
    "an id far beyond the others": (model(vocab={EOS: 0, "a": 10**9}), "number of tokens, 2, found 1000000000 for 'a'"),
    "an id far beyond them in what is added": (added({"id": 2**40, "content": EOS}), "found 1099511627776 for '<eos>'"),
    "a negative id": (model(vocab={EOS: 0, "a": -1}), "found -1 for 'a'"),
    "an id that is no integer": (model(vocab={EOS: 0, "a": 1.0}), "found 1.0 for 'a'"),
    "an id that is a truth": (model(vocab={EOS: 0, "a": True}), "found True for 'a'"),
    "an added token that is none": (added(3), "is not a tokenizer.json: expected tokens in model.vocab and added_tokens"),
    "an added token that the library gives another id": (
        added(*GOOD["added_tokens"], {**GOOD["added_tokens"][0], "content": "<b>", "id": 77}),
        "expected added tokens with ids that follow those before them, found 77 for '<b>'",
    ),
    "a merge that is none": (model(merges=[["a", 3]]), "is not a tokenizer.json: "),
    "a merge of one": (model(merges=["ab"]), "is not a tokenizer.json: "),
    "a merge to nothing": (model(merges=[["t", "h"]]), "is not a tokenizer.json: "),
    "random tokens": (model(dropout=0.1), "expected no dropout"),
    "32 normalizers in each other": (nested(32), "expected at most 64 levels of JSON, found more"),
    "100,000 normalizers in each other": (nested(100_000), "is not a tokenizer.json: "),
    "100,000 lists": ("[" * 100_000, "is not a tokenizer.json: "),
    "a panic as it is read": (
        json.dumps({**GOOD, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
        "is not a tokenizer.json: ",
    ),
    "a panic as it is used": (
        json.dumps({**GOOD, "pre_tokenizer": {"type": "FixedLength", "length": 0}}),
        "is not a tokenizer.json: chunk size must be non-zero",
    ),
}

LOAD = """
import sys
from fnrecipe.data import huggingface_tokenizer
from fnrecipe.errors import UsageError
for path in sys.argv[1:]:
    try:
        huggingface_tokenizer(path)
        print("loaded")
    except UsageError as error:
        print(repr(str(error)))
"""


def test_one_line_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    """In a process of its own: a crash of the library would end this one, and it prints panics by itself."""
    paths = []
    for number, (content, _) in enumerate(FILES.values()):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(content)
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.splitlines()
    for (name, (_, expected)), path, line in zip(FILES.items(), paths, told, strict=True):
        assert line[1:].startswith(f"tokenizer.path: {path}"), name
        assert expected in line, name
        assert "\\n" not in line, name


def test_levels_that_a_tokenizer_may_have(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(nested(31))
    assert huggingface_tokenizer(str(tmp_path / "t.json")).vocab_size == len(GOOD["model"]["vocab"])


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(path))


def far_too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (pipe, "expected a file, or a directory with a tokenizer.json, found neither: "),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "expected a file, or a directory with a tokenizer.json"),
    "a socket": (listening, "cannot read "),
    "an empty directory": (Path.mkdir, "cannot read "),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "cannot read "),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot read "),
    "a file of 1 TiB": (far_too_large, "expected at most 256 MiB, found more"),
}


@pytest.mark.parametrize(("make", "expected"), SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    make(tmp_path / "t")
    with pytest.raises(UsageError) as caught:
        huggingface_tokenizer(str(tmp_path / "t"))
    assert str(caught.value).startswith("tokenizer.path: ")
    assert expected in str(caught.value)


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(UsageError, match=r"^tokenizer\.path: cannot read 'a\\x00b': embedded null byte$"):
        huggingface_tokenizer("a\0b")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    *[(key,) for key in GOOD],
    *[("model", key) for key in [*GOOD["model"], "unk_id", "vocab"]],
    *[("added_tokens", 0, key) for key in GOOD["added_tokens"][0]],
]


@pytest.mark.parametrize("library", [dropping, lambda: unigram(by_bytes=True)], ids=["BPE", "Unigram"])
@settings(max_examples=200)
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_in_any_place_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, library: Callable[[], Any], place: tuple[Any, ...], value: Any
) -> None:
    content = json.loads(library().to_str())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    told = refusal(path)
    assert told is None or (told.startswith("tokenizer.") and len(told.splitlines()) == 1)


def refusal(path: Path) -> str | None:
    try:
        tokenizer = huggingface_tokenizer(str(path))
    except UsageError as error:
        return str(error)
    assert len(tokenizer.num_bytes) == tokenizer.vocab_size
    return None

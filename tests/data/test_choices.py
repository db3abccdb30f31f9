"""Questions are read strictly, continuations are the tokens behind their context, accuracies are those of closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fnrecipe.data import byte_tokenizer
from fnrecipe.data.choices import Question, accuracy, continuations, read_questions
from fnrecipe.errors import UsageError

GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


def test_questions_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({**GOOD, "more": 1}) + "\n\n" + json.dumps({**GOOD, "answer": 0}) + "\n")
    assert read_questions(str(path)) == [
        Question("a", ("b", "c"), 1, f"{path}:1"),
        Question("a", ("b", "c"), 0, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected a JSON object, found unexpected end of data"),
        ("[]", "expected a JSON object, found list"),
        ('{"context": "a", "choises": ["b"], "answer": 0}', "expected the field 'choices', found none; did you mean choises?"),
        ('{"choices": ["b", "c"], "answer": 0}', "expected the field 'context', found none"),
        (json.dumps({**GOOD, "context": 3}), "expected text in the field 'context', found int"),
        (json.dumps({**GOOD, "choices": []}), "expected a list of at least 2 texts in the field 'choices', found []"),
        (json.dumps({**GOOD, "choices": ["b"]}), "expected a list of at least 2 texts in the field 'choices', found ['b']"),
        (
            json.dumps({**GOOD, "choices": ["b", 2]}),
            "expected a list of at least 2 texts in the field 'choices', found ['b', 2]",
        ),
        (json.dumps({**GOOD, "choices": ["b", ""]}), "expected text in each of the choices, found none in number 1"),
        (json.dumps({**GOOD, "answer": 2}), "expected the index of one of 2 choices, from 0, in the field 'answer', found 2"),
        (json.dumps({**GOOD, "answer": -1}), "in the field 'answer', found -1"),
        (json.dumps({**GOOD, "answer": True}), "in the field 'answer', found True"),
        (json.dumps({**GOOD, "answer": "B"}), "in the field 'answer', found 'B'"),
    ],
)
def test_a_line_that_is_no_question_is_told_with_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(GOOD) + f"\n{line}\n")
    with pytest.raises(UsageError) as error:
        read_questions(str(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_no_question_at_all_is_told(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"none\.jsonl: expected a question on each line, found none"):
        read_questions(str(tmp_path / "none.jsonl"))


def encode(context: str, continuation: str, *, add_bos: bool = False, length: int = 8) -> tuple[list[int], bytes, int]:
    (found,) = continuations([(context, continuation)], byte_tokenizer(), add_bos=add_bos, length=length)
    return list(found.given), bytes(found.ids), found.lost


def test_a_continuation_is_what_follows_the_tokens_of_its_context() -> None:
    bos = byte_tokenizer().bos
    assert encode("ab", "cd") == ([97, 98], b"cd", 0)
    assert encode("ab", "cd", add_bos=True) == ([bos, 97, 98], b"cd", 0)
    assert encode("ab ", "cd") == ([97, 98], b" cd", 0)
    assert encode("", "cd") == ([bos], b"cd", 0)
    assert encode(" \n", "cd") == ([bos], b" \ncd", 0)


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    assert encode("abcdefg", "hi") == ([*b"abcdefg"], b"hi", 0)
    assert encode("abcdefgh", "ij") == ([*b"bcdefgh"], b"ij", 1)
    assert encode("abcdefgh", "ij", add_bos=True) == ([*b"bcdefgh"], b"ij", 2)
    with pytest.raises(UsageError, match=r"expected 1 to 8 tokens \(dataset.max_seq_len\) in 'bcdefghij' behind 'a', found 9"):
        encode("a", "bcdefghij")


def test_accuracies() -> None:
    questions = [
        Question("", ("a", "bbbb"), 0, ""),
        Question("", ("a", "bbbb"), 1, ""),
        Question("", ("a", "b", "c", "d"), 3, ""),
        Question("", ("é", "ab"), 0, ""),
    ]
    found = accuracy(questions, [[-1.0, -2.0], [-1.0, -2.0], [-4.0, -3.0, -2.0, -1.0], [-2.0, -2.0]])
    assert found.questions == 4
    assert found.chance == (1 / 2 + 1 / 2 + 1 / 4 + 1 / 2) / 4
    assert (found.acc.value, found.acc_norm.value) == (3 / 4, 3 / 4)
    assert found.acc.stderr == pytest.approx(math.sqrt(3 / 4 * 1 / 4 / 3))  # the unbiased variance of a Bernoulli sample, by n
    assert found.centred.value == pytest.approx((0.75 - found.chance) / (1 - found.chance))
    assert found.centred.stderr == pytest.approx(found.acc.stderr / (1 - found.chance))


def test_one_question_has_no_standard_error() -> None:
    assert math.isnan(accuracy([Question("", ("a", "b"), 0, "")], [[0.0, -1.0]]).acc.stderr)

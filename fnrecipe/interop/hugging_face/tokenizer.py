"""The tokenizer of a run as files of Hugging Face: copies of those it was read from, or new ones for bytes."""

from __future__ import annotations

import json
from pathlib import Path

import attrs

from fnrecipe.config import TokenizerSection
from fnrecipe.config.model_dir import TOKENIZER, TOKENIZER_CONFIG, read_json, token_text
from fnrecipe.data import Tokenizer, byte_tokenizer, huggingface_tokenizer
from fnrecipe.data.answer_ends import with_answer_ends
from fnrecipe.data.chat_template import ChatTemplate
from fnrecipe.errors import UsageError

CHAT_TEMPLATE = "chat_template.jinja"
BESIDE = (
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that belong to a tokenizer.json and are copied as they are."""


@attrs.frozen(eq=False)
class TokenizerFiles:
    """A tokenizer that knows the ends of its template's answers, and its files by name.

    origin  the directory of Hugging Face that they are from, if it has these ends of a text
    """

    tokenizer: Tokenizer
    files: dict[str, bytes]
    origin: Path | None


def tokenizer_files(section: TokenizerSection, max_seq_len: int, chat_template: str | None = None) -> TokenizerFiles:
    """The files of the tokenizer of a config; what they say of the ends of a text is what the config says.

    A chat template is given in the place of the tokenizer's own.

    Raises:
        UsageError: if it cannot be read.
    """
    found = _tokenizer_files(section, max_seq_len)
    files = found.files if chat_template is None else {**found.files, CHAT_TEMPLATE: chat_template.encode()}
    template = ChatTemplate(files[CHAT_TEMPLATE].decode(errors="replace"), CHAT_TEMPLATE) if CHAT_TEMPLATE in files else None
    return attrs.evolve(found, tokenizer=with_answer_ends(found.tokenizer, template), files=files)


def _tokenizer_files(section: TokenizerSection, max_seq_len: int) -> TokenizerFiles:
    if section.family == "byte":
        tokenizer = byte_tokenizer()
        return TokenizerFiles(tokenizer, {TOKENIZER: _byte_level(tokenizer), **_config({}, tokenizer, max_seq_len)}, None)
    assert section.path is not None
    tokenizer = huggingface_tokenizer(section.path, section.eos_token, section.bos_token)
    path = Path(section.path) / TOKENIZER if Path(section.path).is_dir() else Path(section.path)
    told = path.name == TOKENIZER and (path.parent / TOKENIZER_CONFIG).is_file()
    if not told:
        beside = path.parent / CHAT_TEMPLATE
        template = {CHAT_TEMPLATE: _bytes(beside)} if beside.is_file() else {}
        return TokenizerFiles(tokenizer, {TOKENIZER: _bytes(path), **_config({}, tokenizer, max_seq_len), **template}, None)
    names = [TOKENIZER, TOKENIZER_CONFIG, *(name for name in BESIDE if (path.parent / name).is_file())]
    files = {name: _bytes(path.parent / name) for name in names}
    values = read_json(path.parent / TOKENIZER_CONFIG)
    if any(token_text(values.get(key)) != name for key, name in _ends(section, tokenizer).items()):
        return TokenizerFiles(tokenizer, {**files, **_config(values, tokenizer, max_seq_len)}, None)
    return TokenizerFiles(tokenizer, files, path.parent)


def _ends(section: TokenizerSection, tokenizer: Tokenizer) -> dict[str, str]:
    """The names of the ends of a text that a run has not from tokenizer_config.json: all, if it was given the file beside."""
    names = dict(zip(("bos_token", "eos_token"), tokenizer.names, strict=True))
    is_told = section.path is not None and Path(section.path).is_dir()
    return {key: name for key, name in names.items() if not is_told or getattr(section, key) is not None}


def _config(values: dict[str, object], tokenizer: Tokenizer, max_seq_len: int) -> dict[str, bytes]:
    """A tokenizer_config.json; without `values` of an older one, one that says how to read a tokenizer.json."""
    bos, eos = tokenizer.names
    new = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len, "clean_up_tokenization_spaces": False}
    return {TOKENIZER_CONFIG: pretty({**(values or new), "bos_token": bos, "eos_token": eos})}


def _byte_level(tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that gives the bytes of a text: a byte-level BPE without a merge."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    names = {char: number for number, char in enumerate(_characters())}
    inner = Inner(models.BPE(vocab=names, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(tokenizer.names[1], special=True)])
    return inner.to_str(pretty=True).encode()


def _characters() -> list[str]:
    """The characters by which byte-level vocabularies spell the bytes 0 to 255: printable ones as they are, others from 256."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(0x100)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"tokenizer.path: cannot read {path}: {error.strerror}") from None


def pretty(values: object) -> bytes:
    """JSON as transformers writes it."""
    return f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode()

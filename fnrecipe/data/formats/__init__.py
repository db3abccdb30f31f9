"""Formats by name. Each module here defines one or two; a new one is a module and a line in this table.

A recipe may have more of its own: `open_corpus(path, tokenizer, formats={**FORMATS, "csv": CSV})`.
"""

from collections.abc import Mapping

from fnrecipe.data.formats.format import Format as Format
from fnrecipe.data.formats.format import Reading as Reading
from fnrecipe.data.formats.jsonl import JSONL
from fnrecipe.data.formats.parquet import PARQUET
from fnrecipe.data.formats.text import PYTHON, TEXT
from fnrecipe.data.formats.tokens import TOKENS

FORMATS: Mapping[str, Format] = {"jsonl": JSONL, "parquet": PARQUET, "text": TEXT, "python": PYTHON, "tokens": TOKENS}

"""Python sources as examples: a function's head and docstring are the prompt, its body is the response.

As preferences, that response is better than its lines in backward order; of short functions alone.
"""

from __future__ import annotations

import ast
import io
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice

import orjson

from fnrecipe.data.blocks import Block
from fnrecipe.data.document import Document, Read
from fnrecipe.data.formats import text
from fnrecipe.data.formats.format import Format, Reading
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError

SHORT = 250
"""Bytes of a function in a pair at most: both answers with their prompts then fit into a row of 512 tokens, even of bytes."""


def read(block: Block, *, limit: int) -> Iterator[Read]:
    """`{"prompt": …, "completion": …}` of each function of a file that has a docstring and something behind it."""
    for item in text.read_python(block, limit=limit):
        if isinstance(item, DataError) or item.text is None:
            yield item
        else:
            yield from _functions(block.path, item.text)


def _functions(path: str, source: str) -> Iterator[Read]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the source
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        yield DataError(f"{path}: expected a Python source: {error}")
        return
    lines = list(io.StringIO(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            split = node.body[0].end_lineno or 0
            prompt, completion = "".join(lines[node.lineno - 1 : split]), "".join(islice(lines, split, node.end_lineno))
            record = orjson.dumps({"prompt": prompt, "completion": completion}).decode()
            if completion:
                place = f"{path}:{node.lineno}"
                yield Document(record, bad=partial(_bad, place), place=partial(str, place))


def _bad(place: str, what: str) -> DataError:
    return DataError(f"{place}: {what}")


def _read(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    return read(block, limit=reading.max_record_bytes)


def _read_pairs(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    """`{"prompt": …, "chosen": …, "rejected": …}` of each short function whose lines read otherwise backwards."""
    for item in _read(block, reading, tokenizer):
        if isinstance(item, DataError) or item.text is None:
            yield item
            continue
        record = orjson.loads(item.text)
        body = record["completion"]
        backwards = "".join(reversed(list(io.StringIO(body))))
        if backwards != body and len((record["prompt"] + body).encode()) <= SHORT:
            pair = {"prompt": record["prompt"], "chosen": body, "rejected": backwards}
            yield Document(orjson.dumps(pair).decode(), bad=item.bad, place=item.place)


PYTHON_FUNCTIONS = Format(text.PYTHON.suffixes, text.PYTHON.plan, _read)
PYTHON_PREFERENCES = Format(text.PYTHON.suffixes, text.PYTHON.plan, _read_pairs)

"""What ends the answers of a model that a chat template speaks to."""

from __future__ import annotations

import attrs

from fnrecipe.data.chat_template import ChatTemplate, encode_chat
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError


def with_answer_ends(tokenizer: Tokenizer, template: ChatTemplate | None) -> Tokenizer:
    """The tokenizer whose answers end, too, with the special token that the template writes last behind one.

    What writes none, refuses a question and its answer, or is no template adds nothing.
    """
    if template is None:
        return tokenizer
    try:
        chat = encode_chat(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)
    except (DataError, UsageError):
        return tokenizer
    special = set(tokenizer.special.values())
    last = [token for token in chat.ids[chat.trained].tolist() if token in special][-1:]
    return attrs.evolve(tokenizer, answer_ends=tokenizer.answer_ends.union(last))

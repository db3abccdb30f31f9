"""lm-evaluation-harness on a run's directory, or on one of Hugging Face: `fnrecipe` as a model of the harness.

python -m fnrecipe.interop.lm_eval run --model fnrecipe --model_args pretrained=runs/first --tasks …
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal, Protocol, cast

import attrs
import torch

from fnrecipe import presets, random
from fnrecipe.compiler.modes import BACKENDS, jit_mode
from fnrecipe.config import ModelSection, TokenizerSection, TrainerSection
from fnrecipe.config.find import NotFoundError
from fnrecipe.config.model_dir import describe
from fnrecipe.config.sections.model import FAMILIES, ModelConfig
from fnrecipe.data import tokenizer_file
from fnrecipe.data.choices import Continuation
from fnrecipe.errors import UsageError
from fnrecipe.generation.generator import Generator, go_on
from fnrecipe.generation.sampling import Sampling
from fnrecipe.interop.pretrained import pretrained as read_params
from fnrecipe.interop.survey import weights_dtype
from fnrecipe.models.likelihood import likelihoods, rows_of
from fnrecipe.parallel.mesh import replicated
from fnrecipe.runtime import host
from fnrecipe.streams import tokenizer_of
from fnrecipe.transforms import jit

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UsageError(f"expected lm-evaluation-harness: pip install 'fnrecipe[lm-eval]' ({error})") from None

_SHORTEST = 64

Scored = tuple[float, bool]
_log = logging.getLogger(__name__)


class Request(Protocol):
    """A request of the harness: its arguments are a text, and for what is generated how."""

    @property
    def args(self) -> tuple[str, Mapping[str, object]]: ...


@register_model("fnrecipe")
class FnrecipeLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness, in one process. Its arguments, as `--model_args` gives them:

    pretrained     the directory
    dtype          of activations
    device         cpu, cuda, cuda:1, …; auto: a GPU if there is one
    batch_size     rows at a time
    max_length     of a row, in tokens; by default the context of the model
    max_gen_toks   tokens to be generated, where a task does not say
    add_bos_token  whether BOS stands before a text; by default where the tokenizer's file puts it there
    seed           of what is sampled
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._device = _device(device)
        section, tokenizer = _sections(pretrained)
        self.tokens = tokenizer_of(tokenizer)
        self.add_bos_token = _begins(tokenizer) if add_bos_token is None else add_bos_token
        self.rows = _rows(batch_size)
        self.max_length: int = section.config.max_seq_len if max_length is None else max_length
        self.max_gen_toks, self.key = max_gen_toks, random.key(seed, self._device)
        self.params = read_params(section, self.key, replicated)
        apply = presets.apply(section, TrainerSection(dtype=dtype), "row")  # a row is one text
        self.likelihoods = jit(likelihoods(apply), backend=BACKENDS[jit_mode("auto", self._device)])
        made = partial(presets.generator, section, TrainerSection(dtype=dtype), vocab_size=self.tokens.vocab_size)
        of_temperature = cache(lambda temperature: made(Sampling(temperature=temperature), context=self.max_length))
        self.generator: Callable[[float], Generator[ModelConfig]] = of_temperature

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [*([self.tokens.bos] if begins else []), *self.tokens.encode([string])[0].tolist()]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that do not overlap, each behind the last token of the one before."""
        windows = partial(
            utils.get_rolling_token_windows, prefix_token=self.tokens.bos, max_seq_len=self.max_length, context_len=1
        )
        texts = [[utils.make_disjoint_window(w) for w in windows(self.tok_encode(request.args[0]))] for request in requests]
        found = iter(self._loglikelihood_tokens([(("", ""), *window) for each in texts for window in each]))
        return [sum(next(found)[0] for _ in each) for each in texts]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the texts that end it."""
        return [self._generated(number, *request.args) for number, request in enumerate(requests)]

    def _generated(self, number: int, context: str, asked: Mapping[str, object]) -> str:
        wanted = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        length = wanted["max_gen_toks"]
        if length >= self.max_length:
            raise UsageError(f"max_gen_toks: expected less than the {self.max_length:,} tokens of a row, found {length:,}")
        begin = self.tok_encode(context)[length - self.max_length :] or [self.tokens.bos]
        generator, key = self.generator(wanted["temperature"] if wanted["do_sample"] else 0.0), random.fold_in(self.key, number)
        tokens = go_on(generator, self.params, begin, key, length, self.tokens.answer_ends)
        text = self.tokens.decode(tokens)
        for end in wanted["until"]:
            text = text.partition(end)[0] if end else text
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[Scored]:
        found = [_cut(given, ids, self.max_length) for _, given, ids in requests]
        if cut := sum(each.lost > 0 for each in found):
            _log.warning("%d of %d contexts are cut to fit in rows of %d tokens", cut, len(found), self.max_length)
        order = sorted(range(len(found)), key=lambda number: -_length(found[number]))
        scored = dict(zip(order, self._in_batches([found[number] for number in order]), strict=True))
        return [scored[number] for number in range(len(found))]

    def _in_batches(self, found: Sequence[Continuation]) -> Iterator[Scored]:
        """The scores of continuations in descending order of length. Few lengths of rows are traced: powers of two."""
        for start in range(0, len(found), self.rows):
            batch = found[start : start + self.rows]
            length = min(max(_SHORTEST, 1 << (_length(batch[0]) - 1).bit_length()), self.max_length)
            (rows,) = rows_of(batch, self.rows, length)
            moved = (tensor.to(self._device) for tensor in (rows.tokens, rows.targets, rows.mask))
            with torch.no_grad():
                values, greedy = self.likelihoods(self.params, *moved)
            yield from list(zip(values.tolist(), greedy.tolist(), strict=True))[: len(batch)]


def _device(name: str) -> torch.device:
    """The device called `name`; without a GPU the CPU for one, which the harness names where its user names none."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("device: there is no %s here; the model is on the CPU", name)
        return torch.device("cpu")
    return host.pick_device("auto") if name == "auto" else torch.device(name)


def _rows(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UsageError(f"batch_size: expected a number of rows from 1, found {batch_size}")
    return int(batch_size)


def _sections(path: str) -> tuple[ModelSection, TokenizerSection]:
    """The model in a directory, with the dtype of its weights, and its tokenizer.

    Raises:
        UsageError: if there is no model that is known, or no tokenizer.
    """
    try:
        values = describe(path, FAMILIES).tokenizer
    except NotFoundError as error:
        raise UsageError(f"pretrained: expected {error.expected}; {error.hint}") from None
    if not values:
        raise UsageError(f"pretrained: expected a tokenizer.json in {path}, found none")
    section = attrs.evolve(ModelSection(path=path), dtype=cast("Literal['float32', 'bfloat16']", weights_dtype(path)))
    return section, TokenizerSection(**values)  # type: ignore[arg-type]


def _begins(section: TokenizerSection) -> bool:
    """Whether the post-processor in a tokenizer's file puts a token before a text."""
    if section.family != "hf" or section.path is None:
        return False
    path = Path(section.path) / "tokenizer.json" if Path(section.path).is_dir() else Path(section.path)
    return bool(tokenizer_file.ends(tokenizer_file.read(str(path)).get("post_processor"))[0])


def _cut(given: Sequence[int], ids: Sequence[int], length: int) -> Continuation:
    """A continuation whose inputs fit in `length`: what is too long is cut off at its beginning, as by the harness's own."""
    if not 0 < len(ids) <= length:
        raise UsageError(f"max_length: expected 1 to {length:,} tokens in a continuation, found {len(ids):,}")
    lost = max(len(given) + len(ids) - 1 - length, 0)
    return Continuation(given[lost:], ids, lost)


def _length(found: Continuation) -> int:
    return len(found.given) + len(found.ids) - 1


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

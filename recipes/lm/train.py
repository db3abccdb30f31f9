"""Language-model pre-training: what is trained, on what, and how.

fnrecipe train lm --out DIR          # or, from a copy of this folder:
python -m recipes.lm.train DIR
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fnrecipe import interop, presets
from fnrecipe.data.encode_examples import encode_question
from fnrecipe.evaluations import named_evaluations
from fnrecipe.loss import Loss
from fnrecipe.models.flops import TokenFlops
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.recipe import Evaluation, Measurement, Recipe
from fnrecipe.streams import all_corpora, example, make_tokenizer, source_list
from fnrecipe.tree import Tree

from .config import LMConfig, needs
from .config import config as defaults
from .data import train_documents, train_stream, valid_stream


def init(config: LMConfig, key: Tensor, place: Placement) -> Tree:
    return presets.init(config.model, key, place)


def pretrained(config: LMConfig, key: Tensor, place: Placement) -> Tree | None:
    return interop.pretrained(config.model, key, place)


def trains(config: LMConfig, path: str, parameter: Tensor) -> bool:
    return presets.trains(config.model, path)


def model(config: LMConfig, params: Tree) -> Tree:
    return presets.merged(config.model, params)


def loss(config: LMConfig) -> Loss:
    dataset, section = config.dataset, config.loss
    apply = presets.apply(config.model, config.trainer, dataset.attention, dataset.documents_per_row)
    objective = presets.objective(section)
    return next_token_loss(apply, source_list(config), objective, length_normalization=section.length_normalization)


def update(config: LMConfig) -> Transform:
    return presets.update(config.optimizer, config.lr_scheduler, config.trainer, config.regime, config.model)


def positions(config: LMConfig) -> int:
    return config.dataset.max_seq_len


def flops(config: LMConfig) -> TokenFlops | None:
    return presets.flops(config.model, config.dataset.max_seq_len)


def rules(config: LMConfig) -> Mapping[str, int]:
    return presets.rules(config.model)


def evaluations(config: LMConfig) -> Mapping[str, Evaluation[LMConfig] | Measurement[LMConfig]]:
    """The validation, and what the config names beside it."""
    named = named_evaluations(config, stream=valid_stream, loss=loss, tokenizer=make_tokenizer, encode=encode)
    return {"valid": Evaluation(valid_stream), **named}


def encode(config: LMConfig, prompt: str) -> list[int]:
    """The tokens of a prompt."""
    return encode_question(prompt, make_tokenizer(config), None, add_bos=config.tokenizer.add_bos)


def sample(config: LMConfig, params: Tree, key: Tensor) -> str:
    tokenizer, prompt = make_tokenizer(config), config.regime.sample_prompt
    size, ends = tokenizer.vocab_size, tokenizer.answer_ends
    tokens = presets.sample(config, params, encode(config, prompt), key, vocab_size=size, ends=ends)
    return (prompt + tokenizer.decode(tokens)).rstrip()


recipe = Recipe(
    name="lm",
    config=defaults,
    init=init,
    pretrained=pretrained,
    loss=loss,
    update=update,
    trains=trains,
    model=model,
    stream=train_stream,
    documents=train_documents,
    example=example,
    evaluations=evaluations,
    sample=sample,
    corpora=all_corpora,
    tokenizer=make_tokenizer,
    positions=positions,
    flops=flops,
    needs=needs,
    rules=rules,
)

if __name__ == "__main__":
    from fnrecipe.cli.main import run_recipe

    run_recipe(recipe)

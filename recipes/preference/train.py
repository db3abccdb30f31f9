"""Preference optimization: of two answers to a prompt, the better one becomes likelier beside the other.

fnrecipe train preference --out DIR         # or, from a copy of this folder:
python -m recipes.preference.train DIR
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
from torch import Tensor

from fnrecipe import interop, presets
from fnrecipe.config import AdapterSection
from fnrecipe.config.find import find_component
from fnrecipe.config.sections.optim import CRITERIA
from fnrecipe.data.encode_examples import encode_question
from fnrecipe.evaluations import named_evaluations
from fnrecipe.loss import Loss
from fnrecipe.models.adapter import ADAPTER
from fnrecipe.models.answers import REFERENCE, preference_loss
from fnrecipe.models.flops import TokenFlops
from fnrecipe.models.next_token import Apply, next_token_loss
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.recipe import Evaluation, Measurement, Recipe
from fnrecipe.streams import source_list
from fnrecipe.tree import Tree

from .config import PreferenceConfig, needs
from .config import config as defaults
from .data import all_corpora, example, make_template, make_tokenizer, train_documents, train_stream, valid_stream
from .reference import kept, reference
from .score import score


def init(config: PreferenceConfig, key: Tensor, place: Placement) -> Tree:
    """The parameters of the model, and beside them those of the reference model, which begin the same.

    Of a model with an adapter, the base is the reference model, unless `reference.path` names another.
    """
    return _with_reference(config, presets.init(config.model, key, place))


def pretrained(config: PreferenceConfig, key: Tensor, place: Placement) -> Tree | None:
    """What is read of the model and of the reference model; what is not begins as `init` has it."""
    own, other = config.model.path, config.reference.path
    if own is None and other is None:
        return None
    params = interop.pretrained(config.model, key, place) or presets.init(config.model, key, place)
    if other is None:
        return _with_reference(config, params)
    return {**params, REFERENCE: reference(config, key, lambda path, leaf: place(f"{REFERENCE}.{path}", leaf))}


def trains(config: PreferenceConfig, path: str, parameter: Tensor) -> bool:
    return not path.startswith(f"{REFERENCE}.") and presets.trains(config.model, path)


def model(config: PreferenceConfig, params: Tree) -> Tree:
    """The parameters without those of the reference model, with those of the adapter added to them."""
    return presets.merged(config.model, _without(REFERENCE, params))


def loss(config: PreferenceConfig) -> Loss:
    found = find_component(config.criterion.name, CRITERIA)
    log_probabilities: Literal["model", "data"] = "model" if config.has_reference else "data"
    judge = found.make(config.criterion.config)
    among = log_probabilities if found.reference else None
    return preference_loss(_apply(config), judge, source_list(config), reference=among, pairs=found.pairs)


def text_loss(config: PreferenceConfig) -> Loss:
    return next_token_loss(_apply(config))


def update(config: PreferenceConfig) -> Transform:
    return presets.update(config.optimizer, config.lr_scheduler, config.trainer, config.regime, config.model)


def positions(config: PreferenceConfig) -> int:
    return config.dataset.max_seq_len


def flops(config: PreferenceConfig) -> TokenFlops | None:
    """Those of training, and a third of those of all of the model for the reference model, which has no backward pass."""
    length, base = config.dataset.max_seq_len, attrs.evolve(config.model, adapter=AdapterSection())
    found, whole = (presets.flops(model, length) for model in (config.model, base))
    if found is None or whole is None or not config.has_reference:
        return found
    return TokenFlops(found.full + whole.full // 3, found.causal + whole.causal // 3)


def rules(config: PreferenceConfig) -> Mapping[str, int]:
    found = presets.rules(config.model)
    return {**found, **{f"{REFERENCE}.{pattern}": dim for pattern, dim in found.items()}}


def evaluations(config: PreferenceConfig) -> Mapping[str, Evaluation[PreferenceConfig] | Measurement[PreferenceConfig]]:
    """The validation, and what the config names beside it."""
    named = named_evaluations(config, stream=valid_stream, loss=loss, tokenizer=make_tokenizer, encode=encode)
    return {"valid": Evaluation(valid_stream), **named}


def encode(config: PreferenceConfig, prompt: str) -> list[int]:
    """The tokens of a prompt, as a user's message where there is a template."""
    return encode_question(prompt, make_tokenizer(config), make_template(config), add_bos=config.tokenizer.add_bos)


def sample(config: PreferenceConfig, params: Tree, key: Tensor) -> str:
    """The answer to the prompt of the config."""
    tokenizer, prompt = make_tokenizer(config), config.regime.sample_prompt
    size, ends = tokenizer.vocab_size, tokenizer.answer_ends
    tokens = presets.sample(config, _without(REFERENCE, params), encode(config, prompt), key, vocab_size=size, ends=ends)
    return (prompt + ("\n" if make_template(config) else "") + tokenizer.decode(tokens)).rstrip()


def _apply(config: PreferenceConfig) -> Apply:
    dataset = config.dataset
    return presets.apply(config.model, config.trainer, dataset.attention, dataset.documents_per_row)


def _with_reference(config: PreferenceConfig, params: Tree) -> Tree:
    """The parameters with copies of them as those of the reference model, where it has its own."""
    if not config.keeps_reference:
        return params
    return {**params, REFERENCE: kept(config, _without(ADAPTER, params))}


def _without(part: str, params: Tree) -> Tree:
    return {name: value for name, value in params.items() if name != part}


recipe = Recipe(
    name="preference",
    config=defaults,
    init=init,
    pretrained=pretrained,
    loss=loss,
    text_loss=text_loss,
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
    scored=score,
    positions=positions,
    flops=flops,
    needs=needs,
    rules=rules,
)

if __name__ == "__main__":
    from fnrecipe.cli.main import run_recipe

    run_recipe(recipe)

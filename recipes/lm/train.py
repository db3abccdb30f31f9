"""Language-model pre-training: what is trained, on what, and how.

fnrecipe train lm --out DIR          # or, from a copy of this folder:
python -m recipes.lm.train DIR
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fnrecipe import optim
from fnrecipe.config import schedule_steps
from fnrecipe.loss import Loss
from fnrecipe.models import llama
from fnrecipe.models.flops import TokenFlops
from fnrecipe.models.generate import generate
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.recipe import Recipe
from fnrecipe.tree import Tree

from .config import LMConfig, needs
from .config import config as defaults
from .data import all_corpora, example, make_tokenizer, source_list, train_stream, valid_stream


def init(config: LMConfig, key: Tensor, place: Placement) -> Tree:
    dtype = getattr(torch, config.model.dtype)
    return llama.init(config.model.config, key, lambda path, leaf: place(path, leaf.to(dtype)))


def compute(config: LMConfig) -> Policy:
    trainer = config.trainer
    checkpointing = trainer.activation_checkpointing
    dtype = getattr(torch, trainer.dtype)
    return Policy(dtype, checkpointing.mode, checkpointing.every_nth_layer, trainer.logits_at_once)


def loss(config: LMConfig) -> Loss:
    apply = partial(llama.apply, config.model.config, policy=compute(config), scope=config.dataset.attention)
    return next_token_loss(apply, source_list(config))


def update(config: LMConfig) -> Transform:
    adamw, cosine = config.optimizer.config, config.lr_scheduler.config
    num_warmup_steps, num_steps = schedule_steps(cosine, config.regime.num_steps)
    learning_rate = optim.cosine_annealing(
        adamw.lr, num_warmup_steps=num_warmup_steps, num_steps=num_steps, final_scale=cosine.final_lr_scale
    )
    return optim.adamw(
        learning_rate,
        betas=adamw.betas,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        max_norm=config.trainer.max_grad_norm,
    )


def positions(config: LMConfig) -> int:
    return config.dataset.max_seq_len


def flops(config: LMConfig) -> TokenFlops:
    return llama.flops(config.model.config, config.dataset.max_seq_len)


def sample(config: LMConfig, params: Tree, key: Tensor) -> str:
    tokenizer, prompt = make_tokenizer(config), config.regime.sample_prompt
    begin = [tokenizer.bos] * config.tokenizer.add_bos + tokenizer.encode([prompt])[0].tolist()
    tokens = generate(
        partial(llama.apply, config.model.config, policy=compute(config), scope="row"),  # the window is one text
        params,
        begin or [tokenizer.eos],
        key,
        length=config.regime.num_sample_tokens,
        window=config.dataset.max_seq_len,
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos,
    )
    return (prompt + tokenizer.decode(tokens)).rstrip()


recipe = Recipe(
    name="lm",
    config=defaults,
    init=init,
    loss=loss,
    update=update,
    stream=train_stream,
    example=example,
    validate=valid_stream,
    sample=sample,
    corpora=all_corpora,
    tokenizer=make_tokenizer,
    positions=positions,
    flops=flops,
    needs=needs,
    rules=llama.TENSOR_RULES,
)

if __name__ == "__main__":
    from fnrecipe.cli.main import run_recipe

    run_recipe(recipe)

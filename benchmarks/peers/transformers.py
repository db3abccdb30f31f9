"""`transformers`: its LlamaForCausalLM in a loop of one's own, or in its Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Thread
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.peers.plain import loop, tensors
from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig


def make_step(config: LlamaConfig, *, trainer: bool = False) -> Callable[[Batch], Any]:
    torch.manual_seed(0)
    model = make_model(config)
    return _trainer_step(model) if trainer else loop(model, _forward(model))


def make_model(config: LlamaConfig) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.model_dim,
            intermediate_size=config.ffn_inner_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attn_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            initializer_range=config.init_std,
            tie_word_embeddings=config.tied_embeddings,
            use_cache=False,
        )
    ).train()


def _forward(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Documents are told apart by their positions, which is how transformers takes packed rows."""

    def forward(tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, position_ids=positions).logits
        return logits

    return forward


def _trainer_step(model: Any) -> Callable[[Batch], Any]:
    """The Trainer runs in a thread, for it wants to fetch its batches by itself."""
    batches: Queue[dict[str, Tensor]] = Queue()
    losses: Queue[Any] = Queue()

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return _Batches(batches)

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            self.latest: Any = super().compute_loss(*args, **options)
            return self.latest

    class Report(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            losses.put(trainer.latest.detach())

    trainer = Trainer(model, _arguments(), callbacks=[Report()])
    Thread(target=_train, args=(trainer, losses), daemon=True).start()

    def step(batch: Batch) -> Any:
        tokens, _, positions, targets, _ = tensors(batch)
        batches.put({"input_ids": tokens, "position_ids": positions, "labels": targets, "shift_labels": targets})
        loss = losses.get()
        if isinstance(loss, Exception):
            raise loss
        return loss

    return step


class _Batches:
    def __init__(self, queue: Queue[dict[str, Tensor]]) -> None:
        self.queue = queue

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.queue.get()


def _train(trainer: Any, losses: Queue[Any]) -> None:
    try:
        trainer.train()
    except Exception as error:  # the other thread waits for it
        losses.put(error)


def _arguments() -> Any:
    return transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=1_000_000,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1_000_000,
    )

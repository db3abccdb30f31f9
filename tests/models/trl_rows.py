"""The cases of `test_trl.py`, and a script that prints their rows by TRL's own trainers, in an environment of its own:

python3.11 -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 torch==2.13.0
/tmp/trl/bin/python tests/models/trl_rows.py

A Llama of two layers in float32, whose weights are sines, and a padded batch of ids; a row is the loss as the trainer has it,
the norm of its gradient, and the gradient's products with a direction for embeddings, attention and feed-forward networks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Ids: TypeAlias = list[int]
PARTS = ("embed_tokens", "self_attn", "mlp")
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RAGGED: list[tuple[Ids, Ids, Ids]] = [
    ([5, 9, 11], [3, 4, 2], [7, 8, 1, 6, 2]),
    ([12], [40, 41, 42, 43, 2], [9, 2]),
    ([20, 21], [33, 2], [50, 51, 52, 2]),
]
"""Prompt, chosen and rejected answer."""
EVEN: list[tuple[Ids, Ids, Ids]] = [([5], [3, 4, 2], [7, 8, 1, 6, 2]), ([12], [40, 41, 2], [9, 2])]
"""Prompts of one token, chosen answers of one length: nats are means over the same tokens here and in TRL."""
JUDGED: list[tuple[Ids, Ids, Ids, bool]] = [
    ([5, 9, 11], [3, 4, 2], [50, 51, 2], True),
    ([12], [40, 41, 42, 43, 2], [3, 4, 2], False),
    ([20, 21], [50, 51, 2], [40, 41, 42, 43, 2], True),
]
"""Prompt, answer, an answer to another prompt, and whether the answer is desirable."""
PAIRS: Mapping[str, tuple[str, list[tuple[Ids, Ids, Ids]], Mapping[str, Any]]] = {
    "dpo": ("DPO", RAGGED, {"beta": 0.1}),
    "dpo of means": ("DPO", RAGGED, {"beta": 2.0, "loss_type": ["sigmoid_norm"]}),
    "dpo and nll": ("DPO", EVEN, {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
    "cpo": ("CPO", RAGGED, {"beta": 0.3, "cpo_alpha": 0.0}),
    "cpo, smoothed": ("CPO", RAGGED, {"beta": 0.3, "cpo_alpha": 0.0, "label_smoothing": 0.1}),
    "cpo and nll": ("CPO", EVEN, {"beta": 0.3, "cpo_alpha": 0.7}),
    "simpo": ("CPO", RAGGED, {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    "simpo and nll": ("CPO", EVEN, {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.5}),
    "orpo, odds alone": ("ORPO", RAGGED, {"beta": 0.7}),
    "orpo": ("ORPO", EVEN, {"beta": 0.7}),
}
"""The trainer, the batch, and what the trainer is told."""
SINGLES: Mapping[str, Mapping[str, Any]] = {
    "kto": {"beta": 0.1},
    "kto, weighted": {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6},
}


def sines(shapes: Mapping[str, Sequence[int]], phase: float) -> dict[str, Tensor]:
    """A tensor of each name and shape, by the order of the names; those of norms are about 1."""
    found = {}
    for number, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        wave = torch.sin(phase + number + (1.7 + 0.1 * number) * torch.arange(math.prod(shape), dtype=torch.float64))
        found[name] = ((1 + 0.2 * wave) if "norm" in name else 0.3 * wave).view(tuple(shape)).float()
    return found


def _model(phase: float) -> Any:
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, pad_token_id=0, attn_implementation="eager"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict(sines(shapes, phase), strict=False)
    return model


def _tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(number): number for number in range(64)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "0", "eos_token": "2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _trainer(kind: str, columns: Mapping[str, Any], told: Mapping[str, Any]) -> Any:
    """TRL's trainer of a model, and of a frozen one where it takes one."""
    import trl
    from datasets import Dataset
    from trl.experimental import cpo, orpo

    classes = {
        "DPO": (trl.DPOTrainer, trl.DPOConfig),
        "KTO": (trl.KTOTrainer, trl.KTOConfig),
        "CPO": (cpo.CPOTrainer, cpo.CPOConfig),
        "ORPO": (orpo.ORPOTrainer, orpo.ORPOConfig),
    }
    trainer, config = classes[kind]
    args = config(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **told)
    frozen = {"ref_model": _model(1.0)} if kind in ("DPO", "KTO") else {}
    data = Dataset.from_dict({name: [value] * 8 for name, value in columns.items()})
    return trainer(model=_model(0.0), args=args, train_dataset=data, processing_class=_tokenizer(), **frozen)


def _of_pairs(kind: str, batch: list[tuple[Ids, Ids, Ids]], told: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    trainer = _trainer(kind, {"prompt": "5 6", "chosen": " 7 8", "rejected": " 9"}, told)
    if kind == "DPO":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return trainer, trainer.data_collator([dict(zip(names, each, strict=True)) for each in batch])
    found = {}
    for name, side in (("chosen", 1), ("rejected", 2)):
        rows = [(each[0], each[side]) for each in batch]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        padding = [length - len(prompt) - len(answer) for prompt, answer in rows]
        several = list(zip(rows, padding, strict=True))
        found[f"{name}_input_ids"] = [prompt + answer + [0] * rest for (prompt, answer), rest in several]
        found[f"{name}_attention_mask"] = [[1] * (length - rest) + [0] * rest for _, rest in several]
        found[f"{name}_labels"] = [[-100] * len(prompt) + answer + [-100] * rest for (prompt, answer), rest in several]
    return trainer, {name: torch.tensor(value) for name, value in found.items()}


def _of_singles(told: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    trainer = _trainer("KTO", {"prompt": "5 6", "completion": " 7 8", "label": True}, told)
    names = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    return trainer, trainer.data_collator([dict(zip(names, each, strict=True)) for each in JUDGED])


def _row(trainer: Any, batch: dict[str, Tensor], alone: bool) -> list[float]:
    model = trainer.model.train()
    if alone:  # TRL always adds the nats of prompt and answer
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
        loss = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    else:
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    slopes = {name: parameter.grad for name, parameter in model.named_parameters()}
    directions = sines({name: slope.shape for name, slope in slopes.items()}, 2.0)
    products = [sum(float((slopes[n] * directions[n]).sum()) for n in slopes if part in n) for part in PARTS]
    return [float(loss), math.sqrt(sum(float(slope.square().sum()) for slope in slopes.values())), *products]


def main() -> None:
    found = {name: _row(*_of_pairs(*case), name == "orpo, odds alone") for name, case in PAIRS.items()}
    found |= {name: _row(*_of_singles(told), False) for name, told in SINGLES.items()}
    for name, row in found.items():
        print(f'    "{name}": ({", ".join(f"{value:.7g}" for value in row)}),')


if __name__ == "__main__":
    main()

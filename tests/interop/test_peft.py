"""Adapters and peft: what is trained here is loaded there with the same logits, and what is made there begins a run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import fnrecipe
from fnrecipe import nn, random
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.interop.hugging_face import adapter as peft_form
from fnrecipe.models.adapter import ADAPTER
from fnrecipe.parallel.mesh import replicated
from fnrecipe.presets import apply
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell.trained.export import export_adapter, import_model
from tests.helpers import assert_same_bits, draw

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TOKENS = torch.randint(0, 288, (2, 24), generator=torch.Generator().manual_seed(0))


def configured(base: Path, texts: Path, **adapter: Any) -> Any:
    keys = [f"model.adapter.{key}={json.dumps(value)}" for key, value in adapter.items()]
    given = [f"model.path={base}", f"dataset.sources={texts}", "dataset.max_seq_len=32", "gang.device=cpu"]
    return resolve(lm.config, pairs=[*given, *keys])[0]


def logits(config: Any, params: Any) -> Tensor:
    positions = torch.arange(24).expand(2, 24)
    found = apply(config.model, config.trainer, "row")(params, TOKENS, torch.zeros_like(TOKENS), positions)
    return nn.all_logits(found)


def peft_model(base: Path, directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory)


def trained_adapter(base: Path, directory: Path, **config: Any) -> Any:
    """A model of peft with an adapter that is far from its beginning, which is saved."""
    torch.manual_seed(1)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        {"name": "lora", "rank": 4, "alpha": 6},
    ),
    "dora of some": (
        {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "model.layers.1.mlp.down_proj"], "use_dora": True},
        {"name": "dora", "rank": 3, "alpha": 8, "targets": ["layers.*.query", "layers.1.down"]},
    ),
    "rank-stabilised": (
        {"r": 4, "lora_alpha": 3, "target_modules": ["o_proj", "up_proj"], "use_rslora": True},
        {"name": "lora", "rank": 4, "alpha": 6, "targets": ["layers.*.output", "layers.*.up"]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_begins_a_run_and_leaves_it_again(saved: Path, texts: Path, tmp_path: Path, kind: str) -> None:
    theirs, ours = KINDS[kind]
    with torch.no_grad():
        expected = trained_adapter(saved / "untied", tmp_path / "theirs", **theirs)(TOKENS).logits
    config = configured(saved / "untied", texts, path=str(tmp_path / "theirs"), **ours)
    import_model(lm, config, tmp_path / "run")

    _, _, params = fnrecipe.load(tmp_path / "run", lm)
    torch.testing.assert_close(logits(config, params), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(config, lm.model(config, params)), expected, rtol=1e-4, atol=1e-4)

    fnrecipe.export(tmp_path / "run", tmp_path / "merged", recipe=lm)
    export_adapter(tmp_path / "run", tmp_path / "alone", recipe=lm)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(peft_model(saved / "untied", tmp_path / "alone")(TOKENS).logits, expected)
    assert_same_bits(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "theirs")))
    targets = json.loads((tmp_path / "alone/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(expected_modules(kind))


def expected_modules(kind: str) -> list[str]:
    """Short names where all weights of a name are adapted."""
    if kind == "lora":
        return [*(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj", "down_proj"]
    if kind == "rank-stabilised":
        return ["o_proj", "up_proj"]
    return ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def test_transposed_weights_have_an_adapter_and_parts_of_a_tensor_have_none(texts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 288, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "base")
    targets = ["layers.*.up", "layers.*.down", "layers.*.output"]
    config = configured(tmp_path / "base", texts, name="dora", rank=4, targets=targets)
    import_model(lm, config, tmp_path / "run")
    _, _, params = fnrecipe.load(tmp_path / "run", lm)
    params = {**params, ADAPTER: draw(params[ADAPTER], 2)}
    peft_form.export(tmp_path / "alone", config.model, params, dtype=None)
    with torch.no_grad():
        found = peft_model(tmp_path / "base", tmp_path / "alone")(TOKENS).logits
    torch.testing.assert_close(logits(config, params), found, rtol=1e-4, atol=1e-4)

    whole = configured(tmp_path / "base", texts, name="lora")
    with pytest.raises(UsageError, match=r"^model\.adapter\.targets: expected weights that are tensors of their own .*c_attn"):
        peft_form.export(tmp_path / "none", whole.model, lm.init(whole, random.key(0), replicated), dtype=None)
    assert not (tmp_path / "none").exists()


def test_another_adapter_than_that_of_the_config_is_told(saved: Path, texts: Path, tmp_path: Path) -> None:
    trained_adapter(saved / "tied", tmp_path / "theirs", r=4, lora_alpha=8, target_modules=["q_proj"])
    config = configured(saved / "tied", texts, name="dora", rank=8, alpha=4, path=str(tmp_path / "theirs"))
    with pytest.raises(UsageError) as caught:
        lm.pretrained(config, random.key(0), replicated)
    said = tmp_path / "theirs/adapter_config.json"
    lines = str(caught.value).splitlines()
    assert lines[:3] == [
        f"model.adapter.name: expected lora, as {said} has it, found dora",
        f"model.adapter.rank: expected 4, as {said} has it, found 8",
        f"model.adapter.alpha: expected 8, as {said} has it, found 4.0",
    ]
    file = tmp_path / "theirs/adapter_model.safetensors"
    assert lines[3].startswith(f"{file}: expected the weights that model.adapter.targets=['layers.*'] fits, missing: ")
    assert f"{file}: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: expected the shape [8, 32], " in lines[4]

    said.write_text(json.dumps({**json.loads(said.read_text()), "modules_to_save": ["lm_head"]}))
    right = configured(saved / "tied", texts, name="lora", rank=4, alpha=8, targets=["*.query"], path=str(tmp_path / "theirs"))
    with pytest.raises(UsageError, match=rf"^{said}: expected an adapter of low rank alone, found modules_to_save$"):
        lm.pretrained(right, random.key(0), replicated)


def test_a_run_without_an_adapter_has_none_to_export(saved: Path, texts: Path, tmp_path: Path) -> None:
    import_model(lm, configured(saved / "tied", texts), tmp_path / "run")
    with pytest.raises(UsageError, match=r"^model\.adapter\.name: expected lora or dora for the form of peft, found null$"):
        export_adapter(tmp_path / "run", tmp_path / "alone", recipe=lm)

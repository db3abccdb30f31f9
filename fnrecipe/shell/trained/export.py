"""A run as a directory of Hugging Face, and such a directory as a run."""

from __future__ import annotations

from pathlib import Path

import torch

from fnrecipe import checkpoint
from fnrecipe.build import init_train_state
from fnrecipe.config import ModelSection, ShellConfig, TokenizerSection
from fnrecipe.data.chat_template import read_chat_template
from fnrecipe.errors import UsageError
from fnrecipe.interop.gguf import export as gguf
from fnrecipe.interop.gguf.export import ExportedGGUF
from fnrecipe.interop.hugging_face import adapter
from fnrecipe.interop.hugging_face import export as hugging_face
from fnrecipe.interop.hugging_face.adapter import ExportedAdapter
from fnrecipe.interop.hugging_face.export import Exported
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import C, Recipe
from fnrecipe.shell.directory import layout, lock
from fnrecipe.shell.directory.facts import write_facts
from fnrecipe.shell.directory.identity import identity
from fnrecipe.shell.find_recipe import Named
from fnrecipe.shell.session import Session
from fnrecipe.shell.trained.load import LoadedRun, Weights, load

SHARD_SIZE = 5_000_000_000
"""Bytes of a file of weights, as transformers has cut them for long."""


def export(
    run: str | Path,
    out: str | Path,
    *,
    recipe: Named | None = None,
    step: int | None = None,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    replace: bool = False,
    weights: Weights = "latest",
) -> Exported:
    """Writes the model of a run as the directory `out`, which transformers, vLLM and others load.

    run, recipe, step, weights   as `load` takes them
    dtype               float32, bfloat16 or float16; None: that of the run
    shard_size          bytes of a file of weights at most
    replace             whether a directory that is there gives way

    Raises:
        UsageError, CheckpointError: as `load`; if `out` is there already; if the recipe's model has no form of Hugging Face.
    """
    found, model, tokenizer, kind = _opened(run, recipe, step, dtype, weights)
    return hugging_face.export(
        Path(out),
        model,
        tokenizer,
        found.recipe.model(found.config, found.params),
        dtype=kind,
        shard_size=shard_size,
        replace=replace,
        chat_template=_chat_template(found.config),
    )


def export_gguf(
    run: str | Path,
    out: str | Path,
    *,
    recipe: Named | None = None,
    step: int | None = None,
    dtype: str | None = None,
    weights: Weights = "latest",
) -> ExportedGGUF:
    """Writes the model of a run as the GGUF file `out`, which llama.cpp and others load; the rest as for `export`."""
    found, model, tokenizer, kind = _opened(run, recipe, step, dtype, weights)
    name, template = Path(run).resolve().name, _chat_template(found.config)
    params = found.recipe.model(found.config, found.params)
    return gguf.export(Path(out), model, tokenizer, params, dtype=kind, name=name, chat_template=template)


def export_adapter(
    run: str | Path,
    out: str | Path,
    *,
    recipe: Named | None = None,
    step: int | None = None,
    dtype: str | None = None,
    weights: Weights = "latest",
) -> ExportedAdapter:
    """Writes the adapter of a run alone, as the directory `out`, which peft loads beside the base; the rest as for `export`."""
    found, model, _, kind = _opened(run, recipe, step, dtype, weights)
    return adapter.export(Path(out), model, found.params, dtype=kind)


def _opened(
    run: str | Path, recipe: Named | None, step: int | None, dtype: str | None, weights: Weights
) -> tuple[LoadedRun, ModelSection, TokenizerSection, torch.dtype | None]:
    """A run, the sections of its config that an export is made of, and the dtype of that name."""
    found = load(run, recipe, step=step, weights=weights)
    return found, *exportable(found.recipe, found.config), None if dtype is None else getattr(torch, dtype)


def _chat_template(config: ShellConfig) -> str | None:
    """The chat template that a config names, for examples; None if it names none."""
    path: str | None = getattr(config.dataset, "chat_template", None)
    return None if path is None else read_chat_template(path).source


def exportable(recipe: Recipe[C], config: C) -> tuple[ModelSection, TokenizerSection]:
    """The sections of a config that an export is made of.

    Raises:
        UsageError: if there are none, or the family has no form of Hugging Face.
    """
    model, tokenizer = (getattr(config, name, None) for name in ("model", "tokenizer"))
    if not isinstance(model, ModelSection) or not isinstance(tokenizer, TokenizerSection):
        raise UsageError(f"{recipe.name}: expected a recipe with the sections model and tokenizer, as lm has them")
    hugging_face.part_of(model)
    return model, tokenizer


def export_at_end(session: Session[C]) -> None:
    """Writes the model of the last checkpoint to the run's directory, by one rank, if the config says so."""
    if session.config.regime.export_hugging_face and session.gang.leads:
        place = session.out / layout.HUGGING_FACE
        average = session.config.trainer.average
        weights: Weights = "average" if average is not None and average.evaluate else "latest"
        export(session.out, place, recipe=session.recipe, replace=True, weights=weights)
        session.display.line(f"exported: {place}")


def import_model(recipe: Recipe[C], config: C, out: Path) -> Path:
    """Makes `out` the directory of a run at step 0, with the weights that the config names as its checkpoint.

    Raises:
        UsageError: if there is a run already; if the weights cannot be read, or are not those of the config.
    """
    with lock.claimed(out):
        if checkpoint.committed(out / layout.CHECKPOINTS) or (out / layout.CONFIG).exists():
            raise UsageError(f"{out}: expected a directory without a run, found one")
        device = torch.device("cpu")
        state = init_train_state(recipe, config, Mesh(), device, pretrained=True)
        facts = identity(recipe, config, recipe.corpora(config) if recipe.corpora else [])
        written = checkpoint.save(out / layout.CHECKPOINTS, 0, state, None, facts)
        write_facts(recipe, config, device, out)
    return written

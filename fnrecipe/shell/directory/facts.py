"""What a run writes of itself where it begins: its config, and on what it was made."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fnrecipe.config import unstructure, yaml
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.files import replace
from fnrecipe.shell.directory import layout
from fnrecipe.shell.directory.redact import redacted_values


def write_facts(recipe: Recipe[C], config: C, device: torch.device, out: Path) -> None:
    """Writes the config, and what somebody needs to know to run this again, but for the secrets of addresses."""
    facts = {"recipe": recipe.name, "origin": recipe.origin, "seed": config.common.seed, **host.facts(device)}
    replace(out / layout.CONFIG, yaml.dump(redacted_values(unstructure(config))).encode())
    replace(out / layout.RUN, f"{json.dumps(redacted_values(facts), indent=2)}\n".encode())

"""`fnrecipe new NAME`: a recipe to start from, and its test."""

from __future__ import annotations

import keyword
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from fnrecipe.errors import UsageError

# Small enough to be read at once, and complete: a function of `lm` replaced, a section of keys that it reads, and a test that
# holds it against numbers worked out by hand. It uses no more of the library than that.
_RECIPE = '''"""The recipe NAME: `lm`, with a rate that stays at its peak, then falls to the end.

fnrecipe train NAME.py --out runs/NAME
fnrecipe train NAME.py --out runs/short --config regime.num_steps=100 decay.fraction=0.5
"""

from __future__ import annotations

import attrs
import torch
from fnrecipe import optim
from fnrecipe.components.lr_schedulers.cosine_annealing import schedule_steps
from fnrecipe.config.bounds import Fraction
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.train import recipe as lm
from torch import Tensor


@attrs.frozen
class DecaySection:
    """Keys of your own. `fraction`: the part of all steps in which the rate falls."""

    fraction: Fraction = 0.2  # from 0 up to 1; what is not is refused by name


@attrs.frozen
class Config(LMConfig):
    """All sections of `lm`, and one more."""

    decay: DecaySection = attrs.field(factory=DecaySection)


def schedule(config: Config) -> optim.Schedule:
    """From the number of a step, counted from 1, to its learning rate."""
    peak, section = config.optimizer.config.lr, config.lr_scheduler.config
    num_warmup_steps, num_steps = schedule_steps(section, config.regime.num_steps)
    num_decay_steps = max(config.decay.fraction * num_steps, 1)

    def rate(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        rising = number / max(num_warmup_steps, 1)
        left = ((num_steps - number) / num_decay_steps).clamp(min=0)
        falling = section.final_lr_scale + (1 - section.final_lr_scale) * left
        return peak * torch.minimum(rising, falling).clamp(max=1)

    return rate


def update(config: Config) -> optim.Transform:
    """AdamW under that schedule, with the values that `lm` reads from the same keys."""
    adamw = config.optimizer.config
    return optim.adamw(
        schedule(config),
        betas=adamw.betas,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        max_norm=config.trainer.max_grad_norm,
    )


# The rest is that of `lm`: model, loss, data, sample. Each is a function of the config
# in fnrecipe/recipes/lm/train.py, and can be replaced here in the same way.
defaults = Config(**attrs.asdict(lm.config, recurse=False))
recipe = attrs.evolve(lm, name="NAME", config=defaults, update=update)
'''

_TEST = '''"""What NAME.py promises: pytest test_NAME.py"""

from __future__ import annotations

from pathlib import Path

import fnrecipe
import pytest
import torch
from fnrecipe.config import resolve

from NAME import recipe, schedule


def test_the_rate_rises_stays_and_falls() -> None:
    pairs = ["regime.num_steps=10", "optimizer.config.lr=8", "decay.fraction=0.4"]
    pairs += ["lr_scheduler.config={num_warmup_steps: 2, final_lr_scale: 0}"]
    config, _ = resolve(recipe.config, pairs=pairs)
    rate = schedule(config)
    found = [float(rate(torch.tensor(step))) for step in range(1, 11)]
    assert found == pytest.approx([4, 8, 8, 8, 8, 8, 6, 4, 2, 0])


def test_it_trains(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("A few words are enough to train on. " * 99)
    pairs = [f"dataset.sources={tmp_path}/data.txt", "dataset.valid_fraction=0"]
    pairs += ["regime.num_steps=2", "lr_scheduler.config.num_warmup_steps=0"]
    pairs += ["gang.device=cpu", "trainer.jit=off", "regime.num_sample_tokens=0"]
    config, _ = resolve(recipe.config, pairs=pairs)
    assert fnrecipe.train(recipe, config, tmp_path / "run") == 0
'''


@click.command(short_help="Write a recipe of your own to start from.")
@click.argument("name")
def new(name: str) -> int:
    """Write NAME.py, a small recipe that changes one thing of `lm` and has a key of its own, and test_NAME.py, which passes.

    \b
    fnrecipe new mine
    """
    files = {Path(f"{name}.py"): _RECIPE, Path(f"test_{name}.py"): _TEST}
    _check_name(name)
    if there := [path for path in (Path(name), *files) if path.exists()]:
        raise UsageError(f"{there[0]}: expected a new name, found this there already")
    if name in sys.modules or find_spec(name) is not None:
        raise UsageError(f"NAME: expected one that no installed module has, found {name!r}")
    for path, template in files.items():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(template.replace("NAME", name))
        except OSError as error:
            raise UsageError(f"{path}: cannot write the file: {error.strerror}") from None
    click.echo(f"{name}.py: fnrecipe train {name}.py --out runs/{name}")
    click.echo(f"test_{name}.py: pytest test_{name}.py")
    return 0


def _check_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"NAME: expected a name that Python can import (letters, digits and _), found {name!r}")

"""Prints the rows of optax's optimizers that `test_golden_optimizers.py` has, in a virtual environment of their own:

python3.11 -m venv /tmp/optax && /tmp/optax/bin/pip install optax==0.2.8 jax==0.10.2
/tmp/optax/bin/python tests/optim/optax_rows.py
"""

import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_enable_x64", True)
ROWS, COLUMNS = jnp.meshgrid(jnp.arange(4.0), jnp.arange(3.0), indexing="ij")
K = jnp.arange(12.0).reshape(4, 3)


def gradient(step: int) -> jax.Array:
    return jnp.cos(0.7 * K + 1.3 * step) + 0.5 * jnp.sin(1.1 * K**2 + 0.3 * step)


def show(name: str, transform: optax.GradientTransformation, turned: bool = False, average: bool = False) -> None:
    """The matrix after five updates: sum, first and last element, norm; `turned`: optax has outputs in columns."""
    params = jnp.sin(1 + 3 * ROWS + COLUMNS)
    params = params.T if turned else params
    state = transform.init(params)
    for step in range(1, 6):
        updates, state = transform.update(gradient(step).T if turned else gradient(step), state, params)
        params = optax.apply_updates(params, updates)
    params = optax.contrib.schedule_free_eval_params(state, params) if average else params
    found = params.T if turned else params
    row = [float(value) for value in (found.sum(), found[0, 0], found[3, 2], jnp.linalg.norm(found))]
    print(f'"{name}": ({", ".join(f"{value:.12f}" for value in row)}),')


show("AdamW", optax.adamw(0.01, 0.9, 0.95, weight_decay=0.1))
show("NAdamW of one momentum", optax.nadamw(0.01, 0.9, 0.95, weight_decay=0.1))
show("SGD", optax.sgd(0.01, momentum=0.7, nesterov=True))
show("Lion", optax.lion(0.01, 0.8, 0.95, weight_decay=0.1))
show("Adafactor", optax.adafactor(0.01, min_dim_size_to_factor=2))
show("AdEMAMix", optax.contrib.ademamix(0.01, alpha=5.0, weight_decay=0.1))
show("Muon without Nesterov", optax.contrib.muon(0.02, nesterov=False, weight_decay=0.1), turned=True)
FREE = optax.contrib.schedule_free_adamw(0.01, warmup_steps=None, b1=0.8, b2=0.95, weight_decay=0.1)
show("schedule-free AdamW", FREE)
show("schedule-free AdamW, average", FREE, average=True)
show("adaptive clipping", optax.chain(optax.adaptive_grad_clip(0.5), optax.sgd(0.1)), turned=True)
